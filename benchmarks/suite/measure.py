"""One case of the suite: every way on one shape, checked against float64, then timed in turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fork_attn import checks
from fork_attn.bench import (  # noqa: F401  the ways register themselves
    way_flash,
    way_flashinfer,
    way_flex,
    way_grouped,
    way_ours,
    way_torch,
    way_xformers,
)
from fork_attn.bench.figures import close, measured
from fork_attn.bench.inputs import TOLERANCE, Inputs, Setting
from fork_attn.bench.machine import Limits
from fork_attn.bench.shapes import HEADS, PAGE_SIZES, SHAPES, Heads, Shape
from fork_attn.bench.timing import Timer
from fork_attn.bench.way import DTYPES, FAILED, WAYS, Absent, Way, told

COLD_BYTES = 128 << 20
"""Of K and V that a way reads before it comes back to the same layer: more than caches hold, as in
a model. Before single calls a GPU's L2 is flushed besides."""
COMPILED = ("S1", "N1", "T-1024-1", "R9")
"""What a way that compiles for seconds is measured on; on a GPU in more."""
GPU_QUICK = ("S1", "S2", "S3", "S6", "N1", "N2", "N4", "U1", "T-8192-8")


@dataclass(frozen=True)
class Case:
    """One shape in one setting."""

    shape: Shape
    setting: Setting

    @property
    def id(self) -> str:
        s = self.setting
        return f"{self.shape.id} {s.heads} {_name(s.dtype)} page {s.page_size}"


def _name(dtype: torch.dtype) -> str:
    return next(name for name, t in DTYPES.items() if t == dtype)


def cases(
    device: torch.device,
    quick: bool = False,
    shapes: Iterable[str] | None = None,
    heads: Iterable[Heads] | None = None,
    dtypes: Iterable[str] | None = None,
    page_sizes: Iterable[int] | None = None,
) -> list[Case]:
    """What is measured: on a CPU shapes that it does in a second or so, on a GPU all of them, those
    of `quick` first, with the first setting of heads and pages of 16; what is given replaces the
    default."""
    gpu = device.type == "cuda"
    chosen = list(shapes) if shapes is not None else None
    for name in chosen or ():
        if name not in SHAPES:
            raise ValueError(f"shapes: expected of {', '.join(SHAPES)}, got {name!r}")
    wanted = [SHAPES[name] for name in chosen] if chosen is not None else list(SHAPES.values())
    if chosen is None and not gpu:
        wanted = [s for s in wanted if s.cpu == "quick" or (s.cpu == "full" and not quick)]
    if chosen is None and gpu:
        first = [SHAPES[name] for name in GPU_QUICK]
        wanted = first + [s for s in wanted if s not in first and not quick]
    all_heads = list(heads) if heads is not None else list(HEADS[:1])
    default = ("bf16",) if gpu else ("bf16", "fp32", "fp8")
    all_dtypes = list(dtypes) if dtypes is not None else list(default)
    sizes = list(page_sizes) if page_sizes is not None else list(PAGE_SIZES[:1])
    for size in sizes:
        checks.integer("page_sizes", size, low=1, high=2**16)
    return [
        Case(shape, Setting(h, DTYPES[d], size, device))
        for h in all_heads
        for d in all_dtypes
        for size in sizes
        for shape in wanted
        # On CPUs fp32 and fp8 in a few shapes, unless asked for.
        if gpu or dtypes is not None or chosen is not None or d == "bf16" or shape.cpu == "quick"
    ]


def build_ways(
    inputs: Inputs, layers: int, kinds: Iterable[type[Way]]
) -> tuple[dict[str, Way], dict[str, float], dict[str, str]]:
    """The ways that run, the error of each, and why the others do not.

    This package's are built first: where memory is short, a rival goes without.

    Raises:
        RuntimeError: this package's own output is wrong.
    """
    ready: dict[str, Way] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    kinds = list(kinds)
    for kind in sorted(kinds, key=lambda kind: not kind.ours):
        try:
            ready[kind.name], errors[kind.name] = _built(kind, inputs, layers)
        except Absent as reason:
            absent[kind.name] = str(reason)
        except _Wrong:
            raise
        except Exception as failure:  # one's failure must not cost the others' numbers
            absent[kind.name] = FAILED + told(failure)
    names = [kind.name for kind in kinds]
    in_order = {name: ready[name] for name in names if name in ready}
    return in_order, errors, {name: absent[name] for name in names if name in absent}


class _Wrong(RuntimeError):
    pass


