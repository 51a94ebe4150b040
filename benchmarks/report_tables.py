"""Tables of results, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from report_plots import by_prefix, main_rows, setting

from fork_attn.bench.results import (
    best_rival,
    geomean,
    of_limit,
    ours,
    over_best_rival,
    over_half_kv,
)

Result = dict[str, Any]
Row = dict[str, Any]

KINDS = (
    ("nothing shared", 0.0, 1.05),
    ("reuse up to 8", 1.05, 8.0),
    ("reuse from 8 on", 8.0, float("inf")),
)


def conditions(result: Result) -> str:
    """What it was measured on, in a sentence or two."""
    m = result["machine"]
    versions = m["versions"]
    if m.get("gpu"):
        gpu = m["gpu"]
        clocks = result.get("clocks_before") or {}
        clock = clocks.get("clocks.sm", "clock unknown")
        where = f"{gpu['name']}, {gpu['multiprocessors']} SMs, {clock}, CUDA {gpu['cuda']}"
    else:
        where = f"{m['cpu']}, {m['threads']} threads of {m['cores']} cores, {m['capability']}"
    load = ", ".join(f"{x:.1f}" for x in result["load_before"])
    note = f" Note: {result['note']}." if result.get("note") else ""
    return (
        f"{where}; torch {versions['torch']}; commit {m['commit']}; {m['date'][:16]} UTC; load "
        f"averages before (1, 5, 15 min): {load}.{note}"
    )


def _spread(values: Iterable[float]) -> str:
    some = list(values)
    if not some:
        return "–"
    return f"{geomean(some):.2f} ({min(some):.2f}–{max(some):.2f})"


def _over(row: Row, rival: str, what: str = "step") -> float | None:
    own = ours(row, what)
    if own is None or what not in row["ways"].get(rival, {}):
        return None
    return float(row["ways"][rival][what]["median"] / row["ways"][own][what]["median"])


def headline(suites: list[Result], models: list[Result]) -> str:
    """README's first table: geometric means with the least and the most, losses named."""
    parts: list[str] = []
    if suites:
        parts += _headline_attention(suites[0])
    for other in suites[1:]:
        parts += ["", _headline_in_short(other)]
    if models:
        parts += ["", *_headline_model(models[0])]
    parts += ["", "All shapes, all rivals and the losses: [benchmarks](docs/benchmarks.md)."]
    return "\n".join(parts)


def _compared(result: Result) -> list[Row]:
    return [r for r in main_rows(result) if over_best_rival(r) is not None]


