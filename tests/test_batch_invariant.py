"""batch_invariant=True: the same bits whatever else is in the step and whoever shares a context."""

from __future__ import annotations

import random

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from invariant_crowd import Crowd, alone, check_against_oracle, check_buffers, same_bits


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32))
def test_a_row_has_the_same_bits_alone_and_in_a_crowd(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    try:
        crowd = Crowd(rng)
        for _ in range(rng.randint(3, 14)):
            crowd.act()
        torch.set_num_threads(rng.choice([1, 2, 5]))
        check_buffers(crowd)
        rows = crowd.step()
        check_against_oracle(crowd, rows)
        for row in rng.sample(rows, min(6, len(rows))):
            torch.set_num_threads(rng.choice([1, 2, 5]))
            for new in {1, rng.randint(1, len(row.context))}:
                out, lse = alone(crowd, row, new)
                assert same_bits(out, row.out)
                assert same_bits(lse, row.lse)
    finally:
        torch.set_num_threads(threads)
