"""Attention through the cache on a card: asynchronous, deterministic, blind to what is not seen."""

from __future__ import annotations

import device_bodies as bodies
import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)


@pytest.mark.parametrize("announced", [False, True])
def test_decoding_never_waits(announced: bool) -> None:
    bodies.decoding_never_waits("cuda", announced)


@DTYPES
def test_a_hundred_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    bodies.a_hundred_runs_give_the_same_bits("cuda", dtype)


@pytest.mark.sanitized
@DTYPES
@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_what_nobody_sees_is_nan(
    dtype: torch.dtype, tail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORK_ATTN_DEBUG", "poison")
    bodies.what_nobody_sees_is_nan("cuda", dtype, tail)