def _by_kind(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    return [
        (name, some)
        for name, low, high in KINDS
        if (some := [r for r in rows if low <= r["reuse"] < high])
    ]


def _best_rivals(rows: list[Row]) -> str:
    return _spread([v for r in rows if (v := over_best_rival(r)) is not None])


def _losses(rows: list[Row]) -> str:
    lost = [r for r in rows if (over_best_rival(r) or 1) < 1]
    worst = min(rows, key=lambda r: over_best_rival(r) or 1)
    return (
        f"Slower than the best rival in {len(lost)} of {len(rows)}; "
        f"worst: {worst['shape']} ({worst['text']}) at {over_best_rival(worst):.2f} times "
        f"{best_rival(worst)}."
    )


def _headline_in_short(result: Result) -> str:
    rows = _compared(result)
    found = ", ".join(f"{name} {_best_rivals(some)}" for name, some in _by_kind(rows))
    return (
        f"The same against the best rival on another machine: {found}. "
        f"{_losses(rows)} {conditions(result)}"
    )


def _headline_attention(result: Result) -> list[str]:
    rows = _compared(result)
    lines = [
        "Attention of one decode step, time of a rival over ours, opening the step, planning and "
        f"storing in ours ({setting(rows[0])}):",
        "",
        "| | shapes | best rival of each shape | SDPA, a call per branch | share of the machine's "
        "limit |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, some in _by_kind(rows):
        sdpa = [v for r in some if (v := _over(r, "sdpa_per_branch")) is not None]
        limit = [v for r in some if (v := of_limit(r)) is not None]
        lines.append(
            f"| {name} | {len(some)} | {_best_rivals(some)} | {_spread(sdpa)} | {_spread(limit)} |"
        )
    lines += ["", f"Geometric mean (least–most). {_losses(rows)} {conditions(result)}"]
    return lines


def _headline_model(result: Result) -> list[str]:
    lines = [
        f"Decoding with {result['model']} ({result.get('dtype', '')}), against stock transformers "
        "in one batch over copied caches:",
        "",
        "| threads over prompt | tokens/s | stock | times | K and V held | stock |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for cell in by_prefix(result):
        if not {"fork_attn", "stock_batch"} <= cell["ways"].keys():
            continue  # the table of all says why
        own, stock = cell["ways"]["fork_attn"], cell["ways"]["stock_batch"]
        lines.append(
            f"| {cell['threads']} over {cell['prefix']} | {own['tokens_per_s']:.1f} | "
            f"{stock['tokens_per_s']:.1f} | {own['tokens_per_s'] / stock['tokens_per_s']:.2f} | "
            f"{_mib(own['kv_bytes'])} | {_mib(stock['kv_bytes'])} |"
        )
    return [*lines, "", conditions(result)]


def _mib(num_bytes: float | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 2**20:.0f} MiB"


def suite(results: list[Result]) -> str:
    """Every case of every result: ours, the limit, the best rival and all others."""
    return "\n\n".join(_suite(result) for result in results) or "Nothing is measured yet."


def _suite(result: Result) -> str:
    lines = [conditions(result), "", *_streams(result)]
    settings = list(dict.fromkeys(setting(r) for r in result["cases"]))
    for name in settings:
        rows = [r for r in result["cases"] if setting(r) == name]
        rivals = list(dict.fromkeys(n for r in rows for n in r["ways"]))
        rivals = [n for n in rivals if not n.startswith("fork_attn")]
        graph = any("graph" in way for r in rows for way in r["ways"].values())
        lines += ["", f"**{name}**", "", *_table(rows, rivals, result["step_layers"], graph)]
    return "\n".join([*lines, "", *_absent(result)])


def _streams(result: Result) -> list[str]:
    limits = result["limits"]
    text = ", ".join(f"{k} {v / 1e9:.1f} GB/s" for k, v in limits["stream"].items())
    if limits["dense_bf16"]:
        text += f"; dense bf16 matmul {limits['dense_bf16'] / 1e12:.0f} TFLOP/s"
    return [f"Measured limits: {text}. {len(result['cases'])} of {result['cases_planned']} cases."]


def _table(rows: list[Row], rivals: list[str], layers: int, graph: bool) -> list[str]:
    columns = ["id", "shape", "reuse", "cold µs (p20–p95)", "warm µs"]
    columns += ["graph µs"] if graph else []
    columns += ["plan µs", f"step of {layers} µs", "limit µs", "of limit", "best rival ×"]
    columns += [f"{name} ×" for name in rivals]
    fp8 = any(over_half_kv(r) is not None for r in rows)
    columns += ["bf16 K and V ×"] if fp8 else []
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for row in rows:
        own = ours(row, "cold")
        if own is None:
            continue
        way = row["ways"][own]
        cells = [row["shape"], row["text"], f"{row['reuse']:.1f}", _times(way["cold"])]
        cells.append(_median(way, "warm"))
        cells += [_median(way, "graph")] if graph else []
        cells += [_median(way, "plan"), _median(way, "step")]
        cells += [f"{row['limit_seconds'] * 1e6:.0f} {row['limit_by']}", f"{of_limit(row):.2f}"]
        best = over_best_rival(row)
        cells.append("–" if best is None else f"**{best:.2f}**")
        some = [*(_over(row, n) for n in rivals), *([over_half_kv(row)] if fp8 else [])]
        cells += ["–" if v is None else f"{v:.2f}" for v in some]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(times: dict[str, Any]) -> str:
    spread = [times["p20"], times["p95"]]
    shown = "–".join("?" if v is None else f"{v * 1e6:.0f}" for v in spread)
    return f"{times['median'] * 1e6:.0f} ({shown})"


def _median(way: dict[str, Any], what: str) -> str:
    return f"{way[what]['median'] * 1e6:.0f}" if what in way else "–"


def _absent(result: Result) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for row in result["cases"]:
        for name, why in row["absent"].items():
            reasons[name, why] = reasons.get((name, why), 0) + 1
    if not reasons:
        return []
    lines = ["| not measured | cases | why |", "|---|--:|---|"]
    for (name, why), count in sorted(reasons.items()):
        lines.append(f"| {name} | {count} | {why.replace('|', '/')} |")
    return lines


def memory(results: list[Result]) -> str:
    """K and V that one layer holds, and what fork and join copy or prefill again."""
    if not results:
        return "Nothing is measured yet."
    rows = [r for r in main_rows(results[0]) if ours(r, "cold") and r["branches"] > 1]
    lines = [
        "| id | shape | held MiB | least MiB | a copy per branch MiB | copied at the last fork |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        own = row["ways"][str(ours(row, "cold"))]
        cells = (row["unique_bytes"], row["copied_bytes"])
        least, copied = (f"{n / 2**20:.1f}" for n in cells)
        lines.append(
            f"| {row['shape']} | {row['text']} | {own['held_bytes'] / 2**20:.1f} | {least} | "
            f"{copied} | 0, against {(cells[1] - cells[0]) / 2**20:.1f} MiB |"
        )
    return "\n".join(lines)


def end_to_end(results: list[Result]) -> str:
    """Every cell and every replay of every result."""
    return "\n\n".join(_model(result) for result in results) or "Nothing is measured yet."


def _model(result: Result) -> str:
    lines = [
        conditions(result),
        "",
        f"{result['model']}, {result.get('dtype', '')}",
        "",
        "| threads over prompt | way | ms a step (p20–p95) | tokens/s | fork ms | K and V |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for cell in by_prefix(result):
        shape = f"{cell['threads']} over {cell['prefix']}"
        for name, way in cell["ways"].items():
            step, fork = way["step"], way["fork"]
            high = "?" if step["p95"] is None else f"{step['p95'] * 1e3:.1f}"
            forked = "–" if fork is None else f"{fork['median'] * 1e3:.2f}"
            lines.append(
                f"| {shape} | {name} | "
                f"{step['median'] * 1e3:.1f} ({step['p20'] * 1e3:.1f}–{high}) | "
                f"{way['tokens_per_s']:.1f} | {forked} | {_mib(way['kv_bytes'])} |"
            )
        lines += [
            f"| {shape} | {name} | {why} | – | – | – |" for name, why in cell["absent"].items()
        ]
    if result["traces"]:
        lines += ["", *_traces(result)]
    if result.get("continuous"):
        lines += ["", _continuous(result["continuous"])]
    return "\n".join(lines)


def _left_out(shape: str, part: dict[str, Any]) -> list[str]:
    return [f"| {shape} | {name} | {why} | – | – | – |" for name, why in part["absent"].items()]


def _traces(result: Result) -> list[str]:
    lines = [
        "| replay | way | seconds | tokens/s | peak K and V | tokens prefilled again at joins |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for trace in result["traces"]:
        shape = f"{trace['name']}: {trace['tokens']} tokens, {trace['critical_path']} steps"
        for name, way in trace["ways"].items():
            lines.append(
                f"| {shape} | {name} | {way['wall']['median']:.2f} | {way['tokens_per_s']:.1f} | "
                f"{_mib(way['peak_kv_bytes'])} | {way['prefilled_tokens']} |"
            )
        lines += [
            f"| {shape} | {name} | {why} | – | – | – |" for name, why in trace["absent"].items()
        ]
    return lines


def _continuous(found: dict[str, Any]) -> str:
    if "absent" in found:
        return "Not measured: " + ", ".join(f"{k}: {v}" for k, v in found["absent"].items())
    seconds = ", ".join(f"{name} {s:.2f} s" for name, s in found["seconds"].items())
    return (
        f"From the prompt on, once: {found['prompt']} tokens read, then {found['threads']} threads "
        f"of {found['steps']} tokens: {seconds}."
    )
