"""The folder of a run: new, to go on in, finished, or somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from dr2dist.checkpoints.checkpoint import Checkpoint, DamagedError
from dr2dist.checkpoints.folders import put_back, written
from dr2dist.config import Config, dump_config, moved_settings
from dr2dist.config.names import BEFORE
from dr2dist.config.text import flat, shown_value
from dr2dist.errors import UserError, one_line
from dr2dist.files import check_can_be_made
from dr2dist.training.lock import LOCK, check_free
from dr2dist.training.run_files import CONFIG, LOGS, METRICS, STARTS, read_lines, read_summary

_FREE = (
    "output",
    "checkpoint",
    "data.cache",
    "data.num_workers",
    "launch",
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
    "train.loggers",
    "train.micro_batch",
    "train.on_bad_batch",
    "train.profile",
    "train.step_limit",
)
"""What may change when a run goes on: it does not change what the run computes."""

_LENGTH = ("train.steps", "train.epochs", "train.patience")
"""What may change too when a run has finished and is to be longer."""


class Start(NamedTuple):
    """What a folder holds of a run. checkpoints: to go on from, newest first. damaged: how many of
    the newest are so at first sight; all are looked at closely when they are read. cut: whether a
    run began there and left none. finished: the summary of a run that has nothing left to do.
    longer: steps of a run that has finished there and is to have more of them."""

    checkpoints: tuple[Path, ...] = ()
    damaged: int = 0
    cut: bool = False
    finished: dict[str, Any] | None = None
    longer: int | None = None

    def describe(self, weights: str) -> str:
        """Where the run begins, in a few words."""
        if self.checkpoints:
            lost = f" ({self.damaged} newer one(s) are damaged)" if self.damaged else ""
            return f"{self.checkpoints[self.damaged]}{lost}"
        again = "; the run before was cut before its first checkpoint" if self.cut else ""
        return f"{'random weights' if weights == 'random' else weights}{again}"


def find_start(config: Config, global_batch: int, steps: int, index: str) -> Start:
    """Where a run of so many steps begins, or goes on from. index: the digest of its samples'.

    Raises UserError if the folder holds something else than this run so far, or a run that is
    going on.
    """
    folder = Path(config.output)
    occupied = _occupied(folder)
    check_can_be_made(folder, "output: ")
    if not occupied:
        return Start()
    check_free(folder, config.train.grace)
    put_back(folder)
    before = _read_config(folder)
    if before is None:
        raise UserError(f"output: {folder} is not empty and holds no run; name another")
    old, new = (flat(each) for each in (_completed(before, config), _values(config)))
    ended = _summary(folder)
    _same_run(old, new, folder, longer=ended is not None and steps > ended["steps"])
    read_lines(folder / METRICS)  # which a run that goes on cuts back
    found = tuple(reversed(written(folder)))
    damaged = _count_damaged(found, folder)
    if found:
        _same_order(found[damaged], global_batch, index)
    if ended is not None and all(old.get(key) == new.get(key) for key in _LENGTH):
        return Start(found, damaged, finished=ended)
    if not found:
        _check_cut(folder)
    elif ended is not None:
        _check_patience(config.train.patience, found[damaged], folder)
    return Start(found, damaged, cut=not found, longer=None if ended is None else ended["steps"])


def _check_cut(folder: Path) -> None:
    """Raises UserError where a run without checkpoints has had some: one that was stopped by a step
    that could not be proven may have had none."""
    summary = read_summary(folder)
    saved = 0 if summary is None or summary["status"] == "stopped" else summary["steps"]
    starts = [line["step"] for line in read_lines(folder / STARTS)]
    done = max([saved, *starts])
    if done or (folder / "checkpoints").is_symlink():
        raise UserError(
            f"output: {folder} holds a run that has done {done} steps, but no checkpoint of it: "
            "put them back, or name another output"
        )


def _read_config(folder: Path) -> Any:
    """None if there is no such file. Raises UserError for one that is damaged."""
    path = folder / CONFIG
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
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


def _count_damaged(newest_first: Sequence[Path], folder: Path) -> int:
    """How many checkpoints before the first sound one are damaged, their files not summed up.

    Raises UserError if all are.
    """
    faults: list[str] = []
    for path in newest_first:
        try:
            Checkpoint(path)
            return len(faults)
        except DamagedError as error:
            faults.append(str(error))
    if faults:
        raise UserError(f"{faults[0]}; no sound checkpoint is left in {folder}")
    return 0


def _summary(folder: Path) -> dict[str, Any] | None:
    """Of a run that has finished."""
    summary = read_summary(folder)
    return summary if summary is not None and summary["status"] == "finished" else None


def _check_patience(patience: int | None, checkpoint: Path, folder: Path) -> None:
    """Raises UserError where a run that has ended early would do so again at once."""
    stale = Checkpoint(checkpoint).state["progress"].get("stale", 0)
    if patience is not None and stale >= patience:
        raise UserError(
            f"train.patience: is {patience}, and the last {stale} validation(s) of {folder} have "
            "brought nothing better, so that it would end at once: a larger one goes on"
        )


def _occupied(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name another")
    names = [entry.name for entry in folder.iterdir()]
    return any(not name.endswith(".tmp") and name not in (LOCK, LOGS) for name in names)


def _completed(before: Any, config: Config) -> Any:
    """What a folder says, with the values of settings that its version did not have yet: today's
    defaults, where these do what it did."""
    moved = moved_settings(before)
    for section, settings in BEFORE.items():
        known = type(getattr(config, section)).model_fields
        did = {name: value for name, value in settings.items() if name in known}
        if isinstance(moved.get(section), dict):
            moved[section] = {**did, **moved[section]}
    try:
        values: Any = type(config).model_validate(moved)
    except ValidationError:  # of another task, or not a configuration at all
        return before
    return _values(values)


def _values(config: Config) -> Any:
    """As a run's folder has them."""
    return yaml.safe_load(dump_config(config))


def _same_run(old: dict[str, Any], new: dict[str, Any], folder: Path, longer: bool) -> None:
    free = (*_FREE, *(_LENGTH if longer else ()))
    for key in [*new, *old]:
        if old.get(key) != new.get(key) and not key.startswith(free):
            raise UserError(
                f"output: {folder} holds a run with {key}: {old.get(key)}, now it is "
                f"{new.get(key)}; {key}={shown_value(old.get(key))} goes on, and in another folder "
                "a run starts anew"
            )


def _same_order(checkpoint: Path, global_batch: int, index: str) -> None:
    """Raises UserError where the schedules or the order of samples would be others."""
    state = Checkpoint(checkpoint).state
    before = state["global_batch"]
    if before != global_batch:
        raise UserError(
            f"train.micro_batch x train.accumulate x ranks is {global_batch}, but {checkpoint} "
            f"was written with {before}, on which the schedules depend: keep the product"
        )
    if state.get("index", index) != index:  # versions before did not say
        raise UserError(
            f"data.train: its shards, or how many samples they have, are not those that "
            f"{checkpoint} was written with, on which the order of samples depends: put them back, "
            "or name another output"
        )
