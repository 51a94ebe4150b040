"""Bad input to the verbs: one type of error, a message that names the argument, no change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cache_pair import CachePair
from kv_table import Model

from fork_attn import (
    Branch,
    Draft,
    DuplicateBranch,
    ForeignBranch,
    ForkAttnError,
    StaleBranch,
    StepOpen,
)

MODEL = Model(num_q_heads=4, num_kv_heads=2, head_dim=4, head_dim_v=6, windows=(None, 5))


class Scene:
    """A cache with a root of six tokens, two children, a freed branch, and a branch of another
    cache."""

    def __init__(self) -> None:
        self.pair = CachePair(MODEL)
        self.cache = self.pair.cache
        self.root = self.pair.new_branch()
        self.pair.step({self.root: 6})
        self.a, self.b, self.freed = self.pair.fork(self.root, 3)
        self.pair.step({self.a: 2})
        self.pair.free(self.freed)
        self.other = CachePair(MODEL)
        self.foreign = self.other.new_branch()


@pytest.fixture
def scene() -> Scene:
    return Scene()


Case = tuple[str, type[Exception], str, Callable[[Scene], object]]


def _each_verb(branch: Callable[[Scene], Branch], error: type[Exception], match: str) -> list[Case]:
    return [
        ("fork", error, match, lambda s: branch(s).fork()),
        ("fork_at", error, match, lambda s: branch(s).fork_at(0)),
        ("join", error, match, lambda s: branch(s).join([s.b])),
        ("select", error, match, lambda s: branch(s).select(s.b)),
        ("crop", error, match, lambda s: branch(s).crop(0)),
        ("excise", error, match, lambda s: branch(s).excise(0, 0)),
        ("position", error, match, lambda s: setattr(branch(s), "position", 1)),
        ("free", error, match, lambda s: branch(s).free()),
        ("reorder", error, match, lambda s: s.cache.reorder([branch(s)], [0])),
        ("cache.free", error, match, lambda s: s.cache.free([s.b, branch(s)])),
        ("step", error, match, lambda s: s.cache.step({s.b: 1, branch(s): 1})),
    ]


STALE = "branch 3 was freed"
FREED: list[Case] = [
    *_each_verb(lambda s: s.freed, StaleBranch, STALE),
    ("join child", StaleBranch, STALE, lambda s: s.root.join([s.a, s.freed])),
    ("select child", StaleBranch, STALE, lambda s: s.root.select(s.freed)),
    ("length", StaleBranch, STALE, lambda s: s.freed.length),
    ("read position", StaleBranch, STALE, lambda s: s.freed.position),
    ("positions", StaleBranch, STALE, lambda s: s.freed.positions),
    ("num_pages", StaleBranch, STALE, lambda s: s.freed.num_pages),
    ("page_table", StaleBranch, STALE, lambda s: s.freed.page_table()),
]

FOREIGN = "branch 0 belongs to another cache"
OTHERS: list[Case] = [
    ("join", ForeignBranch, f"children: {FOREIGN}", lambda s: s.root.join([s.a, s.foreign])),
    ("select", ForeignBranch, f"child: {FOREIGN}", lambda s: s.root.select(s.foreign)),
    ("reorder", ForeignBranch, FOREIGN, lambda s: s.cache.reorder([s.a, s.foreign], [0, 1])),
    ("free", ForeignBranch, FOREIGN, lambda s: s.cache.free([s.a, s.foreign])),
    ("step", ForeignBranch, FOREIGN, lambda s: s.cache.step({s.a: 1, s.foreign: 1})),
]

TWICE = r"branch \d was given twice"
DUPLICATES: list[Case] = [
    (
        "free",
        DuplicateBranch,
        f"{TWICE}, at indices 0 and 2",
        lambda s: s.cache.free([s.a, s.b, s.a]),
    ),
    ("join", DuplicateBranch, TWICE, lambda s: s.root.join([s.a, s.a])),
    ("reorder", DuplicateBranch, TWICE, lambda s: s.cache.reorder([s.a, s.a], [0, 1])),
]

BIG = 2**31
RANGES: list[Case] = [
    ("fork 0", ValueError, "n: expected 1 to .* got 0", lambda s: s.root.fork(0)),
    ("fork -1", ValueError, "n: expected 1 to .* got -1", lambda s: s.root.fork(-1)),
    ("fork huge", ValueError, "n: expected 1 to", lambda s: s.root.fork(BIG)),
    ("fork many", ValueError, "n: expected 1 to 16777216", lambda s: s.root.fork(BIG - 1)),
    ("fork 10**30", ValueError, "n: expected", lambda s: s.root.fork(10**30)),
    ("step empty", ValueError, "at least one branch, got an empty", lambda s: s.cache.step({})),
    ("step 0", ValueError, "tokens: expected 1 to .* got 0", lambda s: s.cache.step({s.a: 0})),
    ("step -5", ValueError, "tokens: expected 1 to .* got -5", lambda s: s.cache.step({s.a: -5})),
    ("step huge", ValueError, "tokens: expected 1 to", lambda s: s.cache.step({s.a: BIG})),
    ("step 10**30", ValueError, "tokens: expected a count", lambda s: s.cache.step({s.a: 10**30})),
    ("step far", ValueError, "stay below", lambda s: s.cache.step({s.root: BIG - 2})),
    ("no draft", ValueError, "tokens: expected", lambda s: s.cache.step({s.a: Draft(())})),
    ("crop 7", ValueError, "length: expected 0 to .* 6 tokens, got 7", lambda s: s.root.crop(7)),
    ("crop -1", ValueError, "length: expected 0 to .* got -1", lambda s: s.root.crop(-1)),
    ("fork_at 7", ValueError, "length: expected .* got 7", lambda s: s.root.fork_at(7)),
    ("fork_at -1", ValueError, "length: expected .* got -1", lambda s: s.root.fork_at(-1)),
    ("excise far", ValueError, "start, end: expected .* got 2, 7", lambda s: s.root.excise(2, 7)),
    ("excise back", ValueError, "start, end: .* got 4, 2", lambda s: s.root.excise(4, 2)),
    ("excise -1", ValueError, "start: expected 0 .* got -1", lambda s: s.root.excise(-1, 2)),
    (
        "position",
        ValueError,
        "position: expected 0 to .* -1",
        lambda s: setattr(s.a, "position", -1),
    ),
    ("position huge", ValueError, "position: expected", lambda s: setattr(s.a, "position", BIG)),
    ("join none", ValueError, "children: expected at least one", lambda s: s.root.join([])),
    ("join itself", ValueError, "branch 1 cannot be joined with itself", lambda s: s.a.join([s.a])),
    ("join at", ValueError, "'max', 'sum' or an int", lambda s: _join_at(s, "mean")),
    ("join at -1", ValueError, "position: expected 0", lambda s: _join_at(s, -1)),
    ("join at huge", ValueError, "position: expected 0", lambda s: _join_at(s, BIG)),
    ("select parent", ValueError, "a descendant of branch 1", lambda s: s.a.select(s.root)),
    ("select sibling", ValueError, "a descendant of branch 1", lambda s: s.a.select(s.b)),
    ("select itself", ValueError, "a descendant of branch 0", lambda s: s.root.select(s.root)),
    ("reorder short", ValueError, "one per branch", lambda s: s.cache.reorder([s.a, s.b], [0])),
    ("reorder past", ValueError, "0 to 1, got 2", lambda s: s.cache.reorder([s.a, s.b], [0, 2])),
    ("reorder -1", ValueError, "0 to 1, got -1", lambda s: s.cache.reorder([s.a, s.b], [0, -1])),
    ("layer", ValueError, "layer_idx: expected 0 to 1, got 2", lambda s: s.cache.layer(2)),
    ("layer -1", ValueError, "layer_idx: expected 0 to 1, got -1", lambda s: s.cache.layer(-1)),
]


def _join_at(scene: Scene, position: Any) -> None:
    scene.root.join([scene.a], position=position)


TYPES: list[Case] = [
    ("fork", TypeError, "n: expected an int, got float", lambda s: s.root.fork(1.0)),  # type: ignore[arg-type]
    ("fork bool", TypeError, "n: expected an int, got a bool", lambda s: s.root.fork(True)),
    ("crop", TypeError, "length: expected an int", lambda s: s.root.crop("1")),  # type: ignore[arg-type]
    ("join", TypeError, "children: expected Branch, got int", lambda s: s.root.join([1])),  # type: ignore[list-item]
    ("select", TypeError, "child: expected Branch", lambda s: s.root.select(None)),  # type: ignore[arg-type]
    ("join at", TypeError, "position: expected an int", lambda s: _join_at(s, 1.5)),
    ("free", TypeError, "branches: expected Branch", lambda s: s.cache.free(["a"])),  # type: ignore[list-item]
    ("step list", TypeError, "tokens: expected a mapping", lambda s: s.cache.step([s.a])),  # type: ignore[arg-type]
    ("step key", TypeError, "expected Branch keys, got int", lambda s: s.cache.step({1: 1})),  # type: ignore[dict-item]
    ("step float", TypeError, "an int or a Draft", lambda s: s.cache.step({s.a: 1.0})),  # type: ignore[dict-item]
    ("step bool", TypeError, "an int or a Draft", lambda s: s.cache.step({s.a: True})),
    ("Branch", TypeError, "Branch: made by", lambda s: Branch()),
]


def _named(cases: list[Case]) -> list[Any]:
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        *_named(FREED),
        *_named(OTHERS),
        *_named(DUPLICATES),
        *_named(RANGES),
        *_named(TYPES),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    scene: Scene, error: type[Exception], match: str, call: Callable[[Scene], object]
) -> None:
    scene.pair.raises(error, match, lambda: call(scene))
    scene.pair.check()
    scene.other.check()
    scene.pair.step({scene.root: 1, scene.a: 1})  # and the cache goes on
    scene.pair.check()


OPEN: list[Case] = [
    *_each_verb(lambda s: s.a, StepOpen, "a step is open; commit or roll it back first"),
    ("new_branch", StepOpen, "new_branch: a step is open", lambda s: s.cache.new_branch()),
]


@pytest.mark.parametrize(("error", "match", "call"), _named(OPEN))
def test_verbs_wait_for_an_open_step(
    scene: Scene, error: type[Exception], match: str, call: Callable[[Scene], object]
) -> None:
    step = scene.cache.step({scene.a: 1})
    scene.pair.raises(error, match, lambda: call(scene))
    assert step.state == "open" and scene.a.length == 8  # looking is allowed
    step.rollback()
    scene.pair.check()


def test_every_typed_error_is_a_fork_attn_error() -> None:
    for error in (StaleBranch, DuplicateBranch, ForeignBranch, StepOpen):
        assert issubclass(error, ForkAttnError) and not issubclass(error, ValueError)
