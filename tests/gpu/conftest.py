"""Tests on a GPU: what they need, their ten minutes, and their table."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

SECONDS = 570
"""After which no test is begun, so that all end within ten minutes."""

_begin = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and time.monotonic() - _begin > SECONDS:
        pytest.skip("not run: the time is over")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Deterministic kernels, and the settings of before again afterwards."""
    matmul = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(matmul)


@pytest.fixture
def two_gpus() -> None:
    found = torch.cuda.device_count()
    if found < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {found}")
