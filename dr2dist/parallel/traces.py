"""What DeepSpeed changes in a process for an engine, put back when the engine is gone.

Its logger's level, its log of communication and its grid of process groups are the process's; its
ZeRO-3 keeps every network on a list; hooks hold the engine and its tensors through the network.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist

from dr2dist.parallel import adapter
from dr2dist.parallel.adapter import ProcessState

_before: dict[weakref.ref[Any], ProcessState] = {}
"""The latest engine, and what there was before any."""


def begin(owner: Any, groups: Any) -> None:
    """Before `deepspeed.initialize`, so that no earlier engine's settings are in force.

    owner: what lives as long as the engine is wanted. groups: its grid, None for none.
    """
    first = next(iter(_before.values()), None) or ProcessState.now()
    first.with_groups(groups).set()
    _before.clear()
    _before[weakref.ref(owner)] = first


def end_with(owner: Any, engine: Any) -> None:
    """After it: when `owner` is gone, what was done for DeepSpeed's engine is undone."""
    weakref.finalize(owner, _end, weakref.ref(owner), engine).atexit = False


def _end(owner: weakref.ref[Any], engine: Any) -> None:
    adapter.forget_network(engine.module)
    if dist.is_initialized():  # an error may end the ranks' group before it ends the engine
        engine.destroy()
    if owner in _before:  # otherwise the settings are a later engine's
        _before.pop(owner).set()
