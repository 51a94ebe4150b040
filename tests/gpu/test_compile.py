"""torch.compile(fullgraph=True) over a model on a card."""

from __future__ import annotations

import pytest
from compiled_model import compiled_steps_equal_plain_ones


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_traced_whole(compiler: str) -> None:
    compiled_steps_equal_plain_ones(compiler, "cuda", settles=False)
