"""Steps: what they say of their rows, drafts, and how they end."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from cache_pair import CachePair
from kv_table import Model

from fork_attn import Branch, Draft, OutOfPages, StalePlan

Tail = Literal["seal", "copy"]
TAILS: tuple[Tail, ...] = ("seal", "copy")
SMALL = Model(num_q_heads=2, num_kv_heads=1, head_dim=2, windows=(None, 3))
TREE = (-1, 0, 0, 1, 1, -1, 5)  # two roots; 0 has the children 1 and 2, 1 has 3 and 4


def make(tail: Tail = "seal", num_pages: int = 32) -> tuple[CachePair, Branch]:
    """A cache with one branch of six tokens in pages of four."""
    pair = CachePair(SMALL, num_pages=num_pages, tail=tail)
    root = pair.new_branch()
    pair.step({root: 6})
    return pair, root


def live_pages(pair: CachePair) -> int:
    return pair.cache.stats().pages_live


def test_a_step_says_what_the_model_needs() -> None:
    pair, root = make()
    (child,) = pair.fork(root)
    step = pair.cache.step({child: 3, root: Draft((-1, -1, 0))})  # the mapping's order
    assert step.branches == (child, root) and step.num_tokens == 6 and step.state == "open"
    assert step.position_ids.tolist() == [6, 7, 8, 6, 6, 7]
    assert step.cu_seqlens_q.tolist() == [0, 3, 6] and step.cu_seqlens_q.dtype == torch.int32
    assert step.seqlens_k.tolist() == [9, 9] and step.seqlens_k.dtype == torch.int32
    assert step.last_indices.tolist() == [2, 5] and step.last_indices.dtype == torch.int64
    assert step.position_ids.dtype == step.slot_mapping.dtype == torch.int64
    assert (root.length, child.position) == (6, 6)  # nothing moves before the commit
    assert step.plan_for(0) is step.plan and step.plan_for(1) is not step.plan
    step.rollback()


def test_layers_of_the_same_kind_share_a_plan() -> None:
    pair = CachePair(Model(windows=(None, 7, None, 7)))
    with pair.cache.step({pair.new_branch(): 2}) as step:
        assert step.plan_for(2) is step.plan_for(0) and step.plan_for(3) is step.plan_for(1)
        pair.raises(ValueError, "layer_idx: expected 0 to 3, got 4", lambda: step.plan_for(4))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("how", ["rollback", "exception", "dropped"])
def test_an_abandoned_step_leaves_everything_as_it_was(tail: Tail, how: str) -> None:
    pair, root = make(tail)
    children = pair.fork(root, 2)
    pair.step({children[0]: 1})
    with pair.unchanged():
        counts = {root: 5, children[0]: Draft((-1, 0)), children[1]: 2}
        step = pair.cache.step(counts)
        pair.store(pair.rows(counts), step)
        step.accept([0, 1])
        pair.cache.check()
        if how == "rollback":
            step.rollback()
        elif how == "exception":
            with pytest.raises(RuntimeError, match="forward"), step:
                raise RuntimeError("forward")
        if how != "dropped":
            assert step.state == "rolled_back"
        del step
        gc.collect()
    pair.check()


@pytest.mark.parametrize("state", ["committed", "rolled_back"])
def test_a_closed_step_is_stale(state: str) -> None:
    pair, root = make()
    step = pair.cache.step({root: 1})
    rows = pair.rows({root: 1})
    pair.store(rows, step)
    step.commit() if state == "committed" else step.rollback()
    assert step.state == state
    for call in (step.commit, step.rollback, step.__enter__, lambda: step.accept([])):
        pair.raises(StalePlan, f"expected an open step, got one that is {state}", call)
    pair.raises(StalePlan, state, lambda: pair.attend(rows, step))
    pair.raises(StalePlan, state, lambda: step.plan)


def test_a_step_closed_by_hand_inside_its_with() -> None:
    pair, root = make()
    with pair.unchanged(), pair.cache.step({root: 1}) as step:
        step.rollback()
    with pair.cache.step({root: 1}) as step:
        pair.store(pair.rows({root: 1}), step)
        step.commit()
    assert root.length == 7 and step.state == "committed"


def test_out_of_pages_says_how_many_and_changes_nothing() -> None:
    pair, root = make(num_pages=3)
    (child,) = pair.fork(root)
    error = pair.raises(
        OutOfPages,
        "step: needs 2 pages, 1 of 3 are free; free or crop branches",
        lambda: pair.cache.step({root: 6, child: 1}),
    )
    assert isinstance(error, OutOfPages) and (error.needed, error.free, error.pending) == (2, 1, 0)
    pair.check()
    pair.step({root: 6})  # exactly what is left
    pair.check()
    pair.raises(OutOfPages, "needs 1 pages, 0 of 3", lambda: pair.cache.step({root: 1}))
    pair.free(root)
    pair.step({child: 2})
    pair.check()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("path", [[], [0], [0, 1, 4], [0, 2], [5, 6], [0, 1, 3]])
def test_an_accepted_path_stays_and_the_rest_goes(tail: Tail, path: list[int]) -> None:
    pair, root = make(tail)
    before = pair.tokens(root)
    pair.step({root: Draft(TREE)}, {root: path}, attend=True)
    pair.check()
    first = before[-1] + 1
    assert pair.tokens(root) == before + [first + i for i in path]
    assert root.positions.tolist() == list(range(6 + len(path))) and root.position == root.length
    assert live_pages(pair) == -(-root.length // 4)
    pair.step({root: 2}, attend=True)
    pair.check()


@pytest.mark.parametrize("tail", TAILS)
def test_drafts_of_forked_branches(tail: Tail) -> None:
    pair, root = make(tail)
    children = pair.fork(root, 3)
    counts = {children[0]: Draft(TREE), root: 2, children[1]: Draft((-1,) * 5)}
    pair.step(counts, {children[0]: [0, 2], children[1]: [4]}, attend=True)
    pair.check()
    pair.step({children[2]: Draft((-1, 0, 1))}, {children[2]: [0, 1, 2]}, attend=True)
    pair.check()
    assert [b.length for b in (root, *children)] == [8, 8, 7, 9]
    pair.join(root, children)
    pair.check()


@pytest.mark.parametrize("tail", TAILS)
def test_a_draft_that_nobody_accepts_is_dropped(tail: Tail) -> None:
    pair, root = make(tail)
    (child,) = pair.fork(root)
    pages = live_pages(pair)
    pair.step({root: Draft(TREE), child: Draft((-1,))})
    pair.check()
    assert (root.length, root.position, live_pages(pair)) == (6, 6, pages)


def test_moving_an_accepted_path_reads_all_before_it_writes() -> None:
    pair, root = make()
    # The path 1, 2, 3 moves every token one slot down, over slots that are still to be read.
    pair.step({root: Draft((-1, -1, 1, 2))}, {root: [1, 2, 3]})
    pair.check()


def test_more_moves_than_one_launch_takes_go_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU moves so many slots at once; what one launch moved, a second try does not."""
    monkeypatch.setattr("fork_attn.ops_cache.MAX_MOVES", 4)
    pair, root = make()
    children = pair.fork(root, 3)
    storage = pair.cache._storage
    move, sizes = storage.move_slots, []

    def move_some(moves: Sequence[tuple[int, int]]) -> None:
        if len(sizes) == 1:
            sizes.append(0)
            raise RuntimeError("out of memory")
        sizes.append(len(moves))
        move(moves)

    monkeypatch.setattr(storage, "move_slots", move_some)
    counts = dict.fromkeys(children, Draft((-1, -1, 1, 2, 3, 4, 5)))
    accept = {child: [1, 2, 3, 4, 5, 6] for child in children}
    step, rows = pair.open(counts), pair.rows(counts, accept)
    pair.store(rows, step)
    for child, path in accept.items():
        step.accept(path, child)
    with pytest.raises(RuntimeError, match="out of memory"):
        step.commit()
    step.commit()
    assert sizes == [4, 0, 4, 4, 4, 2]
    pair.oracle.step(rows)
    pair.check()


