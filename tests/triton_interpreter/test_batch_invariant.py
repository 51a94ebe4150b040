"""batch_invariant=True on the Triton backend: what of it the interpreter can show.

Here products are sums over k in one order, and nothing fuses a multiplication with an addition: so
these tests show that plan, tiles, chunks, masks and merging give a row the same operations in the
same order. That tensor cores treat rows alike is shown on a card (tests/gpu), that instructions are
not fused in tests/triton_compile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from invariant_crowd import Crowd, Setting, alone, check_against_oracle, same_bits

import fork_attn as fa
from fork_attn.testing.triton_interpreter import row_independent_products

SETTING = Setting(
    backend="triton",
    groups=(1, 3, 4, 8),
    head_dims=(8, 24),
    head_dims_v=(8, 16),
    counts=(1, 1, 1, 2, 30, 100, 300),
    num_pages=6000,
)


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    with row_independent_products():
        yield


@pytest.mark.parametrize("seed", range(24))
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    crowd = Crowd(rng, SETTING)
    for _ in range(rng.randint(5, 14)):
        crowd.act()
    rows = crowd.step()
    check_against_oracle(crowd, rows)
    for row in rng.sample(rows, min(4, len(rows))):
        for new in {1, rng.randint(1, min(40, len(row.context)))}:
            out, lse = alone(crowd, row, new)
            assert same_bits(out, row.out)
            assert same_bits(lse, row.lse)
