"""What the ranks of a pool run in folders that they do not all see alike."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dr2dist.checkpoints import writing
from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.config import load_config
from dr2dist.errors import UserError
from dr2dist.parallel.agreement import AgreedError
from dr2dist.parallel.engine import ReversibleEngine
from dr2dist.parallel.sharded_ema import ShardedEMA
from dr2dist.reversible.budget.costs import Watermark
from dr2dist.training.checkpoint_manager import CheckpointManager, Progress
from dr2dist.training.run import run
from tests import cases


def run_apart(path: str, folders: list[str]) -> str:
    """A run whose output is relative, each rank in a folder of its own; how it ended."""
    with contextlib.chdir(folders[dist.get_rank()]):
        try:
            return str(run(load_config(path, []))["status"])
        except AgreedError as error:
            return str(error)


def save(folder: str, zero: int, bf16: bool) -> tuple[int, int]:
    """(most bytes of new tensors while a checkpoint is written, those of the largest range).

    Checks what was written against the tensors themselves.
    """
    engine = cases.make_engine("vit", zero, bf16)
    engine.average = ShardedEMA(engine.masters, 0.9)
    cases.take_step(engine, 0)
    fragments = engine.masters.fragments
    largest = max(4 * len(fragment.values) for fragment in fragments)
    with Watermark() as mark:
        CheckpointManager(Path(folder), 1, {"global_batch": 8}).save(engine, Progress())
    saved = Checkpoint(checkpoints(Path(folder))[-1])
    saved.verify()
    for fragment in fragments:
        place = fragment.name, fragment.start, len(fragment.values)
        assert torch.equal(saved.read("master", *place), fragment.values.float())
        for kind, value in engine.masters.moments(fragment).items():
            found = saved.read(kind, *place)
            assert found.dtype == value.dtype and torch.equal(found, value)
    for (name, start), values in engine.average.shares():
        assert torch.equal(saved.read("ema", name, start, len(values)), values)
    for name, buffer in engine.buffers().items():
        assert torch.equal(saved.tensor("buffer", name), buffer)
    assert os.listdir(Path(folder) / "checkpoints") == ["step-00000001"]
    return mark.peak, largest


def goes_on(path: str, output: str) -> str:
    """How a run in a folder that may be damaged ends: "finished", or the line that refuses it."""
    try:
        return str(run(load_config(path, [f"output={output}"]))["status"])
    except UserError as error:
        return str(error)


def run_writing(path: str, fails: bool) -> tuple[str, list[list[int]]]:
    """A run whose checkpoints take a step to be written, where that is done behind it, or then
    cannot be: how it ended, and for each the steps that were done when it was begun and written."""
    original, step = writing.write_tensors, ReversibleEngine.step
    applied, spans = [0], []

    def slowly(*given: Any) -> str:
        before, end = applied[0], time.monotonic() + 120
        if threading.current_thread() is not threading.main_thread():
            while applied[0] == before and time.monotonic() < end:
                time.sleep(0.01)
        if fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        checksum = original(*given)
        spans.append([before, applied[0]])
        return checksum

    def counted(engine: ReversibleEngine, *given: Any) -> Any:
        verdict = step(engine, *given)
        applied[0] = engine.applied
        return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_tensors", slowly)
        patch.setattr(ReversibleEngine, "step", counted)
        return goes_on(path, load_config(path, []).output), spans
