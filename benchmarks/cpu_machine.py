"""What a CPU measurement ran on: processor, versions, load, stream bandwidth, matmul rate."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from cpu_timing import Timer
from torch import Tensor

import fork_attn

STREAM_BYTES = 512 << 20
"""Of each array: many times any cache."""
MATMUL_COLUMNS = 1024


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """The processor, and everything of the software that a figure may depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fork_attn": fork_attn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def load_average() -> tuple[float, float, float]:
    """Of the last 1, 5 and 15 minutes: other programs on the same cores show here."""
    return os.getloadavg()


def stream_bandwidth(timer: Timer) -> dict[str, float]:
    """Bytes per second with all cores, each array larger than any cache: copy and triad (STREAM's;
    reads and writes counted), and a read alone."""
    n = STREAM_BYTES // 4
    a, b, c = (torch.full((n,), float(i)) for i in range(3))
    times = timer.measure(
        {
            "copy": lambda: c.copy_(a),
            "triad": lambda: torch.add(a, b, alpha=3.0, out=c),
            "read": lambda: a.sum(),
        }
    )
    arrays = {"copy": 2, "triad": 3, "read": 1}
    return {name: arrays[name] * STREAM_BYTES / times[name].best for name in times}


def matmul_rate(timer: Timer, num_heads: int, rows: int, head_dim: int) -> float:
    """fp32 FLOP/s of torch's batched matmul in the shapes of attention's two products, for `rows`
    rows a head over keys that fit in the caches."""
    keys = torch.randn(num_heads, MATMUL_COLUMNS, head_dim)
    q = torch.randn(num_heads, rows, head_dim)
    scores = torch.empty(num_heads, rows, MATMUL_COLUMNS)
    out = torch.empty(num_heads, rows, head_dim)

    def both() -> Tensor:
        torch.bmm(q, keys.transpose(1, 2), out=scores)
        return torch.bmm(scores, keys, out=out)

    flops = 4 * num_heads * rows * head_dim * MATMUL_COLUMNS
    return flops / timer.measure({"matmul": both})["matmul"].best
