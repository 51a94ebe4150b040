"""Where results come from: the processor, and the software that a figure may depend on."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import fork_attn


def machine(device: str) -> dict[str, Any]:
    """What it ran on, at which commit, and how busy the machine was."""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fork_attn": fork_attn.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout; results of an earlier run do not make it dirty."""
    folder = Path(__file__).parent
    try:
        head, changed = (
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
            for command in (
                ("git", "rev-parse", "--short=12", "HEAD"),
                ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changed.strip() else "")
