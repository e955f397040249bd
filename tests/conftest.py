"""One pool of processes for each number of ranks, reused over all tests; a seed for each test.

`--gpu` runs the tests marked `gpu` and no others. All others run on the CPU, on any machine.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    pass  # has what the process that started it has set
elif "--gpu" in sys.argv:
    # Without it cuBLAS refuses to be deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Kernels run in Triton's interpreter, which it must know before it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch

from tests.pool import Pool

GPU_SECONDS = 570
"""After which no test with --gpu is begun, so that all end within ten minutes."""

LONG = ("stopping", "inference", "checkpoint", "run", "run_folder", "state_bits_ranks", "engine")
"""Files that take minutes, since they start commands and ranks: begun first, so that no process is
left with one of them when the others have nothing to do."""

_begin = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests marked gpu, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("gpu")
    if wanted and not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: found no GPU that torch can use")
    chosen, left_out = [], []
    for item in items:
        marked = item.get_closest_marker("gpu") is not None
        (chosen if marked == wanted else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    long = {f"test_{name}": place for place, name in enumerate(LONG)}
    items[:] = sorted(chosen, key=lambda item: long.get(item.path.stem, len(long)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("gpu") and time.monotonic() - _begin > GPU_SECONDS:
        pytest.skip("not run: no time was left")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With --gpu: one line for each test, and what the skipped ones lack."""
    if not config.getoption("gpu"):
        return
    terminalreporter.section(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    terminalreporter.write_line("| outcome | seconds | test | why |\n|---|---|---|---|")
    for kind in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(kind, []):
            why = report.longrepr[2].removeprefix("Skipped: ") if kind == "skipped" else ""
            name = report.nodeid.partition("::")[2]
            terminalreporter.write_line(f"| {kind} | {report.duration:.1f} | {name} | {why} |")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs: on the CPU, and with --gpu on the GPU."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test sees where another one left the random streams, in whatever order they run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()
