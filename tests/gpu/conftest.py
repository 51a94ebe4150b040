"""Tests on a GPU; skipped by name where there is none, or under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = None
    if os.environ.get("TRITON_INTERPRET") == "1":
        why = "TRITON_INTERPRET is set"
    elif not torch.cuda.is_available():
        why = "no CUDA device"
    if why is not None:
        for item in items:
            if "tests/gpu/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=why))
