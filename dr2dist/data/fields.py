"""Which members of a sample a task needs, in webdataset's syntax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dr2dist.data.decoders import decode
from dr2dist.data.film import FILM_TYPES
from dr2dist.data.images import IMAGE_TYPES
from dr2dist.errors import UserError, nearest

USUAL = {
    "image": ";".join((*IMAGE_TYPES, "npy")),
    "video": ";".join((*FILM_TYPES, "zip")),
}
"""What may carry an image, and a film: a file of one, or an archive of its frames."""

Members = Mapping[str, bytes]
"""A sample as it lies in a shard: what its files hold, by extension."""


def split_name(path: Path) -> tuple[str, str]:
    """A file's name as webdataset takes it: the sample's, and the extension, from the first dot on,
    in lower case."""
    name, _, extension = path.name.partition(".")
    return name, extension.lower()


@dataclass(frozen=True)
class Alternative:
    """An extension that may carry a field, such as `jpg`, or the key of a JSON file that does.

    extension: in small letters, without the first dot. key: of `json#category`; dots lead into
    inner objects; None for the whole file.
    """

    extension: str
    key: str | None = None

    @classmethod
    def parse(cls, text: str) -> Alternative:
        """An alternative from its text, `EXTENSION` or `EXTENSION#KEY`."""
        extension, _, key = text.strip().partition("#")
        return cls(extension.lower(), key or None)


class Field:
    """A field of a sample: what a task calls it, and which files may carry it.

    name: the task's. text: extensions that may carry it, the first one that is there counts:
    `jpg;png;json#image`; with `?` at the end a sample may be without. Raises UserError for a text
    without any.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self.optional = name, text, text.rstrip().endswith("?")
        parts = text.rstrip().removesuffix("?").split(";")
        self.alternatives = [Alternative.parse(part) for part in parts if part.strip()]
        if not self.alternatives or not all(each.extension for each in self.alternatives):
            raise UserError(f"data.fields: {name} is '{text}', allowed is such as jpg;png")

    @property
    def extensions(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(each.extension for each in self.alternatives)

    def choose(self, extensions: Sequence[str]) -> Alternative | None:
        """What carries the field in a sample with these extensions; None if nothing does."""
        return next((each for each in self.alternatives if each.extension in extensions), None)

    def decode(self, members: Members) -> Any:
        """The field's value, None where it is optional and not there. Raises ValueError if it
        should be there or cannot be read."""
        chosen = self.choose(list(members))
        if chosen is None and self.optional:
            return None
        if chosen is None:
            found = ", ".join(f".{name}" for name in members) or "nothing"
            raise ValueError(f"has no {self.name} ({self.text}), only {found}")
        value = decode(chosen.extension, members[chosen.extension])
        for part in chosen.key.split(".") if chosen.key else ():
            if not isinstance(value, dict) or part not in value:
                if self.optional:
                    return None
                raise ValueError(f".{chosen.extension} has no key '{chosen.key}'")
            value = value[part]
        return value


class Fields:
    """The fields of a task.

    usual: texts by name, as the task says them. overrides: those of `data.fields`, which count
    instead. Raises UserError for an override of a field that the task does not have.
    """

    def __init__(
        self, usual: Mapping[str, str], overrides: Mapping[str, str] | None = None
    ) -> None:
        for name in overrides or ():
            if name not in usual:
                raise UserError(
                    f"data.fields: {name} is not a field of the task, allowed are "
                    f"{', '.join(usual)}{nearest(name, usual)}"
                )
        self._usual, self._said = usual, overrides or {}
        self.all = [Field(name, text) for name, text in {**usual, **(overrides or {})}.items()]

    def only(self, names: Sequence[str]) -> list[Field]:
        """Those with these names."""
        return [field for field in self.all if field.name in names]

    def wanted(self, extensions: Sequence[str]) -> list[str]:
        """Which of a sample's members the fields need."""
        chosen = [field.choose(extensions) for field in self.all]
        return [each.extension for each in chosen if each is not None]

    def unclear(self, extensions: Sequence[str]) -> Iterator[str]:
        """What is wrong with a sample of which several members may carry a field, and nobody has
        said which does: for each such field a text that goes on after `has`."""
        for field in self.all:
            found = [name for name in dict.fromkeys(field.extensions) if name in extensions]
            if len(found) > 1 and field.name not in self._said:
                yield (
                    f"{' and '.join(f'.{name}' for name in found)}, each of which may be the "
                    f"{field.name}: data.fields says which is, such as {{{field.name}: {found[0]}}}"
                )

    def as_told(self, told: Mapping[str, str]) -> Fields:
        """The same, with fields where an index says that they are, unless it was said otherwise."""
        more = {name: text for name, text in told.items() if name in self._usual}
        return Fields(self._usual, {**more, **self._said}) if more else self

    def decode(self, members: Members) -> dict[str, Any]:
        """All fields by name, without optional ones that are not there. Raises ValueError for one
        that should be, or cannot be read."""
        found = {field.name: field.decode(members) for field in self.all}
        left = {field.name for field in self.all if field.optional and found[field.name] is None}
        return {name: value for name, value in found.items() if name not in left}
