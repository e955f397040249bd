"""What tests on a GPU need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
