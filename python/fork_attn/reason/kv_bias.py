"""Learned vectors on the keys and values of threads: ParaThinker's thought embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fork_attn.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SegmentVectors:
    """What is added to every key (before rotation) and value of a thread, by its segment.

    Attributes:
        keys: (segments, num_layers, num_kv_heads * head_dim).
        values: (segments, num_layers, num_kv_heads * head_dim_v).
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        if self.keys.ndim != 3 or self.values.ndim != 3:
            shapes = f"{tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            raise ValueError(
                f"keys, values: expected (segments, layers, heads * head_dim), got {shapes}"
            )
        if self.keys.shape[:2] != self.values.shape[:2]:
            raise ValueError(
                f"values: expected {tuple(self.keys.shape[:2])} segments and layers as in keys, "
                f"got {tuple(self.values.shape[:2])}"
            )


class KVBias:
    """Hooks that add `SegmentVectors` to what a model's `k_proj` and `v_proj` give.

    Segment 0 adds nothing; segment i adds vector i - 1. A model that normalises its keys does so
    after the vector is added.

    Raises:
        Unsupported: a layer of the model has no `k_proj` or `v_proj`.
        ValueError: the vectors' sizes are not the model's.
    """

    def __init__(self, model: PreTrainedModel, vectors: SegmentVectors) -> None:
        self._rows: torch.Tensor | None = None
        self._device = model.device
        attentions = [
            module
            for module in model.get_decoder().modules()
            if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "k_proj")
        ]
        name = type(model).__name__
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if len(attentions) != layers or not all(hasattr(a, "v_proj") for a in attentions):
            raise Unsupported(
                f"protocol: {name} has no k_proj and v_proj in each of its {layers} layers, to "
                "whose output vectors could be added"
            )
        self._hooks: list[tuple[torch.nn.Module, torch.Tensor]] = []
        for attention in attentions:
            for projection, table in (("k_proj", vectors.keys), ("v_proj", vectors.values)):
                module = getattr(attention, projection)
                self._hooks.append((module, self._table(name, attention, module, table)))
        self._handles: list[Any] = []

    def _table(self, name: str, attention: Any, module: Any, table: torch.Tensor) -> torch.Tensor:
        if table.shape[1] <= attention.layer_idx or table.shape[2] != module.out_features:
            raise ValueError(
                f"vectors: expected ({attention.layer_idx + 1} or more layers, "
                f"{module.out_features}) for {name}, got {tuple(table.shape[1:])}"
            )
        one = table[:, attention.layer_idx].to(module.weight)
        return torch.cat([one.new_zeros(1, one.shape[1]), one])

    def set_rows(self, rows: Sequence[tuple[int, int]]) -> None:
        """What the next forward feeds: (segment, number of tokens), in order of rows."""
        segments = torch.tensor([segment for segment, _ in rows])
        counts = torch.tensor([count for _, count in rows])
        self._rows = segments.repeat_interleave(counts).to(self._device)

    def clear(self) -> None:
        """Forwards from now on are not those of threads."""
        self._rows = None

    def __enter__(self) -> KVBias:
        for module, table in self._hooks:
            self._handles.append(module.register_forward_hook(self._hook(table)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, table: torch.Tensor) -> Callable[..., torch.Tensor]:
        def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output if self._rows is None else output + table[self._rows]

        return add