def _built(kind: type[Way], inputs: Inputs, layers: int) -> tuple[Way, float]:
    """A way that is ready to run, and its error.

    Raises:
        Absent: it cannot do this here, or is wrong.
        _Wrong: this package's own output is wrong.
    """
    kind.available(inputs)
    dtype = _name(inputs.setting.dtype)
    if dtype not in kind.dtypes:
        raise Absent(f"takes K and V in {' or '.join(kind.dtypes)}, not in {dtype}")
    way = kind(inputs)
    try:
        way.build(layers)
        way.plan()
        error, limit = inputs.error(way.output()), TOLERANCE[inputs.q.dtype]
        if not error <= limit:
            if kind.ours:
                raise _Wrong(f"{kind.name} is wrong by {error:.2e}: nothing is measured")
            raise Absent(f"wrong by {error:.2e}, the bound is {limit:.0e}")
    except Exception:
        close(way)
        raise
    return way, error


def run_case(
    case: Case, limits: Limits, seconds: float, only: Iterable[str] | None = None
) -> dict[str, Any]:
    """One case's result, as plain JSON values; `failed` names ways of this package that raised.

    Raises:
        RuntimeError: fork-attn's own output is wrong.
    """
    forest, setting = case.shape.make(), case.setting
    inputs = Inputs(forest, setting)
    layers = -(-COLD_BYTES // inputs.unique_bytes)
    kinds = [kind for name, kind in WAYS.items() if only is None or name in only]
    # What is there to hold e4m3 against is no rival, and not absent elsewhere.
    kinds = [k for k in kinds if not k.beside_fp8 or setting.dtype == DTYPES["fp8"]]
    skipped = [k for k in kinds if k.slow_build and not _compiles(case)]
    ways, errors, absent = build_ways(inputs, layers, [k for k in kinds if k not in skipped])
    absent |= {kind.name: "compiled for a few shapes in bf16 only" for kind in skipped}
    timer = Timer(setting.device, seconds / 4, min_rounds=7, far_rounds=3)
    try:
        times, graph_absent = measured(ways, timer, layers, absent)
    finally:
        for way in ways.values():
            close(way)
    raised = [k.name for k in kinds if k.ours and absent.get(k.name, "").startswith(FAILED)]
    return {
        **_facts(case, inputs, limits),
        "layers": layers,
        "ways": {
            name: {
                "ours": way.ours,
                "error": errors[name],
                "held_bytes": way.held_bytes(),
                **({"note": way.note} if way.note else {}),
                **times[name],
            }
            for name, way in ways.items()
        },
        "absent": absent,
        "graph_absent": graph_absent,
        **({"failed": raised} if raised else {}),
    }


def _compiles(case: Case) -> bool:
    few = set(COMPILED)
    if case.setting.device.type == "cuda":
        few |= {*GPU_QUICK, *(s.id for s in SHAPES.values() if s.cpu == "quick")}
    return case.shape.id in few and case.setting.dtype == torch.bfloat16


def _facts(case: Case, inputs: Inputs, limits: Limits) -> dict[str, Any]:
    forest, heads = inputs.forest, case.setting.heads
    rows = max(1, round(forest.visible_pairs / forest.unique_slots)) * heads.group
    rate = limits.rate(heads.kv, min(rows, 512), heads.dim)
    bandwidth = max(limits.stream.values())
    memory, compute = inputs.moved_bytes / bandwidth, inputs.flops / rate
    return {
        "id": case.id,
        "shape": case.shape.id,
        "family": case.shape.family,
        "text": case.shape.text,
        "heads": str(heads),
        "dtype": str(case.setting.dtype).removeprefix("torch."),
        "page_size": case.setting.page_size,
        "branches": len(forest.queries),
        "rows": forest.num_rows,
        "reuse": forest.reuse,
        "depth": _depth(forest.pieces),
        "longest": max(forest.contexts),
        "unique_bytes": inputs.unique_bytes,
        "copied_bytes": forest.copied_slots * inputs.slot_bytes,
        "moved_bytes": inputs.moved_bytes,
        "flops": inputs.flops,
        "limit_seconds": max(memory, compute),
        "limit_by": "memory" if memory > compute else "compute",
        "matmul_flops_per_s": rate,
    }


def _depth(pieces: Any) -> int:
    depth: list[int] = []
    for piece in pieces:
        depth.append(depth[piece.parent] + 1 if piece.parent >= 0 else 1)
    return max(depth, default=0)
