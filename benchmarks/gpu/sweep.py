"""Bodies of the tree attention kernel timed in turn: warps, stages, pointers against descriptors.

    python benchmarks/gpu/sweep.py --out FOLDER [--seconds N] [--dry]

For row blocks of 16, 32, 64 and 128 rows: contexts read from memory, and the same plan over one
page, which leaves arithmetic. Writes sweep.json after each plan; a second run at the same commit on
the same GPU goes on where the first was cut off. Every body's output is held against the first
one's. `--dry` runs one small plan under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import commit, machine, versions

from fork_attn import ops
from fork_attn.bench.timing import Call, Timer, graphed
from fork_attn.calibrate.design import HEADS, Tensors, plan_rows
from fork_attn.costs import device_target
from fork_attn.kernels import launch
from fork_attn.kernels.launch import Body
from fork_attn.plan import Plan

ROWS = (16, 32, 64, 128)
LOADS = (("pointers", 16), ("pointers", 64), ("descriptors", 64))  # and slots of a page
TOLERANCE = 2e-2  # of the largest output, in bf16, whatever the order of sums


def bodies(rows: int) -> Iterator[Body]:
    """The one that is chosen now first."""
    sm = launch.compute_capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = launch.choose_body(rows, 128, 128, 2, 2, sm)
    yield chosen
    for warps, stages in itertools.product((4, 8), (2, 3, 4)):
        body = Body(chosen.rows, chosen.slots, warps, stages)
        if body != chosen:
            yield body


@contextmanager
def forced(body: Body, descriptors: bool) -> Iterator[None]:
    """Launches inside take this body, and descriptors only if they are asked for."""
    applies = launch.tma_applies

    def asked_for(*arguments: Any) -> bool:
        if descriptors and not applies(*arguments):
            raise ValueError("descriptors cannot load these pages here (launch.tma_applies)")
        return descriptors

    with (
        mock.patch.object(launch, "choose_body", lambda *_: body),
        mock.patch.object(launch, "tma_applies", asked_for),
    ):
        yield


def sweep_plan(
    plan: Plan, tensors: Tensors, descriptors: bool, timer: Timer, dry: bool
) -> list[dict[str, Any]]:
    """One row for each body: seconds from memory and over one page, or why it did not run."""
    found: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    first: torch.Tensor | None = None
    rows = plan.counts["max_block_tokens"] * plan.group
    for index, body in enumerate(bodies(rows)):
        row: dict[str, Any] = {"body": asdict(body), "chosen": index == 0}
        found.append(row)
        try:
            with forced(body, descriptors):
                for streamed in (True, False):
                    arguments = tensors.arguments(plan, streamed)
                    run = _call(arguments)
                    out, _ = run()
                    if streamed and first is None:
                        first = out
                        arguments_of_first = arguments
                    if streamed:  # random queries: those of the first body again
                        out, _ = _call(arguments_of_first)()
                        assert first is not None
                        row["difference"] = float((out - first).abs().max() / first.abs().max())
                        if not row["difference"] <= TOLERANCE:
                            raise ValueError(f"differs by {row['difference']}")
                    name = f"{index} {'memory' if streamed else 'page'}"
                    calls[name] = run if dry else graphed(run)
        except Exception as error:  # out of shared memory, a compiler's limit: named, others go on
            row["absent"] = f"{type(error).__name__}: {error}"[:300]
            for name in [name for name in calls if name.startswith(f"{index} ")]:
                del calls[name]
    for name, times in timer.measure(calls).items():
        index_text, what = name.split()
        found[int(index_text)][f"seconds_{what}"] = times.median
    return found


def _call(arguments: tuple[Any, ...]) -> Any:
    q, k_cache, v_cache, plan = arguments
    return lambda: ops.tree_attention(q, k_cache, v_cache, plan, backend="triton")


def todo(dry: bool) -> list[tuple[int, str, int]]:
    """(rows, load, page size), what matters most first."""
    if dry:
        return [(16, "pointers", 16)]
    return [(rows, load, page) for load, page in LOADS for rows in (128, 64, 16, 32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=150.0, help="of all, compiling included")
    parser.add_argument("--dry", action="store_true", help="one small plan, interpreted on the CPU")
    args = parser.parse_args()
    if args.dry and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry needs TRITON_INTERPRET=1 in the environment")
    if not args.dry and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry interprets one small plan")
    device = torch.device("cpu" if args.dry else "cuda")
    path = args.out / "sweep.json"
    args.out.mkdir(parents=True, exist_ok=True)
    result = _begin(path)
    done = {(c["rows"], c["load"], c["page_size"]) for c in result["cases"]}
    end = time.monotonic() + args.seconds
    workers = 2 if args.dry else torch.cuda.get_device_properties(device).multi_processor_count
    timer = Timer(device, 0.0, *((1, 1) if args.dry else (20, 20)))
    for rows, load, page in todo(args.dry):
        if (rows, load, page) in done:
            print(f"{rows} rows, {load}, pages of {page}: there already")
            continue
        if time.monotonic() > end:
            print(f"{rows} rows, {load}, pages of {page}: no time left; run again to go on")
            continue
        tensors = Tensors(device, 64 if args.dry else (1 << 30) // (HEADS * page * 512), page)
        slots = 64 if args.dry else (1 << 18) // workers * 8 // 64 * 64
        roots = 1 if args.dry else -(-workers // HEADS)
        target = device_target(device)
        plan = plan_rows(target, workers, rows, roots, slots, 128, page_size=page)
        case = {"rows": rows, "load": load, "page_size": page, "slots": slots * roots}
        case["bodies"] = sweep_plan(plan, tensors, load == "descriptors", timer, args.dry)
        result["cases"].append(case)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        _show(case)
    print(f"written to {path}")


def _begin(path: Path) -> dict[str, Any]:
    """What was measured at this commit on this GPU before, or nothing yet."""
    fresh = {"what": "sweep", "commit": commit(), "machine": machine(), "versions": versions()}
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        here = fresh["machine"]["gpu"]  # type: ignore[index]
        if before.get("commit") == fresh["commit"] and before["machine"]["gpu"] == here:
            return before
    return {**fresh, "cases": []}


def _show(case: dict[str, Any]) -> None:
    for row in case["bodies"]:
        body = row["body"]
        name = f"{case['rows']} rows, {case['load']}, pages of {case['page_size']}: "
        name += f"{body['warps']} warps, {body['stages']} stages{' *' if row['chosen'] else ''}"
        if "absent" in row:
            print(f"{name:60}{row['absent'][:80]}")
            continue
        memory, page = (row[f"seconds_{what}"] * 1e6 for what in ("memory", "page"))
        print(f"{name:60}{memory:10.1f} us from memory{page:10.1f} us from one page", flush=True)


if __name__ == "__main__":
    main()