def test_what_accept_refuses() -> None:
    pair, root = make()
    a, b = pair.fork(root, 2)
    with pair.cache.step({a: Draft(TREE), root: 2, b: Draft((-1, 0))}) as step:
        pair.store(pair.rows({a: Draft(TREE), root: 2, b: Draft((-1, 0))}), step)
        raises, chain = pair.raises, "path: expected a chain"
        raises(ValueError, "branch: expected one, as the step has 2", lambda: step.accept([0]))
        for path in ([1], [0, 3], [0, 0], [-1], [7], [0, 1, 3, 4]):
            raises(ValueError, chain, lambda path=path: step.accept(path, a))
        raises(ValueError, "expected one that drafts", lambda: step.accept([0], root))
        stranger = CachePair(SMALL).new_branch()
        raises(ValueError, "expected one of this step's", lambda: step.accept([0], stranger))
        for path, error in (([2**40], ValueError), (["0"], TypeError), ([True], TypeError)):
            raises(error, "path: expected", lambda path=path: step.accept(path, a))
        step.accept([0, 1], b)
        raises(ValueError, "accepted already", lambda: step.accept([], b))
    assert (a.length, b.length) == (6, 8)


@pytest.mark.parametrize("parents", [(0,), (-2,), (-1, 1), (-1, 0, 5)])
def test_a_draft_must_be_a_tree(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"parents: expected -1 <= parents\[i\] < i, got"):
        Draft(parents)


def test_a_draft_must_be_of_ints() -> None:
    for parents in ([0.5], ["a"], 3):
        with pytest.raises(TypeError, match="parents: expected a sequence of ints"):
            Draft(parents)  # type: ignore[arg-type]
    pair, root = make()
    pair.raises(ValueError, "tokens: expected 1 to", lambda: pair.cache.step({root: Draft(())}))
