"""A decode step as one CUDA graph: PlanBuffers, and DecodeGraph over a tiny model."""

from __future__ import annotations

import device_bodies as bodies
import pytest
import torch

DTYPES = pytest.mark.parametrize("dtype", bodies.DTYPES, ids=str)
CAPTURE = pytest.mark.parametrize("capture", [False, True], ids=["plain", "captured"])


@CAPTURE
@DTYPES
@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_one_step_serves_every_topology(dtype: torch.dtype, tail: str, capture: bool) -> None:
    bodies.one_captured_step_serves_every_topology("cuda", capture, dtype, tail)


@pytest.mark.sanitized
@DTYPES
def test_plain_steps_under_the_sanitizer(dtype: torch.dtype) -> None:
    bodies.one_captured_step_serves_every_topology("cuda", False, dtype, "seal")


@CAPTURE
@DTYPES
def test_padding_touches_nothing(dtype: torch.dtype, capture: bool) -> None:
    bodies.padding_touches_nothing("cuda", capture, dtype)


@CAPTURE
@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("tail", ["seal", "copy"])
def test_decode_graph_equals_the_pass_without_one(
    name: str, tail: str, invariant: bool, capture: bool
) -> None:
    pytest.importorskip("transformers")
    from hf_twins import Twins

    twins = Twins(
        name,
        tail,
        device="cuda",
        dtype=torch.bfloat16,
        capture=capture,
        page_size=16,
        batch_invariant=invariant,
    )
    twins.live()
    assert len(twins.graph._runs) > 3  # widths
