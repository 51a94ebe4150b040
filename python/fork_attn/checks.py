"""Argument checks: every message names the argument, what was expected and what was got."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch


def boolean(name: str, value: Any) -> bool:
    """`value`, a bool; TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def integer(name: str, value: Any, *, low: int, high: int = 2**31 - 1) -> int:
    """`value` as an int within [low, high]; TypeError or ValueError otherwise."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got a bool")
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if not low <= result <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {result}")
    return result


def per_layer(name: str, value: Any, num_layers: int) -> tuple[Any, ...]:
    """One value for every layer, or a sequence with one value per layer."""
    if isinstance(value, (list, tuple)):
        if len(value) != num_layers:
            raise ValueError(f"{name}: expected one value or {num_layers}, got {len(value)}")
        return tuple(value)
    return (value,) * num_layers


def tensor(
    name: str,
    value: Any,
    *,
    shape: Sequence[int | str],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """A tensor of the given shape (names in `shape` match any size) whose last dimension is
    contiguous."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.shape != shape and not _fits(value.shape, shape):
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got stride {value.stride(-1)}"
        )
    return value


def _fits(got: Sequence[int], shape: Sequence[int | str]) -> bool:
    return len(got) == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, got, strict=True)
    )
