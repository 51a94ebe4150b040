"""How the keys of a model's layers turn with their positions, found by looking at them.

A model holds its frequencies in buffers, but which layer uses which, for which dimensions and in
which layout is written in its code only. So one token is run at two positions, with no other to
attend to, and for each layer the one description is taken that explains what happened to its
queries and keys. Nothing is assumed that was not seen: a model with learned positions, or whose
queries change with their positions in another way, is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fork_attn.errors import Unsupported
from fork_attn.hf import attention
from fork_attn.rope import Rope, turn_of, turned

# Two positions tell bases apart at which low frequencies have turned far enough to be seen.
_POSITIONS = (3, 40)
_LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest value


def find_ropes(model: weakref.ref[PreTrainedModel], name: str, num_layers: int) -> list[Rope]:
    """The RoPE of every attention layer.

    Raises:
        Unsupported: the model is gone, or some layer's queries or keys change with their position
            in a way that no RoPE with the model's frequencies explains.
    """
    alive = model()
    if alive is None:
        raise Unsupported(f"model: {name} is gone; its RoPE was not looked up before")
    first, second = (_queries_and_keys(alive, position) for position in _POSITIONS)
    frequencies = list(_frequencies(alive))
    ropes = []
    for layer in range(num_layers):
        if layer not in first:
            raise Unsupported(f"model: layer {layer} of {name} did not call the attention function")
        rope = _explain(first[layer], second[layer], frequencies)
        if rope is None:
            raise Unsupported(
                f"model: queries and keys of layer {layer} of {name} do not turn with their "
                f"positions by any of its {len(frequencies)} tables of RoPE frequencies, as with "
                "learned or absolute positions; they cannot be moved"
            )
        ropes.append(rope)
    return ropes


def _frequencies(model: PreTrainedModel) -> Iterator[tuple[float, ...]]:
    """The distinct tables of frequencies in the decoder's buffers."""
    seen = set()
    for name, buffer in model.get_decoder().named_buffers():
        if not name.endswith("inv_freq") or buffer.ndim != 1 or "original" in name:
            continue
        table = tuple(buffer.double().tolist())
        if table not in seen:
            seen.add(table)
            yield table


def _queries_and_keys(model: PreTrainedModel, position: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Per layer (1, heads, dim) queries and keys of one token alone, rotated to `position`."""
    ids = torch.ones((1, 1), dtype=torch.int64, device=model.device)
    with torch.no_grad(), attention.recording() as records:
        model(input_ids=ids, position_ids=torch.full_like(ids, position), use_cache=False)
    return {layer: (q[:, :, 0].cpu(), k[:, :, 0].cpu()) for layer, (q, k) in records.items()}


def _explain(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    frequencies: list[tuple[float, ...]],
) -> Rope | None:
    """The description that turns the first pair into the second with the least error."""
    dim = first[0].shape[-1]
    candidates = [Rope.none()]
    for table in frequencies:
        for interleaved in (False, True):
            for start in {0, max(0, dim - 2 * len(table))}:
                candidates.append(Rope(table, interleaved, start))
    shift = torch.tensor([_POSITIONS[1] - _POSITIONS[0]])
    best: tuple[float, Rope] | None = None
    for rope in candidates:
        if rope.end > dim:
            continue
        turn = turn_of(rope, shift)
        error = max(
            _error(turned(a.double(), rope, turn), b) for a, b in zip(first, second, strict=True)
        )
        if best is None or error < best[0]:
            best = error, rope
    limit = _LIMITS.get(first[0].dtype, 1e-3)
    return best[1] if best is not None and best[0] <= limit else None


def _error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((got - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))
