"""Writes the results of cpu_attention.py into docs/kernels/cpu.md.

python benchmarks/cpu_tables.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs/kernels/cpu.md"
RIVALS = {
    "sdpa_per_branch": "SDPA per branch",
    "sdpa_batched": "SDPA batched",
    "grouped_matmul": "grouped matmul",
}


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def median(row: dict[str, Any], name: str) -> float:
    return float(row["seconds"][name]["median"])


def over_step(row: dict[str, Any], rival: str) -> float:
    """A rival's time over ours, with step and plan in ours."""
    return median(row, rival) / median(row, "fork_attn_step")


def of_limit(row: dict[str, Any]) -> float:
    return median(row, "fork_attn") / float(row["limit_seconds"])


def conditions(result: dict[str, Any]) -> str:
    m = result["machine"]
    before, after = (
        ", ".join(f"{x:.1f}" for x in result[f"load_{w}"]) for w in ("before", "after")
    )
    return (
        f"{m['cpu']}, {m['threads']} threads of {m['cores']} cores, {m['capability']}; "
        f"torch {m['torch']}; commit {m['commit']}; {m['date'][:16]}. Load averages (1, 5, 15 min) "
        f"before: {before}; after: {after}."
    )


def _range(rows: list[dict[str, Any]], rival: str) -> str:
    ratios = [over_step(row, rival) for row in rows if rival in row["seconds"]]
    return f"{geomean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def attention_summary(result: dict[str, Any]) -> list[str]:
    rows = result["cases"]
    kinds = {
        "one branch (no reuse)": [r for r in rows if r["branches"] == 1],
        "reuse between 1 and 8": [r for r in rows if r["branches"] > 1 and r["reuse"] < 8],
        "reuse from 8 on": [r for r in rows if r["reuse"] >= 8],
    }
    lines = [
        f"| | cases | over the limit | {' | '.join(RIVALS.values())} |",
        "|---|---|---|" + "---|" * len(RIVALS),
    ]
    for name, some in kinds.items():
        if not some:
            continue
        shares = [of_limit(r) for r in some]
        within = sum(s <= 1.5 for s in shares)
        cells = [
            name,
            str(len(some)),
            f"{geomean(shares):.2f} ({min(shares):.2f}–{max(shares):.2f}), {within} within 1.5",
            *(_range(some, rival) for rival in RIVALS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def attention_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| prefix | branches | ms (20–80 %) | with step and plan | limit | over it | "
        + " | ".join(f"{name} ×" for name in RIVALS.values())
        + " |",
        "|---|---|---|---|---|---|" + "---|" * len(RIVALS),
    ]
    for row in rows:
        t = row["seconds"]["fork_attn"]
        cells = [
            str(row["prefix"]),
            str(row["branches"]),
            f"{t['median'] * 1e3:.3f} ({t['p20'] * 1e3:.3f}–{t['p80'] * 1e3:.3f})",
            f"{median(row, 'fork_attn_step') * 1e3:.3f}",
            f"{row['limit_seconds'] * 1e3:.3f} {row['limit_by']}",
            f"{of_limit(row):.2f}",
            *(f"{over_step(row, r):.2f}" if r in row["seconds"] else "–" for r in RIVALS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def streams(result: dict[str, Any]) -> str:
    stream = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in result["stream_bytes_per_s"].items())
    return f"{len(result['cases'])} of {result['cases_planned']} cases. Streams in GB/s: {stream}."


def attention(result: dict[str, Any]) -> str:
    lines = [
        conditions(result),
        streams(result),
        "",
        *attention_summary(result),
    ]

    def kind(row: dict[str, Any]) -> tuple[list[int], str]:
        return row["heads"], row["dtype"]

    for (heads, dtype), rows in groupby(sorted(result["cases"], key=kind, reverse=True), key=kind):
        lines += [
            "",
            "{}/{} heads of {}, ".format(*heads) + dtype,
            "",
            *attention_table(list(rows)),
        ]
    return "\n".join(lines)


def other_machine(result: dict[str, Any]) -> str:
    return "\n".join([conditions(result), streams(result), "", *attention_summary(result)])


def fill(text: str, name: str, body: str) -> str:
    """Replaces what stands between the two markers of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"{DOCUMENT}: expected the markers {begin} and {end} once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def main() -> None:
    text = DOCUMENT.read_text()
    renders = {
        "cpu_attention": attention,
        "cpu_attention_zen4": other_machine,
    }
    for name, render in renders.items():
        text = fill(text, name, render(json.loads((RESULTS / f"{name}.json").read_text())))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
