"""What each verb means, and what it may cost. After every line of interest `check` compares bytes,
positions and page counts with the oracle."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from cache_pair import CachePair, Model

from fork_attn import Branch, ForkedKVCache, NotDense, OutOfPages

Tail = Literal["seal", "copy"]
TAILS: tuple[Tail, ...] = ("seal", "copy")
BYTES = Model(num_q_heads=1, num_kv_heads=1, head_dim=2, windows=(None,))


def make(tail: Tail = "seal", page_size: int = 4, num_pages: int = 64) -> CachePair:
    return CachePair(BYTES, num_pages=num_pages, page_size=page_size, tail=tail)


def root_of(pair: CachePair, tokens: int) -> Branch:
    root = pair.new_branch()
    pair.step({root: tokens})
    pair.check()
    return root


def live_pages(pair: CachePair) -> int:
    return pair.cache.stats().pages_live


# -- fork and the tail


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
def test_a_fork_takes_no_pages_even_in_a_full_pool(tail: Tail, page_size: int) -> None:
    pair = make(tail, page_size, num_pages=2)
    root = root_of(pair, 2 * page_size - page_size // 2)
    children = pair.fork(root, 100)
    pair.check()
    stats = pair.cache.stats()
    assert (stats.pages_free, stats.pages_shared, stats.branches) == (0, 2, 101)
    assert [c.length for c in children] == [root.length] * 100
    assert len({*children, root}) == 101 and len({b.id for b in children}) == 100


@pytest.mark.parametrize("tail", TAILS)
def test_the_first_writer_goes_on_in_the_shared_page(tail: Tail) -> None:
    pair = make(tail)
    root = root_of(pair, 6)
    child, last = pair.fork(root, 2)
    shared = pair.slots(root)
    pair.step({child: 1})
    pair.check()
    assert pair.slots(child) == [*shared, shared[-1] + 1] and live_pages(pair) == 2
    pair.step({root: 1})
    pair.check()
    assert live_pages(pair) == 3
    own = pair.slots(root)
    if tail == "seal":  # a fresh page, nothing copied
        assert own[:6] == shared and own[6] % 4 == 0
    else:  # the part-filled page, copied
        assert (
            own[:4] == shared[:4] and own[4] % 4 == 0 and own[4:] == list(range(own[4], own[4] + 3))
        )
    pair.step({last: 3})
    pair.check()
    assert pair.slots(child)[:6] == shared


def test_two_writers_in_one_step_share_the_page_only_once() -> None:
    for tail in TAILS:
        pair = make(tail)
        root = root_of(pair, 5)
        children = pair.fork(root, 3)
        pair.step({b: 2 for b in [*children, root]})
        pair.check()
        ends = {pair.slots(b)[-1] for b in [*children, root]}
        assert len(ends) == 4 and live_pages(pair) == 2 + 3


def test_the_copy_policy_copies_lazily_and_the_last_owner_writes_in_place() -> None:
    pair = make("copy")
    root = root_of(pair, 6)
    child, other = pair.fork(root, 2)
    assert live_pages(pair) == 2  # nothing is copied at the fork
    pair.step({other: 1})  # the first writer, in place
    pair.step({child: 1})  # copies
    assert live_pages(pair) == 3
    pair.free(other)
    pair.step({root: 2})  # alone with the old page now
    pair.check()
    assert live_pages(pair) == 3
    before = pair.slots(child)
    pair.free(root)
    pair.step({child: 1})
    pair.check()
    assert pair.slots(child)[:-1] == before and pair.slots(child)[-1] == before[-1] + 1
    assert live_pages(pair) == 2


@pytest.mark.parametrize("tail", TAILS)
def test_a_sealed_tail_reopens_for_its_last_reader(tail: Tail) -> None:
    pair = make(tail)
    root = root_of(pair, 5)
    (child,) = pair.fork(root)
    pair.step({child: 2})
    pair.free(child)
    pair.step({root: 3})
    pair.check()
    assert live_pages(pair) == 2 and pair.slots(root)[-1] % 4 == 3


@pytest.mark.parametrize("tail", TAILS)
def test_pages_beyond_the_last_reader_return_at_once(tail: Tail) -> None:
    pair = make(tail)
    root = root_of(pair, 40)
    child = pair.fork_at(root, 10)
    assert live_pages(pair) == 10
    pair.free(root)
    pair.check()
    assert live_pages(pair) == 3
    pair.step({child: 2})
    pair.check()
    assert live_pages(pair) == 3  # 12 tokens: the tail page was its own again


# -- fork_at, crop, excise, position


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9])
def test_fork_at_and_crop_anywhere(tail: Tail, length: int) -> None:
    pair = make(tail)
    root = root_of(pair, 9)
    child = pair.fork_at(root, length)
    pair.check()
    assert (child.length, child.position) == (length, length)
    pair.step({child: 3, root: 1})
    pair.check()
    pair.crop(root, length)
    pair.check()
    assert root.position == length
    pair.step({root: 2})
    pair.check()


@pytest.mark.parametrize("tail", TAILS)
def test_crop_across_a_join_and_back_over_a_fork(tail: Tail) -> None:
    pair = make(tail)
    root = root_of(pair, 5)
    a, b = pair.fork(root, 2)
    pair.step({a: 3, b: 6})
    pair.join(root, [a, b])
    for length in (13, 9, 8, 6, 5, 3, 0):
        pair.crop(root, length)
        pair.check()
    assert root.position == 0 and live_pages(pair) == 0


def test_crop_after_a_join_goes_on_behind_the_last_token_it_still_sees() -> None:
    pair = make()
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.step({a: 7, b: 2})
    pair.join(root, [a, b])
    assert root.position == 11
    pair.crop(root, root.length)  # the last token is b's
    assert root.position == 6
    pair.check()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("start", "end"), [(0, 3), (2, 5), (3, 12), (5, 6), (0, 13), (12, 13), (4, 4)]
)
def test_excise_leaves_all_other_positions(tail: Tail, start: int, end: int) -> None:
    pair = make(tail)
    root = root_of(pair, 13)
    (child,) = pair.fork(root)
    pair.excise(root, start, end)
    pair.check()
    assert root.position == 13 and root.length == 13 - (end - start)
    pair.step({root: 2})
    pair.check()
    pair.free(child)
    pair.check()
    pair.excise(root, 0, root.length)
    pair.check()
    assert live_pages(pair) == 0 and root.position == 15


def test_excise_returns_pages_in_the_middle() -> None:
    pair = make()
    root = root_of(pair, 40)
    pair.excise(root, 6, 30)
    pair.check()
    assert live_pages(pair) == 2 + 3 and root.num_pages == 5
    pair.excise(root, 4, 10)  # across the gap
    pair.check()
    assert root.positions.tolist() == [0, 1, 2, 3, 34, 35, 36, 37, 38, 39]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("position", [0, 3, 6, 7, 100])
def test_a_position_that_is_set_starts_a_new_run_of_pages(tail: Tail, position: int) -> None:
    pair = make(tail)
    root = root_of(pair, 6)
    pair.set_position(root, position)
    assert root.position == position
    pair.step({root: 3})
    pair.check()
    assert root.positions.tolist() == [*range(6), *range(position, position + 3)]
    assert live_pages(pair) == 3  # 9 tokens, or 6 + 3 in pages of 4
    (child,) = pair.fork(root)
    assert child.position == position + 3


# -- join


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
    pair.step({b: 1 for b in [*children, root]})
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


# -- select, reorder, free


@pytest.mark.parametrize("tail", TAILS)
def test_select_keeps_one_context_and_frees_the_rest(tail: Tail) -> None:
    pair = make(tail)
    bystander, root = root_of(pair, 2), root_of(pair, 5)
    children = pair.fork(root, 3)
    pair.step(dict.fromkeys(children, 3))
    grandchildren = [g for c in children for g in pair.fork(c, 2)]
    pair.step({g: 5 for g in grandchildren})
    pair.free(children[1])  # its children stay descendants of the root
    winner = grandchildren[3]
    expected = pair.tokens(winner)
    pair.select(root, winner)
    pair.check()
    assert pair.tokens(root) == expected and root.position == 13
    assert pair.cache.branches == (bystander, root)
    assert live_pages(pair) == bystander.num_pages + root.num_pages


@pytest.mark.parametrize("tail", TAILS)
def test_reorder_is_atomic_and_a_source_used_once_writes_in_place(tail: Tail) -> None:
    pair = make(tail)
    root = root_of(pair, 5)
    beams = [root, *pair.fork(root, 3)]
    pair.step(dict.fromkeys(beams, 1))
    before = [pair.slots(b) for b in beams]
    pair.reorder(beams, [2, 2, 1, 3])
    pair.check()
    assert [pair.slots(b) for b in beams] == [before[i] for i in (2, 2, 1, 3)]
    pages = live_pages(pair)
    pair.step({beams[2]: 1, beams[3]: 1})
    pair.check()
    assert live_pages(pair) == pages
    pair.step({beams[0]: 1, beams[1]: 1})
    pair.check()
    assert live_pages(pair) == pages + 1
    pair.reorder([beams[0]], [0])
    pair.reorder([], [])
    pair.check()


def test_beams_under_copy_have_dense_page_tables() -> None:
    pair = make("copy")
    root = root_of(pair, 6)
    beams = [root, *pair.fork(root, 3)]
    noise = torch.Generator().manual_seed(1)
    for _ in range(30):
        pair.step(dict.fromkeys(beams, 1))
        pair.reorder(beams, torch.randint(4, (4,), generator=noise).tolist())
        pair.check()
        for beam in beams:
            table, length = beam.page_table(), beam.length
            assert table.dtype == torch.int32 and len(table) == -(-length // 4)
            t = torch.arange(length)
            assert (table[t // 4] * 4 + t % 4).tolist() == pair.slots(beam)


def test_a_page_table_is_refused_where_slots_are_skipped() -> None:
    pair = make("copy")
    root = root_of(pair, 6)
    assert root.page_table().tolist() == [slot // 4 for slot in pair.slots(root)[::4]]
    (child,) = pair.fork(root)
    pair.excise(child, 1, 2)
    pair.raises(NotDense, "branch 1: token 1", child.page_table)
    pair.step({root: 1})
    assert len(root.page_table()) == 2
    sealed = make("seal")
    root = root_of(sealed, 6)
    (child,) = sealed.fork(root)
    sealed.step({root: 1})
    sealed.step({child: 1})
    sealed.raises(NotDense, "token 6", child.page_table)


def test_an_empty_branch() -> None:
    pair = make()
    empty = pair.new_branch()
    assert (empty.length, empty.position, empty.num_pages) == (0, 0, 0)
    assert empty.positions.shape == (0,) and empty.positions.dtype == torch.int64
    assert empty.page_table().shape == (0,)
    (child,) = pair.fork(empty)
    pair.crop(empty, 0)
    pair.excise(empty, 0, 0)
    pair.fork_at(empty, 0)
    pair.join(empty, [child], "sum")
    pair.check()
    assert empty.length == 0


def test_handles() -> None:
    pair = make()
    root = root_of(pair, 3)
    with pair.cache.new_branch() as scoped:
        assert scoped.alive and scoped in pair.cache.branches
    assert not scoped.alive and "freed" in repr(scoped)
    (child,) = pair.fork(root)
    pair.step({child: 4})
    assert live_pages(pair) == 2
    pair.drop(child)
    del child
    assert live_pages(pair) == 1  # a dropped handle is freed at the next verb
    pair.check()
    assert root != pair.cache.new_branch() and repr(root) == "Branch(id=0, length=3, position=3)"


def test_a_cache_without_kv_keeps_the_books() -> None:
    cache = ForkedKVCache(
        num_layers=2, num_pages=2**16, num_q_heads=8, num_kv_heads=2, head_dim=64, device="meta"
    )
    root = cache.new_branch()
    with cache.step({root: 2**20 - 5}) as step:
        assert step.plan.unique_kv_bytes == (2**20 - 5) * 2 * 128 * 2
    child = root.fork()[0]
    with pytest.raises(OutOfPages) as caught:
        cache.step({root: 5, child: 1})
    assert (caught.value.needed, caught.value.free) == (1, 0)
    with cache.step({child: 5}):
        pass
    assert cache.stats().kv_bytes == 2**20 * 2 * 2 * 128 * 2
