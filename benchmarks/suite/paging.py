"""Physical pages for rivals that read paged K and V: shared pages stand once, for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fork_attn.bench.inputs import Inputs
from fork_attn.bench.way import Absent, need

Layers = list[tuple[Tensor, Tensor]]
"""K and V of each layer, (pages, size, KV heads, dim)."""


class Pool:
    """Pages of slots, in a shuffled physical order, as in a pool that is long in use; of the
    setting's page size, or of another for rivals that cannot read those."""

    def __init__(self, inputs: Inputs, size: int | None = None) -> None:
        self.inputs = inputs
        self.size = inputs.setting.page_size if size is None else size
        self._pages: list[Tensor] = []  # slots of each page on the host, at most `size`

    def add(self, slots: Tensor) -> list[int]:
        """Pages that hold the slots, one after the other, from a fresh page on."""
        parts = list(slots.cpu().split(self.size))
        first = len(self._pages)
        self._pages += parts
        return list(range(first, first + len(parts)))

    def slots(self, page: int) -> Tensor:
        return self._pages[page]

    @property
    def num_pages(self) -> int:
        return len(self._pages)

    @property
    def layer_bytes(self) -> int:
        """K and V of all pages, one layer."""
        return self.num_pages * self.size * self.inputs.slot_bytes

    @cached_property
    def order(self) -> Tensor:
        """(pages,) int32 on the host: the physical page of each page."""
        generator = torch.Generator().manual_seed(1)
        return torch.randperm(self.num_pages, generator=generator).int()

    def physical(self, pages: list[int]) -> Tensor:
        """(n,) int32 on the host."""
        return self.order[torch.tensor(pages, dtype=torch.long)]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """K and V, (pages, size, KV heads, dim); slots that hold nothing are 0."""
        lengths = torch.tensor([len(slots) for slots in self._pages])
        full = torch.arange(self.size) < lengths[:, None]
        at, held = torch.zeros_like(full, dtype=torch.long), torch.zeros_like(full)
        order = self.order.long()
        held[order] = full
        at[order] = torch.zeros_like(at).masked_scatter_(full, torch.cat(self._pages))
        device = self.inputs.device
        index, keep = at.flatten().to(device), held.flatten().to(device)[:, None, None]

        def laid(x: Tensor) -> Tensor:
            pages = x[index] * keep
            paged = pages.unflatten(0, (self.num_pages, self.size))
            return paged.to(self.inputs.setting.dtype).contiguous()

        return laid(self.inputs.k), laid(self.inputs.v)

    def layers(self, count: int) -> Layers:
        """As many copies.

        Raises:
            Absent: there is no memory for them.
        """
        need(count * self.layer_bytes, self.inputs, f"{count} layers of pages of {self.size}")
        return [self.tensors() for _ in range(count)]


@dataclass(frozen=True)
class Table:
    """Pages of one context in order, all full but the last."""

    pages: list[int]
    length: int


def dense_tables(inputs: Inputs, pool: Pool) -> list[Table]:
    """One table per query, its new tokens included. Full pages are shared; a context that goes on
    in mid-page copies that page's beginning, as a copy-on-write cache does."""
    forest, size = inputs.forest, pool.size
    tables: list[Table] = []

    def extend(above: Table, slots: Tensor) -> Table:
        whole = above.length // size
        if above.length % size:
            slots = torch.cat([pool.slots(above.pages[whole]), slots.cpu()])
        length = above.length + len(slots) - above.length % size
        return Table(above.pages[:whole] + pool.add(slots), length)

    for index, piece in enumerate(forest.pieces):
        above = tables[piece.parent] if piece.parent >= 0 else Table([], 0)
        slots = inputs.piece_slots(index)
        if piece.queries == 1:  # its new tokens go on in its own last page
            slots = torch.cat([slots, inputs.own_slots(piece.begin)])
        tables.append(extend(above, slots))
    found = []
    for query, leaf in enumerate(forest.leaf_piece):
        own = forest.extends(query)
        found.append(tables[leaf] if own else extend(tables[leaf], inputs.own_slots(query)))
    return found


