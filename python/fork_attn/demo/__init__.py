"""The command `fork-attn demo`: a real model forks into threads over one KV cache and joins them.

Importing this package costs nothing; the model libraries are imported when the demo runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    parser.add_argument("--prompt", metavar="TEXT", help="what the threads think about")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where the trace and its pictures are written (default: demo)",
    )
    parser.add_argument(
        "--no-compare", action="store_true", help="do not measure stock transformers for comparison"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 always picks the likeliest token (default); above it, tokens are sampled",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where the converted weights are kept "
        "(default: $XDG_CACHE_HOME/fork-attn or ~/.cache/fork-attn)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0 if the parent knows all facts after the join; 1 if not; 2 if the demo cannot run, with the
        reason on stderr.
    """
    if args.temperature < 0:
        print(
            f"fork-attn demo: --temperature: expected at least 0, got {args.temperature}",
            file=sys.stderr,
        )
        return 2
    try:
        from fork_attn.demo import main
    except ModuleNotFoundError as error:
        return _refuse(f'{error}: pip install "fork-attn[demo]"')
    try:
        return main.main(args)
    except main.DemoError as error:
        return _refuse(str(error))


def _refuse(reason: str) -> int:
    print(f"fork-attn demo: {reason}", file=sys.stderr)
    return 2
