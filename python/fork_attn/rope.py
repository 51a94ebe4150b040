"""Rotary position embeddings (RoFormer, arXiv 2104.09864), as far as moving keys and queries needs
them.

Turning a rotated vector by the angles of `shift` positions gives what it would be that many
positions later, whatever its own position. Scalings that only change frequencies (linear, llama3,
yarn) are plain frequencies here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Rope:
    """How one layer turns its queries and keys with their positions.

    Attributes:
        inv_freq: radians per position of each pair of dimensions; empty where a layer has no RoPE.
        interleaved: pairs are (2i, 2i + 1), else (i, i + len(inv_freq)).
        start: the first dimension of a head that turns; 2 * len(inv_freq) of them do.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool = False
    start: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "inv_freq", tuple(float(f) for f in self.inv_freq))
        if self.start < 0:
            raise ValueError(f"start: expected at least 0, got {self.start}")

    @classmethod
    def from_base(
        cls, dim: int, base: float = 10000.0, *, interleaved: bool = False, start: int = 0
    ) -> Rope:
        """The usual frequencies base ** (-2i / dim) of `dim` dimensions.

        Raises:
            ValueError: `dim` is odd or negative, or `base` not positive.
        """
        if dim < 0 or dim % 2:
            raise ValueError(f"dim: expected an even number of dimensions, got {dim}")
        if not base > 0:
            raise ValueError(f"base: expected a positive number, got {base}")
        return cls(tuple(base ** (-2 * i / dim) for i in range(dim // 2)), interleaved, start)

    @classmethod
    def none(cls) -> Rope:
        """A layer whose queries and keys know no positions."""
        return cls(())

    @property
    def end(self) -> int:
        """One past the last dimension that turns."""
        return self.start + 2 * len(self.inv_freq)


Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (n, pairs) float64."""


def turn_of(rope: Rope, shifts: torch.Tensor) -> Turn:
    """The turns of `shifts`, (n,) positions, computed in float64."""
    angles = shifts.double()[:, None] * _frequencies(rope, shifts.device)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=64)
def _frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """(pairs,) float64; sent to a device once, as that waits for it."""
    return torch.tensor(rope.inv_freq, dtype=torch.float64, device=device)


def turned(x: torch.Tensor, rope: Rope, turn: Turn) -> torch.Tensor:
    """Rows turned by as many positions as `turn` stands for; computed in fp32, or fp64 if `x` is.

    Args:
        x: (n, heads, dim), rotated.
        rope: of the layer.
        turn: of `turn_of`, n rows.

    Returns:
        (n, heads, dim) in the dtype of `x`.
    """
    if not rope.inv_freq:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(x.device, wide)[:, None] for t in turn)
    part = x[..., rope.start : rope.end].to(wide)
    half = len(rope.inv_freq)
    a, b = (part[..., 0::2], part[..., 1::2]) if rope.interleaved else part.split(half, -1)
    new_a, new_b = a * cos - b * sin, b * cos + a * sin
    new = (
        torch.stack([new_a, new_b], -1).flatten(-2)
        if rope.interleaved
        else torch.cat([new_a, new_b], -1)
    )
    return torch.cat([x[..., : rope.start], new.to(x.dtype), x[..., rope.end :]], -1)


def with_rotations(
    q: torch.Tensor, rotations: torch.Tensor, rope: Rope, turn: Turn
) -> torch.Tensor:
    """The query tensor that a plan with rotations reads: `q`, and behind it the rotated copies.

    Args:
        q: (T, num_q_heads, head_dim).
        rotations: (n, 2) int32: row, and by how many positions it moves back.
        rope: of the layer.
        turn: of `turn_of(rope, -rotations[:, 1])`.

    Returns:
        (T + n, num_q_heads, head_dim).
    """
    rows = q.index_select(0, rotations[:, 0].to(q.device, torch.int64))
    return torch.cat([q, turned(rows, rope, turn)])
