"""The planner's costs: datasheet figures, or a file that `fork-attn calibrate` wrote."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fork_attn import _C, _env

TARGETS = ("cpu", "sm_80", "sm_90", "sm_100")
WHAT, VERSION = "fork-attn costs", 2

FIELDS = {
    "bytes_per_ns": "memory bandwidth of a worker while all stream",
    "flops_per_ns_16": "a worker's rate on tiles below 32 rows",
    "flops_per_ns_32": "from 32 rows on",
    "flops_per_ns_64": "from 64 rows on",
    "flops_per_ns_128": "from 128 rows on",
    "load_rows": "reading a slot costs as much arithmetic as this many rows",
    "ns_per_exp": "a score",
    "item_ns": "a work item",
    "partial_bytes_per_ns": "a worker's rate of writing partial rows and reading them back",
    "launch_ns": "a call",
}
"""What a file holds, in the order in which it is shown."""

_POSITIVE = (
    *("bytes_per_ns", "partial_bytes_per_ns", "item_ns"),
    *(f"flops_per_ns_{rows}" for rows in (16, 32, 64, 128)),
)


@dataclass(frozen=True)
class Measured:
    """A file of measured costs."""

    path: Path
    target: str
    machine: str  # `machine_name` of what it was measured on
    date: str
    costs: dict[str, float]  # FIELDS


def cache_folder() -> Path:
    """Where files lie that belong to the user and the machine: $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fork-attn"


def default_path(target: str) -> Path:
    """The file that is used where `FORK_ATTN_COSTS` is not set."""
    return cache_folder() / f"costs-{target}.json"


def device_target(device: torch.device) -> str:
    """The row of the planner's cost table for a device: `cpu`, or the GPU's architecture."""
    if device.type != "cuda":
        return "cpu"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def machine_name(target: str) -> str | None:
    """The processor or GPU here that plans for `target` run on; None: there is none."""
    if target != "cpu":
        if not torch.cuda.is_available() or device_target(torch.device("cuda")) != target:
            return None
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return f"{value.strip()}, {torch.get_num_threads()} threads"
    return f"{os.uname().machine}, {torch.get_num_threads()} threads"


def read(path: Path) -> Measured:
    """Reads a file of measured costs.

    Raises:
        ValueError: it cannot be read, or a field of it is off, by name.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(found, dict) or found.get("what") != WHAT:
        raise ValueError(f"{path}: what: expected {WHAT!r}, a file of `fork-attn calibrate`")
    if found.get("version") != VERSION:
        got = found.get("version")
        raise ValueError(f"{path}: version: expected {VERSION}, got {got!r}: calibrate again")
    if found.get("target") not in TARGETS:
        expected = ", ".join(TARGETS)
        raise ValueError(f"{path}: target: expected {expected}, got {found.get('target')!r}")
    for name in ("machine", "date"):
        if not isinstance(found.get(name), str):
            raise ValueError(f"{path}: {name}: expected a string, got {found.get(name)!r}")
    costs = found.get("costs")
    if not isinstance(costs, dict):
        raise ValueError(f"{path}: costs: expected an object, got {costs!r}")
    numbers = {name: _number(path, name, costs) for name in FIELDS}
    for name in costs:
        if name not in FIELDS:
            raise ValueError(f"{path}: costs.{name}: no such cost")
    return Measured(path, found["target"], found["machine"], found["date"], numbers)


def _number(path: Path, name: str, costs: Mapping[str, Any]) -> float:
    value = costs.get(name)
    least = "above 0" if name in _POSITIVE else "of at least 0"
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and name in _POSITIVE):  # type: ignore[operator]
        raise ValueError(f"{path}: costs.{name}: expected a number {least}, got {value!r}")
    return float(value)  # type: ignore[arg-type]


@functools.cache
def load() -> dict[str, Measured]:
    """Gives the planner its measured costs, once; by target, what they are. The first plan of a
    process does this.

    Raises:
        ValueError: the file that `FORK_ATTN_COSTS` names is not one of costs.
    """
    named = _env.costs()
    if named == "datasheet":
        return {}
    if named:
        try:
            found = [read(Path(named).expanduser())]
        except ValueError as error:
            raise ValueError(f"FORK_ATTN_COSTS: {error}") from None
    else:
        found = [m for target in TARGETS if (m := _of_this_machine(target)) is not None]
    for measured in found:
        use(measured)
    return {measured.target: measured for measured in found}


def _of_this_machine(target: str) -> Measured | None:
    """What is in the user's cache directory. It was not asked for, so that one that cannot be used
    is not an error; a warning says so."""
    path = default_path(target)
    if not path.exists():
        return None
    try:
        measured = read(path)
        if measured.target != target:
            raise ValueError(f"{path}: target: expected {target!r}, got {measured.target!r}")
    except ValueError as error:
        warnings.warn(f"datasheet costs are used: {error}", stacklevel=2)
        return None
    return measured if measured.machine == machine_name(target) else None


def use(measured: Measured) -> None:
    """Gives the planner these costs."""
    _C.set_target_costs(measured.target, measured.costs)


def target_costs(target: str) -> dict[str, float]:
    """The costs that plans for a target are made with.

    Raises:
        ValueError: no such target, or see `load`.
    """
    load()
    return _C.target_costs(target)


def describe(target: str) -> str:
    """Where a target's costs come from, for people.

    Raises:
        ValueError: see `load`.
    """
    measured = load().get(target)
    if measured is None:
        return "datasheet"
    return f"measured on {measured.machine}, {measured.date}, {measured.path}"
