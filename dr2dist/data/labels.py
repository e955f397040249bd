"""Labels of samples, as their members say them, and the classes that they are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dr2dist.errors import UserError, one_line


def class_index(label: Any, classes: Sequence[str]) -> int:
    """A label, a number or a name, as its class's number. Raises ValueError for another one."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    whole = not isinstance(label, bool) and not (isinstance(label, float) and label % 1)
    try:
        number = int(label) if whole else -1
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < len(classes):
        names = ", ".join(classes[:10])
        raise ValueError(f"label {label!r}, allowed is 0 to {len(classes) - 1} or one of {names}")
    return number


def check_named_once(labels: Any, named: Sequence[Any]) -> None:
    """Raises ValueError for labels that name a class twice: they may be 0 or 1 for each class.

    named: the classes that they name.
    """
    seen = set()
    for each in named:
        if each in seen:
            raise ValueError(
                f"labels {labels!r:.60} name class {each} twice: a list of classes is wanted, not "
                "0 or 1 for each"
            )
        seen.add(each)


MOST = 1_000_000
"""Classes that numbers without names make at most."""


def classes_of(labels: Iterable[Any], names: Path | None) -> list[str]:
    """The names of classes: a file's lines, or all texts in order, or numbers up to the largest.

    Raises UserError for a file that cannot be read, and for numbers and texts without names.
    """
    if names is not None:
        return _names(names)
    every = set(labels)
    texts = {label for label in every if isinstance(label, str)}
    if texts and texts != every:
        raise UserError(
            f"labels are texts ('{min(texts)}') and numbers ({min(every - texts)}): --classes FILE "
            "says which number has which name, a line each"
        )
    if texts:
        return sorted(texts)
    if every and (min(every) < 0 or max(every) >= MOST):
        wrong = min(every) if min(every) < 0 else max(every)
        raise UserError(
            f"the label {wrong} is there, allowed are numbers from 0 to {MOST - 1}, or more with "
            "--classes FILE"
        )
    return [str(number) for number in range(max(every, default=-1) + 1)]


def _names(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
    while lines and not lines[-1]:
        lines.pop()
    for number, name in enumerate(lines):
        if not name or name in lines[:number]:
            fault = f"'{name}' is there twice" if name else "is empty"
            raise UserError(f"{path}: line {number + 1}: {fault}; allowed is a name for each class")
    return lines
