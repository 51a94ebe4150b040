"""The commands `fork-attn generate` and `fork-attn trace`.

Importing this package costs nothing; the model libraries are imported when a command runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

LIMITS = {
    "max_new_tokens": "sampled tokens of all threads together",
    "max_thread_tokens": "sampled tokens of one thread",
    "max_fanout": "children of one fork",
    "max_depth": "forks inside forks",
    "max_width": "threads that write at once",
    "max_pages": "KV pages",
}


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fork-attn generate`."""
    parser.add_argument("prompt", nargs="?", help="what to think about; - reads standard input")
    parser.add_argument(
        "--model", metavar="NAME_OR_DIR", help="a Hugging Face model, or a directory with one"
    )
    parser.add_argument("--protocol", metavar="NAME", help="how threads fork and join")
    parser.add_argument("--list", action="store_true", help="list the protocols and stop")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="options",
        help="an option of the protocol, such as n=8 for best_of_n; may be repeated",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as saved)")
    parser.add_argument("--memory", metavar="SIZE", help="of the KV cache, such as 2GiB")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")

    parser.add_argument(
        "--speculate", metavar="lookup|NAME_OR_DIR",
        help="draft tokens by prompt lookup, or with a smaller model of the same vocabulary",
    )  # fmt: skip
    parser.add_argument(
        "--draft-tokens", type=int, metavar="N", help="draft tokens of a thread's step at most"
    )

    sampling = parser.add_argument_group(
        "sampling", "what is left out is as the model's own generation config says"
    )
    sampling.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--min-p", type=float, metavar="P")
    sampling.add_argument("--repetition-penalty", type=float, metavar="X")

    limits = parser.add_argument_group("limits")
    for name, text in LIMITS.items():
        option = "--" + name.replace("_", "-")
        limits.add_argument(option, type=int, metavar="N", help=f"most {text}")
    limits.add_argument("--max-seconds", type=float, metavar="S", help="most time")

    output = parser.add_argument_group("output")
    output.add_argument("--answer", action="store_true", help="print the answer alone")
    output.add_argument("--no-live", action="store_true", help="do not show threads as they grow")
    output.add_argument("--save", type=Path, metavar="FILE.json", help="write the trace")
    _add_views(output)


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `fork-attn trace`."""
    parser.add_argument("file", type=Path, help="a trace that `generate --save` wrote")
    parser.add_argument("--quiet", action="store_true", help="print nothing, only write files")
    _add_views(parser)


def _add_views(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the threads over time: .svg, .png or .html"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="the picture with every token under the pointer"
    )
    parser.add_argument(
        "--timeline", type=Path, metavar="FILE.json", help="for https://ui.perfetto.dev"
    )


def run_generate(args: argparse.Namespace) -> int:
    """Runs `fork-attn generate`.

    Returns:
        0; 2 if it cannot run, with the reason on stderr; 130 if it was interrupted.
    """
    return _guarded("generate", args)


def run_trace(args: argparse.Namespace) -> int:
    """Runs `fork-attn trace`; 0, or 2 with the reason on stderr."""
    return _guarded("trace", args)


def _guarded(name: str, args: argparse.Namespace) -> int:
    try:
        from fork_attn.errors import ForkAttnError
        from fork_attn.reason_command import commands
    except ModuleNotFoundError as error:
        return _refuse(name, f'{error}: pip install "fork-attn[reason]"')
    try:
        return commands.generate(args) if name == "generate" else commands.trace(args)
    except KeyboardInterrupt:
        _refuse(name, "interrupted; all pages are free again")
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ForkAttnError) as error:
        return _refuse(name, str(error))


def _refuse(name: str, reason: str) -> int:
    """Prints why not, in one line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    print(f"fork-attn {name}: {' '.join(lines[:2]) or 'failed'}", file=sys.stderr)
    return 2
