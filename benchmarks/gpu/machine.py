"""What was measured on: machine, clocks, versions, commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_GPU_FIELDS = (
    "name,driver_version,memory.total,power.limit,temperature.gpu,"
    "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
)
_PACKAGES = (
    "fork-attn",
    "torch",
    "triton",
    "transformers",
    "numpy",
    "flashinfer-python",
    "xformers",
)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def clocks() -> dict[str, str] | None:
    """nvidia-smi's word on the first GPU, or None where there is none."""
    line = _output("nvidia-smi", "-i", "0", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader")
    if line is None:
        return None
    return dict(zip(_GPU_FIELDS.split(","), (v.strip() for v in line.split(",")), strict=True))


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def versions() -> dict[str, str | None]:
    """Versions of packages, of CUDA and nvcc, and of the rivals that PEERS carries."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    nvcc = _output("nvcc", "--version")
    found["nvcc"] = nvcc.splitlines()[-1] if nvcc else None
    carried = Path(os.environ.get("PEERS", "")) / "versions.json"
    if os.environ.get("PEERS") and carried.is_file():
        found.update({f"peers:{k}": v for k, v in json.loads(carried.read_text()).items()})
    return found


def commit() -> str:
    """The commit measured; from the variable COMMIT where the tree travels without its history."""
    described = _output("git", "describe", "--always", "--dirty", "--abbrev=12")
    return described or os.environ.get("COMMIT") or "unknown"
