"""Pictures of results: scaling in branches, prefix and depth, roofline, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from svg_chart import Series, bars, lines

from fork_attn.bench.results import best_rival, ours

Result = dict[str, Any]
Row = dict[str, Any]

TITLES = {
    "bench-branches.svg": "Branches over one prefix",
    "bench-prefix.svg": "Length of the prefix",
    "bench-depth.svg": "Depth of the tree",
    "bench-roofline.svg": "Against the machine's limits",
    "bench-memory.svg": "K and V that are held",
    "bench-threads.svg": "Decoding with a model",
    "bench-simulation.svg": "Predicted, past what was measured",
}


def markdown(names: list[str]) -> str:
    """The pictures that there are."""
    shown = [f"![{TITLES[n]}](assets/{n})" for n in TITLES if n in names and "simul" not in n]
    return "\n\n".join(shown)


def pictures(suites: list[Result], models: list[Result]) -> dict[str, str]:
    """SVG by file name; a picture that lacks data is left out."""
    found: dict[str, str | None] = {}
    if suites:
        first = suites[0]
        rows = main_rows(first)
        found |= {
            "bench-branches.svg": _scaling(
                rows, first, "S-w", "branches over 4096 tokens, own 64", lambda r: r["branches"]
            ),
            "bench-prefix.svg": _scaling(
                rows, first, ("S-p", "S-w8"), "tokens of the prefix, 8 branches", _prefix
            ),
            "bench-depth.svg": _scaling(
                rows, first, "N-d", "levels of a tree of 32 branches of 2048 tokens", _depth
            ),
            "bench-roofline.svg": _roofline(first),
            "bench-memory.svg": _memory(rows),
        }
    if models:
        found["bench-threads.svg"] = _threads(models[0])
    return {name: svg for name, svg in found.items() if svg is not None}


def main_rows(result: Result) -> list[Row]:
    """The cases of the first setting of heads, dtype and page size: what pictures show."""
    rows = result["cases"]
    keys = ("heads", "dtype", "page_size")
    wanted = [r for r in rows if r["dtype"] == "bfloat16"] or rows
    return [r for r in rows if all(r[k] == wanted[0][k] for k in keys)]


def setting(row: Row) -> str:
    return f"{row['heads']}, {row['dtype']}, pages of {row['page_size']}"


def _prefix(row: Row) -> float:
    return float(row["text"].split("x[")[1].split(",")[0])


def _depth(row: Row) -> float:
    return float(row["shape"].removeprefix("N-d"))


def _scaling(
    rows: list[Row],
    result: Result,
    prefixes: str | tuple[str, ...],
    x_text: str,
    x_of: Callable[[Row], float],
) -> str | None:
    chosen = [r for r in rows if r["shape"].startswith(prefixes)]
    if prefixes == ("S-p", "S-w8"):
        chosen = [r for r in chosen if r["branches"] == 8]
    if len(chosen) < 3:
        return None
    names = list(dict.fromkeys(name for row in chosen for name in row["ways"]))
    names.sort(key=lambda name: not name.startswith("fork_attn"))
    series = [
        Series(name, [(x_of(r), _ms(r, name)) for r in chosen if name in r["ways"]])
        for name in names
    ]
    limit = [(x_of(r), r["limit_seconds"] * 1e3) for r in chosen]
    series.append(Series("machine's limit", limit, dashed=True))
    title = f"Attention of one decode step: {setting(chosen[0])}"
    return lines(title, x_text, "ms, one layer, cold", [s for s in series if len(s.points) > 1])


def _ms(row: Row, name: str) -> float:
    return float(row["ways"][name]["cold"]["median"]) * 1e3


def _roofline(result: Result) -> str | None:
    rows = main_rows(result)
    if len(rows) < 3:
        return None
    bandwidth = max(result["limits"]["stream"].values())
    rate = max(r["matmul_flops_per_s"] for r in rows)
    marks: dict[str, list[tuple[float, float]]] = {"fork_attn": [], "best rival": []}
    for row in rows:
        intensity = row["flops"] / row["moved_bytes"]
        fastest = (("fork_attn", ours(row, "cold")), ("best rival", best_rival(row, "cold")))
        for label, name in fastest:
            if name is not None:
                seconds = row["ways"][name]["cold"]["median"]
                marks[label].append((intensity, row["flops"] / seconds / 1e9))
    low = min(p[0] for p in marks["fork_attn"])
    high = max(p[0] for p in marks["fork_attn"])
    ridge = rate / bandwidth
    points = sorted({low, high, min(max(ridge, low), high)})
    roof = [(x, min(x * bandwidth, rate) / 1e9) for x in points]
    series = [
        *(Series(name, some, marks_only=True) for name, some in marks.items() if some),
        Series("measured roof", roof, dashed=True),
    ]
    title = f"FLOP/s over unique bytes: {setting(rows[0])}"
    return lines(title, "useful FLOPs per unique byte", "GFLOP/s", series)


def _memory(rows: list[Row]) -> str | None:
    groups = []
    for row in rows:
        own = ours(row, "cold")
        if own is None or row["reuse"] < 1.5:
            continue
        held = row["ways"][own]["held_bytes"] / 2**20
        groups.append(
            (
                row["shape"] + " " + row["text"][:16],
                [("fork_attn", held), ("a copy per branch", row["copied_bytes"] / 2**20)],
            )
        )
    if not groups:
        return None
    return bars("K and V held for one layer, logarithmic", "MiB", groups[:14])


def by_prefix(result: Result) -> list[dict[str, Any]]:
    """Cells by prompt, then threads."""
    return sorted(result["cells"], key=lambda cell: (cell["prefix"], cell["threads"]))


def _threads(result: Result) -> str | None:
    groups = []
    for cell in by_prefix(result):
        label = f"{cell['threads']} over {cell['prefix']}"
        groups.append((label, [(n, w["tokens_per_s"]) for n, w in cell["ways"].items()]))
    for trace in result["traces"]:
        groups.append((trace["name"], [(n, w["tokens_per_s"]) for n, w in trace["ways"].items()]))
    if not groups:
        return None
    title = f"Tokens a second, {result['model']} in {result.get('dtype', '')}, logarithmic"
    return bars(title, "tokens/s", groups)
