"""FORK_ATTN_DEBUG=pages: pages that a plan names, looked at on the device."""

from __future__ import annotations

import random

import pytest
import torch
from plan_cases import RandomPlan, Shape
from test_backend import make_cache, new_tokens
from triton.runtime.errors import InterpreterError
from triton_cases import triton_case

from fork_attn.kernels.launch import check_pages
from fork_attn.plan_format import GATHER, sections
from fork_attn.testing.planbuf import BlockSpec, RunSpec, build_plan

SHAPE = Shape(4, 2, 1, 16, 16, dtype=torch.float32)


def plan_of(*runs: RunSpec) -> torch.Tensor:
    block = BlockSpec([0, 1], [0, 1], [list(runs)])
    return build_plan([block], num_tokens=2, group=2, page_size=4)


@pytest.mark.parametrize("seed", range(10))
def test_good_plans_pass(seed: int) -> None:
    plan = RandomPlan(random.Random(seed), SHAPE, num_tokens=9, max_slots=90).build()
    case = triton_case(SHAPE, plan)
    check_pages(plan, sections(plan).pages, len(case.k), 4)


@pytest.mark.parametrize(
    ("run", "num_pages"),
    [
        (RunSpec([0, 7], 6), 7),
        (RunSpec([0, -1], 6), 9),
        (RunSpec(list(range(300)), 1200), 299),
        (RunSpec([1, 9, 28], 3, kind=GATHER, words=[3, 3, 3]), 7),
        (RunSpec([-1, 2], 2, kind=GATHER, words=[3, 3]), 7),
    ],
    ids=["above", "below", "the last of many", "a slot above", "a slot below"],
)
def test_pages_outside_the_cache_are_found(run: RunSpec, num_pages: int) -> None:
    plan = plan_of(RunSpec([0], 3), run)
    pages = sections(plan).pages
    with pytest.raises(InterpreterError, match="a page outside the cache"):
        check_pages(plan, pages, num_pages, 4)
    if min(run.pages) >= 0:
        check_pages(plan, pages, num_pages + 1, 4)


def test_runs_outside_the_lists_are_found() -> None:
    plan = plan_of(RunSpec([0, 1], 5))
    with pytest.raises(InterpreterError, match="outside the page lists"):
        check_pages(plan, sections(plan).pages[:1].clone(), 9, 4)


def test_attend_checks_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    branch = cache.new_branch()

    def attend() -> None:
        with cache.step({branch: 5}) as step:
            step.plan  # noqa: B018  made before the lists are spoilt
            lists = cache._lists
            assert lists is not None
            lists.pages[:] += spoil
            cache.attend(0, *new_tokens(5), step)
            lists.pages[:] -= spoil

    monkeypatch.setenv("FORK_ATTN_DEBUG", "poison,pages")
    spoil = 0
    attend()
    spoil = 1000
    with pytest.raises(InterpreterError, match="a page outside the cache"):
        attend()
