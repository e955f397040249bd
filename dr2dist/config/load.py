"""YAML and overrides to a Config, with one clear line for what is wrong."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo

from dr2dist.config.names import MEANT, MOVED
from dr2dist.config.schema import Config
from dr2dist.config.task import DEFAULT_TASK, Data, TaskOptions, sections_of, task_names
from dr2dist.config.text import put, read_settings, shown_value
from dr2dist.errors import UserError, nearest, one_line


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides (values are YAML).

    Modules that the file names as plugins are imported. Returns a frozen Config with the sections
    of its task. Raises UserError with file, key, what was found and what is allowed.
    """
    values = read_settings(path, overrides)
    try:
        named = values.get("plugins")
        import_plugins(named if isinstance(named, list) else (), Path(path).parent)
        kind = _config_type(*sections_of(_task_name(values)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_line(kind, e) for e in error.errors())}") from None


def import_plugins(names: Iterable[str], folder: Path | None = None) -> None:
    """Imports modules by name, which register tasks and backbones; from the present folder and
    another one too, behind all that is installed.

    Raises UserError for one that cannot be imported.
    """
    for name in names:
        for place in (Path.cwd(), folder):
            if place is not None and str(place.resolve()) not in sys.path:
                sys.path.append(str(place.resolve()))
        try:
            importlib.import_module(str(name))
        except Exception as error:
            reason = one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"plugins: {name} cannot be imported: {reason}") from None


def _task_name(values: dict[str, Any]) -> Any:
    task = values.get("task")
    return task.get("name", DEFAULT_TASK) if isinstance(task, dict) else DEFAULT_TASK


@functools.cache
def _config_type(options: type[TaskOptions], data: type[Data]) -> type[Config]:
    """The schema with the sections of a task."""
    return create_model(
        "Config", __base__=Config, __doc__=Config.__doc__, task=(options, ...), data=(data, ...)
    )


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, with what was left out filled in: load_config takes it."""
    return yaml.safe_dump(config.effective(), sort_keys=False)


def moved_settings(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version has written, as this one would have."""
    found = copy.deepcopy(values)
    for old, new in MOVED.items():
        section, name = old.split(".")
        if isinstance(found.get(section), dict) and name in found[section]:
            put(found, new, found[section].pop(name))
    model = found.get("model")
    if isinstance(model, dict) and model.get("weights") is None:
        model["weights"] = "random"
    return found


def describe_config() -> str:
    """All settings with their meaning, one a line; of each task its own."""
    lines = _describe(Config, "", leave_out=("task", "data"))
    of: dict[tuple[str, type[BaseModel]], list[str]] = {}
    for task in task_names():
        for section, kind in zip(("task", "data"), sections_of(task), strict=True):
            of.setdefault((section, kind), []).append(task)
    for (section, own), tasks in of.items():
        about = inspect.cleandoc(own.__doc__ or "").replace("\n", " ")
        lines.append(f"{section} {{of {', '.join(tasks)}}}: {about}")
        lines += _describe(own, f"{section}.")
    return "\n".join(lines)


def _line(kind: type[Config], error: Any) -> str:
    """One error of pydantic as `key: what was found, what is allowed`."""
    place = [str(part) for part in error["loc"]]
    # pydantic names the chosen kind of path behind `coefficients`: no key of the file.
    shown = place[:1] + place[2:] if place[:1] == ["coefficients"] else place
    key = ".".join(shown)
    section = _section(kind, place[:-1])
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden" if key in MOVED:
            return f"{key}: is {MOVED[key]} now"
        case "extra_forbidden" if section is not None:
            known = MEANT.get(place[-1], key)
            meant = f"; did you mean '{known}'?" if known != key else ""
            hint = meant or nearest(place[-1], section.model_fields) or ";"
            return f"{key}: unknown key{hint} allowed: {', '.join(section.model_fields)}"
        case "missing" if place[-1].isdecimal():
            key, message = ".".join(shown[:-1]), f"allowed is a list: {_about(kind, place)}"
        case "missing":
            return f"{key}: is missing: {_about(kind, place)}"
        case "value_error":
            return f"{key}: {message}" if key else message
        case "literal_error":
            message = _choose(error["input"], error["ctx"]["expected"])
        case "union_tag_invalid":
            tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
            return f"{key}.kind: found {tag!r}; {_choose(tag, tags)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = "allowed is a section, with a key of its own on each line"
        case "tuple_type":
            message = f"allowed is a list: {_about(kind, place)}"
    return f"{key}: found {shown_value(error['input'])}; {message}"


def _about(kind: type[Config], place: list[str]) -> str:
    """What the schema says of a setting, or of the one that a place is in."""
    for end in range(len(place), 0, -1):
        section = _section(kind, place[: end - 1])
        if section is not None and place[end - 1] in section.model_fields:
            return section.model_fields[place[end - 1]].description or "of its own values"
    return "of its own values"


def _choose(found: Any, expected: str) -> str:
    """`expected`: pydantic's list of quoted names, the last one after `or`."""
    names = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    hint = nearest(found, names) if isinstance(found, str) and found not in names else ""
    return f"allowed is {', '.join(names)}{hint}"


def _section(kind: Any, place: Sequence[str]) -> type[BaseModel] | None:
    """The section that a place in the configuration lies in."""
    choices = _sections(kind)
    if not place:
        return choices[0] if len(choices) == 1 else None
    if len(choices) > 1:  # one of several kinds of path, named by pydantic
        for choice in choices:
            if place[0] in typing.get_args(choice.model_fields["kind"].annotation):
                return _section(choice, place[1:])
    if not choices:
        return None
    if place[0].isdecimal():  # a member of a list of sections
        return _section(choices[0], place[1:])
    field = choices[0].model_fields.get(place[0])
    return None if field is None else _section(field.annotation, place[1:])


def _sections(kind: Any) -> list[type[BaseModel]]:
    """The sections that a field's type allows: none for a plain value."""
    if typing.get_origin(kind) in (typing.Annotated, tuple):
        return _sections(typing.get_args(kind)[0])
    if typing.get_origin(kind) is types.UnionType:
        return [section for choice in typing.get_args(kind) for section in _sections(choice)]
    return [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _describe(kind: type[BaseModel], prefix: str, leave_out: Sequence[str] = ()) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        if name in leave_out:
            continue
        for section in _sections(field.annotation):
            kinds = section.model_fields.get("kind")
            tag = "" if kinds is None else typing.get_args(kinds.annotation)[0]
            of_kind = f" {{kind: {tag}}}" if tag else ""
            lines.append(f"{prefix}{name}{of_kind}: {(section.__doc__ or '').strip()}")
            lines += _describe(section, f"{prefix}{name}.")
        if field.description:
            lines.append(f"{prefix}{name}: {field.description}{_allowed(field)}")
    return lines


def _allowed(field: FieldInfo) -> str:
    """A setting's choices and its default, as YAML writes them."""
    notes = []
    if typing.get_origin(field.annotation) is typing.Literal:
        notes.append(" | ".join(map(str, typing.get_args(field.annotation))))
    if field.is_required():
        notes.append("required")
    else:
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        notes.append(f"default {value if isinstance(value, str) else json.dumps(value)}")
    return f" ({'; '.join(notes)})" if notes else ""
