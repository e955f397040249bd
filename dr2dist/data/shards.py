"""Making and verifying shards: webdataset tar files with an index."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from tqdm import tqdm

from dr2dist.data.decoders import decode
from dr2dist.data.described import Described, describe, finish, read_note
from dr2dist.data.film import Footage
from dr2dist.data.found import open_shard
from dr2dist.data.frames import RATE
from dr2dist.data.index import FORMAT, INDEX_NAME, Index, Shard, read_index
from dr2dist.data.labels import class_index
from dr2dist.data.listing import shown
from dr2dist.data.members import ShardMembers
from dr2dist.data.records import Readable, Record
from dr2dist.data.scan import Scanned, scan
from dr2dist.data.split import describe_parts, split
from dr2dist.data.unfinished import check_output, unfinished
from dr2dist.data.usable import usable
from dr2dist.data.video_records import check_span, late_actions, span_of
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write

log = logging.getLogger(__name__)


def make_shards(
    records: Sequence[Record],
    classes: Sequence[str],
    output: Path,
    *,
    samples_per_shard: int = 256,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    group_by: str | None = None,
    split_by: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    skip_unreadable: bool = False,
) -> Made:
    """Writes OUTPUT, or OUTPUT/train, OUTPUT/val and OUTPUT/test if shares are held out.

    The shares, group_by and split_by are those of `split`.

    Files are copied as they are, mixed by `seed`; the same input gives the same bytes whatever
    the number of workers. The folder appears only when it is complete; what is done when the work
    breaks off lies in OUTPUT.part, and the same call goes on there. skip_unreadable: samples that
    cannot be read are left out, and named. Raises UserError for an unreadable one (named), an
    output that cannot be made, or a value outside its range.
    """
    output = check_output(output)
    shares = {"val": val_fraction, "test": test_fraction}
    if samples_per_shard < 1:
        raise UserError(f"samples-per-shard is {samples_per_shard}, allowed is 1 and more")
    parts = split(records, shares, seed, group_by, split_by)
    keys = {name: [record.key for record in chosen] for name, chosen in parts.items()}
    plan = (FORMAT, samples_per_shard, keys, seed, list(classes))
    run = _Run(workers, progress, skip_unreadable, [])
    with unfinished(output, _digest(records, plan)) as folder:
        made = [
            _write_part(folder / name, chosen, classes, samples_per_shard, seed, run)
            for name, chosen in parts.items()
        ]
    _tell_late(run.late)
    return Made(
        sum(part.samples for part in made),
        sum((part.left for part in made), ()),
        () if "" in parts else tuple(describe_parts({p: read_index(output / p) for p in parts})),
    )


class Made(NamedTuple):
    """samples: that were written. left: what could not be read, a line each. parts: a line for
    each of several parts."""

    samples: int
    left: tuple[str, ...]
    parts: tuple[str, ...] = ()


class _Run(NamedTuple):
    """How the work is done. late: takes films with annotations after their end, a text each."""

    workers: int | None
    progress: bool
    skip: bool
    late: list[str]


def _tell_late(late: Sequence[str]) -> None:
    if late:
        log.warning(
            "%d film(s) have annotations that begin after their end, which are not learnt, such as "
            "%s; frames of a folder are %g a second unless --frame-rate says otherwise",
            len(late),
            min(late),
            RATE,
        )


def _digest(records: Sequence[Record], plan: Any) -> str:
    """Of all that the shards' bytes depend on; of files their size and time."""
    found = hashlib.sha256(json.dumps(plan).encode())
    for record in records:
        found.update(repr((record.key, record.label, sorted(record.members.items()))).encode())
        for name, file in sorted(record.files.items()):
            try:
                info = file.stat()
            except OSError:  # named when it is read
                continue
            found.update(repr((name, file, info.st_size, info.st_mtime_ns)).encode())
    return found.hexdigest()


def _write_part(
    folder: Path,
    records: list[Record],
    classes: Sequence[str],
    samples_per_shard: int,
    seed: int,
    run: _Run,
) -> Made:
    if not records:
        raise UserError(f"{folder.name}: no samples are left for this part")
    folder.mkdir(exist_ok=True)
    ordered = sorted(records, key=lambda record: record.key)
    order = np.random.default_rng(seed).permutation(len(ordered))
    mixed = [ordered[place] for place in order]
    groups = [mixed[k : k + samples_per_shard] for k in range(0, len(mixed), samples_per_shard)]
    paths = [folder / f"shard-{number:06d}.tar" for number in range(len(groups))]
    task = partial(_shard_of, run=run)
    made: list[Described] = _in_parallel(
        task, list(zip(paths, groups, strict=True)), run.workers, run.progress
    )
    left = tuple(line for shard in made for _, line in shard.left)
    samples = sum(shard.samples for shard in made)
    if not samples:
        raise UserError(f"{folder.name}: no sample can be read, such as {left[0]}")
    for path, shard in zip(paths, made, strict=True):
        if not shard.samples:
            path.unlink(missing_ok=True)
    label = None if any(record.label is None for record in records) else "cls"
    described = [(shard, _note_of(path)) for path, shard in zip(paths, made, strict=True)]
    finish(folder / INDEX_NAME, described, classes, label=label)
    return Made(samples, left)


