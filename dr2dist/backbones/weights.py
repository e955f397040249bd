"""The weights of a checkpoint file: of safetensors, or of torch.save without running its code."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from dr2dist.errors import UserError, nearest, one_line

log = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
ENDINGS = (SAFETENSORS, ".pth", ".pt", ".bin")

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "module",
    "teacher",
    "ema",
    "net",
    "encoder",
)
"""Entries that training scripts keep weights under, in the order in which they are preferred."""

PREFIXES = ("backbone.", "model.")
"""What stands before a backbone's names in a larger model; clean_state_dict knows wrappers' own."""


def check_file(path: Path) -> None:
    """Raises UserError unless there is a file of one of the kinds that can be read."""
    if path.is_dir():
        raise UserError(f"model.weights: {path} is a folder, a file is needed")
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = nearest(path.name, [each.name for each in beside if each.suffix in ENDINGS])
        raise UserError(f"model.weights: {path} does not exist{hint}")
    if path.suffix not in ENDINGS:
        raise UserError(f"model.weights: {path} ends in '{path.suffix}', allowed is {_listed()}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU; the file is mapped, not read, where it allows it.

    A state dict, or one inside of a training script's checkpoint (WRAPPERS); prefixes of wrappers
    are taken off. Raises UserError for a file that holds no weights or that only unpickling, which
    runs a file's code, could read.
    """
    check_file(path)
    found = _of_safetensors(path) if path.suffix == SAFETENSORS else _of_torch(path)
    return _bare(_weights_in(found, path))


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            trained = file.metadata() or {}
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.weights: {path} is damaged, or not of safetensors: {one_line(error)}"
        ) from None
    if trained.get("beta", "0.0") != "0.0":
        log.warning(
            "%s was trained with %s: with others it starts as another network",
            path,
            ", ".join(
                f"{name} {trained[name].strip(chr(34))}"
                for name in ("alpha", "beta", "gain", "hand_on")
                if name in trained
            ),
        )
    return state


def _of_torch(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 is no archive
    try:
        # Scripts keep their arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch's readers raise anything on a damaged file
        raise UserError(f"model.weights: {path} {_why_not(error)}") from None


def _why_not(error: Exception) -> str:
    """What is wrong with a file that torch refuses; its own advice is to unpickle it."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code is not None:
        return (
            f"holds {code[1]}, not only tensors: unpickling it would run the file's code, allowed "
            "is a state dict, as torch.save(model.state_dict(), path) writes it"
        )
    if "TorchScript" in str(error):
        return (
            "is a TorchScript archive, allowed is a state dict, as "
            "torch.save(torch.jit.load(path).state_dict(), other) writes it"
        )
    told = "" if isinstance(error, pickle.UnpicklingError) else f": {one_line(error)[:200]}"
    return f"is damaged, or not written by torch.save{told or '; allowed is ' + _listed()}"


def _weights_in(found: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        raise UserError(
            f"model.weights: {path} holds a {type(found).__name__}, allowed is a state dict"
        )
    for name in WRAPPERS:
        if isinstance(found.get(name), Mapping) and found[name]:
            log.info("%s: takes the weights under '%s'", path, name)
            return _weights_in(found[name], path)
    state = {k: v.detach() for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        raise UserError(
            f"model.weights: {path} holds no weights but {sorted(map(str, found))[:5]}, allowed is "
            f"a state dict, or one under {', '.join(WRAPPERS)}"
        )
    return state


def _bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the backbone's own names: what most of them have in front is taken off."""
    state = clean_state_dict(state)
    for prefix in PREFIXES:
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if len(inside) > len(state) / 2:
            state = inside
    return state


def _listed() -> str:
    return ", ".join(ENDINGS)
