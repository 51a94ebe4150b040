"""What a result says: our fastest way, the best rival, ratios, shares of the limit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HALF_KV = "fork_attn_bf16_kv"
"""Beside cases of e4m3: this package over the same K and V in bf16. No rival."""


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON, in folders that are made; nothing without a path."""
    if path is not None:
        replace(path, json.dumps(result, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file beside it first: one who is stopped in the middle leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def ours(row: dict[str, Any], what: str = "step") -> str | None:
    """Our fastest way of a case, by name."""
    return _fastest(row, what, True)


def best_rival(row: dict[str, Any], what: str = "step") -> str | None:
    """The fastest of the others."""
    return _fastest(row, what, False)


def _fastest(row: dict[str, Any], what: str, mine: bool) -> str | None:
    found = {
        name: way[what]["median"]
        for name, way in row["ways"].items()
        if way["ours"] == mine and what in way and (mine or name != HALF_KV)
    }
    return min(found, key=found.__getitem__) if found else None


def over_best_rival(row: dict[str, Any], what: str = "step") -> float | None:
    """The best rival's time over ours; above 1 we are faster."""
    own, rival = ours(row, what), best_rival(row, what)
    if own is None or rival is None:
        return None
    return float(row["ways"][rival][what]["median"] / row["ways"][own][what]["median"])


def over_half_kv(row: dict[str, Any], what: str = "step") -> float | None:
    """Our time over K and V in bf16 over that over e4m3; None where the case is not e4m3."""
    own, half = ours(row, what), row["ways"].get(HALF_KV, {})
    if own is None or what not in half:
        return None
    return float(half[what]["median"] / row["ways"][own][what]["median"])


def of_limit(row: dict[str, Any]) -> float | None:
    """The limit's time over our kernel's; 1 is the limit."""
    own = ours(row, "cold")
    if own is None:
        return None
    return float(row["limit_seconds"] / row["ways"][own]["cold"]["median"])


def geomean(values: Iterable[float]) -> float:
    """nan of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else float("nan")


def line(row: dict[str, Any]) -> str:
    """A case's result on one line."""
    own, rival, limit = ours(row, "cold"), best_rival(row), of_limit(row)
    parts = [f"{row['id']:28}"]
    if own is not None and limit is not None:
        parts.append(f"{row['ways'][own]['cold']['median'] * 1e6:9.1f} us")
        parts.append(f"{limit:5.2f} of {row['limit_by']} limit")
    if rival is not None:
        parts.append(f"step {over_best_rival(row) or 0:5.2f}x {rival}")
    if (half := over_half_kv(row)) is not None:
        parts.append(f"step {half:5.2f}x bf16 K and V")
    return "  ".join(parts)


def flat(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The result as rows of a CSV, one for each case and way."""
    keys = ("id", "shape", "heads", "dtype", "page_size", "branches", "rows", "reuse", "layers")
    facts = ("unique_bytes", "moved_bytes", "flops", "limit_seconds", "limit_by")
    for row in result["cases"]:
        for name, way in row["ways"].items():
            times = {
                f"{what}_{q}": way[what][q] if what in way else ""
                for what in ("cold", "warm", "graph", "plan", "step")
                for q in ("median", "p20", "p95")
            }
            some = {key: row[key] for key in keys + facts}
            extra = {"error": way["error"], "held_bytes": way["held_bytes"], "absent": ""}
            yield {"way": name, **some, **times, **extra}
        for name, why in row["absent"].items():
            yield {"way": name, **{key: row[key] for key in keys + facts}, "absent": why}
