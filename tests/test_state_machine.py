"""Random operations against the deep-copy oracle, in pools so tight that a fifth of the allocating
ones run out of pages."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar, Literal

import pytest
from cache_pair import CachePair
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kv_table import KVTable, Model

from fork_attn import (
    Branch,
    Draft,
    DuplicateBranch,
    OutOfPages,
    StaleBranch,
    StepOpen,
    Unsupported,
)
from fork_attn.reference_cache import Token

OPERATIONS = {1: 3000, 3: 3000, 16: 3000, 64: 1000}  # by page size, under each tail policy
STEPS_PER_EXAMPLE = 50
MOST_PAGES = {1: 40, 3: 20, 16: 20, 64: 10}
CASES = [(tail, size) for size in OPERATIONS for tail in ("seal", "copy")]
MOST_BRANCHES = 24

TABLE = KVTable(Model())  # made once: large, and every machine may use it
which = st.integers(0, 1000)  # a branch, taken modulo the number of live ones
some = st.lists(which, min_size=1, max_size=4)
fraction = st.integers(0, 24)  # of a length, in 24ths
mostly = st.sampled_from([24, 23, 23, 22, 20, 12, 0])  # of a length, to keep
amount = st.sampled_from(
    [0, 1, 1, 2, 3, 4, 8, 8, 9, 9]
)  # of the free slots, in 8ths; 9: a page too many


class CacheMachine(RuleBasedStateMachine):
    page_size = 16
    tail: Literal["seal", "copy"] = "seal"
    counts: ClassVar[Counter[str]] = Counter()

    @initialize(data=st.data())
    def open_cache(self, data: st.DataObject) -> None:
        num_pages = data.draw(st.integers(4, MOST_PAGES[self.page_size]), "num_pages")
        self.pair = CachePair(
            Model(), num_pages=num_pages, page_size=self.page_size, tail=self.tail, table=TABLE
        )
        self.freed: Branch | None = None
        self.pair.new_branch()

    def live(self, i: int) -> Branch:
        branches = list(self.pair.ids)
        return branches[i % len(branches)]

    def several(self, picks: list[int]) -> list[Branch]:
        return list(dict.fromkeys(self.live(i) for i in picks))

    def length(self, branch: Branch, part: int) -> int:
        return branch.length * part // 24

    def finish_all(self) -> None:
        """Other streams, where there are some, finish."""

    def tokens(self, part: int) -> int:
        free = self.pair.cache.stats().pages_free * self.page_size
        return max(1, free + 2 * self.page_size if part == 9 else free * part // 8)

    def room(self) -> bool:
        return len(self.pair.ids) < MOST_BRANCHES

    def some_live(self) -> bool:
        return len(self.pair.ids) > 0

    def crowded(self) -> bool:
        return len(self.pair.ids) > 3 and self.pair.cache.stats().pages_free < 3

    def try_step(
        self,
        tokens: dict[Branch, int | Draft],
        accept: dict[Branch, list[int]] | None = None,
        attend: bool = False,
    ) -> None:
        if self.drafts_under_watch(tokens):
            self.pair.raises(Unsupported, "neither may draft", lambda: self.pair.cache.step(tokens))
            return
        self.counts["allocating"] += 1
        try:
            self.pair.step(tokens, accept, attend=attend)
        except OutOfPages:
            self.counts["out of pages"] += 1
            self.pair.check()
            self.finish_all()
            self.pair.free(*list(self.pair.ids)[1::2])  # else most pools would stay full

    def drafts_under_watch(self, tokens: dict[Branch, int | Draft]) -> bool:
        """Whether some branch watches another one of the step, and one of them drafts."""
        return any(
            self.pair.watches(a, b)
            for a, x in tokens.items()
            for b, y in tokens.items()
            if isinstance(x, Draft) or isinstance(y, Draft)
        )

    @invariant()
    def equals_the_oracle(self) -> None:
        if hasattr(self, "pair"):
            self.counts["operations"] += 1
            self.pair.check()

    # -- verbs

    @precondition(lambda self: len(self.pair.ids) < 3)
    @rule()
    def new_branch(self) -> None:
        self.pair.new_branch()

    @precondition(lambda self: self.some_live() and self.room())
    @rule(i=which, n=st.integers(1, 3))
    def fork(self, i: int, n: int) -> None:
        self.pair.fork(self.live(i), n)

    @precondition(lambda self: self.some_live() and self.room())
    @rule()
    def fork_the_youngest(self) -> None:
        self.pair.fork(self.live(-1))

    @precondition(lambda self: self.some_live() and self.room())
    @rule(i=which, part=mostly)
    def fork_at(self, i: int, part: int) -> None:
        branch = self.live(i)
        self.pair.fork_at(branch, self.length(branch, part))

    @precondition(lambda self: len(self.pair.ids) > 1)
    @rule(
        picks=st.lists(which, min_size=2, max_size=4),
        position=st.one_of(st.sampled_from(["max", "sum"]), st.integers(0, 50)),
        rebase=st.sampled_from([False, False, True, "copy"]),
    )
    def join(
        self,
        picks: list[int],
        position: Literal["max", "sum"] | int,
        rebase: bool | Literal["copy"],
    ) -> None:
        pair = self.pair
        parent, *children = self.several(picks)
        if not children:
            return
        ids = [pair.ids[b] for b in children]

        def call() -> None:
            parent.join(children, position=position, rebase=rebase)

        if self.refused_as_watched(parent, call):
            return
        if pair.oracle.conflict(pair.ids[parent], ids):
            pair.raises(ValueError, "stands at two different positions", call)
            return
        freed = children[-1]
        try:
            pair.join(parent, children, position, rebase)
            self.freed = freed
        except OutOfPages:
            self.counts["joins out of pages"] += 1

    def refused_as_watched(self, branch: Branch, call: Callable[[], object]) -> bool:
        """Whether the branch is watched; then the call must have been refused."""
        watched = self.pair.oracle.is_watched(self.pair.ids[branch])
        if watched:
            self.pair.raises(ValueError, "is watched, and may only grow", call)
        return watched

    @precondition(some_live)
    @rule(i=which, j=which, lag=st.sampled_from([0, 0, 1, 3]), rebase=st.booleans())
    def watch(self, i: int, j: int, lag: int, rebase: bool) -> None:
        pair, branch, other = self.pair, self.live(i), self.live(j)
        if branch is other:
            pair.raises(ValueError, "cannot watch itself", lambda: branch.watch(other))
        elif pair.watches(branch, other):
            pair.raises(ValueError, "is watched by branch .* already", lambda: branch.watch(other))
        else:
            self.counts["watches"] += 1
            pair.watch(branch, other, lag, rebase)

    @precondition(some_live)
    @rule(i=which, j=which)
    def select(self, i: int, j: int) -> None:
        pair, parent = self.pair, self.live(i)
        below = pair.oracle.descendants(pair.ids[parent])
        if not below:
            pair.raises(ValueError, "child: expected a descendant", lambda: parent.select(parent))
            return
        child = next(b for b, k in pair.ids.items() if k == below[j % len(below)])
        if self.refused_as_watched(parent, lambda: parent.select(child)):
            return
        self.freed = child
        pair.select(parent, child)

    @precondition(some_live)
    @rule(picks=some, indices=st.lists(which, min_size=4, max_size=4))
    def reorder(self, picks: list[int], indices: list[int]) -> None:
        pair, branches = self.pair, self.several(picks)
        order = [i % len(branches) for i in indices[: len(branches)]]
        if any(
            k != i and pair.oracle.is_watched(pair.ids[branches[k]]) for k, i in enumerate(order)
        ):
            pair.raises(ValueError, "is watched", lambda: pair.cache.reorder(branches, order))
            return
        pair.reorder(branches, order)

    @precondition(some_live)
    @rule(i=which, part=mostly)
    def crop(self, i: int, part: int) -> None:
        branch = self.live(i)
        length = self.length(branch, part)
        if not self.refused_as_watched(branch, lambda: branch.crop(length)):
            self.pair.crop(branch, length)

    @precondition(some_live)
    @rule(i=which, part=fraction, other=fraction, rebase=st.booleans())
    def excise(self, i: int, part: int, other: int, rebase: bool) -> None:
        pair, branch = self.pair, self.live(i)
        start, end = sorted((self.length(branch, part), self.length(branch, other)))

        def call() -> None:
            branch.excise(start, end, rebase=rebase)

        if self.refused_as_watched(branch, call):
            return
        if rebase and self.below_zero(branch, start, end):
            pair.raises(ValueError, "what follows would stand at positions", call)
            return
        pair.excise(branch, start, end, rebase)

    def below_zero(self, branch: Branch, start: int, end: int) -> bool:
        """Whether what follows [start, end) would move to negative positions."""
        if start == end:
            return False
        oracle, i = self.pair.oracle, self.pair.ids[branch]
        tokens, position = oracle.tokens(i), oracle.position(i)
        shift = tokens[start].position - (tokens[end].position if end < len(tokens) else position)
        items, count, moving = oracle.branches[i].items, 0, [position]
        for item in items:
            count += isinstance(item, Token)
            if count > end or (count == end and not isinstance(item, Token)):
                moving.append(item.position)
        return min(moving) + shift < 0

    @precondition(some_live)
    @rule(i=which, by=st.integers(-3, 9))
    def set_position(self, i: int, by: int) -> None:
        branch = self.live(i)
        self.pair.set_position(branch, max(0, branch.position + by))

    @precondition(some_live)
    @rule(picks=some)
    def free(self, picks: list[int]) -> None:
        branches = self.several(picks)
        self.freed = branches[0]
        self.pair.free(*branches)

    @precondition(crowded)
    @rule(picks=st.lists(which, min_size=3, max_size=4))
    def make_room(self, picks: list[int]) -> None:
        self.free(picks)

    @precondition(some_live)
    @rule(i=which)
    def drop(self, i: int) -> None:
        branch = self.live(i)
        if branch is not self.freed:
            self.pair.drop(branch)
            del branch
            gc.collect(0)

    # -- steps

    @precondition(some_live)
    @rule(i=which, n=st.integers(1, 5))
    def step_one(self, i: int, n: int) -> None:
        self.try_step({self.live(i): n})

    @precondition(some_live)
    @rule(picks=some, n=st.integers(1, 3), part=amount)
    def step_several(self, picks: list[int], n: int, part: int) -> None:
        first, *rest = self.several(picks)
        self.try_step({first: self.tokens(part), **dict.fromkeys(rest, n)})

    @precondition(some_live)
    @rule(i=which, part=amount)
    def step_large(self, i: int, part: int) -> None:
        self.try_step({self.live(i): self.tokens(part)})

    @precondition(some_live)
    @rule(picks=some, part=amount)
    def step_evenly(self, picks: list[int], part: int) -> None:
        branches = self.several(picks)
        self.try_step(dict.fromkeys(branches, max(1, self.tokens(part) // len(branches))))

    @precondition(some_live)
    @rule(picks=some, n=st.integers(1, 4))
    def step_and_attend(self, picks: list[int], n: int) -> None:
        self.try_step(dict.fromkeys(self.several(picks), n), attend=True)

    @precondition(some_live)
    @rule(
        picks=some,
        choices=st.lists(st.integers(0, 99), min_size=1, max_size=6),
        leaf=st.integers(-1, 5),
        attend=st.booleans(),
    )
    def step_draft(self, picks: list[int], choices: list[int], leaf: int, attend: bool) -> None:
        first, *rest = self.several(picks)
        parents = [choice % (i + 1) - 1 for i, choice in enumerate(choices)]
        path: list[int] = []
        at = min(leaf, len(parents) - 1)
        while at >= 0:
            path.insert(0, at)
            at = parents[at]
        accept = {} if leaf == 5 else {first: path}
        self.try_step({first: Draft(parents), **dict.fromkeys(rest, 1)}, accept, attend)

    @precondition(some_live)
    @rule(picks=some, n=st.integers(1, 9), how=st.sampled_from(["rollback", "error", "drop"]))
    def step_abandoned(self, picks: list[int], n: int, how: str) -> None:
        pair, branches = self.pair, self.several(picks)
        self.counts["allocating"] += 1
        rolled_back_pages_wait = bool(pair.cache._streams)
        with nullcontext() if rolled_back_pages_wait else pair.unchanged():
            try:
                step = pair.open(dict.fromkeys(branches, n))
            except OutOfPages:
                self.counts["out of pages"] += 1
                return
            pair.cache.check()
            pair.store(pair.rows(dict.fromkeys(branches, n)), step)
            self.refused_while_open(branches[0])
            if how == "rollback":
                step.rollback()
            elif how == "error":
                with pytest.raises(KeyError), step:
                    raise KeyError
            del step

    def refused_while_open(self, b: Branch) -> None:
        cache, raises = self.pair.cache, self.pair.raises
        for call in (
            cache.new_branch,
            b.fork,
            lambda: b.fork_at(0),
            lambda: b.join([b]),
            lambda: b.select(b),
            lambda: b.crop(0),
            lambda: b.excise(0, 0),
            lambda: b.watch(b),
            lambda: setattr(b, "position", 0),
            b.free,
            lambda: cache.reorder([b], [0]),
            lambda: cache.step({b: 1}),
        ):
            raises(StepOpen, "a step is open", call)

    # -- bad input

    @precondition(lambda self: self.freed is not None and not self.freed.alive)
    @rule()
    def use_a_freed_branch(self) -> None:
        pair, freed = self.pair, self.freed
        assert freed is not None
        for call in (
            freed.fork,
            lambda: freed.crop(0),
            freed.free,
            lambda: freed.watch(freed),
            lambda: pair.cache.step({freed: 1}),
        ):
            pair.raises(StaleBranch, "was freed", call)

    @precondition(some_live)
    @rule(i=which, beyond=st.integers(1, 4))
    def use_bad_arguments(self, i: int, beyond: int) -> None:
        pair, b = self.pair, self.live(i)
        end = b.length + beyond
        if not pair.oracle.is_watched(pair.ids[b]):
            pair.raises(ValueError, "length: expected", lambda: b.crop(end))
            pair.raises(ValueError, "expected", lambda: b.excise(0, end))
        pair.raises(ValueError, "length: expected", lambda: b.fork_at(end))
        pair.raises(ValueError, "n: expected", lambda: b.fork(0))
        pair.raises(ValueError, "tokens: expected", lambda: pair.cache.step({b: 0}))
        pair.raises(ValueError, "joined with itself|is watched", lambda: b.join([b]))
        pair.raises(DuplicateBranch, "given twice", lambda: pair.cache.free([b, b]))

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            self.pair.free(*self.pair.ids)
            self.finish_all()
            stats = self.pair.cache.stats()
            assert (stats.pages_free, stats.segments) == (stats.pages_total, 0)


@pytest.mark.parametrize(("tail", "page_size"), CASES)
def test_random_operations_equal_the_oracle(
    tail: Literal["seal", "copy"], page_size: int, record_property: pytest.RecordProperty
) -> None:
    counts: Counter[str] = Counter()
    options = {"tail": tail, "page_size": page_size, "counts": counts}
    machine = type("Machine", (CacheMachine,), options)
    tight = 0.1  # Hypothesis favours some operations in each run: go on while too few hit the limit
    wanted = OPERATIONS[page_size]
    while counts["operations"] < wanted or (
        counts["operations"] < 3 * wanted and counts["out of pages"] < tight * counts["allocating"]
    ):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=20,
                stateful_step_count=STEPS_PER_EXAMPLE,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    share = counts["out of pages"] / counts["allocating"]
    for name, value in (*counts.items(), ("share", share)):
        record_property(name, value)
    assert 0.05 < share < 0.7, f"{dict(counts)}: the pools are too large or too small"
