"""Every body compiled for GPUs that are not there: `make triton-test`, in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":  # the mode is fixed when Triton is imported
    collect_ignore_glob = ["test_*.py"]
# What did not change since the last run is not compiled again.
os.environ.setdefault(
    "TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "triton-cache")
)
