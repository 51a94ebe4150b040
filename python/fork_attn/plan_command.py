"""`fork-attn plan`: the plan of a decode step over a tree, printed and drawn."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fork_attn.plan_picture import picture
from fork_attn.plan_report import DTYPES, parse_heads, parse_shape, plan_tree, report

_MOST_LINES = 16  # of row blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "shape",
        help="nodes per level x tokens per node of each level, such as '[1,256]x[2048,32]'; every "
        "branch of the last level adds one token",
    )
    parser.add_argument("--heads", default="32/8", help="query heads/KV heads (default 32/8)")
    parser.add_argument("--dim", type=int, default=128, help="of a head (default 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of K and V")
    parser.add_argument("--page-size", type=int, default=16, help="slots in a page (default 16)")
    parser.add_argument("--target", default="sm_90", help="cpu, sm_80, sm_90 (default) or sm_100")
    parser.add_argument("--workers", type=int, help="SMs or cores (default: the target's)")
    parser.add_argument("--window", type=int, help="sliding window in positions (default: none)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--plot", metavar="FILE.svg", help="draws which row block reads what")


def run(args: argparse.Namespace) -> int:
    """Runs the command; the exit status is 2 where an argument is off."""
    try:
        if args.plot is not None and not args.plot.endswith(".svg"):
            raise ValueError(f"plot: expected a file that ends in .svg, got {args.plot!r}")
        tree = plan_tree(
            parse_shape(args.shape),
            heads=parse_heads(args.heads),
            head_dim=args.dim,
            dtype=DTYPES[args.dtype],
            page_size=args.page_size,
            target=args.target,
            workers=args.workers,
            window=args.window,
        )
        if args.plot is not None:
            title = f"{args.shape}, heads {args.heads}x{args.dim}, {args.target}"
            Path(args.plot).write_text(picture(tree, title))
    except (ValueError, OSError) as error:
        print(f"fork-attn plan: {error}", file=sys.stderr)
        return 2
    figures = report(tree)
    if args.json:
        print(json.dumps(figures))
    else:
        _print(figures)
    return 0


def _print(figures: dict[str, Any]) -> None:
    summary, blocks = _summary(figures), _block_lines(figures["blocks"])
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for name, value in summary:
            print(f"{name:<16}{value}")
        print()
        for queries, reads in blocks:
            print(f"{queries:<32}{reads}")
        return
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in summary:
        table.add_row(name, value)
    console.print(table, "")
    table = Table("row blocks", "read", box=None, pad_edge=False)
    for queries, reads in blocks:
        table.add_row(queries, reads)
    console.print(table)


def _summary(f: dict[str, Any]) -> list[tuple[str, str]]:
    floor = max(f["memory_floor_us"], f["compute_floor_us"])
    return [
        ("target", f"{f['target']}, {f['workers']} workers"),
        ("costs", f["costs"]),
        ("K and V", f"{_bytes(f['unique_kv_bytes'])} unique"),
        ("  once a tile", f"{_bytes(f['tile_unique_kv_bytes'])}"),
        (
            "  read",
            f"{_bytes(f['read_kv_bytes'])}: {f['read_kv_bytes'] / f['unique_kv_bytes']:.2f} x "
            f"unique, {f['read_kv_bytes'] / f['tile_unique_kv_bytes']:.3f} x once a tile",
        ),
        ("partials", f"{_bytes(f['partial_bytes'])}, {f['partial_rows']} rows"),
        (
            "FLOPs",
            f"{f['flops'] / 1e9:.3f} G useful, {f['executed_flops'] / f['flops']:.2f} x executed",
        ),
        ("work", f"{f['row_blocks']} row blocks, {f['items']} items in {f['spans']} spans"),
        ("balance", f"max / mean {f['work_max_over_mean']:.3f} over {f['workers']} workers"),
        (
            "predicted",
            f"{f['predicted_us']:.1f} us; floors: memory {f['memory_floor_us']:.1f} us, compute "
            f"{f['compute_floor_us']:.1f} us; {f['predicted_us'] / floor:.2f} x the higher one",
        ),
        ("plan", _bytes(f["plan_bytes"])),
    ]


def _block_lines(blocks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One line for each stretch of row blocks that read alike."""
    stretches: list[list[dict[str, Any]]] = []
    for block in blocks:
        if stretches and _kind(stretches[-1][-1]) == _kind(block):
            stretches[-1].append(block)
        else:
            stretches.append([block])
    lines = []
    for stretch in stretches[:_MOST_LINES]:
        first, last = stretch[0]["first"], stretch[-1]["last"]
        queries = f"{stretch[0]['queries']} of branches {first} to {last}"
        reads = ", ".join(
            f"level {r['level']}: {r['slots']} slots of {_count(r['nodes'], 'node')}"
            for r in stretch[0]["reads"]
        )
        lines.append((f"{len(stretch)} x {queries}" if len(stretch) > 1 else queries, reads))
    if len(stretches) > _MOST_LINES:
        rest = sum(len(stretch) for stretch in stretches[_MOST_LINES:])
        lines.append((f"and {_count(rest, 'row block')} more", "see --json or --plot"))
    return lines


def _kind(block: dict[str, Any]) -> tuple[Any, ...]:
    return block["queries"], str(block["reads"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
