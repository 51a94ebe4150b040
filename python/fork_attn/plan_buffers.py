"""Fixed-capacity buffers for steps: one captured call serves every topology that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fork_attn import _C, checks, ops
from fork_attn.device_step import resident_plan
from fork_attn.errors import PlanCapacityExceeded, Unsupported
from fork_attn.kv_library import DTYPE_CODES, paged_argument, rows_argument
from fork_attn.plan import PlanShape
from fork_attn.rotation_buffers import RotationBuffers
from fork_attn.staging import Layout, News, Staging

if TYPE_CHECKING:
    from fork_attn.cache import ForkedKVCache
    from fork_attn.kernels.bodies import Merge
    from fork_attn.layers import Layer
    from fork_attn.step import Step

_Kind = tuple["int | None", int]  # sliding window and GQA group: layers that share a plan
_NEWS_BYTES = 16 * 1024  # room behind a plan for what is new in page lists; more goes by itself


class PlanBuffers:
    """Where a step's tensors and plans lie at addresses that never change.

    `update` writes a step there, `attend` reads everything from there, counts included: what was
    captured into a CUDA graph once serves whatever step was written last. Rows beyond the step's
    are padding: they store nothing, see nothing and give zeros. Steps that see tokens at shifted
    positions (rebased joins, watches) and steps that do not are two captures: see `shifted`. One
    stream at a time.

    Args:
        cache: on the CPU, or on a CUDA device.
        max_tokens: rows of a step, at most.
        max_plan_bytes: of the plan of one kind of layer; None: 16 KiB, 512 bytes a row and 128 a
            rotated copy.
        max_partial_rows: partial results of a plan; None: what plans of that many rows and the
            cache's workers can need if every row block is cut once more than its fair share.
        max_rotations: rotated copies of query rows in a plan, one for each row and shift at which
            it sees something; None: four for each row.

    Attributes:
        input_ids: (max_tokens,) int64, what `update` was given, padded with 0.
        position_ids, slot_mapping: (max_tokens,) int64, padded with 0 and -1 (stored nowhere).
        last_indices: (max_tokens,) int64, each branch's last row, padded with 0.
        num_tokens, num_branches: of the step written last.
        shifted: whether that step sees tokens at shifted positions. `attend` then reads rotated
            copies of the queries as well, so what was captured for one serves not the other.

    Raises:
        Unsupported: no such buffers on the cache's device or backend.
    """

    def __init__(
        self,
        cache: ForkedKVCache,
        *,
        max_tokens: int,
        max_plan_bytes: int | None = None,
        max_partial_rows: int | None = None,
        max_rotations: int | None = None,
    ) -> None:
        if cache.backend not in ("cpu", "triton") or cache.device.type == "meta":
            raise Unsupported(
                f"PlanBuffers: backends cpu and triton have them, not {cache.backend!r} "
                f"on {cache.device}"
            )
        self.cache = cache
        self.max_tokens = checks.integer("max_tokens", max_tokens, low=1)
        if max_rotations is None:
            max_rotations = 4 * self.max_tokens
        self.max_rotations = checks.integer("max_rotations", max_rotations, low=0)
        if max_plan_bytes is None:
            max_plan_bytes = 16 * 1024 + 512 * self.max_tokens + 128 * self.max_rotations
        self.max_plan_words = checks.integer("max_plan_bytes", max_plan_bytes, low=1) // 8
        target = _C.target_costs(cache._target)
        self._most_rows = int(target["max_rows"])
        if max_partial_rows is None:
            spans = cache.num_workers * int(target["spans_per_worker"])
            rows = self.max_tokens + self.max_rotations
            max_partial_rows = 2 * rows + spans * min(64, self._most_rows)
        self.max_partial_rows = checks.integer("max_partial_rows", max_partial_rows, low=1)
        self.num_tokens = self.num_branches = 0
        self.shifted = False
        self._kind_keys = list(dict.fromkeys(map(_kind, cache._storage.layers)))
        self._lists = cache._page_lists.pages
        self._staging = Staging(cache.device)
        self._rotations: RotationBuffers[_Kind] = RotationBuffers(self.max_rotations, cache.device)
        self._workspaces: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._allocate()

    @property
    def uploads(self) -> int:
        """Copies to the device so far."""
        return self._staging.uploads

    @property
    def num_bytes(self) -> int:
        """Bytes of those copies."""
        return self._staging.num_bytes

    def _allocate(self) -> None:
        layout = Layout()
        parts = [layout.add(self.max_tokens, 8) for _ in range(4)]
        self._plan_at = layout.add(self.max_plan_words, 8)
        num_bytes = layout.num_bytes + _NEWS_BYTES
        self._block = torch.zeros(num_bytes, dtype=torch.uint8, device=self.cache.device)
        self._parts = parts
        self.input_ids, self.position_ids, self.slot_mapping, self.last_indices = (
            self._block[part].view(torch.int64) for part in parts
        )
        self.slot_mapping.fill_(-1)
        first = self._block[self._plan_at].view(torch.int64)
        others = [torch.zeros_like(first) for _ in self._kind_keys[1:]]
        self._plans = dict(zip(self._kind_keys, [first, *others], strict=True))

    def update(self, step: Step, input_ids: Sequence[int] | None = None) -> None:
        """Writes an open step: one copy, and one more for each further kind of layer.

        Args:
            step: of the cache, with at most `max_tokens` rows.
            input_ids: a token id for each row.

        Raises:
            PlanCapacityExceeded: the step does not fit; nothing was written.
            StalePlan: the step is closed.
            ValueError: `input_ids` has another length.
        """
        self.cache._require_step(step)
        _fits("rows", step.num_tokens, self.max_tokens)
        if input_ids is not None and len(input_ids) != step.num_tokens:
            raise ValueError(f"input_ids: expected {step.num_tokens}, got {len(input_ids)}")
        data = [self._plan(key) for key in self._kind_keys]
        core = self.cache._core
        layout = Layout()
        layout.add(self._plan_at.start // 8 + data[0].num_words, 8)
        news = News(core, layout)
        _fits("page list entries", news.arena_size, len(self._lists))
        if self.cache._page_lists.pages is not self._lists:
            raise PlanCapacityExceeded("page lists: the cache's were moved to a larger array")
        if self.cache._streams or layout.num_bytes > len(self._block):
            layout, news = self._tell_apart(data[0].num_words)
        if self.cache._streams:
            self.cache._streams.record(*self._memory())
        try:
            self._write(step, input_ids, data, news, layout.num_bytes)
        except BaseException:
            core.forget_arena()
            raise
        self.shifted = any(d.num_rotations for d in data)
        if self.shifted:
            self._write_rotations(step.num_tokens, data)
        self.num_tokens, self.num_branches = step.num_tokens, len(step.branches)

    def _plan(self, key: _Kind) -> _C.PlanData:
        data = resident_plan(self.cache, key[0], self._shape(key))
        _fits("bytes of a plan", 8 * data.num_words, 8 * self.max_plan_words)
        _fits("partial rows of a plan", data.num_partial_rows, self.max_partial_rows)
        _fits("rotated query rows of a plan", data.num_rotations, self.max_rotations)
        return data

    def _shape(self, key: _Kind) -> PlanShape:
        layer = next(x for x in self.cache._storage.layers if _kind(x) == key)
        return layer.plan_shape(self.cache.dtype)

    def _tell_apart(self, num_words: int) -> tuple[Layout, News]:
        """Sends news by themselves: long ones, such as all lists of a large prefill; and all where
        other streams are announced, as the block belongs to the current stream and page lists to
        that of uploads."""
        core, streams, staging = self.cache._core, self.cache._streams, self.cache._staging
        layout = Layout()
        news = News(core, layout)
        try:
            with streams.uploading():  # of other steps too, of which this one's plans may know
                if news.count or news.num_moves:
                    num_moved = news.fill(core, staging.buffer(layout.num_bytes))
                    sent = torch.empty(
                        layout.num_bytes, dtype=torch.uint8, device=self._block.device
                    )
                    staging.send(layout.num_bytes, sent)
                    self.cache._page_lists.apply(news, sent, num_moved)
        except BaseException:
            core.forget_arena()
            raise
        nothing = Layout()
        nothing.add(self._plan_at.start // 8 + num_words, 8)
        return nothing, News(core, nothing)

    def _memory(self) -> Iterator[Tensor]:
        """All that `attend` reads and writes here."""
        yield self._block
        yield from self._plans.values()
        yield from self._rotations.memory()
        for tensors in self._workspaces.values():
            yield from tensors

    def _write(
        self,
        step: Step,
        input_ids: Sequence[int] | None,
        data: list[_C.PlanData],
        news: News,
        num_bytes: int,
    ) -> None:
        core, width = self.cache._core, self.max_tokens
        host = self._staging.buffer(len(self._block))
        at = host.data_ptr()
        ids = host[self._parts[0]].view(torch.int64)
        ids.zero_()
        if input_ids is not None:
            ids[: len(input_ids)] = torch.tensor(input_ids)
        positions, slots, last = (at + part.start for part in self._parts[1:])
        core.fill_padded_step(positions, slots, last, width)
        data[0].copy_to(at + self._plan_at.start)
        num_moved = news.fill(core, host)
        self._staging.send(num_bytes, self._block)
        self.cache._page_lists.apply(news, self._block, num_moved)
        for key, more in zip(self._kind_keys[1:], data[1:], strict=True):
            host = self._staging.buffer(8 * more.num_words)
            more.copy_to(host.data_ptr())
            self._staging.send(8 * more.num_words, self._plans[key].view(torch.uint8))

    def _write_rotations(self, num_tokens: int, data: list[_C.PlanData]) -> None:
        for key, one in zip(self._kind_keys, data, strict=True):
            begin, count = one.rotations
            rotations = self._plans[key][begin : begin + count].view(torch.int32).view(-1, 2)
            ropes = [x.rope for x in self.cache._storage.layers if _kind(x) == key]
            self._rotations.write(key, rotations, num_tokens, ropes)

    def attend(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`ForkedKVCache.attend` over the step written last, padded to the rows of `q`.

        Args:
            layer_idx, softmax_scale, softcap, sinks: as there.
            q: (rows, num_q_heads, head_dim), at least the step's rows, at most `max_tokens`.
            k: (rows, num_kv_heads, head_dim).
            v: (rows, num_kv_heads, head_dim_v).

        Returns:
            (rows, num_q_heads, head_dim_v); zeros for padding.

        Raises:
            ValueError, TypeError: a shape, dtype, device or stride is off.
        """
        cache = self.cache
        layer = cache._layer(layer_idx)
        rows = checks.tensor("q", q, shape=("rows", "num_q_heads", "head_dim")).shape[0]
        if not self.num_tokens <= rows <= self.max_tokens:
            raise ValueError(f"q: expected {self.num_tokens} to {self.max_tokens} rows, got {rows}")
        cache._storage.check_rows(layer, rows, q, k, v)
        options = ops.check_scores(
            softmax_scale, softcap, sinks, layer.num_q_heads, layer.head_dim, cache.device
        )
        k_cache, v_cache = cache.layer(layer_idx)
        cache._storage.store(layer, k, v, self.slot_mapping[:rows], self.num_tokens)
        if self.shifted:
            assert layer.rope is not None
            q = self._rotations.queries(_kind(layer), layer.rope, q)
        run = self._attend_cpu if cache.backend == "cpu" else self._attend_triton
        return run(rows, layer, q, k_cache, v_cache, *options)

    def _attend_cpu(
        self,
        rows: int,
        layer: Layer,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        cap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        out = q.new_zeros((rows, q.shape[1], layer.head_dim_v))
        k_scale, v_scale = layer.k_scale, layer.v_scale
        lse = q.new_empty((rows, q.shape[1]), dtype=torch.float32)
        _C.tree_attention_cpu(
            self._plans[_kind(layer)].data_ptr(),
            rows_argument(q),
            paged_argument(k_cache),
            paged_argument(v_cache),
            rows_argument(out),
            lse.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
            0 if k_scale is None else k_scale.data_ptr(),
            0 if v_scale is None else v_scale.data_ptr(),
            DTYPE_CODES[q.dtype],
            DTYPE_CODES[k_cache.dtype],
            layer.num_q_heads,
            layer.num_kv_heads,
            layer.head_dim,
            layer.head_dim_v,
            scale,
            cap,
            self._lists.data_ptr(),
        )
        return out

    def _attend_triton(
        self,
        rows: int,
        layer: Layer,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        cap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        on_gpu = q.device.type == "cuda"
        out: Tensor = torch.ops.fork_attn.tree_attention_triton(
            q,
            k_cache,
            v_cache,
            self._plans[_kind(layer)],
            self._lists,
            *self._workspace(layer),
            rows,
            self.cache.num_workers if on_gpu else ops.ops_triton.INTERPRETER_PROGRAMS,
            max(1, min(64, self._most_rows // layer.group)),
            layer.window or 0,
            scale,
            cap,
            sinks,
            layer.k_scale,
            layer.v_scale,
            self._merge(layer),
            self.cache.batch_invariant,
        )[0]
        return out

    def _merge(self, layer: Layer) -> Merge:
        """Of any plan that fits."""
        from fork_attn.kernels.bodies import choose_merge

        sizes = (self.max_partial_rows, layer.group, layer.head_dim_v)
        return choose_merge(*sizes, self.cache.batch_invariant)

    def _workspace(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Partial results and counters, shared by layers of one shape."""
        key = (layer.num_q_heads, layer.num_kv_heads, layer.head_dim_v)
        if key not in self._workspaces:
            from fork_attn.kernels.launch import Workspace

            made = Workspace.allocate(
                self.max_partial_rows, self.max_tokens, *key, self.cache.device
            )
            self._workspaces[key] = (made.partial_out, made.partial_lse, made.counters)
        return self._workspaces[key]


def _kind(layer: Layer) -> _Kind:
    return (layer.window, layer.group)


def _fits(what: str, needed: int, capacity: int) -> None:
    if needed > capacity:
        raise PlanCapacityExceeded(f"{what}: expected at most {capacity}, got {needed}")
