"""Kernels under Triton's interpreter: `make triton-test`, in a process of their own."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from fork_attn.testing import triton_interpreter

    triton_interpreter.install()
else:  # the mode is fixed when Triton is imported
    collect_ignore_glob = ["test_*.py"]
