"""The command `fork-attn`: what is installed, models that fork and join, plans, measurements."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

import fork_attn
from fork_attn import _C, _env, costs, demo, ops, plan_command, reason_command
from fork_attn.bench import command as bench_command
from fork_attn.calibrate import command as calibrate_command

_PACKAGES = ("torch", "triton", "transformers", "flash-attn", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit status.
    """
    args = _build_parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fork-attn",
        description="A KV cache and attention kernels for models that think in parallel threads.",
    )
    parser.add_argument("--version", action="version", version=f"fork-attn {fork_attn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser(
        "info",
        help="versions, backends, the extension's build, GPU or why none",
        description="Says what is installed here and what it can use.",
    )
    info.add_argument("--json", action="store_true", help="one JSON object instead of text")
    info.set_defaults(run=_info)

    run_demo = commands.add_parser(
        "demo",
        help="fork, join and decode a real model on this machine",
        description="Lets a small language model fork into threads over one KV cache, then join.",
    )
    demo.add_arguments(run_demo)
    run_demo.set_defaults(run=demo.run)

    generate = commands.add_parser(
        "generate",
        help="let a model think in threads, and watch it",
        description="Lets a Hugging Face model think in threads that fork and join.",
    )
    reason_command.add_generate_arguments(generate)
    generate.set_defaults(run=reason_command.run_generate)

    trace = commands.add_parser(
        "trace",
        help="show or draw a saved generation",
        description="Shows the threads of a saved generation, and draws them.",
    )
    reason_command.add_trace_arguments(trace)
    trace.set_defaults(run=reason_command.run_trace)

    plan = commands.add_parser(
        "plan",
        help="what a decode step over a tree of contexts reads, and how evenly",
        description="Plans one decode step over a tree of contexts; needs no KV and no GPU.",
    )
    plan_command.add_arguments(plan)
    plan.set_defaults(run=plan_command.run)

    bench = commands.add_parser(
        "bench",
        help="tree attention side by side with what one would use instead, on this machine",
        description="Checks every implementation against float64, then times them in turn.",
    )
    bench_command.add_arguments(bench)
    bench.set_defaults(run=bench_command.run)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure what the planner weighs: bandwidth, arithmetic, items, partial results",
        description="Measures the planner's costs on this machine by the kernels themselves, and "
        "writes a file that plans then follow.",
    )
    calibrate_command.add_arguments(calibrate)
    calibrate.set_defaults(run=calibrate_command.run)
    return parser


def _info(args: argparse.Namespace) -> int:
    report = info()
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    return 0


def info() -> dict[str, Any]:
    """What is installed here and what it can use, as plain JSON values."""
    versions: dict[str, str | None] = {"fork-attn": fork_attn.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["python"] = platform.python_version()
    cuda = _C.cuda_info()
    for device in cuda["devices"]:
        device["capability"] = list(device["capability"])
    return {
        "versions": versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "extension": {"path": _C.__file__, **_C.build_info()},
        "cuda": cuda,
        "torch_cuda": {"built_for": torch.version.cuda, "available": torch.cuda.is_available()},
        "backends": ops.backend_states(),
        "default_backend": _env.default_backend(),
        "costs": _costs(),
    }


def _costs() -> dict[str, str]:
    """Where each target's costs come from, or why the file that was named cannot be used."""
    try:
        return {target: costs.describe(target) for target in costs.TARGETS}
    except ValueError as error:
        return dict.fromkeys(costs.TARGETS, str(error))


def _as_text(report: dict[str, Any]) -> str:
    lines: list[str] = []

    def line(name: str, value: object) -> None:
        lines.append(f"{name:<20}{value}")

    for name, version in report["versions"].items():
        line(name, version or "not installed")
    machine = report["machine"]
    line("machine", f"{machine['system']}, {machine['cpus']} CPUs, {machine['threads']} threads")

    extension, cuda = report["extension"], report["cuda"]
    openmp = f"OpenMP {extension['openmp']}" if extension["openmp"] else "no OpenMP"
    sanitized = ", sanitized" if extension["sanitized"] else ""
    line("extension", f"{extension['compiler']}, {openmp}, {extension['simd']} kernels{sanitized}")
    line("", extension["path"])
    line("device code", cuda["architectures"] if cuda["built"] else "none")
    for index, device in enumerate(cuda["devices"]):
        line(f"GPU {index}", _describe_device(device))
    if not cuda["devices"]:
        line("GPU", f"none: {cuda['reason']}")
    torch_cuda = report["torch_cuda"]
    line("torch CUDA", f"built for {torch_cuda['built_for']}, available: {torch_cuda['available']}")
    for name, state in report["backends"].items():
        line(f"backend {name}", state)
    line("default backend", report["default_backend"])
    for target, source in report["costs"].items():
        line(f"costs {target}", source)
    return "\n".join(lines)


def _describe_device(device: dict[str, Any]) -> str:
    major, minor = device["capability"]
    code = device["binary_version"]
    return (
        f"{device['name']}, sm_{major}{minor}, {device['multiprocessors']} SMs, "
        f"{device['memory_bytes'] / 2**30:.0f} GiB, "
        + (f"runs sm_{code} code of this build" if code else "this build has no code for it")
    )
