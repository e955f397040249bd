"""Why a model cannot be converted, in one line, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from dr2dist.backbones.backbone import COMPUTES, Backbone, own_method
from dr2dist.backbones.weights import ENDINGS
from dr2dist.errors import UserError, nearest

OWN_FAMILY = "for a family of your own see docs/backbones.md and dr2dist.register_backbone"


def check_is_model(model: Any) -> None:
    """Raises UserError for what is no model, or a compiled one."""
    if isinstance(model, str | Path):
        raise UserError(f"convert: {_of_text(model)}")
    if isinstance(model, type):
        raise UserError(
            f"convert: {model.__name__} is a class, a model is needed: call it, or use "
            "timm.create_model(name)"
        )
    if isinstance(model, Mapping):
        tensors = any(isinstance(value, Tensor) for value in model.values())
        raise UserError(
            f"convert: a {'state dict' if tensors else type(model).__name__} of {len(model)} "
            "entries is given, a model is needed: model = timm.create_model(name); "
            "model.load_state_dict(state)"
        )
    if not isinstance(model, nn.Module):
        found = "None" if model is None else f"a {type(model).__name__}"
        raise UserError(
            f"convert: {found} is given, a model is needed, such as timm.create_model(name)"
        )
    _check_is_not_compiled(model)
    for name in COMPUTES:
        if name in model.__dict__:
            raise UserError(
                f"convert: the model's {name} was replaced, which a reversible network would not "
                f"call: convert the model without it; {OWN_FAMILY}"
            )


def _of_text(given: str | Path) -> str:
    name = str(given)
    if isinstance(given, str) and timm.is_model(name):
        return f"'{name}' is a name, a model is needed: timm.create_model('{name}')"
    if isinstance(given, Path) or Path(name).suffix in ENDINGS:
        return (
            f"'{name}' is a path, a model is needed: dr2dist.load reads an exported file, others "
            "are weights for a model of timm.create_model(name)"
        )
    hint = nearest(name, timm.list_models())
    return f"'{name}' is a text, a model is needed: timm.create_model(name){hint}"


def _check_is_not_compiled(model: nn.Module) -> None:
    if isinstance(model._modules.get("_orig_mod"), nn.Module):
        raise UserError(
            "convert: the model is compiled, which a reversible network cannot be from outside: "
            "convert(model._orig_mod, compile=True) compiles its functions"
        )
    if model.__dict__.get("_compiled_call_impl") is not None:
        raise UserError(
            "convert: the model is compiled by its own compile(), which a network would go on to "
            "call: convert(copy.deepcopy(model), compile=True) compiles the functions of a copy"
        )


def unsupported(model: nn.Module, families: Sequence[Backbone]) -> str:
    """What is missing for a model that no family matches, and what is supported."""
    kind = type(model)
    if isinstance(getattr(model, "module", None), nn.Module):
        name = kind.__name__
        return f"{name} is around a model: convert its .module, and put {name} around the result"
    known = "; ".join(map(_described, families))
    return (
        f"{kind.__name__} of {kind.__module__} is not supported: {_missing(model, families)}; "
        f"supported families: {known}; {OWN_FAMILY}"
    )


def _missing(model: nn.Module, families: Sequence[Backbone]) -> str:
    for family in families:
        for known in family.classes:
            if isinstance(model, known):
                method = own_method(model, known) or "part"
                return (
                    f"it is built as {_named(known)}, but has a {method} of its own, which need "
                    "not be x + F(x) and would not be called"
                )
    runs = list(_runs(model))
    if not runs:
        return "no family is built so, and it has no list of like blocks"
    # Stages of blocks are runs as well.
    name, module = max(runs, key=lambda run: "block" in type(run[1]).__name__.lower())
    return (
        f"no family says what is F of x + F(x) in its blocks, such as {name}, a "
        f"{type(module).__name__}"
    )


def _runs(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The first of each run of like modules that have some inside, as blocks do."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        first, *others = module.named_children()
        alike = any(type(other) is type(first[1]) for _, other in others)
        if alike and any(True for _ in first[1].children()):
            yield f"{name}.{first[0]}" if name else first[0], first[1]


def _described(family: Backbone) -> str:
    """A family with the classes that its models are built as, and patterns of their names."""
    patterns = ", ".join(family.patterns)
    classes = ", ".join(map(_named, family.classes))
    return f"{family.name} ({classes}: {patterns})" if classes else f"{family.name} ({patterns})"


def _named(kind: type) -> str:
    """A class with the package that it is of, since several have some of the same name."""
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
