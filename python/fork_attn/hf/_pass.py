"""What one model forward tells every layer's attention call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fork_attn.errors import Unsupported

if TYPE_CHECKING:
    from fork_attn.cache import ForkedKVCache
    from fork_attn.hf._link import Link
    from fork_attn.step import Step

# The keyword argument that carries a ForwardPass through the model's layers.
FORK_STEP = "fork_step"


def placeholder_mask(device: torch.device) -> Tensor:
    """A 4-D mask, so that the model builds none of its own: visibility is in the step's plan."""
    return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)


@dataclass(eq=False)
class ForwardPass:
    """One model forward over an open step.

    Attributes:
        link: the attached model's cache and layers.
        step: the open step, or None if every token of the batch is padding.
        stored: (num_tokens,) int64, the rows of the flattened batch that the step stores; None if
            it stores all of them in order.
        source: (batch * seq,) int64, for each row of the flattened batch the step's row whose
            output it takes, `num_tokens` meaning zeros; None with `stored`.
        owner: the module whose forward closes this pass, or None if the caller closes the step.
        on_commit, on_abort: run after the step is committed or rolled back.
    """

    link: Link
    step: Step | None
    stored: Tensor | None = None
    source: Tensor | None = None
    owner: torch.nn.Module | None = None
    on_commit: Callable[[], None] | None = None
    on_abort: Callable[[], None] | None = None
    closed: bool = False
    _attended: set[int] = field(default_factory=set)

    @property
    def cache(self) -> ForkedKVCache:
        return self.link.cache

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Stores key and value and attends.

        Args:
            layer_idx: the layer.
            query: (batch, Hq, seq, D).
            key: (batch, Hkv, seq, D), the new tokens only.
            value: (batch, Hkv, seq, Dv).
            options: softmax_scale, softcap and sinks of `ForkedKVCache.attend`.

        Returns:
            (batch, seq, Hq, Dv), contiguous; zeros for padding.
        """
        batch, num_heads, seq, _ = query.shape
        self._attended.add(layer_idx)
        if self.step is None:
            return query.new_zeros(batch, seq, num_heads, value.shape[-1])
        q, k, v = (self._select(x) for x in (query, key, value))
        if self.link.cast:
            q, k, v = (x.to(self.link.kv_dtype) for x in (q, k, v))
        out = self.cache.attend(layer_idx, q, k, v, self.step, **options)
        if self.link.cast:
            out = out.to(query.dtype)
        if self.source is not None:
            padded = torch.cat([out, out.new_zeros(1, *out.shape[1:])])
            out = padded.index_select(0, self.source)
        return out.view(batch, seq, num_heads, out.shape[-1])

    def _select(self, states: Tensor) -> Tensor:
        """(batch, heads, seq, dim) to the step's rows (num_tokens, heads, dim)."""
        rows = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
        return rows if self.stored is None else rows.index_select(0, self.stored)

    def check_complete(self) -> None:
        """Raises Unsupported if a layer ran without this pass: its output saw no cached token."""
        missing = sorted(set(range(self.link.num_layers)) - self._attended)
        if missing:
            raise Unsupported(
                f"model: the attention of layers {missing} of {self.link.model_name} ran without "
                f"the cache: the model does not hand on the keyword argument {FORK_STEP!r}, or its "
                "attention implementation was changed after attach"
            )

    def commit(self) -> None:
        """Commits the step; rolls back and raises Unsupported if a layer was left out."""
        try:
            self.check_complete()
        except Unsupported:
            self.abort()
            raise
        self.closed = True
        if self.step is not None:
            self.step.commit()
        if self.on_commit is not None:
            self.on_commit()

    def abort(self) -> None:
        """Rolls the step back."""
        self.closed = True
        if self.step is not None and self.step.state == "open":
            self.step.rollback()
        if self.on_abort is not None:
            self.on_abort()
