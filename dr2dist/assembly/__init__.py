"""A run's network and task, made of plain values by one function for whoever needs them."""

from dr2dist.assembly.blueprint import Assembled, Blueprint, assemble
from dr2dist.assembly.metadata import ExportMetadata

__all__ = ["Assembled", "Blueprint", "ExportMetadata", "assemble"]
