"""Tables of thinking in threads, as Markdown."""

from __future__ import annotations

from typing import Any

from report_tables import conditions

Result = dict[str, Any]

NAMES = {
    "fork_attn": "`fork_attn.reason.generate`",
    "stock_generate": "stock `generate`",
    "stock_one_by_one": "stock `generate`, one after another",
    "stock_batch": "stock `generate`, one batch over copied caches",
}


def reasoning(results: list[Result]) -> str:
    """Every part of every result."""
    return "\n\n".join(_reasoning(result) for result in results) or "Nothing is measured yet."


def _reasoning(result: Result) -> str:
    lines = [conditions(result), "", f"{result['model']}, {result['dtype']}", "", *_fans(result)]
    if "coordination" in result:
        lines += ["", *_coordination(result["coordination"])]
    if "joins" in result:
        lines += ["", *_joins(result["joins"])]
    return "\n".join(lines)


def _fans(result: Result) -> list[str]:
    lines = [
        "| threads over prompt, tokens each | way | seconds (p20–p95) | tokens/s | its time "
        "over ours | K and V |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for fan in result["fans"]:
        shape = f"{fan['threads']} over {fan['prefix']}, {fan['tokens']}"
        shape += "" if fan["same_tokens"] else " (tokens differ)"
        own = fan["ways"]["fork_attn"]["seconds"]["median"]
        for name, way in fan["ways"].items():
            times = "" if name == "fork_attn" else f"{way['seconds']['median'] / own:.2f}"
            lines.append(
                f"| {shape} | {NAMES[name]} | {_spread(way['seconds'], 1, 2)} | "
                f"{way['tokens_per_s']:.1f} | {times} | {_mib(way['kv_bytes'])} |"
            )
    return lines


def _coordination(found: dict[str, Any]) -> list[str]:
    return [
        f"Coordination, {found['protocol']}, {found['forks']} forks of {found['threads']} threads, "
        f"{found['tokens']} tokens in {found['steps']} steps:",
        "",
        "| | median (p20–p95) |",
        "|---|--:|",
        f"| share of a generation, % | {_spread(found['share'], 100, 2)} |",
        f"| a step of {found['threads']} threads in it, µs | {_spread(found['step'], 1e6, 0)} |",
        f"| such a step with no model beside it, µs | "
        f"{_spread(found['step_without_model'], 1e6, 0)} |",
    ]


def _joins(found: dict[str, Any]) -> list[str]:
    lines = [
        f"ThreadWeaver, {found['forks']} forks of {found['threads']} threads, {found['tokens']} "
        "tokens:",
        "",
        "| join | seconds (p20–p95) | ms of the step behind a join | tokens read again | K and V "
        "at most | after the last join |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, way in found["ways"].items():
        after = _spread(way["after_join"], 1e3, 1)
        lines.append(
            f"| `{name}` | {_spread(way['seconds'], 1, 2)} | {after} | "
            f"{way['prefilled_tokens']} | {_mib(way['peak_kv_bytes'])} | "
            f"{_mib(way['joined_kv_bytes'])} |"
        )
    return lines


def _spread(times: dict[str, float], factor: float, digits: int) -> str:
    median, low, high = (f"{times[key] * factor:.{digits}f}" for key in ("median", "p20", "p95"))
    return f"{median} ({low}–{high})"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
