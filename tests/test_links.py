"""Links at shifted positions: joins end to end, excisions that close up, watches; bad input."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from cache_pair import CachePair
from kv_table import Model
from small_pair import TAILS, Tail, live_pages, make, root_of

import fork_attn as fa
from fork_attn import (
    DuplicateBranch,
    ForeignBranch,
    NotDense,
    OutOfPages,
    Rope,
    StaleBranch,
    Unsupported,
)
from fork_attn.reference import rerotate

ATTENDING = Model(windows=(None, 6, None))


def attending(tail: Tail = "seal", **options: Any) -> CachePair:
    return CachePair(ATTENDING, num_pages=64, page_size=3, tail=tail, **options)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("rebase", [True, "copy"])
def test_children_lie_end_to_end(tail: Tail, rebase: bool | Literal["copy"]) -> None:
    pair = attending(tail)
    root = root_of(pair, 5)
    a, b, c = pair.fork(root, 3)
    pair.step({a: 2, b: 4, root: 1})
    pair.join(root, [b, a, c], rebase=rebase)
    pair.check()
    assert root.positions.tolist() == list(range(12)) and root.position == 12
    pair.step({root: 3}, attend=True)
    (left,) = pair.fork(root)
    pair.step({root: 1, left: 2}, attend=True)
    pair.join(root, [left], "sum", rebase)
    assert root.positions.tolist() == list(range(18)) and root.position == 18
    pair.step({root: 2}, attend=True)
    pair.check()
    pair.assert_precise()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("workers", [1, 7])
def test_many_branches_over_a_rebased_context(backend: str, workers: int) -> None:
    pair = attending(backend=backend, num_workers=workers)
    root = root_of(pair, 4)
    children = pair.fork(root, 5)
    pair.step({c: 1 + i for i, c in enumerate(children)})
    pair.join(root, children, rebase=True)
    forks = pair.fork(root, 6)
    for _ in range(3):
        pair.step(dict.fromkeys([root, *forks], 1), attend=True)
    pair.check()
    pair.assert_precise()


def test_a_join_that_moves_positions_moves_no_bytes() -> None:
    pair = make()
    root = root_of(pair, 6)
    a, b = pair.fork(root, 2)
    pair.step({a: 3, b: 4})
    pages = live_pages(pair)
    pair.join(root, [a, b], rebase=True)
    assert live_pages(pair) == pages
    with pytest.raises(NotDense, match="token 9 is seen at a position shifted by 3"):
        root.page_table()
    pair.crop(root, 9)  # what is left stands where it was written
    assert root.position == 9
    pair.step({root: 1})
    pair.check()


def test_a_copy_takes_fresh_pages_and_goes_on_in_them() -> None:
    pair = make(num_pages=8)
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.step({a: 3, b: 6})
    pair.join(root, [a, b], rebase="copy")
    pair.check()
    assert pair.slots(root)[7] % 4 == 0  # the copies of b begin a page
    before = live_pages(pair)
    pair.step({root: 2})  # in the last page of the copies
    assert live_pages(pair) == before
    pair.check()


def test_a_copy_that_does_not_fit_changes_nothing() -> None:
    pair = make(num_pages=5)
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.step({a: 4, b: 8})
    error = pair.raises(
        OutOfPages, 'rebase="copy" needs 2 pages, 1', lambda: root.join([a, b], rebase="copy")
    )
    assert (error.needed, error.free) == (2, 1)  # type: ignore[attr-defined]
    pair.join(root, [a, b], rebase=True)
    pair.check()


def test_a_copy_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make()
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.step({a: 4, b: 8})

    def fail(slots: object) -> None:
        raise MemoryError("no room to gather")

    monkeypatch.setattr(pair.cache._storage, "copy_shifted", fail)
    pair.raises(MemoryError, "no room", lambda: root.join([a, b], rebase="copy"))
    monkeypatch.undo()
    pair.join(root, [a, b], rebase="copy")
    pair.check()


def test_a_token_at_two_positions_is_refused() -> None:
    pair = make()
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.step({a: 2, b: 3})
    (late,) = pair.fork(b)
    pair.join(root, [a, b], rebase=True)
    match = "children: a token stands at two different positions, 6 and 4"
    for rebase in (False, True, "copy"):
        pair.raises(ValueError, match, lambda rebase=rebase: root.join([late], rebase=rebase))


@pytest.mark.parametrize("tail", TAILS)
def test_an_excision_closes_up(tail: Tail) -> None:
    pair = attending(tail)
    root = root_of(pair, 12)
    pair.excise(root, 3, 7, rebase=True)
    assert root.positions.tolist() == list(range(8)) and root.position == 8
    pair.step({root: 2}, attend=True)
    pair.excise(root, 6, 10, rebase=True)  # to the end: the position goes back
    assert root.positions.tolist() == list(range(6)) and root.position == 6
    pair.step({root: 1}, attend=True)
    pair.check()
    pair.assert_precise()


def test_what_cannot_close_up_is_refused() -> None:
    pair = make()
    root = root_of(pair, 4)
    pair.set_position(root, 2)
    pair.step({root: 3})  # positions 0 1 2 3 2 3 4
    pair.excise(root, 0, 3)
    match = "rebase: what follows would stand at positions -.* expected 0"
    pair.set_position(root, 0)
    pair.step({root: 1})
    pair.raises(ValueError, match, lambda: root.excise(1, 2, rebase=True))


def test_a_watcher_sees_what_is_written() -> None:
    pair = attending()
    root = root_of(pair, 5)
    a, b = pair.fork(root, 2)
    pair.step({b: 2})
    pair.watch(a, b)
    assert (a.length, a.position, a.positions.tolist()) == (5, 5, list(range(5)))
    assert pair.cache._core.view(a._handle)[1] == list(range(7))
    for _ in range(3):
        pair.step({a: 1, b: 2}, attend=True)
    assert (a.length, a.position) == (8, 8)
    assert pair.cache._core.view(a._handle)[1] == list(range(5 + 8 + 3))
    with pytest.raises(NotDense, match="watches another branch"):
        a.page_table()
    assert "watches 2" in pair.cache.render()
    pair.free(b)  # its eight tokens stay
    assert "watches one that was freed" in pair.cache.render()
    pair.step({a: 1}, attend=True)
    pair.check()
    pair.free(a, root)
    assert live_pages(pair) == 0


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("rebase", [True, False])
def test_rows_of_one_step_see_each_other(lag: int, rebase: bool) -> None:
    pair = attending()
    root = root_of(pair, 4)
    branches = pair.fork(root, 3)
    for i, branch in enumerate(branches):
        pair.set_position(branch, 10 * (i + 1))
        for other in branches:
            if other is not branch:
                pair.watch(branch, other, lag, rebase)
    for counts in ((3, 3, 3), (1, 4, 2), (5, 1, 1), (1, 1, 1)):
        pair.step(dict(zip(branches, counts, strict=True)), attend=True)
    (child,) = pair.fork(branches[0])  # sees what its parent watches
    pair.step({child: 2, branches[1]: 3}, attend=True)
    pair.check()
    pair.assert_precise()


def test_workers_share_one_read_of_every_block() -> None:
    pair = CachePair(Model(windows=(None,)), num_pages=400, page_size=16, table=None)
    root = root_of(pair, 512)
    workers = pair.fork(root, 4)
    for w in workers:
        for other in workers:
            if other is not w:
                pair.watch(w, other)
    pair.step(dict.fromkeys(workers, 256))
    step = pair.open(dict.fromkeys(workers, 1))
    plan = step.plan
    assert plan.unique_kv_bytes == (512 + 4 * 257) * 64
    assert plan.read_kv_bytes - plan.unique_kv_bytes == 3 * 4 * 64  # new tokens, by each watcher
    step.rollback()


def test_a_header_that_only_its_reader_sees() -> None:
    """The views of Hogwild!: prompt, the other's work, a header, one's own work."""
    pair = attending()
    root = root_of(pair, 5)
    header, a, b = pair.fork(root, 3)
    pair.step({header: 3})
    for worker, other in ((a, b), (b, a)):
        pair.watch(worker, other)
        pair.watch(worker, header)
    for _ in range(3):
        pair.step({a: 1, b: 1}, attend=True)
    work = {w: pair.tokens(w)[5:] for w in (a, b)}
    for worker, other in ((a, b), (b, a)):
        seen, _ = pair.oracle.view(pair.ids[worker])
        prompt, own = pair.tokens(root), pair.tokens(header)[5:]
        want = [*prompt, *work[other], *own, *work[worker]]
        assert [t.identity for t in seen] == want
        assert [t.position for t in seen] == list(range(14))
    pair.check()


def test_a_watched_branch_may_only_grow() -> None:
    pair = make()
    root = root_of(pair, 6)
    a, b = pair.fork(root, 2)
    (child,) = pair.fork(b)
    pair.watch(a, b)
    match = "branch 2 is watched, and may only grow, fork or be freed"
    for call in (
        lambda: b.crop(3),
        lambda: b.crop(6),
        lambda: b.excise(1, 2),
        lambda: b.join([child]),
        lambda: b.select(child),
        lambda: pair.cache.reorder([a, b], [0, 0]),
    ):
        pair.raises(ValueError, match, call)
    pair.reorder([a, b], [1, 1])  # the watcher may change; so its watch is gone
    pair.crop(b, 3)
    pair.check()


def test_what_a_watcher_sees_is_joined_once() -> None:
    pair = attending()
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.watch(a, b)
    pair.step({a: 2, b: 3})
    (c,) = pair.fork(b)
    pair.step({c: 2})
    pair.join(a, [b])  # adds nothing: b is freed, and a still sees it where it watched
    assert a.length == 6
    pair.join(a, [c])  # adds what c wrote itself
    assert a.length == 8
    pair.step({a: 1}, attend=True)
    pair.check()


def test_crops_keep_the_watches_behind_what_they_keep() -> None:
    pair = attending()
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.watch(a, b)
    pair.step({a: 2, b: 3})
    plain = pair.fork_at(a, 3)
    with_watch = pair.fork_at(a, 4)
    assert [len(pair.oracle.places(pair.ids[x])) for x in (plain, with_watch)] == [0, 1]
    pair.step({plain: 1, with_watch: 1, b: 1}, attend=True)
    pair.check()


def test_bad_input_to_watch() -> None:
    pair = make()
    root = root_of(pair, 4)
    a, b, gone = pair.fork(root, 3)
    pair.free(gone)
    foreign = make().new_branch()
    pair.watch(a, b)
    pair.raises(ValueError, "other: branch 1 cannot watch itself", lambda: a.watch(a))
    pair.raises(ValueError, "branch 2 is watched by branch 1 already", lambda: a.watch(b))
    pair.raises(StaleBranch, "branch 3 was freed", lambda: a.watch(gone))
    pair.raises(StaleBranch, "branch 3 was freed", lambda: gone.watch(a))
    pair.raises(ForeignBranch, "other: branch 0 belongs to another", lambda: a.watch(foreign))
    pair.raises(TypeError, "other: expected Branch, got int", lambda: a.watch(1))  # type: ignore
    pair.raises(ValueError, "lag: expected 0 to .*, got -1", lambda: b.watch(a, lag=-1))
    pair.raises(TypeError, "lag: expected an int", lambda: b.watch(a, lag=0.5))  # type: ignore
    pair.raises(TypeError, "rebase: expected a bool", lambda: b.watch(a, rebase=1))  # type: ignore
    for counts in ({a: fa.Draft([-1]), b: 1}, {a: 1, b: fa.Draft([-1])}):
        match = "branch 1 watches branch 2; neither may draft in a step of both"
        pair.raises(Unsupported, match, lambda counts=counts: pair.cache.step(counts))
    pair.step({a: fa.Draft([-1, 0])}, {a: [0]})
    pair.step({b: fa.Draft([-1, 0])}, {b: [0]})
    pair.check()


def test_bad_input_to_rebase() -> None:
    pair = make()
    root = root_of(pair, 4)
    a, b = pair.fork(root, 2)
    pair.raises(
        ValueError,
        "rebase: expected False, True or 'copy', got 'move'",
        lambda: root.join([a], rebase="move"),
    )  # type: ignore[arg-type]
    pair.raises(TypeError, "rebase: expected a bool", lambda: root.excise(0, 1, rebase="copy"))  # type: ignore
    pair.raises(DuplicateBranch, "given twice", lambda: root.join([a, a], rebase=True))
    pair.set_position(root, 2**31 - 2)
    pair.step({b: 3})
    pair.raises(
        ValueError, "position: expected position and length", lambda: root.join([b], rebase=True)
    )


def test_positions_beyond_32_bits_are_refused() -> None:
    pair = make()
    root = root_of(pair, 4)
    pair.set_position(root, 2**31 - 10)
    pair.step({root: 5})
    (child,) = pair.fork(root)
    a = pair.fork_at(root, 4)
    pair.watch(a, child)  # two billion positions lie between its first token and its last
    pair.step({a: 1})
    pair.set_position(a, 2**31 - 2)
    pair.raises(
        ValueError,
        "would see a token at a position beyond 32 bits",
        lambda: pair.cache.step({a: 1}),
    )


def test_a_cache_without_rope_refuses_by_name() -> None:
    cache = fa.ForkedKVCache(
        num_layers=2,
        num_pages=8,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        rope=[Rope.from_base(8), None],
    )
    root = cache.new_branch()
    with cache.step({root: 2}):
        pass
    a, b = root.fork(2)
    before = cache._core.digest()
    for name, call in (
        ("join", lambda: root.join([a], rebase=True)),
        ("join", lambda: root.join([a], rebase="copy")),
        ("watch", lambda: a.watch(b)),
        ("excise", lambda: root.excise(0, 1, rebase=True)),
    ):
        with pytest.raises(Unsupported, match=f"{name}.*: the cache does not know how keys turn"):
            call()
    assert cache._core.digest() == before
    a.watch(b, rebase=False)
    root.excise(0, 1)


def test_bad_ropes_are_refused() -> None:
    sizes = {"num_layers": 2, "num_pages": 8, "num_q_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(TypeError, match="rope: expected Rope or None, got float"):
        fa.ForkedKVCache(**sizes, rope=10000.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rope: expected one value or 2, got 1"):
        fa.ForkedKVCache(**sizes, rope=[Rope.none()])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at most head_dim 8 dimensions, got .* \[2, 10\)"):
        fa.ForkedKVCache(**sizes, rope=Rope.from_base(8, start=2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim: expected an even number of dimensions, got 7"):
        Rope.from_base(7)
    with pytest.raises(ValueError, match="base: expected a positive number, got 0"):
        Rope.from_base(8, 0)
    with pytest.raises(ValueError, match="start: expected at least 0, got -1"):
        Rope.from_base(8, start=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_copies_in_16_and_8_bits(dtype: torch.dtype) -> None:
    ropes = [Rope.from_base(8), Rope.from_base(4, interleaved=True, start=4), Rope.none()]
    cache = fa.ForkedKVCache(
        num_layers=3,
        num_pages=16,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=8,
        page_size=4,
        dtype=dtype,
        rope=ropes,
    )
    root = cache.new_branch()
    a, b = root.fork(2)
    torch.manual_seed(0)
    k = torch.randn(9, 1, 8, dtype=torch.bfloat16)
    with cache.step({a: 4, b: 5}) as step:
        for layer in range(3):
            cache.attend(layer, k.repeat(1, 2, 1), k, k, step)
    old = cache._core.slots(b._handle)
    before = [tuple(c.flatten(0, 1)[old].float() for c in cache.layer(i)) for i in range(3)]
    root.join([a, b], rebase="copy")
    new = cache._core.slots(root._handle)[4:]
    for layer, rope in enumerate(ropes):
        got_k, got_v = (c.flatten(0, 1)[new].float() for c in cache.layer(layer))
        want = rerotate(before[layer][0], 4, rope, torch.float64)
        limit = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got_k.double(), want.double(), atol=limit, rtol=limit)
        assert torch.equal(got_v, before[layer][1])
