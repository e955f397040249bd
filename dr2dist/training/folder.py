"""The folder of a run: new, to go on in, finished, or somebody else's."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from dr2dist.checkpoints.checkpoint import Checkpoint, DamagedError, written
from dr2dist.config import Config, dump_config, moved_settings
from dr2dist.errors import UserError, one_line
from dr2dist.training.lock import LOCK, check_free

CONFIG = "config.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
LOGS = "logs"

_FREE = (
    "output",
    "checkpoint",
    "data.num_workers",
    "plugins",
    "parallel",
    "reversible.chunk_budget",
    "reversible.chunk_size",
    "reversible.chunk_tokens",
    "reversible.memory",
    "reversible.memory_budget",
    "train.accumulate",
    "train.bad_batches",
    "train.grace",
    "train.log_every",
    "train.micro_batch",
    "train.on_bad_batch",
    "train.profile",
    "train.step_limit",
)
"""What may change when a run goes on: it does not change what the run computes."""


_LENGTH = ("train.steps", "train.epochs", "train.patience")
"""What may change too when a run has finished and is to be longer."""


class Start(NamedTuple):
    """What a folder holds of a run. checkpoints: to go on from, newest first; those that are
    damaged are found out as they are read. cut: whether a run began there and left none. longer:
    steps of a run that has finished there and is to have more of them."""

    checkpoints: tuple[Path, ...] = ()
    cut: bool = False
    longer: int | None = None

    def describe(self, weights: str) -> str:
        """Where the run begins, in a few words."""
        sound = next((path for path in self.checkpoints if _fault(path) is None), None)
        if sound is not None:
            lost = len(self.checkpoints[: self.checkpoints.index(sound)])
            return f"{sound}" + (f" ({lost} newer one(s) are damaged)" if lost else "")
        again = "; the run before was cut before its first checkpoint" if self.cut else ""
        return f"{'random weights' if weights == 'random' else weights}{again}"


def find_start(config: Config, global_batch: int, steps: int) -> Start:
    """Where a run of so many steps begins, or goes on from.

    Raises UserError if the folder holds something else than this run so far, or a run that is
    going on.
    """
    folder = Path(config.output)
    occupied = _occupied(folder)
    _check_can_be_made(folder)
    if not occupied:
        return Start()
    check_free(folder)
    before = _read_config(folder)
    if before is None:
        raise UserError(f"output: {folder} is not empty and holds no run; name another")
    ended = _summary(folder)
    longer = ended is not None and steps > ended["steps"]
    _same_run(_completed(before, config), yaml.safe_load(dump_config(config)), folder, longer)
    _check_metrics(folder / METRICS)
    found = tuple(reversed(written(folder)))
    faults = {path: _fault(path) for path in found}
    if found and all(faults.values()):
        raise UserError(f"{faults[found[0]]}; no sound checkpoint is left in {folder}")
    sound = next((path for path in found if faults[path] is None), None)
    if sound is not None:
        _same_batch(sound, global_batch)
    extended = longer and not _same_length(config, before)
    return Start(found, not found, ended["steps"] if ended and extended else None)


def _check_can_be_made(folder: Path) -> None:
    """Raises UserError if it cannot. Leaves nothing behind."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"output: {folder} cannot be made: {parent}: {error.strerror}") from None


def _read_config(folder: Path) -> Any:
    """None if there is no such file. Raises UserError for one that is damaged."""
    path = folder / CONFIG
    try:
        found = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: is damaged: it holds no settings; put the run's configuration back, or name "
            "another output"
        )
    return found


def _check_metrics(path: Path) -> None:
    """Raises UserError for a line that is none of a run's; the last may be cut off."""
    try:
        lines = path.read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)["step"] + 0
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: line {number} is damaged: found '{line[:40]}'; delete it to go on"
            ) from None


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint at first sight: its files are not summed up."""
    try:
        Checkpoint(path)
    except DamagedError as error:
        return str(error)
    return None


def finished(config: Config) -> dict[str, Any] | None:
    """The summary of a run that has finished in the folder, unless it is to be longer now."""
    summary = _summary(Path(config.output))
    if summary is None or not _same_length(config, _read_config(Path(config.output))):
        return None
    return summary


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return None
    return summary if summary["status"] == "finished" else None


def _same_length(config: Config, before: Any) -> bool:
    old, new = flat(_completed(before, config)), flat(yaml.safe_load(dump_config(config)))
    return all(old.get(key) == new.get(key) for key in _LENGTH)


def _occupied(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name another")
    names = [entry.name for entry in folder.iterdir()]
    return any(not name.endswith(".tmp") and name not in (LOCK, LOGS) for name in names)


def _completed(before: Any, config: Config) -> Any:
    """What a folder says, with the values of settings that its version did not have yet: these are
    today's defaults, which do what it did."""
    try:
        values: Any = type(config).model_validate(moved_settings(before))
    except ValidationError:  # of another task, or not a configuration at all
        return before
    return yaml.safe_load(dump_config(values))


def _same_run(before: Any, now: Any, folder: Path, longer: bool) -> None:
    old, new, free = flat(before), flat(now), (*_FREE, *(_LENGTH if longer else ()))
    for key in [*new, *old]:
        if old.get(key) != new.get(key) and not key.startswith(free):
            raise UserError(
                f"output: {folder} holds a run with {key}: {old.get(key)}, now it is "
                f"{new.get(key)}; name another folder to start anew"
            )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their whole names, such as optim.lr."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    parts = [flat(value, f"{prefix}{key}.") for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _same_batch(checkpoint: Path, global_batch: int) -> None:
    before = Checkpoint(checkpoint).state["global_batch"]
    if before != global_batch:
        raise UserError(
            f"train.micro_batch x train.accumulate x ranks is {global_batch}, but {checkpoint} "
            f"was written with {before}, on which the order of samples depends: keep the product"
        )
