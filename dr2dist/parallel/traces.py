"""What DeepSpeed changes in a process for an engine, put back when the engine is gone.

Its logger's level, its log of communication and its grid of process groups are the process's; its
ZeRO-3 keeps every network on a list; hooks hold the engine and its tensors through the network.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import deepspeed
from deepspeed.comm import comm
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import logger


class _ProcessState(NamedTuple):
    """Of the process: levels of DeepSpeed's logger and its handlers, the rest its own objects."""

    levels: list[int]
    comms_logger: Any
    groups: Any


_before: dict[weakref.ref[Any], _ProcessState] = {}
"""The latest engine, and what there was before any."""


def begin(owner: Any, groups: Any) -> None:
    """Before `deepspeed.initialize`, so that no earlier engine's settings are in force.

    owner: what lives as long as the engine is wanted. groups: its grid, None for none.
    """
    first = next(iter(_before.values()), None)
    if first is None:
        levels = [target.level for target in (logger, *logger.handlers)]
        first = _ProcessState(levels, comm.comms_logger, deepspeed.utils.groups.mpu)
    _set(first._replace(comms_logger=type(comm.comms_logger)(), groups=groups))
    _before.clear()
    _before[weakref.ref(owner)] = first


def end_with(owner: Any, engine: Any) -> None:
    """After it: when `owner` is gone, what was done for DeepSpeed's engine is undone."""
    weakref.finalize(owner, _end, weakref.ref(owner), engine).atexit = False


def _end(owner: weakref.ref[Any], engine: Any) -> None:
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    engine.destroy()
    if owner in _before:  # otherwise the settings are a later engine's
        _set(_before.pop(owner))


def _set(settings: _ProcessState) -> None:
    for target, level in zip((logger, *logger.handlers), settings.levels, strict=True):
        target.setLevel(level)
    comm.comms_logger = settings.comms_logger
    deepspeed.utils.groups.mpu = settings.groups
