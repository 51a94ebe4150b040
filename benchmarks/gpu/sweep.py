"""Bodies of the tree attention kernel timed in turn: warps, stages, pointers against descriptors.

    python benchmarks/gpu/sweep.py --out FOLDER [--seconds N] [--dry]

For row blocks of 16, 32, 64 and 128 rows: contexts read from memory, and the same plan over one
page, which leaves arithmetic. Bodies are compiled ahead by other processes. Writes sweep.json after
each plan; a second run at the same commit on the same GPU goes on where the first was cut off.
Every body's output is held against the first one's. The exit status is 1 where nothing could be
timed of a plan, else 124 where plans are left. `--dry` runs one small plan under Triton's
interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import commit, machine, versions

from fork_attn import ops
from fork_attn.bench import results
from fork_attn.bench.timing import Call, Timer, graphed
from fork_attn.calibrate.design import HEADS, Tensors, plan_rows
from fork_attn.costs import device_target
from fork_attn.kernels import launch
from fork_attn.kernels.launch import Body
from fork_attn.plan import Plan

ROWS = (16, 32, 64, 128)
STAGES = (3, 5, 7)  # one, two and three tiles of K and V on their way, as compiled for sm_90
LOADS = (("pointers", 16), ("pointers", 64), ("descriptors", 64))  # and slots of a page
Case = tuple[int, str, int]  # rows, load, slots of a page
TOLERANCE = 2e-2  # of the largest output, in bf16, whatever the order of sums


def bodies(rows: int) -> Iterator[Body]:
    """The one that is chosen now first."""
    sm = launch.compute_capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = launch.choose_body(rows, 128, 128, 2, 2, sm)
    yield chosen
    for warps, stages in itertools.product((4, 8), STAGES):
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
    for index, body in enumerate(itertools.islice(bodies(rows), 2 if dry else None)):
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


def todo(dry: bool) -> list[Case]:
    """What matters most first."""
    if dry:
        return [(16, "pointers", 16)]
    return [(rows, load, page) for load, page in LOADS for rows in (128, 64, 16, 32)]


def make_plan(target: str, workers: int, rows: int, page: int, dry: bool) -> Plan:
    """About a GiB of K and V in contexts that keep every worker busy; a small one if dry."""
    slots = 64 if dry else (1 << 18) // workers * 8 // 64 * 64
    roots = 1 if dry else -(-workers // HEADS)
    return plan_rows(target, workers, rows, roots, slots, 128, page_size=page)


def tensors_of(device: torch.device, plan: Plan, page: int) -> Tensors:
    """K and V pages for all that a plan reads."""
    return Tensors(device, plan.page_limit, page)


def main() -> int:
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
    left = [case for case in todo(args.dry) if case not in done]
    target = device_target(device)
    with processes(args.dry) as pool:
        ahead = 0
        while left and time.monotonic() < end:
            if not ahead:
                ahead = len(ROWS)
                compile_ahead(pool, left[:ahead], target, workers, end, args.dry)
            ahead -= 1
            rows, load, page = left.pop(0)
            plan = make_plan(target, workers, rows, page, args.dry)
            tensors = tensors_of(device, plan, page)
            case = {"rows": rows, "load": load, "page_size": page, "pages": plan.page_limit}
            case["bodies"] = sweep_plan(plan, tensors, load == "descriptors", timer, args.dry)
            result["cases"].append(case)
            results.write(path, result)
            _show(case)
    for rows, load, page in left:
        print(f"{rows} rows, {load}, pages of {page}: no time left; run again to go on")
    print(f"written to {path}")
    if empty := [case for case in result["cases"] if not any(map(timed, case["bodies"]))]:
        names = [(c["rows"], c["load"], c["page_size"]) for c in empty]
        print(f"NOTHING MEASURED of {len(names)} plans: every body is absent: {names}")
        return 1
    return 124 if left else 0


def timed(row: dict[str, Any]) -> bool:
    """Whether a body was."""
    return "seconds_memory" in row


# --- compiling ahead, in processes of their own: Triton compiles on one core


@contextmanager
def processes(dry: bool) -> Iterator[ProcessPoolExecutor]:
    """Processes; what they have not begun at the end they never do."""
    number = 1 if dry else max(1, min(12, (os.cpu_count() or 1) - 2))
    # Not by fork: a child cannot use its parent's CUDA.
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compile_ahead(
    pool: ProcessPoolExecutor, cases: list[Case], target: str, workers: int, end: float, dry: bool
) -> None:
    """Compiles every body of these cases, waiting until `end` at most; nothing is timed meanwhile.
    What fails here fails again where it is timed, and is named there."""
    begun = time.monotonic()
    try:
        futures = [
            pool.submit(compile_body, case, index, target, workers, dry)
            for case in cases
            for index in range(1 if dry else len(list(bodies(case[0]))))
        ]
    except BrokenProcessPool:  # a process died; the rest is compiled where it is timed
        return
    done, late = wait(futures, max(0.0, end - begun))
    for future in late:
        future.cancel()
    failed = sum(future.exception() is not None for future in done)
    text = f"compiled {len(done) - failed} bodies in {time.monotonic() - begun:.0f} s"
    print(f"{text}, {failed} failed, {len(late)} not yet done", flush=True)


def compile_body(case: Case, index: int, target: str, workers: int, dry: bool) -> None:
    """Launches one body once, over one page, so that it is in Triton's cache."""
    rows, load, page = case
    device = torch.device("cpu" if dry else "cuda")
    plan = make_plan(target, workers, rows, page, dry)
    arguments = Tensors(device, 1, page).arguments(plan, False)
    body = next(itertools.islice(bodies(rows), index, None))
    with forced(body, load == "descriptors"):
        _call(arguments)()
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    sys.exit(main())
