"""Scales of e4m3 caches: one fp32 number per layer and KV head, for K and for V.

A cache holds x / scale rounded to e4m3 (OCP 8-bit floating point: 4 bits of exponent, 3 of
mantissa, up to 448), and attention reads scale * what it holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fork_attn import checks

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0

# A layer's first write sets its scales so that its largest value is stored as 448 / HEADROOM. Later
# tokens may be larger by as much before they saturate. The precision of a floating-point number
# does not depend on its size, so headroom costs only the smallest values: below 2**-6 of the stored
# range they lose bits, and HEADROOM doublings of that.
HEADROOM = 2.0


def calibrate(name: str, rows: Tensor) -> Tensor:
    """(heads,) fp32 scales from the first rows (T, heads, dim) that a layer stores.

    Heads that are zero throughout get 1. On a GPU nothing is read back: a value that is not finite
    gives its head a scale that is not finite either, and outputs that show it.

    Raises:
        ValueError: no rows; or on the CPU, a value that is not finite.
    """
    if len(rows) == 0:
        raise ValueError(f"{name}: expected rows to set the layer's scales by, got none")
    most = rows.abs().amax((0, 2)).float()
    if rows.device.type == "cpu" and not bool(most.isfinite().all()):
        raise ValueError(
            f"{name}: expected finite values to set the layer's scales by, got Inf or NaN"
        )
    return scale_for(most)


def scale_for(most: Tensor) -> Tensor:
    """The scales of heads whose largest values are `most`, fp32; of NaN, NaN."""
    scale = (most * (HEADROOM / E4M3_MAX)).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(most == 0, 1.0, scale)


def check_scale(name: str, scale: Tensor, num_heads: int, device: torch.device) -> Tensor:
    """A copy of a layer's scale on its device.

    Raises:
        ValueError, TypeError: not (num_heads,) fp32 positive normal numbers.
    """
    checks.tensor(name, scale, shape=(num_heads,), dtype=torch.float32)
    low = torch.finfo(torch.float32).tiny
    if not bool(((scale >= low) & (scale <= 1 / low)).all()):
        raise ValueError(f"{name}: expected positive normal numbers, got {scale.tolist()}")
    return scale.detach().clone().to(device)
