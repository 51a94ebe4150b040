"""What a part of `make gpu` has measured, from the files that it wrote: one line, and loud ones.

    python benchmarks/gpu/measured.py KIND FILE

KIND is tests, sanitizer, baseline, costs, sweep, suite or end_to_end. The exit status is 1 where
something failed or nothing was measured, 124 where a part of it is missing for want of time. With
PEERS in the environment, a rival of theirs that ran nowhere counts as failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CUT_OFF = 124  # as `timeout` has it
PEER_WAYS = ("flash_attn_3", "flashinfer", "xformers")  # how the names of their ways begin


@dataclass
class Found:
    """What a file says.

    Attributes:
        text: for the summary.
        wrong: what has to be looked at, a line each.
        notes: what is good to know.
        status: 0, 1 or CUT_OFF.
    """

    text: str
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: int = 0

    def fail(self, why: str) -> None:
        self.wrong.append(why)
        self.status = 1


def tests(path: Path, every_file: bool = True) -> Found:
    """pytest's JUnit XML: each file has to have a test that ran to its end and passed."""
    outcomes: dict[str, Counter[str]] = {}
    failed: list[str] = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "passed"
        if outcome == "passed" and "skipped" in kinds:
            outcome = "skipped"
        outcomes.setdefault(module, Counter())[outcome] += 1
        if outcome == "failed":
            failed.append(f"{module}: {case.get('name')}")
    total: Counter[str] = sum(outcomes.values(), Counter())
    found = Found(", ".join(f"{total[k]} {k}" for k in ("passed", "failed", "skipped")))
    if failed:
        found.fail(f"FAILED: {_some(failed)}")
    if not total["passed"]:
        found.fail("NOTHING TESTED: no test passed")
    elif every_file:
        for module, counts in outcomes.items():
            if not counts["passed"] and not counts["failed"]:
                found.fail(f"NOTHING TESTED of {module}: {counts['skipped']} skipped")
    return found


def sanitizer(path: Path) -> Found:
    """As tests; of a file only some tests may be chosen."""
    return tests(path, every_file=False)


def baseline(path: Path) -> Found:
    """Roofs, dense attention, and the cache's kernels beside a copy."""
    held = _read(path)
    roofs, dense = held.get("roofs", {}), held.get("dense_attention", [])
    kernels = held.get("cache_kernels", {}).get("cases", [])
    rates = ", ".join(f"{name.split('_')[0]} {rate / 1e12:.2f} T/s" for name, rate in roofs.items())
    found = Found(f"{rates or 'no roofs'}; {len(dense)} of dense attention, {len(kernels)} kernels")
    for name, there in (("roofs", roofs), ("dense attention", dense), ("the cache", kernels)):
        if not there:
            found.fail(f"NOTHING MEASURED of {name}")
    absent = {f"{name}: {why}" for row in dense for name, why in row["absent"].items()}
    tell = found.fail if os.environ.get("PEERS") else found.notes.append
    for text in sorted(absent):
        tell(f"absent from dense attention: {text}")
    return found


def costs(path: Path) -> Found:
    """A file of `fork-attn calibrate`."""
    held = _read(path)
    if not held.get("costs") or not held.get("measured"):
        return Found("", ["NOTHING MEASURED: no costs"], status=1)
    error = held["fit"]["median_error"]
    return Found(f"{len(held['measured'])} cases, median error of the fit {error:.1%}")


def sweep(path: Path) -> Found:
    """Bodies that were timed; those that were not are named in the file."""
    cases = _read(path).get("cases", [])
    timed = [[b for b in case["bodies"] if "seconds_memory" in b] for case in cases]
    of = sum(len(case["bodies"]) for case in cases)
    found = Found(f"{sum(map(len, timed))} of {of} bodies in {len(cases)} plans")
    if not cases:
        found.fail("NOTHING MEASURED: no plan")
    for case, some in zip(cases, timed, strict=True):
        if not some:
            name = f"{case['rows']} rows, {case['load']}, pages of {case['page_size']}"
            found.fail(f"NOTHING MEASURED of {name}: {case['bodies'][0]['absent']}")
    return found


def suite(path: Path) -> Found:
    """Cases that our kernel ran, ways that ran nowhere."""
    held = _read(path)
    cases = held.get("cases", [])
    ran: Counter[str] = Counter()
    ours = 0
    for case in cases:
        timed = [name for name, way in case.get("ways", {}).items() if "step" in way]
        ran.update(timed)
        ours += any(case["ways"][name]["ours"] for name in timed)
    missing = held.get("not_reached", [])
    text = f"ours in {ours} of {held.get('cases_planned')} cases, {len(ran)} ways"
    found = Found(text, status=CUT_OFF if missing else 0)
    if missing:
        found.text += f"; {len(missing)} not reached: {_some(missing)}"
    if not ours:
        found.fail("NOTHING MEASURED: our kernel ran in no case")
    failed = [f"{row['id']}: {row['reason']}" for row in held.get("failed", [])]
    for case in cases:  # ways of ours
        failed += [f"{case['id']}: {n}: {case['absent'][n]}" for n in case.get("failed", ())]
    if failed:
        found.fail(f"FAILED: {_some(failed)}")
    for why, names in _absent_everywhere(cases, ran).items():
        found.notes.append(f"absent from all {len(cases)} cases: {', '.join(names)}: {why}")
    if os.environ.get("PEERS") and cases:
        for peer in PEER_WAYS:
            if not any(name.startswith(peer) for name in ran):
                found.fail(f"NOTHING MEASURED of {peer}, which PEERS carries")
    return found


def _absent_everywhere(cases: Iterable[dict[str, Any]], ran: Counter[str]) -> dict[str, list[str]]:
    """Ways that ran in no case, by the reason that is given most often."""
    reasons: dict[str, Counter[str]] = {}
    for case in cases:
        for name, why in case.get("absent", {}).items():
            if name not in ran:
                reasons.setdefault(name, Counter())[why] += 1
    found: dict[str, list[str]] = {}
    for name, whys in sorted(reasons.items()):
        found.setdefault(whys.most_common(1)[0][0], []).append(name)
    return found


def end_to_end(path: Path) -> Found:
    """Cells and traces in which this package was timed."""
    held = _read(path)
    counts = []
    for part in ("cells", "traces"):
        ours = [row for row in held.get(part, []) if "fork_attn" in row["ways"]]
        counts.append(len(ours))
    found = Found(f"{held.get('model')}: {counts[0]} cells, {counts[1]} replays")
    if not sum(counts):
        found.fail("NOTHING MEASURED end to end")
    elif "continuous" not in held:  # the last thing that is written
        found.status = CUT_OFF
    return found


def _read(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return "; ".join(text[:200] for text in texts[:5]) + more


KINDS: dict[str, Callable[[Path], Found]] = {
    f.__name__: f for f in (tests, sanitizer, baseline, costs, sweep, suite, end_to_end)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        found = KINDS[args.kind](args.file)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        found = Found("", [f"NOTHING MEASURED: {args.file}: {error}"], status=1)
    for line in found.notes:
        print(f"{args.file.stem}: {line}")
    for line in found.wrong:
        print(f"!!! {args.file.stem}: {line}")
    print(f"{args.file.stem}: {found.text or 'nothing'}")
    return found.status


if __name__ == "__main__":
    sys.exit(main())
