"""`fork-attn bench`: the suite on this machine, and against committed results."""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from fork_attn.bench import compare, measure, results
from fork_attn.bench.machine import kind, machine
from fork_attn.bench.session import Session
from fork_attn.bench.shapes import SHAPES, Heads
from fork_attn.bench.way import DTYPES, WAYS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("--quick", action="store_true", help="a small subset of the shapes")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="results to hold these against; exit status 1"
        " where a ratio to a rival fell beyond noise",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--shapes", nargs="+", metavar="ID", help="of --list")
    parser.add_argument("--heads", nargs="+", metavar="Q/KVxDIM", help="such as 32/8x128")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of K and V; fp8 is e4m3")
    parser.add_argument("--page-sizes", nargs="+", type=int, metavar="N")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="implementations, of --list")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of timing each case (default 2)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="begins cases within these only, and names those not reached; cases that the file of"
        " --json has already, of the same commit and machine, are kept",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="writes the result, a CSV beside it"
    )
    parser.add_argument(
        "--list", action="store_true", help="shapes and implementations; runs nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 1 after a regression or where a case or a way of this
    package failed, 2 where an argument is off."""
    if args.list:
        return _list()
    try:
        device = _device(args.device)
        for name in args.ways or ():
            if name not in WAYS:
                raise ValueError(f"ways: expected of {', '.join(WAYS)}, got {name!r}")
        heads = [Heads.parse(text) for text in args.heads] if args.heads else None
        todo = measure.cases(device, args.quick, args.shapes, heads, args.dtypes, args.page_sizes)
        for name, seconds in (("seconds", args.seconds), ("budget", args.budget)):
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"{name}: expected seconds above 0, got {seconds}")
        then = _read(args.against, "against: expected results") if args.against else None
        if then is not None:
            _require_same_kind(device, then, args.against)
        go_on = args.budget is not None and args.json is not None and args.json.exists()
        before = _read(args.json, "json: expected results to go on with") if go_on else None
    except ValueError as error:
        print(f"fork-attn bench: {error}", file=sys.stderr)
        return 2
    session = Session(
        device,
        args.seconds,
        lambda result: _save(args.json, result),
        _show,
        args.ways,
        args.budget,
        before,
    )
    now = session.run(todo)
    _show_absent(now)
    failed = _show_not_measured(now)
    if then is None:
        return failed
    try:
        found = compare.compare(now, then)
    except ValueError as error:
        print(f"fork-attn bench: {error}", file=sys.stderr)
        return 2
    print("\n".join(compare.show(found)))
    return 1 if found.regressed else failed


def _read(path: Path, expected: str) -> dict[str, Any]:
    """The results in a file.

    Raises:
        ValueError: it cannot be read, or holds something else, with what was expected.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{expected} in {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{expected} in {path}, got other JSON")
    return found


def _device(name: str | None) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _require_same_kind(device: torch.device, then: dict[str, Any], path: Path) -> None:
    """Before minutes are spent, what `compare` would refuse in the end."""
    here = kind(machine(device))
    try:
        there = kind(then["machine"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"against: expected results in {path}, got other JSON") from None
    if here != there:
        raise ValueError(f"against: expected results of {here}, got those of {there}")


def _show(text: str) -> None:
    print(text, flush=True)


def _save(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    results.write(path, result)
    rows = list(results.flat(result))
    text = io.StringIO()
    fields = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, fields, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    results.replace(path.with_suffix(".csv"), text.getvalue())


def _show_absent(result: dict[str, Any]) -> None:
    reasons: dict[tuple[str, str], int] = {}
    for row in result["cases"]:
        for name, why in row["absent"].items():
            reasons[name, why] = reasons.get((name, why), 0) + 1
    if reasons:
        print("absent:")
    for (name, why), count in sorted(reasons.items()):
        print(f"  {name:28}{count:3} cases: {why}")


def _show_not_measured(result: dict[str, Any]) -> int:
    """Names what failed and what was not reached; 1 where something failed."""
    failed = [f"{row['id']}: {row['reason']}" for row in result["failed"]]
    for row in result["cases"]:
        failed += [f"{row['id']}: {name}: {row['absent'][name]}" for name in row.get("failed", ())]
    for text in failed:
        print(f"FAILED {text}")
    if missing := result["not_reached"]:
        print(
            f"no time left for {len(missing)} of {result['cases_planned']} cases: "
            f"{', '.join(missing)}; with --budget and the same --json, another run goes on"
        )
    return 1 if failed else 0


def _list() -> int:
    for shape in SHAPES.values():
        forest = shape.make()
        facts = f"{len(forest.queries)} branches, reuse {forest.reuse:.1f}"
        print(f"{shape.id:12}{shape.text:62}{facts}, CPU: {shape.cpu}")
    print()
    for name, way in WAYS.items():
        text = " ".join((inspect.getdoc(way) or "").split())
        print(f"{name:28}{', '.join(way.dtypes):24}{text.split('. ')[0]}")
    return 0
