"""The hooks by which an attached model opens and closes the step of a ForkCache."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch

from fork_attn.errors import ForeignBranch, Unsupported
from fork_attn.hf._link import Link
from fork_attn.hf._pass import FORK_STEP, ForwardPass, placeholder_mask
from fork_attn.hf.fork_cache import Call, ForkCache

# Arguments that every model takes, of which none says more about a row than its tokens do.
_PLAIN_ARGUMENTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
)
_MEDIA_ARGUMENTS = ("pixel_values", "image", "video", "audio", "input_features")


class _Hooks:
    """One pair of hooks, shared by a model and its decoder.

    The first of the two that is called with a ForkCache opens the step; the inner one finds it
    among its arguments and leaves it alone.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._running: weakref.ref[ForwardPass] | None = None

    def before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get(FORK_STEP) is not None:
            return None
        if not any(isinstance(x, ForkCache) for x in (*args, kwargs.get("past_key_values"))):
            return None
        kwargs = _named(module, args) | kwargs
        self._abort_interrupted()
        fork_cache: ForkCache = kwargs["past_key_values"]
        if fork_cache.cache is not self._link.cache:
            raise ForeignBranch(
                "past_key_values: the ForkCache belongs to another cache than the one that "
                f"{self._link.model_name} was attached to"
            )
        forward_pass, position_ids = fork_cache._begin(self._link, _call(module, kwargs))
        forward_pass.owner = module
        self._running = weakref.ref(forward_pass)
        kwargs["attention_mask"] = placeholder_mask(position_ids.device)
        kwargs["position_ids"] = position_ids
        kwargs[FORK_STEP] = forward_pass
        return (), kwargs

    def after(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        forward_pass = kwargs.get(FORK_STEP)
        if forward_pass is None or forward_pass.owner is not module or forward_pass.closed:
            return
        self._running = None
        # Torch calls this hook with None when the forward raised.
        if output is None:
            forward_pass.abort()
        else:
            forward_pass.commit()

    def _abort_interrupted(self) -> None:
        """Closes what a KeyboardInterrupt left open: torch runs no hooks for it."""
        forward_pass = None if self._running is None else self._running()
        self._running = None
        if forward_pass is not None and not forward_pass.closed:
            forward_pass.abort()


def install_hooks(modules: list[torch.nn.Module], link: Link) -> None:
    hooks = _Hooks(link)
    for module in modules:
        module.register_forward_pre_hook(hooks.before, with_kwargs=True)
        module.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


def _named(module: torch.nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """The positional arguments of a forward by name."""
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False))


def _call(module: torch.nn.Module, kwargs: dict[str, Any]) -> Call:
    """What the ForkCache needs to know of a call."""
    for name, value in kwargs.items():
        if value is not None and name.startswith(_MEDIA_ARGUMENTS):
            raise Unsupported(f"{name}: a ForkCache takes text only")
    input_ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    tokens = input_ids if input_ids is not None else embeds
    if tokens is None:
        raise ValueError("input_ids: expected token ids or inputs_embeds, got neither")
    batch, seq = tokens.shape[:2]
    # Rows with the same tokens have the same keys and values only if nothing else tells them apart.
    others = [
        name
        for name, value in kwargs.items()
        if name not in _PLAIN_ARGUMENTS and isinstance(value, torch.Tensor)
    ]
    comparable = input_ids is not None and not others and not module.training
    return Call(
        batch=batch,
        seq=seq,
        device=tokens.device,
        attention_mask=kwargs.get("attention_mask"),
        position_ids=kwargs.get("position_ids"),
        comparable_ids=input_ids if comparable else None,
    )
