"""Checkpoints that know no layout: every rank writes its ranges, any layout reads them.

A checkpoint is a folder: `rank-K.safetensors` from each rank, whose keys are KIND/NAME/START (a
range of a flattened parameter; kinds: master, ema, the optimiser's moments, buffer), and
`checkpoint.json` with the state, the shapes and the files' checksums. It is written aside and
renamed, so a folder that has its name is whole.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dr2dist.checkpoints.folders import MANIFEST
from dr2dist.checkpoints.writing import FORMAT, sum_of
from dr2dist.errors import UserError, one_line
from dr2dist.files import sha256


class DamagedError(UserError):
    """A checkpoint that is not whole: a file of it is missing, cut, or not what was written."""


EMA = "ema"
"""The kind of averaged weights."""


def read_manifest(folder: Path) -> str:
    """The text that a checkpoint says of itself. Raises UserError if it cannot be read."""
    try:
        return (folder / MANIFEST).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(folder / MANIFEST, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    """A file that is there and may not be read, or on a disk that fails, need not be damaged."""
    elsewhere = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
    return (UserError if elsewhere else DamagedError)(f"{path}: cannot be read: {reason}")


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises UserError if it cannot be read."""
    return _parsed(folder, read_manifest(folder))


def _parsed(folder: Path, manifest: str) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        state: dict[str, Any] = json.loads(manifest)
    except ValueError as error:
        raise _unreadable(path, error) from None
    if not isinstance(state, dict) or not {"format", "step", "shapes", "files"} <= state.keys():
        raise DamagedError(f"{path}: is damaged: it says nothing of a checkpoint")
    checksum = state.pop("checksum", None)
    if state["format"] != 1 and checksum != sum_of(state):
        raise DamagedError(f"{path}: its checksum differs")
    if state["format"] not in (1, FORMAT):
        raise UserError(f"{path}: format {state['format']}, allowed is 1 or {FORMAT}")
    return state


def is_finite(validation: Mapping[str, float] | None) -> bool:
    """Whether there is a validation and all its values are finite."""
    return validation is not None and all(map(math.isfinite, validation.values()))


class Checkpoint:
    """A written checkpoint, read range by range.

    Raises UserError, naming file and fault, for what is missing, damaged or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.state = _parsed(folder, self.manifest)
        self.shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
        self._files: dict[str, Any] = {}
        self._ranges: dict[tuple[str, str], list[tuple[int, str, str]]] = defaultdict(list)
        for file in self.state["files"]:
            for key in self._open(file).keys():  # noqa: SIM118  (not a dict)
                kind, name, start = key.split("/")
                self._ranges[kind, name].append((int(start), file, key))

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise _unreadable(self.folder / file, error) from None
        return self._files[file]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compares every `parts`-th file, from the one numbered `part` on, with its checksum."""
        for file, wanted in sorted(self.state["files"].items())[part::parts]:
            try:
                found = sha256(self.folder / file)
            except OSError as error:
                raise _unreadable(self.folder / file, error) from None
            if found != wanted:
                raise DamagedError(f"{self.folder / file}: checksum differs")

    def kinds(self, name: str) -> list[str]:
        """What is there of a parameter: master, exp_avg, ..."""
        return sorted(kind for kind, other in self._ranges if other == name)

    def names(self, kind: str) -> list[str]:
        """The parameters of which there is a kind."""
        return [name for name in self.shapes if (kind, name) in self._ranges]

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """The range [start, start + count) of a flattened tensor; a scalar is []."""
        found = self._ranges[kind, name]
        if len(found) == 1 and not self._open(found[0][1]).get_slice(found[0][2]).get_shape():
            scalar: Tensor = self._open(found[0][1]).get_tensor(found[0][2])
            return scalar
        end = start + (math.prod(self.shapes[name]) if count is None else count)
        parts, place = [], start
        for first, file, key in sorted(found):
            values = self._open(file).get_slice(key)
            last = first + values.get_shape()[0]
            if first <= place < min(last, end):
                parts.append(values[place - first : min(last, end) - first])
                place = min(last, end)
        if place != end:
            raise UserError(f"{self.folder}: {kind} of {name} lacks values from {place} to {end}")
        return torch.cat(parts)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor in its shape."""
        return self.read(kind, name).view(self.shapes[name])
