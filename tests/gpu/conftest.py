"""Tests on a GPU; skipped by name where there is none, or under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def waits_for_the_gpu() -> Iterator[None]:
    """A kernel's error shows in the test that launched it, not in the next one; and memory goes
    back, as other processes test on the same GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """After an illegal access nothing runs in a process any more: pytest-xdist starts another."""
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        print(f"this process is lost, and this test with it: {error}", flush=True)
        os._exit(1)
