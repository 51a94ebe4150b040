"""ForkedKVCache: paged KV storage whose branches fork, join and crop without copying."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from fork_attn import _C, checks, ops, ops_flash
from fork_attn.books import Books, CacheStats
from fork_attn.branch import Branch, handles_of, make_branch
from fork_attn.device_step import Kind, plan_target
from fork_attn.devices import default_workers, resolved
from fork_attn.errors import StalePlan, Unsupported
from fork_attn.kv_library import DTYPE_CODES
from fork_attn.layers import Layer, PerLayer, make_layers
from fork_attn.render import render_cache
from fork_attn.rope import Rope
from fork_attn.scrub import make_scrub
from fork_attn.staging import PageLists, Staging
from fork_attn.step import Draft, Step
from fork_attn.storage import KVStorage
from fork_attn.streams import OtherStreams


class ForkedKVCache:
    """A pool of KV pages for all layers of a model, and the branches that see them.

    One thread at a time may use a cache; a second one that enters it raises `ConcurrentUse`.

    Args:
        num_layers: layers of the model.
        num_pages: pages of the pool; every layer has as many.
        num_q_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: heads of K and V.
        head_dim: of Q and K.
        head_dim_v: of V; None means `head_dim`.
        sliding_window: a row sees keys less than this many positions behind it; None means all.
        page_size: slots of a page.
        dtype: of K and V: float32, bfloat16, float16, or float8_e4m3fn, which halves a bf16 cache:
            see `set_scales`.
        device: where K and V live; "meta" keeps the books and makes plans, but holds no KV.
        tail: what a writer does with a part-filled page that it shares and cannot go on in: "seal"
            takes a fresh page, "copy" copies it (copy-on-write), which keeps page tables dense.
        backend: see `tree_attention`.
        batch_invariant: a row's output and LSE are the same bits whatever else is in the step, and
            whoever shares its context; somewhat slower (docs/plan.md).
        num_workers: workers that plans are balanced for; None means the device's cores or SMs.
        rope: how the layers' keys turn with their positions, for `join(rebase=...)`, `watch` and
            `excise(rebase=True)`; None: not known, so that these are refused.

    Raises:
        ValueError, TypeError: an argument is off.
        Unsupported: this version cannot do it, by name.
    """

    _lazy_storage = False

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_q_heads: PerLayer[int],
        num_kv_heads: PerLayer[int],
        head_dim: PerLayer[int],
        head_dim_v: PerLayer[int] | None = None,
        sliding_window: PerLayer[int | None] = None,
        page_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        tail: Literal["seal", "copy"] = "seal",
        backend: ops.Backend = "auto",
        batch_invariant: bool = False,
        num_workers: int | None = None,
        rope: PerLayer[Rope | None] = None,
    ) -> None:
        num_layers = checks.integer("num_layers", num_layers, low=1)
        self.num_pages = checks.integer("num_pages", num_pages, low=1)
        self.page_size = checks.integer("page_size", page_size, low=1, high=2**16)
        if self.num_pages * self.page_size >= 2**31:
            raise ValueError(
                f"num_pages: expected fewer than 2**31 slots, got {num_pages} x {page_size}"
            )
        if dtype not in DTYPE_CODES:
            wanted = "float32, bfloat16, float16 or float8_e4m3fn"
            raise TypeError(f"dtype: expected {wanted}, got {dtype}")
        if tail not in ("seal", "copy"):
            raise ValueError(f"tail: expected 'seal' or 'copy', got {tail!r}")
        self.batch_invariant = checks.boolean("batch_invariant", batch_invariant)
        self.dtype = dtype
        self.device = resolved(device)
        self.tail = tail
        self.backend = ops.resolve_backend(backend, self.device)
        if batch_invariant and self.backend not in ("cpu", "triton"):
            raise Unsupported(f"batch_invariant=True: backend {self.backend!r} does not promise it")
        if self.backend == "flash_attn":
            ops_flash.require_pages(self.page_size)
        # Whether page lists stay on the device, and steps are sent there as one upload.
        self._resident = self.backend == "triton" and self.device.type != "meta"
        self._target = plan_target(self.device)
        workers = default_workers(self.device) if num_workers is None else num_workers
        self.num_workers = checks.integer("num_workers", workers, low=1)
        head_dims = (head_dim, head_dim if head_dim_v is None else head_dim_v)
        self._storage = KVStorage(
            make_layers(num_layers, num_q_heads, num_kv_heads, *head_dims, sliding_window, rope),
            num_pages=self.num_pages,
            page_size=self.page_size,
            dtype=dtype,
            device=self.device,
            lazy=self._lazy_storage,
        )
        self._core = _C.CacheCore(self.num_pages, self.page_size, tail == "copy")
        self._lists: PageLists | None = None
        self._staging = Staging(self.device)
        self._streams = OtherStreams(self._core, self.device)
        self._storage.record = self._streams.record
        self._books = Books(self._core, self._streams, make_scrub(self._core, self._storage))
        self._step_ref: weakref.ref[Step] | None = None
        self._find_ropes: Callable[[], Sequence[Rope]] | None = None  # if not given; may refuse

    @classmethod
    def _lazy(cls, **kwargs: Any) -> ForkedKVCache:
        """A cache whose layers take memory at their first write, in the shapes that arrive then."""
        cache = cls.__new__(cls)
        cache._lazy_storage = True
        cache.__init__(**kwargs)  # type: ignore[misc]
        return cache

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"ForkedKVCache({self.num_layers} layers, {s.pages_live}/{s.pages_total} pages of "
            f"{self.page_size} live, {s.branches} branches, {self.dtype}, {self.device})"
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._storage.layers)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The live branches, oldest first."""
        return self._books.branches

    def new_branch(self) -> Branch:
        """A branch with an empty context."""
        return make_branch(self, self._books.verb().new_branch())

    def step(self, tokens: Mapping[Branch, int | Draft], *, wait: bool = False) -> Step:
        """Reserves slots for new tokens of some branches. Use as `with cache.step({a: 1, b: 3}) as
        step:`.

        Args:
            tokens: number of new tokens, or a draft tree, of each branch. The mapping's order is
                the order of rows.
            wait: where free pages do not do but pages that other streams still read would, wait
                for those streams instead of raising (see `record_stream`).

        Raises:
            OutOfPages: the pool cannot hold them; nothing was changed.
            ValueError: no branches, or a count below 1 or too large.
            StaleBranch, ForeignBranch, StepOpen: what their names say.
        """
        self._streams.require_current("step")
        if isinstance(tokens, Mapping):
            tokens = dict(tokens)  # one reading: its order is the order of rows
        num_tokens = self._books.open_step(tokens, wait, self, Branch, Draft)
        core = self._core
        try:
            step = Step(self, tokens, num_tokens)
            copies = core.step_copies()
            if copies:
                self._storage.copy_pages(copies)
        except BaseException:
            if core.step_open:
                core.rollback_step()
                self._books.freed()
            raise
        self._step_ref = weakref.ref(step)
        return step

    def attend(
        self,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        step: Step,
        *,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Stores the step's new K and V of one layer and attends: row i sees its branch's context
        and its own tokens up to itself (a draft token: its ancestors and itself).

        Args:
            layer_idx: 0 to num_layers - 1.
            q: (T, num_q_heads, head_dim), the step's rows in order, in the cache's dtype and
                device; with an e4m3 cache in float32, bfloat16 or float16.
            k: (T, num_kv_heads, head_dim), already rotated, in the dtype of `q`.
            v: (T, num_kv_heads, head_dim_v), likewise.
            step: open, of this cache.
            softmax_scale, softcap, sinks: see `tree_attention`.

        Returns:
            (T, num_q_heads, head_dim_v).

        Raises:
            ValueError, TypeError: a shape, dtype, device or stride is off.
            StalePlan: the step is closed.
            ConcurrentUse: another thread is using this cache.
        """
        layer = self._layer(layer_idx)
        self._require_step(step)
        if self.device.type == "meta":
            raise Unsupported("attend: a cache on device 'meta' holds no KV")
        self._storage.check_rows(layer, step.num_tokens, q, k, v)
        options = ops.check_scores(
            softmax_scale, softcap, sinks, layer.num_q_heads, layer.head_dim, self.device
        )
        k_cache, v_cache = self.layer(layer_idx)
        if self.backend == "flash_attn":
            tables = step._flash_tables()
            self._storage.store(layer, k, v, step.slot_mapping)
            return ops_flash.attend(q, k_cache, v_cache, tables, layer.window, *options)
        plan = step.plan_for(layer_idx)
        traced = torch.compiler.is_compiling()  # torch.compile cannot follow the extension
        if not traced:
            self._core.enter()
        try:
            self._storage.store(layer, k, v, step.slot_mapping)
            queries, scales = plan.queries(q, layer.rope), (layer.k_scale, layer.v_scale)
            out, _ = ops.run_tree_attention(
                queries, k_cache, v_cache, plan, *options, *scales, backend=self.backend
            )
        finally:
            if not traced:
                self._core.leave()
        return out

    def layer(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(k_cache, v_cache): views (num_pages, page_size, num_kv_heads, head_dim), the latter with
        head_dim_v.

        Raises:
            ValueError: no such layer, or (attached models) one that was never written.
        """
        layer = self._layer(layer_idx)
        if layer.k_cache is None or layer.v_cache is None:
            raise ValueError(
                f"layer_idx: layer {layer_idx} takes memory at its first write, and had none yet"
            )
        return layer.k_cache, layer.v_cache

    def scales(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(k_scale, v_scale) of a layer, (num_kv_heads,) fp32 each, or None: they are not set, or
        the cache is not e4m3.

        Raises:
            ValueError: no such layer.
        """
        layer = self._layer(layer_idx)
        if layer.k_scale is None or layer.v_scale is None:
            return None
        return layer.k_scale, layer.v_scale

    def set_scales(self, layer_idx: int, k_scale: torch.Tensor, v_scale: torch.Tensor) -> None:
        """Sets what the K and V of one layer of an e4m3 cache are divided by when they are stored
        and multiplied with when they are read.

        A layer whose scales are not set when it is first written takes them from the tokens of that
        write, with room for values twice as large.

        Args:
            layer_idx: 0 to num_layers - 1.
            k_scale: (num_kv_heads,) fp32, positive.
            v_scale: likewise.

        Raises:
            ValueError: the cache is not e4m3, or pages are live, or still read by other streams,
                that the layer was written to with other scales; or a shape or value is off.
            TypeError: a dtype is off.
        """
        layer = self._layer(layer_idx)
        stats = self.stats()
        in_use = layer.written and stats.pages_live + stats.pages_pending > 0
        self._storage.set_scales(layer, k_scale, v_scale, in_use=in_use)

    def reorder(self, branches: Sequence[Branch], indices: Sequence[int]) -> None:
        """`branches[i]` continues the context of `branches[indices[i]]`, all at once (beam search).

        Raises:
            ValueError: `indices` has another length, or names no branch.
            DuplicateBranch, ForeignBranch, StaleBranch, StepOpen: what their names say.
        """
        handles = handles_of(self, "branches", branches)
        targets = [checks.integer("indices", i, low=-(2**31)) for i in indices]
        self._books.verb().reorder(handles, targets)
        self._books.freed()

    def free(self, branches: Iterable[Branch]) -> None:
        """Releases branches, all or none; pages that no other branch sees return at once.

        Raises:
            DuplicateBranch, ForeignBranch, StaleBranch, StepOpen: what their names say.
        """
        handles = handles_of(self, "branches", branches)
        self._books.verb().free(handles)
        self._books.forget(handles)
        self._books.freed()

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Announces a stream, besides the cache's own, whose work reads or writes the cache's
        pages; it waits for what the own stream has queued by now.

        Pages freed from now on are not reused before all work that is queued on the stream, or on
        the own one, when they are freed has finished. The cache's own stream is the one that was
        current when the cache was made; until another is announced, what runs there is in order
        and waits for nothing. Work that sees what another stream stored is ordered behind that by
        the caller, as for any tensor (`stream.wait_stream`): docs/streams.md.

        Raises:
            TypeError, ValueError: not a CUDA stream of the cache's device.
        """
        if not self._streams.announce(stream):
            return
        self._streams.record(*self._storage.caches())
        if self._lists is not None:
            self._streams.record(self._lists.pages)
        if self._open_step is not None:
            self._open_step._record_streams()

    def stats(self) -> CacheStats:
        """Counts of pages, segments and branches, and the bytes of live KV."""
        return self._books.stats(self._storage.page_bytes)

    def check(self) -> None:
        """Recounts every invariant of the bookkeeping from scratch.

        Raises:
            InvariantError: one does not hold.
        """
        self._core.check()

    def render(self) -> str:
        """The live branches as a tree of text: who forked from whom, lengths, positions, pages."""
        self._books.free_dropped()
        return render_cache(self)

    @property
    def _page_lists(self) -> PageLists:
        """The page lists on the device; room for all pages several times over, as lists grow by
        doubling."""
        if self._lists is None:
            with self._streams.uploading():
                self._lists = PageLists(self._core, self.device, max(4096, 8 * self.num_pages))
            self._streams.record(self._lists.pages)
        return self._lists

    def _kinds(self) -> list[Kind]:
        """Layers of one kind share a plan: same sliding window, heads and dims."""
        layers = self._storage.layers
        return list(dict.fromkeys((x.window, x.plan_shape(self.dtype)) for x in layers))

    @property
    def _open_step(self) -> Step | None:
        step = self._step_ref() if self._step_ref is not None else None
        return step if step is not None and step.state == "open" else None

    def _require_ropes(self, verb: str) -> None:
        """Before a verb that shifts positions: every layer's RoPE must be known."""
        layers = self._storage.layers
        if self.device.type == "meta" or all(layer.rope is not None for layer in layers):
            return
        if self._find_ropes is None:
            raise Unsupported(
                f"{verb}: the cache does not know how keys turn with their positions; "
                "expected rope=... when it was made"
            )
        for layer, rope in zip(layers, self._find_ropes(), strict=True):
            layer.rope = rope

    def _layer(self, layer_idx: int) -> Layer:
        index = checks.integer("layer_idx", layer_idx, low=0, high=self.num_layers - 1)
        return self._storage.layers[index]

    def _require_step(self, step: Step) -> None:
        if not isinstance(step, Step):
            raise TypeError(f"step: expected a Step, got {type(step).__name__}")
        if step._cache is not self:
            raise ValueError("step: expected one of this cache, got one of another")
        if step.state != "open":
            raise StalePlan(f"step: expected an open step, got one that is {step.state}")
