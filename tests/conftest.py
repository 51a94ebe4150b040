"""Random inputs are new in every run; a failing test's output names the seed that repeats them."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-seed", type=int, help="repeat a run's random tensors")


@pytest.fixture(autouse=True)
def fresh_random_tensors(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--torch-seed")
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    print(f"--torch-seed {seed}")
