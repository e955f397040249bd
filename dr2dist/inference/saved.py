"""A plain loop's network as an exported file, which `load`, `evaluate` and `predict` take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from dr2dist.assembly import ExportMetadata, assemble
from dr2dist.assembly.metadata import class_names, metadata_of
from dr2dist.backbones.arguments import arguments_of
from dr2dist.backbones.in_force import adjusted_names
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.checkpoints.tensors import Source, write_tensors
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write
from dr2dist.inference.exported import load, random_inputs
from dr2dist.reversible.arithmetic.setting import COMPUTED
from dr2dist.reversible.trees import tree_leaves

TOLERANCE = 1e-4
"""Largest difference from the network's own output, relative to the largest of it, on a GPU: its
kernels may be chosen anew for other memory. On the CPU none is allowed."""

_GIVE = "give the options with which timm made it, as in save(net, path, depth=12)"


def save(
    net: nn.Module,
    path: str | Path,
    *,
    task: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    orientation: Literal["exif", "stored"] = "exif",
    **options: Any,
) -> None:
    """Writes a converted network as an exported file, aside and renamed; it stays as it is.

    net: what `convert` made of a model of `timm.create_model`, or a copy of it, on any device.
    task: a configuration's section `task`, by default the usual one with as many classes as there
    are logits. classes: their names, by default those in pretrained_cfg, or "0", "1", and so on.
    mean, std: of each channel, by default pretrained_cfg's. orientation: whether samples are turned
    as their files say ("exif"), or lie as they are stored, as in a loop that does not turn them.
    options: of timm.create_model, beside those that can be read off the network (depth, embed_dim,
    num_heads and the like). Weights are written in fp32, and an existing file is replaced.

    The file is loaded again and run on a random sample first. Raises UserError if that is not what
    the network computes, or if it is none that `load` could build.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"save: {path} is a folder, a file is needed")
    _check_kind(net)
    assert isinstance(net, ReversibleNetwork)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        sample, scales = random_inputs(net, 1), net.scales
        wanted = _outputs(net, sample)
        prepared = {"mean": mean, "std": std, "orientation": orientation}
        facts = _facts(net, wanted[-1], task, classes, prepared, options)
        tensors = _tensors(net, path, facts)
        with atomic_write(path) as aside:
            write_tensors(aside, tensors, facts.metadata())
            _check_same(path, facts, _outputs(_again(net, aside), sample), wanted)
        if not scales:  # the next pass finds them, of true samples
            net.set_scales({})


def _check_kind(net: nn.Module) -> None:
    kind = type(net).__name__
    if not isinstance(net, ReversibleNetwork):
        for name in ("module", "_orig_mod"):
            if isinstance(getattr(net, name, None), nn.Module):
                raise UserError(f"save: {kind} is around a network: save its module, net.{name}")
        raise UserError(f"save: {kind} is not converted; give what dr2dist.convert returns")
    cfg = getattr(net, "pretrained_cfg", None) or {}
    if not timm.is_model(cfg.get("architecture") or ""):
        raise UserError(
            "save: the network's pretrained_cfg names no architecture of timm's, so that nothing "
            "could build it again; make it with timm.create_model"
        )
    if any(parameter.is_meta for parameter in net.parameters()):
        raise UserError("save: the network is on the meta device and has no weights")


