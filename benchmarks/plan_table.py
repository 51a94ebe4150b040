"""The accounting of plans for the suite's shapes on sm_90: a CSV, and the table of docs/plan.md.

Exact counts and predicted times; nothing is measured, and no GPU is needed.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import fork_attn as fa
from fork_attn import _C
from fork_attn.branch import Branch
from fork_attn.plan import Plan, build_plan

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "benchmarks" / "results" / "plan_accounting.csv"
DOC = ROOT / "docs" / "plan.md"
BEGIN, END = "<!-- begin: benchmarks/plan_table.py -->", "<!-- end: benchmarks/plan_table.py -->"

TARGET, PAGE_SIZE, HEAD_DIM = "sm_90", 16, 128
HEADS = ("32/8", "64/8", "8/1", "32/32")
Tokens = dict[Branch, int | fa.Draft]
Build = Callable[[fa.ForkedKVCache], Tokens]


def tree(cache: fa.ForkedKVCache, *, nodes: list[int], tokens: list[int], new: int = 1) -> Tokens:
    """`nodes[i]` contexts on level i, each adding `tokens[i]` tokens; each leaf adds `new`."""
    branches = [cache.new_branch() for _ in range(nodes[0])]
    for depth, (count, length) in enumerate(zip(nodes, tokens, strict=True)):
        if depth:
            fan = count // len(branches)
            branches = [child for branch in branches for child in branch.fork(fan)]
        if length:
            cache.step(dict.fromkeys(branches, length)).commit()
    return dict.fromkeys(branches, new)


def few_shot(cache: fa.ForkedKVCache, *, width: int, suffix: int) -> Tokens:
    return tree(cache, nodes=[1, width], tokens=[4000, suffix])


def ragged(cache: fa.ForkedKVCache, *, seed: int) -> Tokens:
    """A random tree with skewed fan-out and lengths off the pages' multiples."""
    rng = random.Random(seed)
    leaves = [cache.new_branch()]
    cache.step({leaves[0]: 1001}).commit()
    while len(leaves) < 200:
        branch = leaves.pop(rng.randrange(len(leaves)))
        children = branch.fork(min(1 + int(rng.paretovariate(1.0)), 40))
        for child in children:
            cache.step({child: 1 + int(rng.paretovariate(0.8)) % 700}).commit()
        leaves += children
    return dict.fromkeys(leaves, 1)


def verify(cache: fa.ForkedKVCache, *, prefix: int, batch: int, draft: int) -> Tokens:
    """A random draft tree behind each of `batch` contexts that share nothing."""
    rng = random.Random(draft)
    parents = [-1, *(rng.randint(max(-1, i - 10), i - 1) for i in range(1, draft))]
    branches = [cache.new_branch() for _ in range(batch)]
    cache.step(dict.fromkeys(branches, prefix)).commit()
    return dict.fromkeys(branches, fa.Draft(parents))


def joined(cache: fa.ForkedKVCache) -> Tokens:
    """Fork 8, join, fork 8; every segment has 2048 tokens."""
    root = cache.new_branch()
    cache.step({root: 2048}).commit()
    children = root.fork(8)
    cache.step(dict.fromkeys(children, 2048)).commit()
    root.join(children)
    cache.step({root: 2048}).commit()
    children = root.fork(8)
    cache.step(dict.fromkeys(children, 2048)).commit()
    return dict.fromkeys(children, 1)


def _trees() -> Iterator[tuple[str, str, Build]]:
    shapes = {
        "S1": ([1, 10], [4000, 400]),
        "S2": ([1, 256], [256, 32]),
        "S3": ([1, 1024], [2048, 32]),
        "S4": ([1, 256], [32768, 256]),
        "S6": ([1, 8], [4000, 32]),
        "S7a": ([1, 128], [128, 3]),
        "S7b": ([1, 128], [1024, 3]),
        "S7c": ([1, 128], [4096, 3]),
        "S7d": ([1, 5000], [512, 64]),
        "S8": ([32, 512], [1024, 4096]),
        "W": ([1, 256], [2048, 32]),
        "N1": ([1, 16, 64], [1024, 256, 32]),
        "N2": ([1, 4, 16, 512], [1024, 256, 128, 32]),
        "N2s": ([1, 4, 16, 64], [1024, 256, 128, 32]),
        "N3": ([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256]),
        "N4": ([1, 2, 4, 8, 16, 32, 64, 128, 1024], [16] * 9),
        "N4s": ([1, 2, 4, 8, 16, 32, 64, 128], [16] * 8),
        "N5": ([1, 8, 16, 32, 64, 128, 1024], [256, 128, 64, 16, 16, 16, 16]),
        "N6": ([8, 16, 32, 256], [512, 512, 256, 32]),
        "N7": ([1, 8, 512], [32, 2048, 256]),
        "U1": ([256], [1024]),
        "U2": ([256], [4096]),
        "U3": ([1], [32768]),
    }
    for name, (nodes, tokens) in shapes.items():
        text = f"{_short(nodes)}x{_short(tokens)}"
        yield name, text, partial(tree, nodes=nodes, tokens=tokens)
        if name in ("N1", "N2"):
            for new in (16, 128, 512):
                build = partial(tree, nodes=nodes, tokens=tokens, new=new)
                yield f"E-{name}-{new}", f"{text}, {new} new tokens each", build


