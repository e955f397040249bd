"""dr2dist: reversible finetuning of vision backbones, exact and distributed."""

from dr2dist.backbones.backbone import Backbone, ChainOf, FeatureInfo, Stem, Transition
from dr2dist.backbones.branch import Branch
from dr2dist.backbones.check import CheckReport, check
from dr2dist.backbones.convert import convert, register_backbone, supported_backbones
from dr2dist.data.batch import Batch
from dr2dist.errors import UserError
from dr2dist.inference.exported import load
from dr2dist.inference.saved import save
from dr2dist.reversible import Chain
from dr2dist.tasks.registry import register_task, supported_tasks
from dr2dist.tasks.task import Head, Loss, Task
from dr2dist.version import __version__

__all__ = [
    "Backbone",
    "Batch",
    "Branch",
    "Chain",
    "ChainOf",
    "CheckReport",
    "FeatureInfo",
    "Head",
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
    "register_task",
    "save",
    "supported_backbones",
    "supported_tasks",
]
