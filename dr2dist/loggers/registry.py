"""The loggers that configurations may name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from dr2dist.errors import UserError, nearest, one_line
from dr2dist.loggers.logger import Logger
from dr2dist.loggers.mlflow import Mlflow
from dr2dist.loggers.tensorboard import TensorBoard
from dr2dist.loggers.wandb import Wandb

_loggers: dict[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
_PACKAGES = ("wandb", "mlflow")
"""What is installed for the logger of the same name, by the extra `loggers`."""


def register_logger(name: str, logger: Callable[[], Logger]) -> None:
    """Makes a logger known by a name, for `train.loggers`; call it in a module among `plugins`.

    logger: a class, or what makes one; called without arguments on rank 0.
    """
    _loggers[name] = logger


def check_loggers(names: Sequence[str]) -> None:
    """Raises UserError for a name that is not known, twice there, or not installed."""
    for name in names:
        if name not in _loggers:
            raise UserError(
                f"train.loggers: '{name}' is not known{nearest(name, _loggers)}; allowed are "
                f"{', '.join(_loggers)}, and what plugins register"
            )
        if names.count(name) > 1:
            raise UserError(f"train.loggers: '{name}' is named twice")
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.loggers: {name} is not installed: pip install 'dr2dist[loggers]'"
            )


def make_loggers(names: Sequence[str]) -> list[Logger]:
    """One of each name, in their order. Raises UserError for one that cannot be made."""
    found = []
    for name in names:
        try:
            found.append(_loggers[name]())
        except Exception as error:  # of whatever one's own does
            reason = one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"train.loggers: {name}: {reason}") from None
    return found
