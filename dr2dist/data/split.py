"""Samples to parts: for training, for validation, for a test at the end."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from dr2dist.data.index import Index
from dr2dist.data.listing import shown
from dr2dist.data.records import Record
from dr2dist.errors import UserError, nearest

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
Parts = dict[str, list[Record]]


def split(
    records: Sequence[Record],
    shares: Mapping[str, float],
    seed: int,
    group_by: str | None = None,
    split_by: str | None = None,
) -> Parts:
    """Records by part: by a column of a table, or with the same share of every class in each part;
    under the name "" where nothing is held out.

    shares: of val and test; what is left is train. group_by: a column of the table, or a regular
    expression that is looked for in a file's path under the source: what it finds (its first group,
    if it has one) is a group, such as a patient, which is in one part alone; by default spans of
    one film are. split_by: a column that says train, val or test. Raises UserError for what
    contradicts each other, a part without samples, and a record of which a column or path says
    nothing.
    """
    held = any(shares.values())
    if split_by is not None:
        if group_by is not None or held:
            raise UserError("--split-by: says all parts: leave out fractions and --group-by")
        return _by_column(records, split_by)
    if not held:
        if group_by is not None:
            raise UserError("--group-by: has no effect without --val-fraction or --test-fraction")
        return {"": list(records)}
    parts = _by_shares(records, shares, seed, group_by)
    for part in ("train", *(part for part, share in shares.items() if share)):
        if part not in parts:
            raise UserError(f"{part}: no samples are left for this part, of {len(records)}")
    return parts


def _by_shares(
    records: Sequence[Record], shares: Mapping[str, float], seed: int, group_by: str | None
) -> Parts:
    for part, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"{part}-fraction is {share}, allowed is 0 and more, below 1")
    if sum(shares.values()) >= 1:
        raise UserError(f"the fractions of {' and '.join(shares)} leave nothing for training")
    held = {part: share for part, share in shares.items() if share}
    if group_by is not None or any(record.group for record in records):
        return _by_groups(records, held, seed, group_by)
    chosen: dict[str, str] = {}
    for label in sorted({-1 if record.label is None else record.label for record in records}):
        own = None if label < 0 else label
        keys = sorted(record.key for record in records if record.label == own)
        order = np.random.default_rng((seed, max(label, 0))).permutation(len(keys))
        start = 0
        for part, share in held.items():
            stop = start + round(share * len(keys))
            chosen |= {keys[place]: part for place in order[start:stop]}
            start = stop
    return _parts(records, [chosen.get(record.key, "train") for record in records])


def _parts(records: Sequence[Record], names: Sequence[str]) -> Parts:
    """The records by part, in the order of PARTS."""
    found: Parts = {}
    for part in PARTS:
        own = [record for record, name in zip(records, names, strict=True) if name == part]
        if own:
            found[part] = own
    return found


def _by_groups(
    records: Sequence[Record], held: Mapping[str, float], seed: int, group_by: str | None
) -> Parts:
    """Each group, the largest first, goes where it brings the classes nearest to their shares."""
    names = [_group_of(record, group_by) for record in records]
    groups: dict[str, Counter[int | None]] = defaultdict(Counter)
    for name, record in zip(names, records, strict=True):
        groups[name][record.label] += 1
    shares = {"train": 1 - sum(held.values()), **held}
    if len(groups) < len(shares):
        found = f"--group-by: finds {len(groups)} group(s)"
        if group_by is None:
            found = f"all spans are of {len(groups)} film(s), each of which is in one part alone,"
        raise UserError(f"{found} for {len(shares)} parts")
    totals = Counter(record.label for record in records)
    missing = {part: {c: share * n for c, n in totals.items()} for part, share in shares.items()}
    mixed = np.random.default_rng(seed).permutation(sorted(groups)).tolist()
    place: dict[str, str] = {}
    for name in sorted(mixed, key=lambda name: -groups[name].total()):
        own = groups[name]
        place[name] = min(shares, key=partial(_off, own, missing, totals))
        for c, count in own.items():
            missing[place[name]][c] -= count
    return _parts(records, [place[name] for name in names])


def _off(
    group: Counter[int | None],
    missing: Mapping[str, Mapping[int | None, float]],
    totals: Mapping[int | None, int],
    part: str,
) -> float:
    """How much further a part is from its share with a group than without: of squared differences,
    those of each class, and that of all samples as often as there are classes."""
    lacks, size, count = missing[part], group.total(), sum(totals.values())
    by_class = sum(n * (n - 2 * lacks[c]) / totals[c] for c, n in group.items())
    return by_class + len(totals) * size * (size - 2 * sum(lacks.values())) / count


def _group_of(record: Record, group_by: str | None) -> str:
    if group_by is None:
        return record.group or record.key
    if group_by in record.columns:
        value = record.columns[group_by].strip()
        if not value:
            raise UserError(f"--group-by: {_named(record)} has nothing in the column '{group_by}'")
        return value
    try:
        found = re.search(group_by, record.place)
    except re.error as error:
        hint = nearest(group_by, record.columns)
        raise UserError(
            f"--group-by: '{group_by}' is no column{hint} and no regular expression: {error}"
        ) from None
    group = None if found is None else found[1] if found.re.groups else found[0]
    if not group:
        raise UserError(f"--group-by: '{group_by}' finds nothing in {_named(record)}")
    return group


def _named(record: Record) -> str:
    return shown(record.place)


def _by_column(records: Sequence[Record], column: str) -> Parts:
    others = {"validation": "val", "valid": "val", "dev": "val"}
    others |= {"training": "train", "testing": "test"}
    names = []
    for record in records:
        if column not in record.columns:
            hint = nearest(column, record.columns)
            raise UserError(f"--split-by: there is no column '{column}'{hint}")
        said = record.columns[column].strip().lower()
        part = others.get(said, said)
        if part not in PARTS:
            raise UserError(
                f"--split-by: {_named(record)} has '{said}' in the column '{column}', allowed are "
                f"{', '.join(PARTS)}"
            )
        names.append(part)
    found, places = _parts(records, names), defaultdict(set)
    for record, name in zip(records, names, strict=True):
        places[record.group].add(name)
    if shared := [group for group, own in places.items() if group and len(own) > 1]:
        log.warning("--split-by: spans of one film are in several parts: %s", shown(shared[0]))
    if "train" not in found and len(found) < 2:  # THUMOS has validation and test, and no other
        raise UserError(f"--split-by: no row has 'train' in the column '{column}'")
    return found


def describe_parts(parts: Mapping[str, Index]) -> list[str]:
    """A line for each part: how many samples it has, and of which classes, the fewest first."""
    lines = []
    for part, index in parts.items():
        # Of many labels an image has no one class.
        by_class = sorted(zip(index.class_counts() or (), index.classes, strict=False))
        listed = ", ".join(f"{name} {count}" for count, name in by_class[:SHOWN])
        more = f", and {len(by_class) - SHOWN} more classes" if len(by_class) > SHOWN else ""
        lines.append(
            f"{part}: {index.num_samples} samples" + (f": {listed}{more}" if listed else "")
        )
    return lines


SHOWN = 10
"""Classes of a part that a line names at most."""
