"""`fork-attn calibrate`: measures, fits, writes a file, and says how well the model fits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fork_attn import costs, ops_triton
from fork_attn.calibrate.measure import Misfit, Tick, calibrate
from fork_attn.errors import Unsupported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--target",
        choices=costs.TARGETS,
        help="default: that of the GPU here, or cpu where there is none",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller calls")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where to write (default: costs-TARGET.json in the user's cache directory, which "
        "plans on this machine then follow; for another file set FORK_ATTN_COSTS)",
    )
    parser.add_argument("--json", action="store_true", help="also print the file")


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 2 where an argument or the machine is off."""
    try:
        target, device = _choose(args.target)
        out = args.out or costs.default_path(target)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _progress() as tick:
            found = calibrate(target, device, args.quick, tick)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        costs.read(out)
    except (ValueError, Unsupported, OSError) as error:
        if isinstance(error, Misfit):  # minutes of measuring are not lost
            print("\n".join(_cases(error.rows)), file=sys.stderr)
        print(f"fork-attn calibrate: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(lines(found)))
        print(f"\nwritten to {out}")
    return 0


def _choose(target: str | None) -> tuple[str, torch.device]:
    """The target and the device that has it.

    Raises:
        ValueError: no device here has it.
        Unsupported: Triton is not there.
    """
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    here = costs.device_target(cuda) if torch.cuda.is_available() else None
    if target is None:
        target = here or "cpu"
    if target == "cpu":
        return target, cpu
    if here != target:
        found = f"a GPU that is {here}" if here else "no CUDA device"
        raise ValueError(f"target: {target} can only be measured where it is; here is {found}")
    ops_triton.require_triton(cuda)
    return target, cuda


@contextmanager
def _progress() -> Iterator[Tick]:
    """A bar on a terminal; without rich, or off a terminal, a line for each phase."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield _say
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _say
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=1)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield tick


def _say(what: str, done: int, total: int) -> None:
    if done == 0:
        print(f"{what}: {total} calls" if total > 1 else what, file=sys.stderr, flush=True)


def lines(found: dict[str, Any]) -> list[str]:
    """What a calibration found, for people."""
    text = [
        f"{found['target']}: {found['machine']}, {found['workers']} workers, {found['date']}",
        "",
        f"{'cost':<18}{'measured':>12}{'datasheet':>12}",
    ]
    for name, what in costs.FIELDS.items():
        measured, given = found["costs"][name], found["datasheet"][name]
        text.append(f"{name:<18}{measured:>12.4g}{given:>12.4g}  {what}")
    text += ["", *_cases([*found["measured"], *found["held_out"]])]
    for name, what in (("fit", "fitted"), ("trees", "trees, not fitted")):
        part = found[name]
        text.append(
            f"{what}: median error {part['median_error']:.1%}, largest {part['largest_error']:.1%}"
        )
    return text


def _cases(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{'case':<26}{'rows':>5}{'measured us':>14}{'predicted us':>14}{'error':>9}",
        *(
            f"{row['case']:<26}{row['rows']:>5}{row['ns'] / 1e3:>14.1f}"
            f"{row['predicted_ns'] / 1e3:>14.1f}{row['error']:>+9.1%}"
            for row in rows
        ),
    ]