def _short(numbers: list[int]) -> str:
    if len(set(numbers)) == 1 and len(numbers) > 1:
        return f"[{numbers[0]} each]"
    return "[" + ",".join(map(str, numbers)) + "]"


def cases() -> dict[str, tuple[str, Build]]:
    """Every shape: its description, and what grows it in a cache and says the step's tokens."""
    found = {name: (text, build) for name, text, build in _trees()}
    for width in (20, 30, 50):
        build = partial(few_shot, width=width, suffix=200)
        found[f"S5-{width}"] = (f"[1,{width}]x[4000,200]", build)
    found["N9"] = ("random tree, about 200 branches", partial(ragged, seed=9))
    for prefix in (1024, 8192, 32768):
        for batch in (1, 8, 32):
            text = f"{batch} x {prefix} tokens, draft trees of 60"
            build = partial(verify, prefix=prefix, batch=batch, draft=60)
            found[f"T-{prefix}-{batch}"] = (text, build)
    found["J"] = ("fork 8, join, fork 8, segments of 2048", joined)
    return dict(sorted(found.items()))


def plan_case(build: Build, heads: str) -> Plan:
    """The plan of one shape for one setting of heads."""
    q_heads, kv_heads = map(int, heads.split("/"))
    cache = fa.ForkedKVCache(
        num_layers=1,
        num_pages=1_000_000,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        device="meta",
    )
    workers = int(_C.target_costs(TARGET)["workers"])
    with cache.step(build(cache)):
        shape = cache._layer(0).plan_shape(torch.bfloat16)
        return build_plan(cache._core, None, shape, PAGE_SIZE, TARGET, workers)


def row(name: str, text: str, heads: str, plan: Plan) -> dict[str, str]:
    """One line of the CSV."""
    costs = _C.target_costs(TARGET)
    workers = plan.num_workers
    share = plan.cost_ns * plan.shape.num_kv_heads / workers
    values: dict[str, object] = {
        "id": name,
        "shape": text,
        "heads": heads,
        "unique_kv_bytes": plan.unique_kv_bytes,
        "tile_unique_kv_bytes": plan.tile_unique_kv_bytes,
        "read_kv_bytes": plan.read_kv_bytes,
        "partial_bytes": plan.partial_bytes,
        "flops": plan.flops,
        "executed_flops": plan.executed_flops,
        "row_blocks": plan.num_row_blocks,
        "items": plan.num_items,
        "spans": len(plan.span_ns),
        "max_over_mean": f"{plan.work_max_over_mean:.3f}",
        "work_for_all": int(share >= 4 * costs["item_ns"]),
        "predicted_us": f"{plan.work[0]:.2f}",
        "memory_floor_us": f"{plan.unique_kv_bytes / costs['bytes_per_ns'] / workers / 1000:.2f}",
        "compute_floor_us": f"{plan.flops / costs['flops_per_ns_128'] / workers / 1000:.2f}",
    }
    return {key: str(value) for key, value in values.items()}


def render(rows: list[dict[str, str]]) -> str:
    """The rows as Markdown tables, one for each setting of heads."""
    lines = []
    for heads in HEADS:
        lines += [
            f"**{heads} x {HEAD_DIM}**",
            "",
            "| id | shape | unique MiB | read / unique | read / tile-unique | partials / unique "
            "| executed / useful | row blocks | items | max / mean | predicted us | floor us |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        lines += [_line(r) for r in rows if r["heads"] == heads]
        lines.append("")
    return "\n".join(lines)


def _line(r: dict[str, str]) -> str:
    unique, read = int(r["unique_kv_bytes"]), int(r["read_kv_bytes"])
    floor = max(float(r["memory_floor_us"]), float(r["compute_floor_us"]))
    balance = r["max_over_mean"] if int(r["work_for_all"]) else f"({r['max_over_mean']})"
    cells = [
        r["id"],
        r["shape"],
        f"{unique / 2**20:.1f}",
        f"{read / unique:.2f}",
        f"{read / int(r['tile_unique_kv_bytes']):.3f}",
        f"{int(r['partial_bytes']) / unique:.2f}",
        f"{int(r['executed_flops']) / int(r['flops']):.2f}",
        r["row_blocks"],
        r["items"],
        balance,
        f"{float(r['predicted_us']):.1f}",
        f"{floor:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def with_table(document: str, table: str) -> str:
    """The document with the table between its markers."""
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}"


def read_rows() -> list[dict[str, str]]:
    """The committed CSV."""
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Writes the CSV and the table."""
    rows = []
    for name, (text, build) in cases().items():
        rows += [row(name, text, heads, plan_case(build, heads)) for heads in HEADS]
        print(name, rows[-4]["max_over_mean"], flush=True)
    CSV.parent.mkdir(parents=True, exist_ok=True)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    DOC.write_text(with_table(DOC.read_text(), render(rows)))


if __name__ == "__main__":
    main()
