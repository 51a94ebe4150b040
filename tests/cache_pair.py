"""A ForkedKVCache beside its oracle: every verb runs on both, and `check` finds any difference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from kv_table import KVTable, Model

from fork_attn import Branch, Draft, ForkAttnError, ForkedKVCache, NotDense, OutOfPages, Step
from fork_attn.reference_cache import DeepCopyCache, Rows, Token
from fork_attn.testing.tolerance import assert_close_to_oracle

BIT_TYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class CachePair:
    """The cache, the oracle, and which branch of one is which of the other."""

    def __init__(
        self,
        model: Model | None = None,
        *,
        num_pages: int = 32,
        page_size: int = 4,
        tail: Literal["seal", "copy"] = "seal",
        table: KVTable | None = None,
        **options: Any,
    ) -> None:
        m = self.model = model or Model()
        self.cache = ForkedKVCache(
            num_layers=len(m.windows),
            num_pages=num_pages,
            num_q_heads=m.num_q_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.head_dim,
            head_dim_v=m.head_dim_v,
            sliding_window=list(m.windows),
            page_size=page_size,
            dtype=m.dtype,
            tail=tail,
            rope=m.ropes,
            **options,
        )
        self.oracle = DeepCopyCache(m.ropes)
        self.ids: dict[Branch, int] = {}
        self.table = table or KVTable(m)
        self.results: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._next_identity = 0
        self.wait = False  # steps wait for other streams
        # What other streams still read: bytes of pending pages, per layer and K or V.
        self._in_flight: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.poison(torch.ones(num_pages, page_size, dtype=torch.bool))

    # -- looking

    def digest(self) -> int:
        """A number for the whole state of the host's books."""
        return self.cache._core.digest()

    def slots(self, branch: Branch) -> list[int]:
        """Where a branch's tokens lie, in context order."""
        return self.cache._core.slots(branch._handle)

    def tokens(self, branch: Branch) -> list[int]:
        """Identities of what a branch sees, by the oracle."""
        return [t.identity for t in self.oracle.tokens(self.ids[branch])]

    def poison(self, slots: torch.Tensor) -> None:
        """Fills slots, (num_pages, page_size) bool, with NaN in all layers."""
        for layer in range(len(self.model.windows)):
            for cache in self.cache.layer(layer):
                cache[slots.to(cache.device)] = torch.nan

    def check(self) -> None:
        """The cache equals the oracle; slots that nobody sees are poisoned."""
        self.cache.stats()  # frees what was dropped
        self.cache.check()
        assert set(self.cache.branches) == set(self.ids)
        seen: list[Token] = []
        slots = [torch.empty(0, dtype=torch.int64)]
        readers: dict[int, int] = {}
        for branch, i in self.ids.items():
            self._check_branch(branch, self.oracle.tokens(i), self.oracle.position(i))
            tokens, at = self._check_view(branch, i)
            for page in (at // self.cache.page_size).unique().tolist():
                readers[page] = readers.get(page, 0) + 1
            seen += tokens
            slots.append(at)
        self._check_stats(readers)
        self._check_bytes(seen, torch.cat(slots))

    def _check_view(self, branch: Branch, i: int) -> tuple[list[Token], torch.Tensor]:
        tokens, _ = self.oracle.view(i)
        slots, positions = self.cache._core.view(branch._handle)
        assert positions == [t.position for t in tokens]
        assert len(set(slots)) == len(slots) == len(tokens)
        places = self.oracle.places(i)
        if not places:
            assert slots == self.slots(branch)
        others = {self.ids[b]: b.id for b in self.ids} | {None: -1}
        want = [others[place.watch.other] for place in places]
        assert self.cache._core.watched(branch._handle) == want
        return tokens, torch.tensor(slots, dtype=torch.int64)

    def _check_branch(self, branch: Branch, tokens: list[Token], position: int) -> None:
        core, handle, size = self.cache._core, branch._handle, self.cache.page_size
        assert branch.alive and core.length(handle) == len(tokens)
        assert core.position(handle) == position
        assert core.positions(handle) == [t.position for t in tokens]
        slots = torch.tensor(core.slots(handle), dtype=torch.int64)
        assert len(slots) == len(tokens)
        pages = (slots // size).unique().tolist()
        assert core.num_pages(handle) == len(pages)
        at = torch.arange(len(slots))
        dense = torch.equal(slots, slots[at // size * size] // size * size + at % size)
        dense &= not self.oracle.places(self.ids[branch])
        dense &= all(t.position == t.written for t in tokens)
        try:
            table = core.page_table(handle)
            assert dense and table == (slots[::size] // size).tolist()
        except NotDense:
            assert not dense

    def _check_stats(self, readers: dict[int, int]) -> None:
        stats = self.cache.stats()
        assert stats.pages_live == len(readers)
        pending = self.cache._core.pending_pages()
        pages = {page for page, _ in pending}
        assert len(pages) == len(pending) == stats.pages_pending
        assert not pages & set(readers)
        assert stats.pages_free == stats.pages_total - len(readers) - len(pending)
        assert stats.pages_shared == sum(count > 1 for count in readers.values())
        assert stats.branches == len(self.ids)
        self._check_in_flight(pending)

    def _check_in_flight(self, pending: list[tuple[int, int]]) -> None:
        layers = range(len(self.model.windows))
        for key in pending:
            stored = [c[key[0]] for layer in layers for c in self.cache.layer(layer)]
            bits = [x.clone(memory_format=torch.contiguous_format) for x in stored]
            bits = [x.view(BIT_TYPES[self.model.dtype]) for x in bits]
            before = self._in_flight.setdefault(key, bits)
            assert all(map(torch.equal, bits, before)), "a pending page was written"
        self._in_flight = {key: self._in_flight[key] for key in pending}

    def _check_bytes(self, tokens: list[Token], at: torch.Tensor) -> None:
        size, bits = self.cache.page_size, BIT_TYPES[self.model.dtype]
        unseen = torch.ones(self.cache.num_pages * size, dtype=torch.bool)
        unseen[at] = False
        for page, _ in self.cache._core.pending_pages():
            unseen.view(-1, size)[page] = False
        copied = torch.tensor([t.copied for t in tokens], dtype=torch.bool)
        for layer in range(len(self.model.windows)):
            wanted = self.table.kv(layer, [t.identity for t in tokens])
            for i, cache in enumerate(self.cache.layer(layer)):
                where = at.to(cache.device)
                got, want = cache[where // size, where % size].cpu(), wanted[i]
                turned = copied if i == 0 else torch.zeros_like(copied)
                same = got[~turned].view(bits), want[~turned].view(bits)
                assert torch.equal(*same), "a token's bytes changed"
                if bool(turned.any()):
                    keys = [t.kv[layer][0] for t in tokens if t.copied]
                    limit = 4 * torch.finfo(got.dtype).eps
                    torch.testing.assert_close(
                        got[turned], torch.stack(keys), atol=limit * 4, rtol=limit
                    )
        self.poison(unseen.view(-1, size))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens inside leaves the books as they are."""
        before = self.digest()
        yield
        assert self.digest() == before

    def raises(self, error: type[Exception], match: str, call: Callable[[], object]) -> Exception:
        """The call raises this very type with this message, and nothing changes."""
        with self.unchanged():
            try:
                call()
            except error as e:
                assert type(e) is error, f"expected {error.__name__}, got {e!r}"
                assert re.search(match, str(e)), f"expected {match!r} in {str(e)!r}"
                return e
        raise AssertionError(f"expected {error.__name__}, nothing was raised")

    # -- verbs

    def new_branch(self) -> Branch:
        branch = self.cache.new_branch()
        self.ids[branch] = self.oracle.new_branch()
        return branch

    def fork(self, branch: Branch, n: int = 1) -> list[Branch]:
        children = branch.fork(n)
        self.ids.update(zip(children, self.oracle.fork(self.ids[branch], n), strict=True))
        return children

    def fork_at(self, branch: Branch, length: int) -> Branch:
        child = branch.fork_at(length)
        self.ids[child] = self.oracle.fork_at(self.ids[branch], length)
        return child

    def join(
        self,
        branch: Branch,
        children: Sequence[Branch],
        position: Literal["max", "sum"] | int = "max",
        rebase: bool | Literal["copy"] = False,
    ) -> None:
        before = self.digest()
        try:
            branch.join(children, position=position, rebase=rebase)
        except OutOfPages as e:
            assert self.digest() == before and rebase == "copy"
            assert e.needed > e.free == self.cache.stats().pages_free
            raise
        self.oracle.join(self.ids[branch], [self.ids[c] for c in children], position, rebase)
        self._forget()

    def watch(self, branch: Branch, other: Branch, lag: int = 0, rebase: bool = True) -> None:
        branch.watch(other, lag=lag, rebase=rebase)
        self.oracle.watch(self.ids[branch], self.ids[other], lag=lag, rebase=rebase)

    def watches(self, branch: Branch, other: Branch) -> bool:
        """Whether a branch watches another one."""
        return other in self.ids and other.id in self.cache._core.watched(branch._handle)

    def select(self, branch: Branch, child: Branch) -> None:
        branch.select(child)
        self.oracle.select(self.ids[branch], self.ids[child])
        self._forget()

    def reorder(self, branches: Sequence[Branch], indices: Sequence[int]) -> None:
        self.cache.reorder(branches, indices)
        self.oracle.reorder([self.ids[b] for b in branches], indices)

    def crop(self, branch: Branch, length: int) -> None:
        branch.crop(length)
        self.oracle.crop(self.ids[branch], length)

    def excise(self, branch: Branch, start: int, end: int, rebase: bool = False) -> None:
        branch.excise(start, end, rebase=rebase)
        self.oracle.excise(self.ids[branch], start, end, rebase)

    def set_position(self, branch: Branch, position: int) -> None:
        branch.position = position
        self.oracle.set_position(self.ids[branch], position)

    def free(self, *branches: Branch) -> None:
        self.cache.free(branches)
        self.oracle.free([self.ids[b] for b in branches])
        self._forget()

    def drop(self, branch: Branch) -> None:
        """Forgets the handle; the caller holds no other reference. The next verb frees it."""
        self.oracle.free([self.ids.pop(branch)])

    def _forget(self) -> None:
        self.ids = {b: i for b, i in self.ids.items() if i in self.oracle.branches}

    # -- steps

    def rows(
        self,
        counts: Mapping[Branch, int | Draft],
        accept: Mapping[Branch, Sequence[int]] | None = None,
    ) -> dict[int, Rows]:
        """The oracle's rows of a step, with new tokens."""
        rows = {}
        for branch, count in counts.items():
            draft = isinstance(count, Draft)
            n = len(count.parents) if draft else count  # type: ignore[union-attr, arg-type]
            parents = count.parents if draft else None  # type: ignore[union-attr]
            path = (accept or {}).get(branch, ())
            rows[self.ids[branch]] = Rows(self._new_tokens(n), parents, path)
        return rows

    def _new_tokens(self, n: int) -> list[Token]:
        first = self._next_identity
        self._next_identity += n
        identities = range(first, first + n)
        layers = [self.table.kv(layer, identities) for layer in range(len(self.model.windows))]
        return [Token(i, 0, [(k[j], v[j]) for k, v in layers]) for j, i in enumerate(identities)]

    def store(self, rows: Mapping[int, Rows], step: Step) -> None:
        """Writes the rows' K and V in all layers."""
        identities = [t.identity for new in rows.values() for t in new.tokens]
        for layer in range(len(self.model.windows)):
            k, v = (x.to(self.cache.device) for x in self.table.kv(layer, identities))
            torch.ops.fork_attn.store_kv(k, v, *self.cache.layer(layer), step.slot_mapping)

    def attend(self, rows: Mapping[int, Rows], step: Step, **options: Any) -> None:
        """Writes the rows' K and V and compares attention with the oracle, in all layers.

        What a mask that is wrong by one token would change is far beyond the tolerance here;
        `results` keeps all of it for a stricter look.
        """
        identities = [t.identity for new in rows.values() for t in new.tokens]
        m = self.model
        noise = torch.Generator().manual_seed(identities[0])  # replays see the same queries
        for layer, window in enumerate(m.windows):
            q = torch.randn(len(identities), m.num_q_heads, m.head_dim, generator=noise).to(m.dtype)
            k, v = self.table.kv(layer, identities)
            inputs = (x.to(self.cache.device) for x in (q, k, v))
            out = self.cache.attend(layer, *inputs, step, **options).cpu()
            want, _ = self.oracle.attend(rows, layer, q, window=window, **options)
            same, _ = self.oracle.attend(rows, layer, q, window=window, dtype=m.dtype, **options)
            assert out.dtype == m.dtype
            limit = 1e-5 if m.dtype == torch.float32 else 5e-2
            torch.testing.assert_close(out.double(), want, atol=limit, rtol=limit)
            self.results.append((out.flatten(), want.flatten(), same.flatten()))

    def assert_precise(self) -> None:
        """All attention so far is as exact as PyTorch's own in this precision."""
        out, want, same = (torch.cat(parts) for parts in zip(*self.results, strict=True))
        assert_close_to_oracle(out, want, same)

    def check_open(self, step: Step, rows: Mapping[int, Rows]) -> None:
        """What an open step says of its rows."""
        placed = [self.oracle.place(i, new) for i, new in rows.items()]
        ends = torch.tensor([0, *(len(p) for p in placed)]).cumsum(0)
        lengths = [len(self.oracle.tokens(i)) + len(p) for i, p in zip(rows, placed, strict=True)]
        assert [self.ids[b] for b in step.branches] == list(rows)
        assert step.num_tokens == int(ends[-1])
        assert step.cu_seqlens_q.tolist() == ends.tolist()
        assert step.last_indices.tolist() == (ends[1:] - 1).tolist()
        assert step.seqlens_k.tolist() == lengths
        assert step.position_ids.tolist() == [t.position for p in placed for t in p]
        slots = step.slot_mapping.tolist()
        seen = {slot for branch in self.ids for slot in self.cache._core.view(branch._handle)[0]}
        assert len(set(slots)) == len(slots) and not seen.intersection(slots)

    def step(
        self,
        counts: Mapping[Branch, int | Draft],
        accept: Mapping[Branch, Sequence[int]] | None = None,
        *,
        attend: bool = False,
        **options: Any,
    ) -> None:
        """A whole step, committed on both sides. `accept` gives the paths of drafts; a draft
        without one is dropped.

        Raises:
            OutOfPages: the pool is too small; checked to have changed nothing.
        """
        step = self.open(counts)
        rows = self.rows(counts, accept)
        with step:
            self.check_open(step, rows)
            if attend:
                self.attend(rows, step, **options)
            else:
                self.store(rows, step)
            for branch, path in (accept or {}).items():
                step.accept(path, branch)
        assert step.state == "committed"
        self.oracle.step(rows)

    def open(self, counts: Mapping[Branch, int | Draft]) -> Step:
        """Opens a step."""
        before = self.digest()
        try:
            return self.cache.step(counts, wait=self.wait)
        except ForkAttnError as e:
            assert self.digest() == before
            if isinstance(e, OutOfPages):
                stats = self.cache.stats()
                assert e.needed > e.free == stats.pages_free and e.pending == stats.pages_pending
                assert not self.wait or e.needed > e.free + e.pending
            raise
