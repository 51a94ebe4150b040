"""What every implementation looks like to the suite."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from fork_attn.bench.inputs import Inputs

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
"""Of K and V; with fp8 all else is bf16."""
HALF = ("bf16", "fp16")


FAILED = "failed: "
"""Begins the reason of an implementation that raised what it should not."""


class Absent(Exception):
    """Why an implementation does not run here, or not on this shape."""


def told(error: BaseException) -> str:
    """An error on one line: compilers and CUDA say in the later lines what went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


class Way(ABC):
    """One implementation of tree attention on one set of inputs.

    The suite calls `available`, `build`, `plan`, then `run` for layers in turn, and `output`. K and
    V lie in as many layers as `build` was told, so that a call can find its own in memory and not
    in the caches.
    """

    name: ClassVar[str]
    ours: ClassVar[bool] = False
    beside_fp8: ClassVar[bool] = False
    """No rival, but this package over K and V in bf16, where the case's are e4m3."""

    shares: ClassVar[bool] = False
    """Whether shared tokens are read once for all queries, not once for each."""

    dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")
    """Of K and V that it takes, by the names of `DTYPES`."""

    slow_build: ClassVar[bool] = False
    """It compiles for seconds: on CPUs it takes part in the quick shapes only."""

    note: str = ""
    """What must be said beside its numbers."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @classmethod
    @abstractmethod
    def available(cls, inputs: Inputs) -> None:
        """Looks whether it can do these inputs here, before anything is allocated.

        Raises:
            Absent: it cannot, with the reason.
        """

    @abstractmethod
    def build(self, layers: int) -> None:
        """Lays out K and V; none of this is timed.

        Raises:
            Absent: it turns out only here that it cannot.
        """

    has_plan: ClassVar[bool] = False

    def plan(self) -> None:  # noqa: B027
        """What the host computes once per step for all layers."""

    @abstractmethod
    def run(self, layer: int) -> Tensor:
        """Attention of one layer over a plan that lies ready; (T, q heads, dim) or a view of it."""

    def output(self) -> Tensor:
        """(T, q heads, dim) of layer 0."""
        return self.run(0).reshape(self.inputs.q.shape)

    def step(self, layers: int, held: int) -> None:
        """A step of that many layers, plan included; `held` layers are in memory."""
        self.plan()
        for layer in range(layers):
            self.run(layer % held)

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of K and V that it holds for one layer."""

    def close(self) -> None:  # noqa: B027
        """Gives up what is open."""


WAYS: dict[str, type[Way]] = {}


def register(kind: type[Way]) -> type[Way]:
    """Adds a way to the suite."""
    WAYS[kind.name] = kind
    return kind


def cuda_module(name: str, inputs: Inputs) -> ModuleType:
    """A package that needs a CUDA device.

    Raises:
        Absent: no such device, or the package is not here or broken.
    """
    if inputs.device.type != "cuda":
        raise Absent(f"{name} needs a CUDA device")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken wheel fails with anything at all; the reason is recorded
        raise Absent(f"import {name}: {told(error)}") from error


def no_draft(inputs: Inputs) -> None:
    """Raises Absent where new tokens need a mask of their own."""
    if any(q.draft is not None for q in inputs.forest.queries):
        raise Absent("draft trees need a mask that it does not take")


def free_bytes(device: torch.device) -> int:
    """Memory that a build may take."""
    if device.type == "cuda":
        # What the allocator holds for tensors to come is free to us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def need(num_bytes: int, inputs: Inputs, what: str) -> None:
    """Raises Absent where that much memory is not free."""
    free = free_bytes(inputs.device)
    if num_bytes * 1.3 > free:
        raise Absent(f"{what} takes {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
