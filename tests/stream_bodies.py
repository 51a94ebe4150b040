"""Steps on several streams, written once: tests/gpu runs them on a card, tests/test_page_lists.py
and tests/triton_interpreter on the CPU, where work on another stream is queued."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from cache_pair import CachePair
from device_bodies import CudaLane, Lane, QueuedLane, lanes
from kv_table import KVTable, Model

import fork_attn as fa
from fork_attn import Branch, Draft, OutOfPages
from fork_attn.kv_library import DTYPE_CODES, paged_argument, rows_argument
from fork_attn.plan import Plan
from fork_attn.plan_buffers import PlanBuffers
from fork_attn.reference_cache import Rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MODEL = Model(head_dim=16)
TABLE = KVTable(MODEL)
WAYS = ("step", "buffers")  # a step's own plans; PlanBuffers
VERBS = (
    *("free", "join", "crop", "crop_in_page", "excise", "select", "reorder"),
    *("rollback", "draft", "growth", "sibling"),
)


def attention(
    cache: fa.ForkedKVCache, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """By an uploaded plan, as it is on the device when this runs."""
    if cache.backend == "triton":
        return fa.tree_attention(q, k, v, plan, backend="triton")[0]
    assert plan.on_device is not None
    out, lse = torch.zeros_like(q), q.new_empty(q.shape[:2])
    shape, code = plan.shape, DTYPE_CODES[torch.float32]
    fa._C.tree_attention_cpu(
        *(plan.on_device.words.data_ptr(), rows_argument(q)),
        *(paged_argument(k), paged_argument(v), rows_argument(out), lse.data_ptr()),
        *(0, 0, 0, code, code, shape.num_q_heads, shape.num_kv_heads),
        *(shape.head_dim, shape.head_dim_v, shape.head_dim**-0.5, 0.0),
        plan.on_device.pages.data_ptr(),
    )
    return out


class QueuedSteps:
    """Steps whose attention another stream runs later, beside the oracle."""

    def __init__(self, device: str, way: str, num_pages: int = 120) -> None:
        backend = "triton" if device == "cuda" or INTERPRETED else "cpu"
        options = {"page_size": 4, "device": device, "backend": backend, "table": TABLE}
        self.pair = CachePair(MODEL, num_pages=num_pages, **options)
        if way == "step":  # on the CPU too: page lists stay, and a step is one upload
            self.pair.cache._resident = True
        self.way = way
        self._kept: list[object] = []  # what is the caller's to keep until streams have read it
        self.results: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def step(
        self,
        lane: Lane | None,
        counts: Mapping[Branch, int | Draft],
        *,
        opened_there: bool = True,
        commit: bool = True,
    ) -> None:
        """Opens a step, queues its K, V and attention on a lane (None: the own stream), and closes
        it; `opened_there`: with the lane's stream current."""
        pair = self.pair
        rows = pair.rows(counts)
        inputs = self._inputs(rows)
        self._kept.append(inputs)
        outs: list[torch.Tensor] = []
        where = lane.use() if lane is not None and opened_there else nullcontext()
        with where:
            step = pair.open(counts)
            work = self._work(step, inputs, outs)
        work() if lane is None else lane.run(work)
        wants = [
            pair.oracle.attend(rows, layer, qkv[0].cpu(), window=window)[0]
            for layer, (window, qkv) in enumerate(zip(MODEL.windows, inputs, strict=True))
        ]
        self.results.append((outs, wants))
        if commit:
            step.commit()
            pair.oracle.step(rows)
        else:
            step.rollback()

    def _inputs(self, rows: Mapping[int, Rows]) -> list[list[torch.Tensor]]:
        m, device = MODEL, self.pair.cache.device
        identities = [t.identity for new in rows.values() for t in new.tokens]
        out = []
        for layer in range(len(m.windows)):
            q = torch.randn(len(identities), m.num_q_heads, m.head_dim)
            out.append([x.to(device) for x in (q, *self.pair.table.kv(layer, identities))])
        return out

    def _work(
        self, step: fa.Step, inputs: list[list[torch.Tensor]], outs: list[torch.Tensor]
    ) -> Callable[[], object]:
        """What stores and attends; the plans are sent now."""
        cache = self.pair.cache
        if self.way == "buffers":
            buffers = PlanBuffers(cache, max_tokens=step.num_tokens)
            buffers.update(step)
            return lambda: outs.extend(buffers.attend(i, *qkv) for i, qkv in enumerate(inputs))
        plans = [step.plan_for(layer) for layer in range(len(inputs))]
        slots = step.slot_mapping

        def work() -> None:
            for layer, (plan, (q, k, v)) in enumerate(zip(plans, inputs, strict=True)):
                caches = cache.layer(layer)
                torch.ops.fork_attn.store_kv(k, v, *caches, slots)
                outs.append(attention(cache, plan, q, *caches))

        return work

    def finish(self, *others: Lane) -> None:
        """All lanes finish; every step's attention and every byte is the oracle's."""
        for lane in others:
            lane.finish()
        for outs, wants in self.results:
            assert len(outs) == len(wants)
            for out, want in zip(outs, wants, strict=True):
                torch.testing.assert_close(out.cpu().double(), want, atol=1e-5, rtol=1e-5)
        self.pair.check()


