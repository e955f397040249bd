"""Making and verifying shards: webdataset tar files with an index."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from dr2dist.data.decoders import decode
from dr2dist.data.index import INDEX_NAME, Index, Sample, Shard, read_index
from dr2dist.data.sources import Record
from dr2dist.errors import UserError
from dr2dist.files import sha256

STREAMS = 64


def make_shards(
    records: Sequence[Record],
    classes: Sequence[str],
    output: Path,
    *,
    samples_per_shard: int = 256,
    val_fraction: float = 0.0,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Writes OUTPUT, or OUTPUT/train and OUTPUT/val if a share is held out.

    Files are copied as they are, mixed by `seed`; the same input gives the same bytes whatever
    the number of workers. The folder appears only when it is complete. Raises UserError for an
    unreadable image (named), an existing output, or a value outside its range.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already and is not empty")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val-fraction is {val_fraction}, allowed is 0 up to 1")
    if samples_per_shard < 1:
        raise UserError(f"samples-per-shard is {samples_per_shard}, allowed is 1 and more")
    parts = {"": list(records)}
    if val_fraction:
        parts = _split(records, val_fraction, seed)
    with _aside(output) as folder:
        for name, chosen in parts.items():
            _write_part(folder / name, chosen, classes, samples_per_shard, seed, workers, progress)


def _split(records: Sequence[Record], share: float, seed: int) -> dict[str, list[Record]]:
    """A held-out part with the same share of every class."""
    held: set[str] = set()
    for label in sorted({-1 if record.label is None else record.label for record in records}):
        own = None if label < 0 else label
        keys = sorted(record.key for record in records if record.label == own)
        order = np.random.default_rng((seed, max(label, 0))).permutation(len(keys))
        held.update(keys[place] for place in order[: round(share * len(keys))])
    return {
        "train": [record for record in records if record.key not in held],
        "val": [record for record in records if record.key in held],
    }


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """A folder beside the output that becomes it at the end, or vanishes."""
    folder = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        if output.exists():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _write_part(
    folder: Path,
    records: list[Record],
    classes: Sequence[str],
    samples_per_shard: int,
    seed: int,
    workers: int | None,
    progress: bool,
) -> None:
    if not records:
        raise UserError(f"{folder.name}: no samples are left for this part")
    folder.mkdir(exist_ok=True)
    ordered = sorted(records, key=lambda record: record.key)
    order = np.random.default_rng(seed).permutation(len(ordered))
    mixed = [ordered[place] for place in order]
    groups = [mixed[k : k + samples_per_shard] for k in range(0, len(mixed), samples_per_shard)]
    paths = [folder / f"shard-{number:06d}.tar" for number in range(len(groups))]
    made = _in_parallel(_write_shard, list(zip(paths, groups, strict=True)), workers, progress)
    index = Index(classes=tuple(classes), streams=STREAMS, shards=tuple(made))
    (folder / INDEX_NAME).write_text(index.model_dump_json())


def _in_parallel(
    task: Callable[[Any], Any], items: list[Any], workers: int | None, progress: bool
) -> list[Any]:
    # Threads do: decoding, hashing and file access all run outside the interpreter's lock.
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(task, items)
        return list(tqdm(results, total=len(items), unit="shard", disable=not progress))


def _write_shard(item: tuple[Path, list[Record]]) -> Shard:
    path, records = item
    with webdataset.TarWriter(str(path), encoder=False, mtime=0, user="", group="") as writer:
        for record in records:
            files = {name: _readable(name, file) for name, file in record.files.items()}
            writer.write({"__key__": record.key, **files, **record.members})
    labels = {record.key: record.label for record in records}
    samples = tuple(Sample(key, members, labels[key]) for key, members in _members(path).items())
    return Shard(name=path.name, bytes=path.stat().st_size, sha256=sha256(path), samples=samples)


def _readable(extension: str, path: Path) -> bytes:
    try:
        data = path.read_bytes()
        decode(extension, data)
        return data
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


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