def dense(inputs: Inputs, layers: int, size: int | None = None) -> tuple[Pool, list[Table], Layers]:
    """The pool, a table per query and every layer's K and V, laid out once for all who ask for
    pages of that size.

    Raises:
        Absent: there is no memory for them.
    """
    key = f"dense {size or inputs.setting.page_size}"
    if key not in inputs.shared:
        pool = Pool(inputs, size)
        tables = dense_tables(inputs, pool)
        inputs.shared[key] = (pool, tables, pool.layers(layers))
    found: tuple[Pool, list[Table], Layers] = inputs.shared[key]
    return found


def pages_in(inputs: Inputs, multiple: int) -> int:
    """The size of pages for a rival that reads multiples of so many slots: the setting's, or the
    least that it reads."""
    size = inputs.setting.page_size
    return multiple if size % multiple else size


def padded(pool: Pool, tables: list[Table]) -> Tensor:
    """(n, longest) int32 on the device; behind a table's end stands page 0."""
    width = max(len(t.pages) for t in tables)
    found = torch.zeros(len(tables), width, dtype=torch.int32)
    for row, table in enumerate(tables):
        found[row, : len(table.pages)] = pool.physical(table.pages)
    return found.to(pool.inputs.device)


@dataclass(frozen=True)
class Level:
    """Entries that together see each row at most once.

    Attributes:
        begins: first row of each entry, and the number of rows.
        tables: pages of each entry; without any where rows see nothing on this level.
        causal: the entry's rows are its last tokens, each seeing those before it.
    """

    begins: list[int]
    tables: list[Table]
    causal: bool


def levels(inputs: Inputs, pool: Pool) -> list[Level]:
    """The forest cut by depth: level i has a piece of every path that is as deep; every piece
    starts on a page of its own. Where one row is new, it stands in its leaf's pages; else new
    tokens are a level of their own, the last.

    Raises:
        ValueError: paths differ in depth, or a draft needs a mask.
    """
    forest = inputs.forest
    if any(q.draft is not None for q in forest.queries):
        raise ValueError("draft tokens see one another by a mask")
    depth: list[int] = []
    for piece in forest.pieces:
        depth.append(depth[piece.parent] + 1 if piece.parent >= 0 else 0)
    deepest = {depth[leaf] for leaf in forest.leaf_piece}
    if len(deepest) != 1:
        raise ValueError("branches lie at different depths")
    (last,) = deepest
    alone = all(q.rows == 1 and forest.extends(i) for i, q in enumerate(forest.queries))
    found = [Level([0], [], False) for _ in range(last + 1)]
    for index, piece in enumerate(forest.pieces):
        slots = inputs.piece_slots(index)
        if alone and depth[index] == last:
            slots = torch.cat([slots, inputs.own_slots(piece.begin)])
        level = found[depth[index]]
        level.tables.append(Table(pool.add(slots), len(slots)))
        level.begins.append(forest.row_begin[piece.end])
    if not alone:
        own = [inputs.own_slots(q) for q in range(len(forest.queries))]
        tables = [Table(pool.add(slots), len(slots)) for slots in own]
        found.append(Level(list(forest.row_begin), tables, True))
    return found


def leveled(inputs: Inputs, layers: int) -> tuple[Pool, list[Level], Layers]:
    """The pool, the levels and every layer's K and V, laid out once for all who ask.

    Raises:
        Absent: the forest has no such levels, or there is no memory.
    """
    if "levels" not in inputs.shared:
        pool = Pool(inputs)
        try:
            found = levels(inputs, pool)
        except ValueError as error:
            raise Absent(str(error)) from error
        inputs.shared["levels"] = (pool, found, pool.layers(layers))
    made: tuple[Pool, list[Level], Layers] = inputs.shared["levels"]
    return made
