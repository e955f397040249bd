"""Which samples of a shard can be used: they have what the others have, and a label."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dr2dist.data.fields import Field
from dr2dist.data.film import FILM_TYPES
from dr2dist.data.images import IMAGE_TYPES
from dr2dist.data.members import Sample
from dr2dist.data.scan import Readable, Scanned, scan
from dr2dist.errors import one_line

KINDS = {**dict.fromkeys(IMAGE_TYPES, "image"), **dict.fromkeys((*FILM_TYPES, "zip"), "film")}
"""Extensions that stand for each other."""


def kind_of(extension: str) -> str:
    """What an extension is of: all images are `image`, `seg.png` is `seg.image`; films of any type
    and archives of their frames are `film`."""
    head, dot, last = extension.rpartition(".")
    return f"{head}{dot}{KINDS.get(last, last)}"


def kinds_of(sample: Sample) -> set[str]:
    """Kinds of a sample's members."""
    return {kind_of(extension) for extension in sample.extensions}


def needed_kinds(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Kinds that over half of the samples have."""
    counts = Counter(kind for sample in samples for kind in kinds_of(sample))
    return tuple(sorted(kind for kind, count in counts.items() if 2 * count > len(samples)))


def usable(
    file: Readable, needs: Sequence[str], label: str | None, headers: bool = False
) -> tuple[Scanned, dict[str, Any]]:
    """What a shard holds that can be used, and the labels by key, each a number or a text.

    needs: kinds of members that a sample must have. label: where its label is, such as cls or
    json#KEY; None: it has none. headers: see `scan`. What lacks either is left out, and named.
    Raises ValueError for a shard that cannot be read.
    """
    field = None if label is None else Field("label", label)
    wanted = () if field is None else field.extensions
    found, kept = scan(file, lambda extension: extension in wanted, headers), []
    labels = {}
    for sample in found.samples:
        lacking = sorted({kind_of(need) for need in needs} - kinds_of(sample))
        if lacking:
            found.left.append((sample.key, f"has no {' and no '.join(lacking)}"))
            continue
        if field is not None:
            try:
                labels[sample.key] = read_label(sample, found, field)
            except ValueError as error:
                found.left.append((sample.key, f"its label cannot be read: {one_line(error)}"))
                continue
        kept.append(sample)
    found.samples = kept
    return found, labels


def read_label(sample: Sample, found: Scanned, field: Field) -> int | str:
    """Raises ValueError for one that is neither a number nor a text, or not there."""
    members = {name: found.contents.get(f"{sample.key}.{name}", b"") for name in sample.members}
    label = field.decode(members)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"is {json.dumps(label)[:40]}, allowed is a number or a text")
    return label
