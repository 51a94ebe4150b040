"""Forks in mid-page: who writes on in the shared tail page, who copies it, when it reopens."""

from __future__ import annotations

import pytest
import torch
from small_pair import TAILS, Tail, live_pages, make, root_of

from fork_attn import ForkedKVCache, NotDense


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
        pair.step(dict.fromkeys([*children, root], 2))
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


def test_a_tail_whose_copied_tokens_were_cropped_is_not_written_again() -> None:
    """And a segment that comes later, in the same place of the books, knows nothing of it."""
    pair = make("copy")
    for frozen in (True, False):
        root = root_of(pair, 6)
        children = pair.fork(root, 2)
        pair.step({children[0]: 1})
        pair.step({children[1]: 1})  # copies tokens 4 and 5
        pair.free(children[0])
        if frozen:
            pair.crop(root, 5)
            last = pair.slots(root)[-1]
            pair.step({root: 1})
            assert pair.slots(root)[-1] != last + 1  # or it would pass for token 5 in a join
            pair.check()
        pair.free(*pair.ids)
        again = root_of(pair, 6)
        pair.crop(again, 5)
        before = pair.slots(again)
        pair.step({again: 1})
        assert pair.slots(again) == [*before, before[-1] + 1]
        pair.free(again)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", ["fork", "fork_at", "fork_at in mid-page", "crop"])
def test_a_shared_prefix_is_read_once_whatever_became_of_its_tail(tail: Tail, kind: str) -> None:
    cache = ForkedKVCache(
        num_layers=1,
        num_pages=600,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        device="meta",
        tail=tail,
    )
    root = cache.new_branch()
    with cache.step({root: 4005}):
        pass
    if kind.startswith("fork_at"):
        leaves = [root.fork_at(4005 if kind == "fork_at" else 4001) for _ in range(16)]
    else:
        leaves = root.fork(16)
    if kind == "crop":
        for leaf in leaves:
            leaf.crop(4001)
    with cache.step(dict.fromkeys(leaves, 1)):
        pass
    with cache.step(dict.fromkeys(leaves, 1)) as step:
        assert step.plan.read_kv_bytes <= 1.05 * step.plan.unique_kv_bytes
