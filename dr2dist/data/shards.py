"""Making and verifying shards: webdataset tar files with an index."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from tqdm import tqdm

from dr2dist.data.decoders import decode
from dr2dist.data.index import INDEX_NAME, Index, Sample, Shard, read_index
from dr2dist.data.listing import shown
from dr2dist.data.sources import Record
from dr2dist.data.split import describe_parts, split
from dr2dist.data.unfinished import check_output, unfinished
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write, sha256

STREAMS = 64


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
    plan = (samples_per_shard, keys, seed, list(classes))
    run = _Run(workers, progress, skip_unreadable)
    with unfinished(output, _digest(records, plan)) as folder:
        made = [
            _write_part(folder / name, chosen, classes, samples_per_shard, seed, run)
            for name, chosen in parts.items()
        ]
        for note in folder.rglob(NOTES):
            note.unlink()
    return Made(
        sum(part.samples for part in made),
        sum((part.left for part in made), ()),
        tuple(describe_parts(parts, classes)) if "" not in parts else (),
    )


class Made(NamedTuple):
    """samples: that were written. left: what could not be read, a line each. parts: a line for
    each of several parts."""

    samples: int
    left: tuple[str, ...]
    parts: tuple[str, ...] = ()


class _Run(NamedTuple):
    """How the work is done."""

    workers: int | None
    progress: bool
    skip: bool


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
            found.update(repr((name, os.fspath(file), info.st_size, info.st_mtime_ns)).encode())
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
    task = partial(_shard_of, skip=run.skip)
    made = _in_parallel(task, list(zip(paths, groups, strict=True)), run.workers, run.progress)
    shards = tuple(shard for shard, _ in made if shard.samples)
    left = tuple(line for _, lines in made for line in lines)
    if not shards:
        raise UserError(f"{folder.name}: no sample can be read, such as {left[0]}")
    for shard, _ in made:
        if not shard.samples:
            (folder / shard.name).unlink(missing_ok=True)
    index = Index(classes=tuple(classes), streams=STREAMS, shards=shards)
    (folder / INDEX_NAME).write_text(index.model_dump_json(), "utf-8")
    return Made(index.num_samples, left)


NOTES = "shard-*.json"


def _note_of(path: Path) -> Path:
    """What is remembered of a finished shard until all are; one of NOTES."""
    return path.with_suffix(".json")


def _shard_of(item: tuple[Path, list[Record]], skip: bool) -> tuple[Shard, list[str]]:
    """A shard, and what was left out of it; one that is there already is taken as it is."""
    path, records = item
    note = _note_of(path)
    if note.exists():
        shard, left = json.loads(note.read_text("utf-8"))
        if left and not skip:
            raise UserError(left[0])
        return Shard.model_validate(shard), left
    left = []
    with atomic_write(path) as aside:
        _write_shard(aside, records, left if skip else None)
        shard = _described(aside, path.name, records)
    with atomic_write(note) as aside:
        aside.write_text(json.dumps([shard.model_dump(), left]), "utf-8")
    return shard, left


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


def _write_shard(path: Path, records: list[Record], left: list[str] | None) -> None:
    """left: takes a line for each sample that cannot be read; None: that is an error."""
    with webdataset.TarWriter(str(path), encoder=False, mtime=0, user="", group="") as writer:
        for record in records:
            try:
                files = {name: _readable(name, file) for name, file in record.files.items()}
            except UserError as error:
                if left is None:
                    raise
                left.append(str(error))
                continue
            writer.write({"__key__": record.key, **files, **record.members})


def _described(path: Path, name: str, records: list[Record]) -> Shard:
    labels = {record.key: record.label for record in records}
    samples = tuple(Sample(key, members, labels[key]) for key, members in _members(path).items())
    return Shard(name=name, bytes=path.stat().st_size, sha256=sha256(path), samples=samples)


def _readable(extension: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
        decode(extension, data)
        return data
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)}: cannot be read: {one_line(error)}") from None


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """(offset, size) of each sample's members, by key and extension."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            found.setdefault(key, {})[extension] = member.offset_data, member.size
    return found


def verify_shards(pattern: str | Path, workers: int | None = None, progress: bool = True) -> Index:
    """Compares every shard with the index: size, checksum, members, labels, keys.

    Returns the index. Raises UserError that names the first faulty shard.
    """
    folder, index = read_index(pattern)
    items = [(folder / shard.name, shard) for shard in index.shards]
    faults = _in_parallel(_fault, items, workers, progress)
    for fault in faults:
        if fault:
            raise UserError(fault)
    samples = [sample for shard in index.shards for sample in shard.samples]
    key, count = Counter(sample.key for sample in samples).most_common(1)[0]
    if count > 1:
        raise UserError(f"{folder}: key '{key}' is there {count} times")
    for sample in samples:
        if sample.label is not None and not 0 <= sample.label < len(index.classes):
            raise UserError(
                f"{folder}: sample '{sample.key}' has label {sample.label}, allowed is 0 to "
                f"{len(index.classes) - 1}"
            )
    return index


def _fault(item: tuple[Path, Shard]) -> str | None:
    """What is wrong with a shard, in a line; None if nothing is."""
    path, shard = item
    if not path.is_file():
        return f"{path}: is missing"
    if path.stat().st_size != shard.bytes:
        return f"{path}: has {path.stat().st_size} bytes, the index says {shard.bytes}"
    if sha256(path) != shard.sha256:
        return f"{path}: checksum differs from the index"
    found = _members(path)
    same = all(
        sample.members.items() <= found.get(sample.key, {}).items() for sample in shard.samples
    )
    keys = found.keys() == {sample.key for sample in shard.samples}
    return None if same and keys else f"{path}: members differ from the index"
