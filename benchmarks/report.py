"""Writes README's headline, the tables of docs/benchmarks.md and its pictures from the results.

python benchmarks/report.py            # after a measurement
python benchmarks/report.py --check    # exit status 1 where something is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report_plots
import report_reasoning
import report_tables
import simulation

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"

Result = dict[str, Any]


def load(prefix: str) -> list[Result]:
    """The committed results of that kind, those of GPUs first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{prefix}_*.json"))]
    return sorted(found, key=lambda result: result["device"] == "cpu")


def files() -> dict[Path, str]:
    """Everything that this program writes, as it should be."""
    suites, models, threads = load("suite"), load("end_to_end"), load("reasoning")
    wanted = {ASSETS / name: svg for name, svg in report_plots.pictures(suites, models).items()}
    wanted |= {ASSETS / name: svg for name, svg in simulation.pictures(suites).items()}
    shown = sorted(path.name for path in wanted)
    sections: dict[Path, dict[str, Callable[[], str]]] = {
        ROOT / "README.md": {"headline": lambda: report_tables.headline(suites, models)},
        ROOT / "docs/benchmarks.md": {
            "suite": lambda: report_tables.suite(suites),
            "pictures": lambda: report_plots.markdown(shown),
            "memory": lambda: report_tables.memory(suites),
            "end to end": lambda: report_tables.end_to_end(models),
            "reasoning": lambda: report_reasoning.reasoning(threads),
        },
        ROOT / "docs/simulation.md": {
            "checks": lambda: simulation.checks_table(suites),
            "predictions": simulation.predictions_table,
        },
    }
    for path, parts in sections.items():
        text = path.read_text()
        for name, render in parts.items():
            text = fill(text, name, render(), path)
        wanted[path] = text
    return wanted


def fill(text: str, name: str, body: str, path: Path) -> str:
    """Replaces what stands between the two markers of that name.

    Raises:
        ValueError: the markers do not stand there once each.
    """
    begin = f"<!-- begin: benchmarks/report.py {name} -->"
    end = f"<!-- end: benchmarks/report.py {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path.name}: expected {begin} and {end} once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"


def stale() -> list[str]:
    """Files that are not what the committed results say; pictures that nothing draws any more."""
    wanted = files()
    wrong = [
        str(path.relative_to(ROOT))
        for path, text in wanted.items()
        if not path.exists() or path.read_text() != text
    ]
    extra = set(ASSETS.glob("bench-*.svg")) - set(wanted)
    return sorted(wrong + [str(path.relative_to(ROOT)) for path in extra])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="writes nothing")
    args = parser.parse_args()
    if args.check:
        wrong = stale()
        if wrong:
            print(f"stale: {', '.join(wrong)}: run benchmarks/report.py", file=sys.stderr)
        return 1 if wrong else 0
    wanted = files()
    for path in set(ASSETS.glob("bench-*.svg")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
