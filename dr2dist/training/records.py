"""What a run writes for people: metrics.jsonl, summary.json, and what its loggers take."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from dr2dist.errors import UserError, one_line
from dr2dist.files import as_json, atomic_write, writing
from dr2dist.loggers.logger import Logger
from dr2dist.training.run_files import CONFIG, METRICS, STARTS, SUMMARY, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class Records:
    """The files of a run's folder; made on rank 0 only.

    config: the resolved configuration, by which a folder is known as a run's. step: the applied one
    that the run starts from; what was written of later ones is dropped. loggers: what else the
    values are for. Raises UserError for a logger that a new run cannot start; one that fails later,
    as where its server is gone, is named and told nothing more, for the run has its own files.
    """

    def __init__(
        self, folder: Path, config: str, step: int = 0, loggers: Iterable[Logger] = ()
    ) -> None:
        self.folder = folder
        (folder / SUMMARY).unlink(missing_ok=True)  # of a run that goes on, or is longer now
        self.write_text(CONFIG, config)
        self._cut_back(step)
        with writing(folder / METRICS):
            self._lines = (folder / METRICS).open("a", encoding="utf-8")
        self._loggers, self._ended = list(loggers), False
        self._tell("start", folder, yaml.safe_load(config), step, strict=step == 0)

    def _cut_back(self, step: int) -> None:
        path = self.folder / METRICS
        if path.exists():
            kept = [line for line in read_lines(path) if line["step"] <= step]
            self.write_text(path.name, "".join(f"{json.dumps(line)}\n" for line in kept))

    def note_start(self, **values: int) -> None:
        """One object in starts.jsonl, with the time and this host."""
        told = {**values, "host": socket.gethostname(), "time": time.time()}
        path = self.folder / STARTS
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")

    def log(self, step: int, **values: Any) -> None:
        """One object in metrics.jsonl, its numbers to loggers too. NaN becomes null. Raises
        UserError where it cannot be written."""
        line = {name: _plain(value) for name, value in values.items()}
        with writing(self.folder / METRICS):
            self._lines.write(json.dumps({"step": step, **line}) + "\n")
            self._lines.flush()
        numbers = {tag(k): value for k, value in line.items() if isinstance(value, int | float)}
        self._tell("log", step, numbers)

    def show(self, step: int, look: Figure) -> None:
        """What a task draws of held-out samples."""
        self._tell("show", step, look)

    def write_text(self, name: str, text: str) -> None:
        """A whole file, written aside and renamed."""
        with atomic_write(self.folder / name) as aside:
            aside.write_text(text, "utf-8")

    def write_summary(self, values: dict[str, Any]) -> None:
        """summary.json: how the run ended."""
        plain = {name: _plain(value) for name, value in values.items()}
        self.write_text(SUMMARY, json.dumps(plain, indent=2) + "\n")
        self._end(plain)

    def close(self) -> None:
        """Ends the files; loggers hear of a run that has no summary, too."""
        self._end({"status": "failed"})
        with contextlib.suppress(OSError):  # what could not be written has been told
            self._lines.close()

    def _end(self, summary: dict[str, Any]) -> None:
        if not self._ended:
            self._ended = True
            self._tell("end", summary)

    def _tell(self, what: str, *values: Any, strict: bool = False) -> None:
        for logger in tuple(self._loggers):
            try:
                getattr(logger, what)(*values)
            except Exception as error:
                reason = one_line(f"{type(error).__name__}: {error}")
                if strict:
                    raise UserError(f"train.loggers: {type(logger).__name__}: {reason}") from None
                self._loggers.remove(logger)
                log.warning("logger %s: %s; it is told nothing more", type(logger).__name__, reason)


def tag(name: str) -> str:
    """A value's name for loggers, in a group: train, val, coefficients, memory, or a stage's."""
    if "/" in name:
        return name
    if name.startswith("val_"):
        return f"val/{name.removeprefix('val_')}"
    if name in ("alpha", "beta", "guard_place"):
        return f"coefficients/{name}"
    return f"{'memory' if name.endswith('_bytes') else 'train'}/{name}"


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process by kind.

    peak_memory_bytes: allocated on its GPU, or resident where there is none. On a GPU also
    peak_reserved_bytes, which its allocator took, and peak_host_bytes, resident.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if not torch.cuda.is_available():
        return {"peak_memory_bytes": resident}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "peak_host_bytes": resident,
    }


def _plain(value: Any) -> Any:
    return as_json(value.item() if isinstance(value, Tensor) else value)
