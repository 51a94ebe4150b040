"""The environment variables that fork-attn reads, all of them.

| variable | meaning |
|---|---|
| `FORK_ATTN_BACKEND` | what `backend="auto"` means: `cpu`, `triton` or `reference` |
"""

from __future__ import annotations

import os


def default_backend() -> str:
    """The backend that "auto" stands for, or "auto" when the variable is unset."""
    return os.environ.get("FORK_ATTN_BACKEND", "auto") or "auto"
