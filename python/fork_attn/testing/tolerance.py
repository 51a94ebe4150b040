"""The tolerance rule for kernels."""

from __future__ import annotations

import torch


def assert_close_to_oracle(
    out: torch.Tensor,
    oracle64: torch.Tensor,
    same_precision_reference: torch.Tensor,
    *,
    name: str = "out",
    magnitude: float = 0.0,
) -> None:
    """Asserts that the largest error is at most twice the reference's, plus one rounding.

    Args:
        out: the result under test.
        oracle64: the exact result, float64.
        same_precision_reference: PyTorch's result in the precision of `out`.
        name: what to call `out` in the message.
        magnitude: the rounding is one of values at least that large. 1 for the LSE of a few rows: a
            relative error of a sum is an absolute one of its logarithm.

    Raises:
        AssertionError: larger error, other shape, or a value that is not finite where the oracle's
            is (an infinity of the oracle, as in an empty row's LSE, must be matched exactly).
        TypeError: the oracle is not float64.
    """
    if oracle64.dtype != torch.float64:
        raise TypeError(f"oracle64: expected float64, got {oracle64.dtype}")
    assert out.shape == oracle64.shape, f"{name}: expected shape {oracle64.shape}, got {out.shape}"
    finite = oracle64.isfinite()
    assert not oracle64.isnan().any(), f"{name}: the oracle holds NaN"
    wrong = torch.where(finite, ~out.isfinite(), out.double() != oracle64)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} values not finite or a wrong infinity"
    exact = oracle64[finite]
    if exact.numel() == 0:
        return
    error = float((out.double()[finite] - exact).abs().max())
    reference = float((same_precision_reference.double()[finite] - exact).abs().max())
    rounding = torch.finfo(out.dtype).eps * max(magnitude, float(exact.abs().max()))
    limit = 2 * reference + rounding
    parts = f"reference {reference:.3e}, rounding {rounding:.3e}"
    assert error <= limit, f"{name}: error {error:.3e} > {limit:.3e} ({parts})"
