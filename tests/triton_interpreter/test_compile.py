"""torch.compile(fullgraph=True) over a model whose attention is the Triton kernel."""

from __future__ import annotations

import pytest
import torch
from compiled_model import compiled_steps_equal_plain_ones

from fork_attn import ops_triton


def test_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks a device is not traced: torch.compile cannot fold a compute capability."""
    check = ops_triton.check_supported
    checked = []

    def untraced(*arguments: torch.Tensor) -> None:
        assert not torch.compiler.is_compiling()
        checked.append(check(*arguments))

    monkeypatch.setattr(ops_triton, "check_supported", untraced)
    compiled_steps_equal_plain_ones("aot_eager", settles=False, backend="triton")
    assert checked
