"""What a measurement ran on: the machine, its load and clocks, versions, commit, and its limits."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fork_attn
from fork_attn.bench.timing import Timer

STREAM_BYTES = 512 << 20
"""Of each array on a CPU: many times any cache."""
GPU_STREAM_BYTES = 2 << 30
MATMUL_COLUMNS = 1024
_GPU_FIELDS = (
    "name,driver_version,memory.total,power.limit,temperature.gpu,"
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
)
_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "flash-attn",
    "flashinfer-python",
    "xformers",
)


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"


def commit() -> str:
    """The commit measured, "-dirty" if anything but results and documents has been changed since;
    from the variable COMMIT where the tree travels without its history."""
    # Found from the extension: this file lies elsewhere when the package is installed editable.
    folder = Path(fork_attn.__file__).resolve().parent
    described = _output("git", "describe", "--always", "--abbrev=12", cwd=folder)
    if not described:
        return os.environ.get("COMMIT") or "unknown"
    # One run writes several files: the first must not mark those after it.
    others = (":(top)", *(f":(top,exclude){p}" for p in ("benchmarks/results", "docs", "*.md")))
    changed = _output("git", "status", "--porcelain", "-uno", "--", *others, cwd=folder)
    return f"{described}-dirty" if changed else described


def clocks() -> dict[str, str] | None:
    """nvidia-smi's word on the first GPU, or None where there is none."""
    line = _output("nvidia-smi", "-i", "0", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    if line is None:
        return None
    return dict(zip(_GPU_FIELDS.split(","), (v.strip() for v in line.split(",")), strict=True))


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes: other programs on the same cores show here."""
    return [round(x, 2) for x in os.getloadavg()]


def nvcc_version() -> str | None:
    """nvcc's last line, or None where there is no nvcc."""
    text = _output("nvcc", "--version")
    return text.splitlines()[-1] if text else None


def versions() -> dict[str, str | None]:
    """Versions of packages, and of the rivals that PEERS carries; None: not installed."""
    found: dict[str, str | None] = {"fork-attn": fork_attn.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    carried = Path(os.environ.get("PEERS", "")) / "versions.json"
    if os.environ.get("PEERS") and carried.is_file():
        found.update({f"peers:{k}": v for k, v in json.loads(carried.read_text()).items()})
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, and everything of the software that a figure may depend on."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    return found


def kind(machine: dict[str, Any]) -> str:
    """What makes two machines alike for a comparison: the GPU, or the processor and its threads."""
    if machine.get("gpu"):
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}"


def stream_bandwidth(device: torch.device, seconds: float) -> dict[str, float]:
    """Bytes per second, each array larger than any cache: copy and triad (STREAM's; reads and
    writes counted), and a read alone."""
    num_bytes = GPU_STREAM_BYTES if device.type == "cuda" else STREAM_BYTES
    a, b, c = (torch.full((num_bytes // 4,), float(i), device=device) for i in range(3))
    times = Timer(device, seconds).measure(
        {
            "copy": lambda: c.copy_(a),
            "triad": lambda: torch.add(a, b, alpha=3.0, out=c),
            "read": lambda: a.sum(),
        }
    )
    arrays = {"copy": 2, "triad": 3, "read": 1}
    return {name: arrays[name] * num_bytes / times[name].p20 for name in times}


def matmul_rate(
    device: torch.device, seconds: float, heads: int, rows: int, dim: int, dtype: torch.dtype
) -> float:
    """FLOP/s of torch's batched matmul in the shapes of attention's two products, for `rows` rows a
    head over keys that fit in the caches."""
    keys = torch.randn(heads, MATMUL_COLUMNS, dim, device=device).to(dtype)
    q = torch.randn(heads, rows, dim, device=device).to(dtype)
    scores = torch.empty(heads, rows, MATMUL_COLUMNS, device=device, dtype=dtype)
    out = torch.empty(heads, rows, dim, device=device, dtype=dtype)

    def both() -> Tensor:
        torch.bmm(q, keys.transpose(1, 2), out=scores)
        return torch.bmm(scores, keys, out=out)

    flops = 4 * heads * rows * dim * MATMUL_COLUMNS
    timer = Timer(device, seconds, min_rounds=20)
    return flops / timer.measure({"matmul": both})["matmul"].p20


def dense_rate(device: torch.device, seconds: float) -> float:
    """FLOP/s of a large bf16 matmul: a GPU's compute roof."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = Timer(device, seconds).measure({"matmul": lambda: a @ b})
    return 2 * size**3 / times["matmul"].p20


class Limits:
    """The machine's limits, measured in the same run as what is held against them."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.stream = stream_bandwidth(device, seconds)
        self.dense = dense_rate(device, seconds) if device.type == "cuda" else None
        self._rates: dict[tuple[int, int, int], float] = {}

    def rate(self, heads: int, rows: int, dim: int) -> float:
        """On a CPU the fp32 matmul rate for as many rows (a power of two); on a GPU the dense bf16
        rate."""
        if self.dense is not None:
            return self.dense
        key = (heads, 1 << max(rows - 1, 0).bit_length(), dim)
        if key not in self._rates:
            self._rates[key] = matmul_rate(self.device, self.seconds / 2, *key, torch.float32)
        return self._rates[key]

    def as_json(self) -> dict[str, Any]:
        rates = {f"{h}x{r}x{d}": rate for (h, r, d), rate in self._rates.items()}
        return {"stream": self.stream, "dense_bf16": self.dense, "matmul_fp32": rates}