def what_queued_attention_reads_outlives(
    device: str, way: str, verb: str, opened_there: bool
) -> None:
    """A slow stream attends; then a verb gives up what it reads, and other branches want it."""
    steps = QueuedSteps(device, way)
    pair = steps.pair
    (lane,) = lanes(device, 1)
    lane.announce(pair.cache)
    root = pair.new_branch()
    steps.step(None, {root: 10})
    a, b, c = pair.fork(root, 3)
    steps.step(None, dict.fromkeys((a, b, c), 13))
    lane.delay()
    options = {"opened_there": opened_there, "commit": verb != "rollback"}
    counts: dict[Branch, int | Draft] = dict.fromkeys((a, b, c), 5)
    if verb == "draft":
        counts[b] = Draft([-1, 0, 1, 1, 2, 2, 2, 5, 6])
    steps.step(lane, counts, **options)
    own: list[Branch] = []  # see nothing that the lane has yet to write, and go on elsewhere
    if verb == "free":
        pair.free(a, b)
    elif verb == "join":
        pair.join(root, [a, b])
    elif verb == "crop":
        pair.crop(b, 14)
        pair.crop(a, 12)
        own = [a, b]
    elif verb == "crop_in_page":
        pair.crop(b, 17)
        pair.crop(a, 9)
        own = [a, b]
    elif verb == "excise":
        pair.excise(b, 10, b.length)
        pair.excise(a, 12, 20)
        own = [b]
    elif verb == "select":
        pair.select(root, a)
    elif verb == "reorder":
        pair.reorder([a, b, c], [2, 2, 2])
    elif verb == "sibling":  # root writes on where the first to write in its page did
        pair.free(a)
        own = [root]
    elif verb == "rollback":
        own = [a, b, c]
    elif verb == "draft":
        own = [b]
    own += [pair.new_branch() for _ in range(4)]
    for count in (9, 30):  # the second makes lists move
        steps.step(None, dict.fromkeys(own, count))
        steps.step(lane, dict.fromkeys([x for x in pair.ids if x not in own], count))
    steps.finish(lane)


def streams_step_branches_of_their_own(
    steps: QueuedSteps, own: Lane | None, others: Sequence[Lane], turns: int, seed: int
) -> None:
    """Streams, the own one among them, step and change disjoint sets of branches of one root, at
    random and at their own pace."""
    rng = random.Random(seed)
    pair = steps.pair
    pair.wait = True
    root = pair.new_branch()
    steps.step(own, {root: 10})
    first = pair.fork(root, 3)
    steps.step(own, dict.fromkeys(first, 9))
    pair.crop(first[0], 11)
    pair.free(*first[1:])
    for lane in others:
        lane.announce(pair.cache)
        lane.delay()
    mine = [*pair.fork(root, 1), first[0]]
    sets = {own: mine, **{lane: pair.fork(root, 2) for lane in others}}
    for _ in range(turns):
        lane, mine = rng.choice(list(sets.items()))
        some = rng.sample(mine, rng.randint(1, len(mine)))
        verb = rng.choice(["step", "step", "step", "drop", *random_verbs(pair, some, mine)])
        try:
            if verb in ("step", "drop"):
                counts = {branch: rng.choice([1, 1, 2, 7, 20]) for branch in some}
                steps.step(lane, counts, commit=verb == "step")
            else:
                change(pair, rng, verb, some)
        except OutOfPages:
            pair.crop(mine[0], mine[0].length // 2)
            pair.free(*mine[1:])
        sets[lane] = [branch for branch in mine if branch.alive] or pair.fork(root, 1)
        if verb == "fork":
            sets[lane] += pair.fork(some[0], 1)
        for lane in (own, *others, pair.cache._streams._uploads):
            if lane is None or rng.random() < 0.7:
                continue
            if isinstance(lane, QueuedLane):
                lane.work_until(rng.randint(lane.done, len(lane.queue)))
            elif isinstance(lane, CudaLane):
                lane.delay()
    steps.finish(*([] if own is None else [own]), *others)


def random_verbs(pair: CachePair, some: list[Branch], mine: list[Branch]) -> list[str]:
    """Those that may be applied to some branches of a stream's set."""
    verbs = ["crop", "excise", "free"]
    return verbs + ["fork"] * (len(mine) < 4) + ["join", "reorder"] * (len(some) > 1)


def change(pair: CachePair, rng: random.Random, verb: str, some: list[Branch]) -> None:
    """Applies a verb."""
    first = some[0]
    if verb == "crop":
        pair.crop(first, rng.randint(0, first.length))
    elif verb == "excise":
        start = rng.randint(0, first.length)
        pair.excise(first, start, rng.randint(start, first.length))
    elif verb == "free":
        pair.free(*some)
    elif verb == "join":
        pair.join(first, some[1:])
    elif verb == "reorder":
        pair.reorder(some, [rng.randrange(len(some)) for _ in some])
