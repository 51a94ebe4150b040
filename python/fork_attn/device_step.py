"""An open step on the device: its tensors and the plans of all layers, in one upload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fork_attn import _C, costs, ops_triton
from fork_attn.plan import Plan, PlanOnDevice, PlanShape, make_plan, plan_data
from fork_attn.staging import Layout, News

if TYPE_CHECKING:
    from fork_attn.cache import ForkedKVCache

Kind = tuple["int | None", PlanShape]
"""Layers of one kind share a plan."""

STEP_TENSORS = (
    "position_ids",
    "slot_mapping",
    "last_indices",
    "cu_seqlens_q",
    "seqlens_k",
)


def plan_target(device: torch.device) -> str:
    """The row of the planner's cost table for a device, with measured costs loaded.

    Raises:
        ValueError: the file of costs that was named is off (`costs.load`).
    """
    costs.load()
    return costs.device_target(device)


def resident_plan(cache: ForkedKVCache, window: int | None, shape: PlanShape) -> _C.PlanData:
    """The plan of the cache's open step for one kind of layer, for page lists that stay on the
    device."""
    return plan_data(
        cache._core,
        window,
        shape,
        cache._target,
        cache.num_workers,
        batch_invariant=cache.batch_invariant,
        resident=True,
    )


def upload_step(
    cache: ForkedKVCache, num_tokens: int, num_branches: int
) -> tuple[dict[str, torch.Tensor], dict[Kind, Plan]]:
    """Plans the core's open step for every kind of layer and sends all of it to the device.

    Asynchronous: what comes back may be used by work on the current stream.

    Returns:
        The tensors named in STEP_TENSORS, and the plans.
    """
    core, lists, streams = cache._core, cache._page_lists, cache._streams
    kinds = cache._kinds()
    data = [resident_plan(cache, window, shape) for window, shape in kinds]
    layout = Layout()
    sizes = (num_tokens, num_tokens, num_branches, num_branches + 1, num_branches)
    itemsizes = (8, 8, 8, 4, 4)
    parts = [layout.add(n, size) for n, size in zip(sizes, itemsizes, strict=True)]
    words = [layout.add(d.num_words, 8) for d in data]
    news = News(core, layout)
    staging = cache._staging
    host = staging.buffer(layout.num_bytes)
    at = host.data_ptr()
    core.fill_step(*(at + part.start for part in parts))
    for d, where in zip(data, words, strict=True):
        d.copy_to(at + where.start)
    try:
        num_moved = news.fill(core, host)
        with streams.uploading():
            lists.reserve(news.arena_size)
            streams.record(lists.pages)
            sent = torch.empty(layout.num_bytes, dtype=torch.uint8, device=cache.device)
            staging.send(layout.num_bytes, sent)
            lists.apply(news, sent, num_moved)
    except BaseException:
        core.forget_arena()
        raise
    dtypes = (torch.int64,) * 3 + (torch.int32,) * 2
    tensors = {
        name: sent[part].view(dtype)
        for name, part, dtype in zip(STEP_TENSORS, parts, dtypes, strict=True)
    }
    plans = {
        kind: make_plan(
            d,
            kind[1],
            cache.page_size,
            cache.num_workers,
            PlanOnDevice(sent[where].view(torch.int64), lists.pages),
        )
        for kind, d, where in zip(kinds, data, words, strict=True)
    }
    for plan in plans.values():
        ops_triton.prepare(plan, cache.device)
    return tensors, plans
