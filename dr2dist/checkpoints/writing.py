"""A checkpoint on its way to disk: each rank writes its file, rank 0 makes a whole of them.

Files can be written behind the steps, in a thread; what ranks do together is short, and done by
their main threads. A folder that has a checkpoint's name is whole: it is written aside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dr2dist.checkpoints.folders import ASIDE, BEFORE, MANIFEST
from dr2dist.checkpoints.tensors import Source, write_tensors
from dr2dist.errors import UserError
from dr2dist.files import writing
from dr2dist.parallel.agreement import agree, from_all

FORMAT = 2
"""1 had no checksum of the manifest itself."""


class Writing:
    """A checkpoint that is being written; every rank must make it, with its own tensors, and call
    `finish`. Nothing else may be on its way to the same folder.

    tensors: by KIND/NAME/START, flat; behind a run they must not change before `finish`. shapes: of
    all parameters and buffers. state: JSON values. behind: writes the files; None: `finish` does.
    Both raise UserError, on all ranks, naming file and rank, for what one cannot write or see.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Source],
        shapes: Mapping[str, tuple[int, ...]],
        state: Mapping[str, Any],
        behind: Executor | None = None,
    ) -> None:
        self._folder, self._tensors = folder, tensors
        # As it is now: parts of it belong to the run, which goes on.
        self._said = json.loads(json.dumps({"format": FORMAT, **state, "shapes": shapes}))
        self._aside = folder.with_name(f"{folder.name}{ASIDE}")
        self._path = self._aside / f"rank-{dist.get_rank():05d}.safetensors"
        with agree(), writing(self._aside):
            if dist.get_rank() == 0:
                shutil.rmtree(self._aside, ignore_errors=True)
                self._aside.parent.mkdir(exist_ok=True)  # the run's folder is there, or is lost
                self._aside.mkdir()
        self._written = None if behind is None else behind.submit(self._write)

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._written is not None and not self._written.done()

    def _write(self) -> str:
        with writing(self._path):
            return write_tensors(self._path, self._tensors)

    def finish(self) -> None:
        """Waits for what is still being written, and makes a checkpoint of it."""
        checksum = ""
        with agree():
            checksum = self._write() if self._written is None else self._written.result()
        sums = from_all((self._path.name, checksum))
        with agree(), writing(self._folder):
            if dist.get_rank() == 0:
                _check_seen([self._aside / name for name, _ in sums])
                values = {**self._said, "files": dict(sums)}
                values["checksum"] = sum_of(values)
                (self._aside / MANIFEST).write_text(json.dumps(values, indent=1) + "\n", "utf-8")
                _to_disk(self._aside / MANIFEST)
                _put(self._aside, self._folder)


def sum_of(values: Mapping[str, Any]) -> str:
    """The checksum of a manifest, however it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _put(aside: Path, folder: Path) -> None:
    """In place of one of the same step, which a run that was stopped in between has written."""
    before = folder.with_name(f"{folder.name}{BEFORE}")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def _check_seen(paths: Sequence[Path]) -> None:
    for other, path in enumerate(paths):
        if not path.exists():
            raise UserError(
                f"{path}: rank {other} has written it and rank 0 does not see it; all ranks need "
                "the same file system"
            )


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
