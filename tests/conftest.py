"""What test files share. Random inputs are new in every run; a failure names its seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# What was measured on this machine must not change what tests see.
os.environ["FORK_ATTN_COSTS"] = "datasheet"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-seed", type=int, help="repeat a run's random tensors")


@pytest.fixture(autouse=True)
def fresh_random_tensors(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--torch-seed")
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    print(f"--torch-seed {seed}")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
