"""YAML and overrides to plain values, which takes nothing that is slow to import."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dr2dist.errors import UserError, one_line

LONGEST = 80
"""Characters of a value that a message shows."""
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and takes 1e-3 for a number, as YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"key '{key}' is given twice in the section at line {line}")
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML file says, with `section.key=value` overrides (values are YAML).

    Raises UserError with file, key, what was found and what is allowed.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings")
    for override in overrides:
        _apply(values, override)
    return values


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a subclass of SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {one_line(error)}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found or not all(key.split(".")):
        raise UserError(f"override '{override}': allowed is section.key=value")
    value = _parse(text, f"override '{override}'")
    try:
        put(values, key, value)
    except UserError as error:
        raise UserError(f"override '{override}': {error}") from None


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a nested value by its whole name. Raises UserError where a part of it has no parts."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"{section} is not a section")
    values[last] = value


def shown_value(value: Any) -> str:
    """A value as YAML has it, on one line and not too long."""
    if isinstance(value, str):
        return repr(value)
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    except yaml.YAMLError:
        text = type(value).__name__
    line = one_line(text.removesuffix("\n...\n"))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their whole names, such as optim.lr."""
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    parts = [flat(value, f"{prefix}{key}.") for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}
