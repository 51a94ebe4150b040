"""torch.compile(fullgraph=True) over a model with a given step."""

from __future__ import annotations

import pytest
import torch
from compiled_model import compiled_steps_equal_plain_ones, make_cache

import fork_attn as fa

pytestmark = pytest.mark.usefixtures("one_thread")


def test_traced_whole() -> None:
    compiled_steps_equal_plain_ones("aot_eager")


def test_by_inductor() -> None:
    compiled_steps_equal_plain_ones("inductor")


def test_tree_attention_and_merge_states_alone() -> None:
    cache = make_cache()
    branch = cache.new_branch()
    q = torch.randn(3, 4, 16)

    def attend(q: torch.Tensor, plan: fa.Plan) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = fa.tree_attention(q, *cache.layer(0), plan, softcap=5.0)
        return fa.merge_states(torch.stack([out, out]), torch.stack([lse, lse]))

    with cache.step({branch: 3}) as step:
        for cached in cache.layer(0):
            cached.normal_()
        want = attend(q, step.plan)
        got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, step.plan)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_opcheck_of_merge_states() -> None:
    arguments = (torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3))
    torch.library.opcheck(torch.ops.fork_attn.merge_states.default, arguments)
