"""Predictions past what was measured: wider trees, longer prefixes, tensor-parallel heads.

Bytes are the planner's exact accounting, times its cost model's; both need no GPU. The model is
held against every measured case.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from svg_chart import Series, lines

from fork_attn import _C
from fork_attn.bench.forest import uniform
from fork_attn.bench.grow import plan_of
from fork_attn.bench.results import geomean, ours
from fork_attn.bench.shapes import SHAPES, Heads

Result = dict[str, Any]

TARGET = "sm_90"
WIDTHS = (8, 32, 128, 512, 2048)
RANKS = (1, 2, 4, 8)
SUFFIX = 256


@dataclass(frozen=True)
class Model:
    """What a step costs beside attention: bf16 weights read once."""

    name: str
    layers: int
    heads: Heads
    weight_bytes: float

    def rank(self, ranks: int) -> Heads:
        """Heads of one tensor-parallel rank."""
        return Heads(self.heads.q // ranks, self.heads.kv // ranks, self.heads.dim)


MODELS = (
    Model("Llama-3-8B", 32, Heads(32, 8), 16.1e9),
    Model("Llama-3-70B", 80, Heads(64, 8), 141e9),
)


@dataclass(frozen=True)
class Point:
    """One step of a model over `[1,width]x[prefix,SUFFIX]`, on one of `ranks` cards."""

    width: int
    prefix: int
    ranks: int
    attention_ms: float
    copies_ms: float  # the bytes of a copy per branch over the bandwidth: what not sharing costs
    weights_ms: float
    kv_bytes: int
    copied_bytes: int


@cache
def predict(model: Model, width: int, prefix: int, ranks: int) -> Point:
    """By the cost model of TARGET; communication between cards is left out."""
    forest = uniform([1, width], [prefix, SUFFIX])
    heads = model.rank(ranks)
    costs = _C.target_costs(TARGET)
    workers = int(costs["workers"])
    bandwidth = costs["bytes_per_ns"] * workers * 1e6  # bytes a ms
    plan = plan_of(forest, heads, torch.bfloat16, 16, TARGET, workers)
    slot = 2 * heads.kv * heads.dim * 2 * model.layers
    return Point(
        width,
        prefix,
        ranks,
        plan.work[0] * model.layers / 1e3,
        forest.copied_slots * slot / bandwidth,
        model.weight_bytes / ranks / bandwidth,
        forest.unique_slots * slot,
        forest.copied_slots * slot,
    )


def predictions_table() -> str:
    """Step time and memory of one card, for models, widths, prefixes and ranks."""
    text = [
        "| model | branches | prefix | cards | heads a card | attention ms | weights ms | K and V "
        "GiB | with copies: attention ms | GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model, width, prefix, ranks in _grid():
        point = predict(model, width, prefix, ranks)
        heads = model.rank(ranks)
        text.append(
            f"| {model.name} | {width} | {prefix} | {ranks} | {heads.q}/{heads.kv} | "
            f"{point.attention_ms:.2f} | {point.weights_ms:.2f} | {point.kv_bytes / 2**30:.2f} | "
            f"{point.copies_ms:.2f} | {point.copied_bytes / 2**30:.1f} |"
        )
    return "\n".join(text)


def _grid() -> list[tuple[Model, int, int, int]]:
    small, large = MODELS
    return [
        *((small, width, 8192, 1) for width in WIDTHS),
        *((small, 64, prefix, 1) for prefix in (2048, 32768, 131072)),
        *((large, 512, 32768, ranks) for ranks in RANKS[1:]),
        *((large, width, 131072, 8) for width in WIDTHS[:4]),
    ]


def checks(result: Result) -> list[tuple[str, float, float]]:
    """Measured and predicted microseconds of every case that fork-attn ran."""
    machine = result["machine"]
    target, workers = "cpu", machine.get("threads", 1)
    if machine.get("gpu"):
        major, minor = machine["gpu"]["capability"]
        target, workers = f"sm_{major}{minor}", machine["gpu"]["multiprocessors"]
    found = []
    for row in result["cases"]:
        own = ours(row, "cold")
        if own is None or row["shape"] not in SHAPES:
            continue
        dtype = getattr(torch, row["dtype"])
        forest, heads = SHAPES[row["shape"]].make(), Heads.parse(row["heads"])
        plan = plan_of(forest, heads, dtype, row["page_size"], target, workers)
        found.append((row["id"], row["ways"][own]["cold"]["median"] * 1e6, plan.work[0]))
    return found


def checks_table(results: list[Result]) -> str:
    """How far the cost model is from what was measured, case by case."""
    parts = []
    for result in results:
        found = checks(result)
        ratios = [measured / predicted for _, measured, predicted in found]
        text = [
            f"Measured over predicted, {len(found)} cases: {geomean(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f}), on {_where(result)}.",
            "",
            "| case | measured µs | predicted µs | ratio |",
            "|---|--:|--:|--:|",
        ]
        for (name, measured, predicted), ratio in zip(found, ratios, strict=True):
            text.append(f"| {name} | {measured:.0f} | {predicted:.0f} | {ratio:.2f} |")
        parts.append("\n".join(text))
    return "\n\n".join(parts) or "Nothing is measured yet."


def _where(result: Result) -> str:
    machine = result["machine"]
    return str(machine["gpu"]["name"] if machine.get("gpu") else machine["cpu"])


def pictures(results: list[Result]) -> dict[str, str]:
    """The one picture: attention of a 70B model's step against branches, 8 cards to 2."""
    model, prefix = MODELS[1], 32768
    series = []
    for ranks in RANKS[1:]:
        points = [(w, predict(model, w, prefix, ranks).attention_ms) for w in WIDTHS]
        heads = model.rank(ranks)
        series.append(Series(f"{ranks} cards, {heads.q}/{heads.kv}", points))
    copies = [(w, predict(model, w, prefix, 8).copies_ms) for w in WIDTHS]
    weights = [(w, predict(model, w, prefix, 8).weights_ms) for w in WIDTHS]
    series.append(Series("8 cards, copies", copies, dashed=True))
    series.append(Series("8 cards, weights", weights, dashed=True))
    title = f"Predicted: attention of a step of {model.name}, prefix {prefix}, own {SUFFIX}"
    return {"bench-simulation.svg": lines(title, "branches", "ms a step, one card", series)}
