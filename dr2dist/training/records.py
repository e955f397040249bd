"""What a run writes for people: metrics.jsonl, TensorBoard, summary.json, weights."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Records:
    """The files of a run's folder; made on rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "metrics.jsonl").open("a")
        self._board: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, **values: Any) -> None:
        """One object in metrics.jsonl, its numbers in TensorBoard too. NaN becomes null."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def write_text(self, name: str, text: str) -> None:
        """A whole file, written aside and renamed."""
        aside = self.folder / f"{name}.tmp"
        aside.write_text(text)
        os.replace(aside, self.folder / name)

    def write_summary(self, values: dict[str, Any]) -> None:
        """summary.json: how the run ended."""
        plain = {name: _plain(value) for name, value in values.items()}
        self.write_text("summary.json", json.dumps(plain, indent=2) + "\n")

    def save_weights(self, name: str, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """weights/NAME.safetensors, fp32 by timm's names, written aside and renamed."""
        folder = self.folder / "weights"
        folder.mkdir(exist_ok=True)
        aside = folder / f"{name}.tmp"
        save_file({key: value.contiguous() for key, value in state.items()}, aside, metadata)
        os.replace(aside, folder / f"{name}.safetensors")

    def close(self) -> None:
        """Ends the files."""
        self._lines.close()
        self._board.close()


def peak_memory() -> int:
    """Peak bytes of this process: allocated on its GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
