"""What was measured on: machine, versions, commit; clocks are `fork_attn.bench.machine.clocks`."""

from __future__ import annotations

from typing import Any

import torch

from fork_attn.bench import machine as suite


def machine() -> dict[str, Any]:
    """The machine and the first GPU, None where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"gpu": None, **suite.machine(device)}


def versions() -> dict[str, str | None]:
    """Versions of packages, of CUDA and nvcc, and of the rivals that PEERS carries."""
    return suite.versions() | {"cuda": torch.version.cuda, "nvcc": suite.nvcc_version()}


def commit() -> str:
    """The commit measured."""
    return suite.commit()
