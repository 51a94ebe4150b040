"""torch.compile(fullgraph=True) over a model whose attention is the Triton kernel."""

from __future__ import annotations

from compiled_model import compiled_steps_equal_plain_ones


def test_traced_whole() -> None:
    compiled_steps_equal_plain_ones("aot_eager", settles=False, backend="triton")
