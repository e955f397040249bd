"""dr2dist: reversible finetuning of vision backbones, exact and distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dr2dist.errors import UserError
from dr2dist.lazily import lazily
from dr2dist.version import __version__

if TYPE_CHECKING:
    from dr2dist.backbones.backbone import Backbone, ChainOf, FeatureInfo, Stem, Transition
    from dr2dist.backbones.branch import Branch
    from dr2dist.backbones.check import CheckReport, check
    from dr2dist.backbones.convert import convert, register_backbone, supported_backbones
    from dr2dist.data.batch import Batch
    from dr2dist.inference.exported import load
    from dr2dist.inference.saved import save
    from dr2dist.loggers.logger import Logger
    from dr2dist.loggers.registry import register_logger
    from dr2dist.reversible import Chain
    from dr2dist.tasks.registry import register_task, supported_tasks
    from dr2dist.tasks.task import Head, Loss, Task

__all__ = [
    "Backbone",
    "Batch",
    "Branch",
    "Chain",
    "ChainOf",
    "CheckReport",
    "FeatureInfo",
    "Head",
    "Logger",
    "Loss",
    "Stem",
    "Task",
    "Transition",
    "UserError",
    "__version__",
    "check",
    "convert",
    "load",
    "register_backbone",
    "register_logger",
    "register_task",
    "save",
    "supported_backbones",
    "supported_tasks",
]

__getattr__ = lazily(
    __name__,
    {
        "dr2dist.backbones.backbone": "Backbone ChainOf FeatureInfo Stem Transition",
        "dr2dist.backbones.branch": "Branch",
        "dr2dist.backbones.check": "CheckReport check",
        "dr2dist.backbones.convert": "convert register_backbone supported_backbones",
        "dr2dist.data.batch": "Batch",
        "dr2dist.inference.exported": "load",
        "dr2dist.inference.saved": "save",
        "dr2dist.reversible": "Chain",
        "dr2dist.tasks.registry": "register_task supported_tasks",
        "dr2dist.tasks.task": "Head Loss Task",
        "dr2dist.loggers.logger": "Logger",
        "dr2dist.loggers.registry": "register_logger",
    },
)


def __dir__() -> list[str]:
    return __all__
