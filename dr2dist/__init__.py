"""dr2dist: reversible finetuning of vision backbones, exact and distributed."""

from dr2dist.backbones.check import CheckReport, check
from dr2dist.backbones.family import Branch, Family, Stem
from dr2dist.backbones.network import convert, register_backbone, supported_backbones
from dr2dist.errors import UserError
from dr2dist.inference.exported import load
from dr2dist.inference.saved import save
from dr2dist.reversible import Chain
from dr2dist.version import __version__

__all__ = [
    "Branch",
    "Chain",
    "CheckReport",
    "Family",
    "Stem",
    "UserError",
    "__version__",
    "check",
    "convert",
    "load",
    "register_backbone",
    "save",
    "supported_backbones",
]
