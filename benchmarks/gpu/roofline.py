"""A picture of the suite's results under the machine's roofs.

    python benchmarks/gpu/roofline.py SUITE.json BASELINE.json OUT.svg

Across: FLOPs a byte of unique K and V. Up: FLOP/s of each shape with a cold L2, our kernel and its
best rival. The roof is the bandwidth of a read and the rate of a dense bf16 matmul.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from svg_chart import Series, lines

from fork_attn.bench import results


def points(cases: list[dict[str, Any]], ours: bool) -> list[tuple[float, float]]:
    """(FLOPs a byte, FLOP/s) of the fastest way of each case, among ours or the others."""
    fastest = results.ours if ours else results.best_rival
    found = []
    for case in cases:
        name = fastest(case, "cold")
        if name is not None:
            seconds = case["ways"][name]["cold"]["median"]
            found.append((case["flops"] / case["unique_bytes"], case["flops"] / seconds))
    return found


def roof(bandwidth: float, rate: float, across: list[float]) -> list[tuple[float, float]]:
    """The roof over a range of FLOPs a byte."""
    ridge = rate / bandwidth
    at = sorted({min(across) / 2, ridge, max(*across, ridge) * 2})
    return [(x, min(rate, x * bandwidth)) for x in at]


def picture(suite: dict[str, Any], baseline: dict[str, Any]) -> str:
    """The SVG.

    Raises:
        ValueError: the suite has no case that our kernel ran.
    """
    ours, rivals = (points(suite["cases"], which) for which in (True, False))
    if not ours:
        raise ValueError("suite: expected at least one case that our kernel ran")
    roofs = baseline["roofs"]
    bandwidth = roofs["read_bytes_per_second"]
    rate = roofs["matmul_bf16_flops_per_second"]
    gpu = baseline["machine"]["gpu"]
    name = gpu["name"] if gpu else baseline["machine"]["cpu"]
    shapes = [x for x, _ in (*ours, *rivals)]
    series = [
        Series("fork-attn", ours, marks_only=True),
        Series("best rival", rivals, marks_only=True),
        Series("roof", roof(bandwidth, rate, shapes), dashed=True),
    ]
    title = f"Tree attention on {name}"
    return lines(title, "FLOPs a byte of unique K and V", "FLOP/s", [s for s in series if s.points])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    suite, baseline = (
        json.loads(path.read_text(encoding="utf-8")) for path in (args.suite, args.baseline)
    )
    args.out.write_text(picture(suite, baseline), encoding="utf-8")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
