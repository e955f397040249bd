"""YAML and overrides to a Config, with one clear line for what is wrong."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dr2dist.config.schema import Config
from dr2dist.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"key '{key}' is given twice in the section at line {line}")
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides (values are YAML).

    Raises UserError: file, key, what was found, what is allowed.
    """
    source = Path(path)
    try:
        text = source.read_text()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        values = yaml.load(text, _Loader)  # noqa: S506  (a subclass of SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings")
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {'; '.join(_line(e) for e in error.errors())}") from None


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, with what was left out filled in."""
    values = config.model_dump(mode="json", exclude_unset=False)
    return yaml.safe_dump(_without_idle(config, values), sort_keys=False)


def describe_config() -> str:
    """All settings with their meaning, one a line."""
    return "\n".join(_describe(Config, ""))


def _apply(values: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not all(key.split(".")):
        raise UserError(f"override '{override}': allowed is section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override '{override}': {section} is not a section")
    values[last] = yaml.safe_load(text)


def _line(error: Any) -> str:
    place = [str(part) for part in error["loc"]]
    section = _section(Config, place[:-1])
    key = ".".join(p for p in place if p not in ("conserve", "paper", "constant", "piecewise"))
    if error["type"] == "extra_forbidden" and section is not None:
        allowed = ", ".join(section.model_fields)
        hint = nearest(place[-1], section.model_fields)
        return f"{key}: unknown key{hint}; allowed: {allowed}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{key}: is missing"
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if error["type"] == "literal_error":
        expected = [word.strip("'") for word in _words(error["ctx"]["expected"])]
        message = f"allowed is {', '.join(expected)}{nearest(str(error['input']), expected)}"
    if error["type"] == "union_tag_invalid":
        expected = [word.strip("'") for word in _words(error["ctx"]["expected_tags"])]
        hint = nearest(str(error["ctx"]["tag"]), expected)
        return f"{key}.kind: found '{error['ctx']['tag']}', allowed is {', '.join(expected)}{hint}"
    return f"{key}: found {error['input']!r}; {message}"


def _words(text: str) -> list[str]:
    return text.replace(" or ", ", ").split(", ")


def _section(kind: Any, place: Sequence[str]) -> type[BaseModel] | None:
    """The section that a place in the configuration lies in."""
    if not place:
        return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(place[0])
        return None if field is None else _section(field.annotation, place[1:])
    for choice in _choices(kind):
        tag = choice.model_fields.get("kind")
        if tag is not None and place[0] in typing.get_args(tag.annotation):
            return _section(choice, place[1:])
    return None


def _choices(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Annotated:
        return _choices(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return list(typing.get_args(kind))
    return [kind]


def _without_idle(config: BaseModel, values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what would be refused as without effect if it were given."""
    idle = {"sgd": ("optim", "betas"), "adamw": ("optim", "momentum")}
    section, key = idle[values["optim"]["name"]]
    values[section].pop(key)
    if values["reversible"]["arithmetic"] == "float":
        values["reversible"].pop("fraction_bits")
    return values


def _describe(kind: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        for choice in _choices(field.annotation):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                lines.append(f"{prefix}{name}: {(choice.__doc__ or '').strip()}")
                lines += _describe(choice, f"{prefix}{name}.")
        if field.description:
            default = "" if field.is_required() else f" (default {field.default})"
            lines.append(f"{prefix}{name}: {field.description}{default}")
    return lines