def _outputs(net: Any, sample: Any) -> list[Tensor]:
    """Features and outputs in evaluation mode. Raises UserError if there are none."""
    first = tree_leaves(sample)[0]
    try:
        with _evaluating(net), torch.autocast(first.device.type, enabled=False):
            found = [net.forward_features(sample), *tree_leaves(net(sample))]
    except RuntimeError as error:
        shape = list(first.shape)
        raise UserError(f"save: the network fails on inputs {shape}: {one_line(error)}") from None
    if not all(value.isfinite().all() for value in found):
        raise UserError("save: the network's output on a random sample is not finite")
    return found


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, and after it each module's own."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _facts(
    net: Any,
    output: Tensor,
    task: Mapping[str, Any] | None,
    classes: Sequence[str] | None,
    prepared: Mapping[str, Any],
    options: Mapping[str, Any],
) -> ExportMetadata:
    for key, value in options.items():
        each = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(one, bool | int | float | str | None) for one in each):
            raise UserError(
                f"save: {key} is {value!r}, allowed are numbers, texts, truth values, None and "
                "lists of them"
            )
    if task is None and (output.dim() != 2 or not getattr(net, "num_classes", 1)):
        raise UserError("save: the network gives no logits [batch, classes]; it needs a classifier")
    count = output.shape[1] if output.dim() == 2 else 0
    names = class_names(net, count) if classes is None else tuple(classes)
    if task is None and (len(set(names)) != count or len(names) != count):
        raise UserError(f"save: classes are {len(names)} names, {len(set(names))} of them "
                        f"different; the network has {count} outputs")  # fmt: skip
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        value = prepared.get(name)
        if value is not None and not _are_numbers(value, least):
            more = " over 0" if name == "std" else ""
            raise UserError(
                f"save: {name} is {value!r}, allowed are finite numbers{more}, in a list"
            )
    said = {
        name: value if isinstance(value, str) else list(value)
        for name, value in prepared.items()
        if value is not None
    }
    facts = metadata_of(net, task, names, said, options)
    found = arguments_of(net, assemble(facts.blueprint(), "meta").model)
    lists = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
    return facts.model_copy(update={"options": {**found, **lists}})


def _are_numbers(values: Any, least: float) -> bool:
    """Whether it is a list of finite numbers over the least."""
    try:
        return all(math.isfinite(value) and value > least for value in values)
    except TypeError:
        return False


def _tensors(net: nn.Module, path: Path, facts: ExportMetadata) -> dict[str, Source]:
    """The weights under timm's names, if they are those of timm's model."""
    own, known = net.state_dict(), assemble(facts.blueprint(), "meta").model.state_dict()
    for name in adjusted_names(own):  # these are in the metadata
        del own[name]
    for name in sorted(own.keys() | known.keys()):
        shapes = [list(d[name].shape) if name in d else "not there" for d in (own, known)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: {name} is {shapes[0]}, in {_named(facts)} {shapes[1]}; {_GIVE}"
            )
    return {
        name: Source(own[name], torch.float32 if own[name].is_floating_point() else own[name].dtype)
        for name in known
    }


def _named(facts: ExportMetadata) -> str:
    options = ", ".join(f"{key}={value!r}" for key, value in facts.options.items())
    return f"timm's {facts.model}" + (f" with {options}" if options else "")


def _again(net: Any, path: Path) -> Any:
    """The file's network, run in the same types, slices and place as the given one."""
    again: Any = load(path)
    for chain, own in zip(again.chains, net.chains, strict=True):
        said = ("alpha", "beta", *COMPUTED)
        chain.setting = replace(own.setting, **{key: getattr(chain.setting, key) for key in said})
    for mine, theirs in (
        (again.named_parameters(), dict(net.named_parameters())),
        (again.named_buffers(), dict(net.named_buffers())),
    ):
        for name, value in mine:
            value.data = value.data.to(theirs[name])
    return again


def _check_same(
    path: Path, facts: ExportMetadata, found: Sequence[Tensor], wanted: Sequence[Tensor]
) -> None:
    for one, other in zip(found, wanted, strict=True):
        if not one.is_floating_point():
            continue
        limit = other.abs().max() * (0 if other.device.type == "cpu" else TOLERANCE)
        difference = (one - other).abs().max()
        if not difference <= limit:
            raise UserError(
                f"{path}: {_named(facts)} computes other outputs with these weights, by up to "
                f"{float(difference):.2g}; {_GIVE}"
            )