def _note_of(path: Path) -> Path:
    """What is remembered of a finished shard until all are."""
    return path.with_suffix(".safetensors")


def _shard_of(item: tuple[Path, list[Record]], run: _Run) -> Described:
    """Writes a shard and describes it; one that is there already is taken as it is."""
    path, records = item
    note = _note_of(path)
    known = read_note(note)
    if known is not None:
        if known.left and not run.skip:
            raise UserError(known.left[0][1])
        return known
    left: list[str] = []
    with atomic_write(path) as aside:
        _write_shard(aside, records, left if run.skip else None, run.late)
        with aside.open("rb") as file:
            found = scan(file)
    found.left = [("", line) for line in left]
    return describe(
        path.name,
        found,
        {record.key: record.label for record in records if record.label is not None},
        note,
    )


def _in_parallel(
    task: Callable[[Any], Any], items: list[Any], workers: int | None, progress: bool
) -> list[Any]:
    # Threads do: decoding, hashing and file access all run outside the interpreter's lock.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(task, items)
        try:
            return list(tqdm(results, total=len(items), unit="shard", disable=not progress))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(
    path: Path, records: list[Record], left: list[str] | None, late: list[str]
) -> None:
    """left: takes a line for each sample that cannot be read; None: that is an error. late: as of
    _Run."""
    said = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    # keep_meta: or else members whose extensions begin with _ are left out.
    with webdataset.TarWriter(str(path), keep_meta=True, **said) as writer:
        for record in records:
            try:
                files = {
                    name: _readable(name, file, record, late) for name, file in record.files.items()
                }
            except UserError as error:
                if left is None:
                    raise
                left.append(str(error))
                continue
            writer.write({"__key__": record.key, **files, **record.members})


def _readable(extension: str, path: Readable, record: Record, late: list[str]) -> bytes:
    """The record's span, if it has one, is to begin in the film."""
    try:
        data = path.read_bytes()
        value = decode(extension, data)
        if isinstance(value, Footage):
            if (span := span_of(record)) is not None:
                check_span(span, value)
            if count := late_actions(record, value):
                late.append(f"{shown(path)}, {count} after {value.seconds:.3f} seconds")
        return data
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: cannot be read: {one_line(error)}") from None


def verify_shards(pattern: str | Path, workers: int | None = None, progress: bool = True) -> Index:
    """Compares every shard with the index: size, checksum, members, labels, keys.

    Returns the index. Raises UserError that names the first faulty shard.
    """
    index = read_index(pattern)
    found = _in_parallel(partial(_fault, index), list(index.shards), workers, progress)
    for fault in found:
        if isinstance(fault, str):
            raise UserError(fault)
    keys = Counter(key for names in found for key in names)
    key, count = keys.most_common(1)[0] if keys else ("", 0)
    if count > 1 and index.unique_keys:
        raise UserError(f"{index.base}: key '{key}' is there {count} times")
    return index


def _fault(index: Index, shard: Shard) -> str | list[str]:
    """What is wrong with a shard, in a line; its keys if nothing is."""
    path = index.where(shard)
    if not index.is_remote(shard) and not Path(path).is_file():
        return f"{path}: is missing"
    try:
        with open_shard(path) as file:
            found, labels = usable(file, index.needs, index.label)
        known = index.members(shard)
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{path}: {one_line(error)}"
    if shard.bytes is not None and found.bytes != shard.bytes:
        return f"{path}: has {found.bytes} bytes, the index says {shard.bytes}"
    if shard.sha256 is not None and found.sha256 != shard.sha256:
        return f"{path}: checksum differs from the index"
    return (
        _fault_of_members(path, found, known)
        or _fault_of_labels(path, labels, index)
        or [known[number].key for number in range(len(known))]
    )


def _fault_of_members(path: str, found: Scanned, known: ShardMembers) -> str | None:
    there = {sample.key: sample.members for sample in found.samples}
    samples = [known[number] for number in range(len(known))]
    same = all(sample.members.items() <= there.get(sample.key, {}).items() for sample in samples)
    if not same or there.keys() != {sample.key for sample in samples}:
        return f"{path}: members differ from the index"
    return None


def _fault_of_labels(path: str, labels: Mapping[str, Any], index: Index) -> str | None:
    for key, label in labels.items():
        try:
            class_index(label, index.classes)
        except ValueError as error:
            return f"{path}: sample '{key}' has {error}"
    return None
