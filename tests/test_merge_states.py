"""merge_states on the CPU."""

from __future__ import annotations

import pytest
import torch
from plan_cases import NAN

from fork_attn import _C
from fork_attn.testing.tolerance import assert_close_to_oracle


@pytest.mark.parametrize("num_states", [1, 2, 9])
def test_merge_states(num_states: int) -> None:
    torch.manual_seed(num_states)
    out = torch.randn(num_states, 50, 3, 40)
    lse = 20 * torch.randn(num_states, 50, 3)
    lse[torch.rand_like(lse) < 0.3] = -torch.inf
    lse[:, 0] = -torch.inf
    out[lse == -torch.inf] = 0
    merged, merged_lse = torch.full((50, 3, 40), NAN), torch.full((50, 3), NAN)
    pointers = (merged.data_ptr(), merged_lse.data_ptr())
    _C.merge_states_cpu(out.data_ptr(), lse.data_ptr(), num_states, 50, 3, 40, *pointers)

    def dense(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.logsumexp(lse.to(dtype), 0)
        weights = torch.exp(lse.to(dtype) - torch.where(total == -torch.inf, 0, total))
        return (weights[..., None] * out.to(dtype)).sum(0), total

    oracle, reference = dense(torch.float64), dense(torch.float32)
    assert_close_to_oracle(merged, oracle[0], reference[0])
    assert_close_to_oracle(merged_lse, oracle[1], reference[1], name="lse")
