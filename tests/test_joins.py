"""Joins: the union of contexts, whatever forked from whom, each token once."""

from __future__ import annotations

from typing import Literal

import pytest
from small_pair import TAILS, Tail, live_pages, make, root_of


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_a_join_is_the_union_and_moves_no_bytes(tail: Tail, page_size: int) -> None:
    pair = make(tail, page_size)
    root = root_of(pair, 7)
    a, b = pair.fork(root, 2)
    pair.step({a: 2, b: 4, root: 1})
    pages, expected = live_pages(pair), pair.tokens(root) + pair.tokens(a)[7:] + pair.tokens(b)[7:]
    pair.join(root, [a, b])
    pair.check()
    assert pair.tokens(root) == expected and root.length == 14
    assert live_pages(pair) <= pages and not a.alive and not b.alive
    assert root.positions.tolist() == [*range(8), 7, 8, 7, 8, 9, 10]
    pair.step({root: 3})
    pair.check()


@pytest.mark.parametrize(("position", "expected"), [("max", 9), ("sum", 11), (40, 40), (0, 0)])
def test_where_a_joined_branch_goes_on(
    position: Literal["max", "sum"] | int, expected: int
) -> None:
    pair = make()
    root = root_of(pair, 5)
    a, b = pair.fork(root, 2)
    pair.step({a: 2, b: 4})
    pair.join(root, [a, b], position)
    pair.check()
    assert root.position == expected


def test_a_copied_tail_counts_once_at_a_join() -> None:
    pair = make("copy")
    root = root_of(pair, 6)
    children = pair.fork(root, 4)
    pair.step(dict.fromkeys([*children, root], 1))
    copies = [pair.slots(b)[5] for b in [*children, root]]
    assert len(set(copies)) == 5  # five copies of token 5
    pair.join(root, children)
    pair.check()
    assert root.length == 6 + 5
    (child,) = pair.fork(root)  # and the copy of a copy
    pair.step({root: 1})
    pair.step({child: 1})
    pair.join(root, [child])
    pair.check()
    assert root.length == 6 + 5 + 2


def test_a_token_written_over_a_cropped_one_is_another_token() -> None:
    for tail in TAILS:
        pair = make(tail)
        root = root_of(pair, 6)
        first, second = pair.fork(root, 2)
        pair.step({first: 1})
        pair.step({second: 1})  # under "copy" it holds copies of tokens 4 and 5
        pair.free(first)
        pair.crop(root, 5)
        pair.step({root: 2})  # slot 5 of the old page may now hold another token
        pair.check()
        pair.join(root, [second])
        pair.check()
        assert root.length == 5 + 2 + 2


@pytest.mark.parametrize("tail", TAILS)
def test_children_that_forked_at_different_points(tail: Tail) -> None:
    pair = make(tail)
    root = root_of(pair, 3)
    early = pair.fork_at(root, 1)
    (middle,) = pair.fork(root)
    pair.step({root: 6})
    (late,) = pair.fork(root)
    pair.step({early: 2, middle: 5, late: 1})
    deep = pair.fork_at(late, 7)
    pair.step({deep: 2})
    pair.join(middle, [late, early, deep])
    pair.check()
    pair.join(root, [middle], "sum")
    pair.check()
    assert root.length == 3 + 6 + 5 + 1 + 2 + 2


@pytest.mark.parametrize("tail", TAILS)
def test_joins_of_joins_and_shared_parts_once(tail: Tail) -> None:
    pair = make(tail, 3)
    root = root_of(pair, 4)
    left, right = pair.fork(root, 2)
    for side in (left, right):
        kids = pair.fork(side, 3)
        pair.step({kid: 1 + i for i, kid in enumerate(kids)})
        pair.join(side, kids[:2])
        pair.step({side: 2})
        pair.check()
        pair.join(side, [kids[2]])
        pair.check()
    (both,) = pair.fork(left)
    pair.step({both: 1})
    pair.join(both, [right])
    pair.join(root, [left, both])
    pair.check()
    assert root.length == 4 + 2 * (1 + 2 + 2 + 3) + 1


def test_a_join_brings_back_what_the_parent_dropped() -> None:
    for tail in TAILS:
        pair = make(tail)
        root = root_of(pair, 10)
        (child,) = pair.fork(root)
        pair.excise(root, 2, 7)
        pair.step({root: 1})
        pair.join(root, [child])
        pair.check()
        assert root.positions.tolist() == [0, 1, 7, 8, 9, 10, 2, 3, 4, 5, 6]


def test_any_live_branch_can_be_a_child() -> None:
    pair = make()
    stranger, root = root_of(pair, 3), root_of(pair, 5)
    (child,) = pair.fork(root)
    pair.step({child: 2})
    pair.join(child, [root, stranger])  # its own parent, and one that shares nothing
    pair.check()
    assert child.length == 5 + 2 + 3 and pair.cache.branches == (child,)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_a_tree_25_deep_joined_from_the_leaves(tail: Tail, page_size: int) -> None:
    pair = make(tail, page_size, num_pages=400)
    spine = [root_of(pair, 2)]
    for depth in range(25):
        (child,) = pair.fork(spine[-1])
        pair.step({child: 1 + depth % 4, **({spine[-1]: 1} if depth % 3 == 0 else {})})
        spine.append(child)
    pair.check()
    while len(spine) > 1:
        child = spine.pop()
        pair.join(spine[-1], [child])
        if len(spine) % 5 == 0:
            pair.step({spine[-1]: 1})
        pair.check()
    pair.free(*spine)
    assert live_pages(pair) == 0
