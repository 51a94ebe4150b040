"""What each verb means, and what it may cost. After every line of interest `check` compares bytes,
positions and page counts with the oracle."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from small_pair import TAILS, Tail, live_pages, make, root_of

from fork_attn import ConcurrentUse, ForkedKVCache, OutOfPages

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


# -- select, reorder, free


@pytest.mark.parametrize("tail", TAILS)
def test_select_keeps_one_context_and_frees_the_rest(tail: Tail) -> None:
    pair = make(tail)
    bystander, root = root_of(pair, 2), root_of(pair, 5)
    children = pair.fork(root, 3)
    pair.step(dict.fromkeys(children, 3))
    grandchildren = [g for c in children for g in pair.fork(c, 2)]
    pair.step(dict.fromkeys(grandchildren, 5))
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


class Collecting:
    """A core that loses the last references to some branches while a verb runs."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def select(self, *args: int) -> list[int]:
        freed: list[int] = self._core.select(*args)
        gc.collect()
        return freed


def test_a_branch_dropped_in_the_moment_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make()
    root = root_of(pair, 3)
    (child,) = root.fork()
    cycle: list[object] = child.fork()
    cycle.append(cycle)
    del cycle
    monkeypatch.setattr(pair.cache, "_core", Collecting(pair.cache._core))
    root.select(child)
    pair.cache.new_branch().free()
    assert pair.cache.branches == (root,)
    pair.check()


def test_dropped_branches_wait_for_a_thread_that_is_in_the_cache() -> None:
    pair = make()
    root = root_of(pair, 3)
    (child,) = pair.fork(root)
    pair.drop(child)
    del child
    pair.cache._core.enter()
    with pytest.raises(ConcurrentUse):
        pair.cache.stats()
    pair.cache._core.leave()
    pair.check()  # and are freed then


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
