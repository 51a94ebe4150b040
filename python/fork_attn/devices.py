"""The device that a cache lives on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fork_attn.errors import Unsupported


def resolved(device: torch.device | str) -> torch.device:
    """A device that a cache can live on; "cuda" alone is the one that it stands for now.

    Raises:
        Unsupported: no such device here, or of a type that caches cannot live on.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "meta", "cuda"):
        raise Unsupported(f"device {device}: expected the CPU, a CUDA device or 'meta'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"device {device}: Torch finds no CUDA device here")
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it a CUDA device is the current one; of the CPU there is one only."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def default_workers(device: torch.device) -> int:
    """Its SMs, or the threads that Torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()
