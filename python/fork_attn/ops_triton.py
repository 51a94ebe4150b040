"""Tree attention by Triton, as a torch op; `ops` calls it when that backend is chosen.

Triton is imported when a kernel first runs: the package works without it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from fork_attn import _env
from fork_attn.errors import Unsupported
from fork_attn.plan import Plan
from fork_attn.plan_format import header, sections

if TYPE_CHECKING:
    from fork_attn.kernels.bodies import Merge
    from fork_attn.kernels.launch import Workspace

INTERPRETER_PROGRAMS = 4

_library = torch.library.Library("fork_attn", "FRAGMENT")
_library.define(
    "tree_attention_triton(Tensor q, Tensor k_cache, Tensor v_cache, Tensor plan, Tensor pages, "
    "Tensor(a!) partial_out, Tensor(b!) partial_lse, Tensor(c!) counters, int num_rows, "
    "int num_programs, int max_block_tokens, int window, float softmax_scale, float softcap, "
    "Tensor? sinks, Tensor? k_scale, Tensor? v_scale, str merge='inside', "
    "bool batch_invariant=False) -> (Tensor, Tensor)"
)


def require_triton(device: torch.device) -> None:
    """Raises Unsupported, by name, where Triton is not installed or cannot run on `device`."""
    if find_spec("triton") is None:
        raise Unsupported("backend 'triton' needs Triton, which is not installed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type not in ("cuda", "meta") and not (interpreted and device.type == "cpu"):
        raise Unsupported(
            f"backend 'triton' cannot attend on {device}: expected a CUDA device, or the CPU with "
            "TRITON_INTERPRET=1"
        )


def check_supported(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raises Unsupported, by name, for head dimensions and dtypes that the kernel cannot do."""
    from fork_attn.kernels import launch

    head_dims = (k_cache.shape[3], v_cache.shape[3])
    launch.check_supported(q.device, q.dtype, k_cache.dtype, head_dims)


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    pages: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    counters: torch.Tensor,
    num_rows: int,
    num_programs: int,
    max_block_tokens: int,
    window: int,
    softmax_scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    merge: Merge = "inside",
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fork_attn.kernels import launch

    if _env.checks_pages():
        launch.check_pages(plan, pages, min(len(k_cache), len(v_cache)), k_cache.shape[1])
    out, lse = _fake(q, k_cache, v_cache, plan, pages, partial_out, partial_lse, counters, num_rows)
    launch.tree_attention(
        q,
        k_cache,
        v_cache,
        plan,
        pages,
        out,
        lse,
        launch.Workspace(partial_out, partial_lse, counters),
        num_programs=num_programs,
        max_block_tokens=max_block_tokens,
        page_size=k_cache.shape[1],
        group=q.shape[1] // k_cache.shape[2],
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        merge=merge,
        batch_invariant=batch_invariant,
    )
    return out, lse


def _fake(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: torch.Tensor,
    pages: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    counters: torch.Tensor,
    num_rows: int,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty((num_rows, q.shape[1], v_cache.shape[3]))
    return out, q.new_empty((num_rows, q.shape[1]), dtype=torch.float32)


_library.impl("tree_attention_triton", _launch, "CUDA")
_library.impl("tree_attention_triton", _launch, "CPU")  # under the interpreter
torch.library.register_fake("fork_attn::tree_attention_triton", _fake, lib=_library)


class _OnDevice:
    """A plan's buffer on the device, and memory for its partial results."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        head = header(plan.buffer)
        if plan.on_device is not None:
            self.buffer, self.pages = plan.on_device.words, plan.on_device.pages
        else:
            self.buffer = plan.buffer.to(device)
            self.pages = sections(plan.buffer).pages.to(device)
        self.num_tokens = head.num_tokens
        self.num_partial_rows = head.num_partial_rows
        self.max_block_tokens = head.max_block_tokens
        self.max_merge_rows = head.max_merge_rows
        self.batch_invariant = head.tile_slots > 0
        self.window = head.window
        self.workspaces: dict[tuple[int, int, int], Workspace] = {}

    def workspace(self, num_q_heads: int, num_kv_heads: int, head_dim_v: int) -> Workspace:
        from fork_attn.kernels.launch import Workspace

        key = (num_q_heads, num_kv_heads, head_dim_v)
        if key not in self.workspaces:
            rows = (self.num_partial_rows, self.num_tokens)
            self.workspaces[key] = Workspace.allocate(*rows, *key, self.buffer.device)
        return self.workspaces[key]

    def merge(self, group: int, head_dim_v: int) -> Merge:
        from fork_attn.kernels.bodies import choose_merge

        return choose_merge(self.max_merge_rows, group, head_dim_v, self.batch_invariant)


def prepare(plan: Plan, device: torch.device) -> None:
    """Does what the plan's first launch on a device would do, so that torch.compile meets tensors
    alone."""
    plan.launches[device] = here = _OnDevice(plan, device)
    here.workspace(plan.shape.num_q_heads, plan.shape.num_kv_heads, plan.shape.head_dim_v)


def memory(plan: Plan) -> list[torch.Tensor]:
    """What a plan holds on devices: its words, with all that was uploaded with them, and memory for
    partial results. Page lists are the cache's."""
    out = []
    for here in plan.launches.values():
        out.append(here.buffer)
        for work in here.workspaces.values():
            out += [work.partial_out, work.partial_lse, work.counters]
    return out


def run(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    scale: float,
    cap: float,
    sinks: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.tree_attention` of checked arguments; the plan goes to the device at its first use.

    Calls for one plan share the memory of its partial results, and so belong on one stream.
    """
    if q.device not in plan.launches:
        plan.launches[q.device] = _OnDevice(plan, q.device)
    here = plan.launches[q.device]
    workspace = here.workspace(q.shape[1], k_cache.shape[2], v_cache.shape[3])
    programs = INTERPRETER_PROGRAMS
    if q.device.type == "cuda":
        programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.fork_attn.tree_attention_triton(
        q,
        k_cache,
        v_cache,
        here.buffer,
        here.pages,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.counters,
        here.num_tokens,
        programs,
        here.max_block_tokens,
        here.window,
        scale,
        cap,
        sinks,
        k_scale,
        v_scale,
        here.merge(q.shape[1] // k_cache.shape[2], v_cache.shape[3]),
        here.batch_invariant,
    )
    return result
