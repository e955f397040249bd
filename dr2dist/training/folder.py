"""The folder of a run: new, to go on in, finished, or somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dr2dist.checkpoints.checkpoint import checkpoints, read_state
from dr2dist.config import Config, dump_config
from dr2dist.errors import UserError

CONFIG = "config.yaml"
SUMMARY = "summary.json"

_FREE = (
    "output",
    "data.num_workers",
    "plugins",
    "parallel",
    "reversible.chunk_budget",
    "reversible.chunk_size",
    "reversible.chunk_tokens",
    "reversible.memory",
    "reversible.memory_budget",
    "train.accumulate",
    "train.checkpoint_every",
    "train.keep",
    "train.log_every",
    "train.micro_batch",
    "train.profile",
)
"""What may change when a run goes on: it does not change what the run computes."""


def find_start(config: Config, global_batch: int) -> Path | None:
    """The checkpoint that a run goes on from; None for a run that starts.

    Raises UserError if the folder holds something else than this run so far.
    """
    folder = Path(config.output)
    if not _occupied(folder):
        return None
    try:
        before = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, yaml.YAMLError):
        raise UserError(f"output: {folder} is not empty and holds no run; name another") from None
    _same_run(_completed(before, config), yaml.safe_load(dump_config(config)), folder)
    found = checkpoints(folder)
    if not found:
        return None
    _same_batch(found[-1], global_batch)
    return found[-1]


def finished(config: Config) -> dict[str, Any] | None:
    """The summary of a run that has finished in the folder."""
    try:
        summary = json.loads((Path(config.output) / SUMMARY).read_text())
    except (OSError, ValueError):
        return None
    return summary if summary["status"] == "finished" else None


def _occupied(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"output: {folder} is a file; name another")
    return any(not entry.name.endswith(".tmp") for entry in folder.iterdir())


def _completed(before: Any, config: Config) -> Any:
    """What a folder says, with the values of settings that its version did not have yet: these are
    today's defaults, which do what it did."""
    try:
        values: Any = type(config).model_validate(before)
    except ValidationError:  # of another task, or not a configuration at all
        return before
    return yaml.safe_load(dump_config(values))


def _same_run(before: Any, now: Any, folder: Path) -> None:
    old, new = _flat(before, ""), _flat(now, "")
    for key in [*new, *old]:
        if old.get(key) != new.get(key) and not key.startswith(_FREE):
            raise UserError(
                f"output: {folder} holds a run with {key}: {old.get(key)}, now it is "
                f"{new.get(key)}; name another folder to start anew"
            )


def _flat(values: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    parts = [_flat(value, f"{prefix}{key}.") for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _same_batch(checkpoint: Path, global_batch: int) -> None:
    before = read_state(checkpoint)["global_batch"]
    if before != global_batch:
        raise UserError(
            f"train.micro_batch x train.accumulate x ranks is {global_batch}, but {checkpoint} "
            f"was written with {before}, on which the order of samples depends: keep the product"
        )
