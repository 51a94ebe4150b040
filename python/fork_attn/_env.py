"""The environment variables that fork-attn reads, all of them.

| variable | meaning |
|---|---|
| `FORK_ATTN_BACKEND` | what `backend="auto"` means: `cpu`, `triton`, `flash_attn` or `reference` |
| `FORK_ATTN_COSTS` | the planner's costs: a file that `fork-attn calibrate` wrote, or \
`datasheet`; unset: the file in the user's cache directory, if it was measured on this machine, \
else datasheet figures. Read once, when a cache or a plan is first made |
| `FORK_ATTN_DEBUG` | `poison`: K and V in slots that no branch sees are NaN, so that a wrong read \
shows; slow; read when a cache is made. `pages`: backend `triton` looks on the device at every \
page that a plan names before it attends; one outside the cache fails a device-side assertion. \
Or both: `poison,pages` |
| `FORK_ATTN_ZERO_ON_FREE` | `1`: pages are overwritten with zeros before they can be reused. Read \
when a cache is made |
"""

from __future__ import annotations

import os


def default_backend() -> str:
    """The backend that "auto" stands for, or "auto" when the variable is unset."""
    return os.environ.get("FORK_ATTN_BACKEND", "auto") or "auto"


def costs() -> str:
    """A file of measured costs, "datasheet", or "" when the variable is unset."""
    return os.environ.get("FORK_ATTN_COSTS", "")


def poison() -> bool:
    """Whether unseen slots hold NaN."""
    return "poison" in _debug()


def checks_pages() -> bool:
    """Whether plans' pages are looked at on the device."""
    return "pages" in _debug()


def _debug() -> tuple[str, ...]:
    value = os.environ.get("FORK_ATTN_DEBUG", "")
    chosen = tuple(value.split(",")) if value else ()
    if not set(chosen) <= {"poison", "pages"}:
        raise ValueError(
            f"FORK_ATTN_DEBUG: expected '', 'poison', 'pages' or 'poison,pages', got {value!r}"
        )
    return chosen


def zero_on_free() -> bool:
    """Whether freed pages are overwritten."""
    return _choice("FORK_ATTN_ZERO_ON_FREE", {"": False, "0": False, "1": True})


def _choice(name: str, meanings: dict[str, bool]) -> bool:
    value = os.environ.get(name, "")
    if value not in meanings:
        expected = " or ".join(repr(choice) for choice in meanings)
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return meanings[value]
