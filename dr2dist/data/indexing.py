"""An index of shards that people have: each is read once, by as many processes as wanted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dr2dist.data.counted import known_counts
from dr2dist.data.described import Described, describe, finish, read_note
from dr2dist.data.fields import USUAL, Field, Fields
from dr2dist.data.found import find_shards, open_shard, shard_size
from dr2dist.data.index import INDEX_NAME, Index, read_index, sidecar
from dr2dist.data.labels import classes_of
from dr2dist.data.listing import left_out, shown
from dr2dist.data.remote import is_remote
from dr2dist.data.scan import Scanned
from dr2dist.data.usable import needed_kinds, usable
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write, check_can_be_made, locked
from dr2dist.status import say

LABELS = ("cls", "json#label")
"""What is taken for a label where nothing is said."""
NO_LABEL = "none"
SPEED = 200e6
"""Bytes a second and process that are expected before any is measured."""
GATHERED = "PLAN.json"


class Part(NamedTuple):
    """A share of the work: every of-th shard from number on, from 0."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From `i/n`, i from 1 on. Raises UserError for another text."""
        number, _, of = text.partition("/")
        if number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of):
            return cls(int(number) - 1, int(of))
        raise UserError(f"--part is '{text}', allowed is such as 1/4: the first of four shares")


@dataclass(frozen=True)
class Indexed:
    """index: None where shards are left to other parts. left: how many of those are. unusable:
    (shard, member or key, reason). notes: what a training run must know, a line each."""

    index: Index | None
    left: int
    unusable: list[tuple[str, str, str]]
    notes: list[str]

    def describe(self) -> list[str]:
        """What cannot be used, a line for each reason, and the notes."""
        reasons: dict[str, list[str]] = {}
        for shard, name, reason in self.unusable:
            reasons.setdefault(reason, []).append(f"{shard}: {name}" if name else shard)
        return [*left_out(reasons), *self.notes]


class _Plan(NamedTuple):
    """What is done to every shard alike. label: where it is, none without one. needs: kinds of
    members that every sample must have."""

    label: str | None
    needs: tuple[str, ...]


def index_shards(
    sources: Sequence[str],
    output: Path,
    *,
    label: str | None = None,
    classes: Path | None = None,
    part: Part | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    take_counts: bool = False,
    progress: bool = True,
) -> Indexed:
    """Writes an index of shards, each read once from its first byte to its last.

    sources: see `find_shards`. label: the member that holds it, such as cls, txt or json#KEY; none:
    there is none; by default cls, or the key label of a .json. classes: a file with a name for each
    number, a line each. part: a share of the work; whoever has the last one, or calls without,
    makes the index. overwrite: an index that is there; one of an earlier version always is.
    take_counts: shards whose samples others have counted are not read, see `known_counts`: what
    they hold is found, and compared with the count, when they are first read in a run.

    What is done when the work breaks off is kept in a folder beside the output, and the same call
    goes on there. Raises UserError for a shard that cannot be read, and what else cannot be.
    """
    if is_remote(str(output).replace(":/", "://", 1)):
        raise UserError(f"{output}: is no place on this machine; an index is written here")
    output = Path(os.path.abspath(output))
    _check_output(output, overwrite)
    shards = find_shards(sources)
    work = output.with_suffix(".members.part")
    lock = work.with_name(f"{work.name}.lock")
    with locked(lock):  # parts that begin, and end, together do so one after the other
        plan = _begin(work, shards, label, part)
    notes = [work / f"{number:06d}.safetensors" for number in range(len(shards))]
    taken = _taken(shards, output.parent, plan) if take_counts else {}
    todo = [
        number
        for number, (shard, note) in enumerate(zip(shards, notes, strict=True))
        if (part is None or number % part.of == part.number)
        and number not in taken
        and not _is_done(shard, note)
    ]
    jobs = [(shards[k], _relative(shards[k], output.parent), notes[k], plan) for k in todo]
    _tell_cost([job[0] for job in jobs], workers)
    _describe_all(jobs, workers, progress)
    described = [
        (taken[number], None) if number in taken else (read_note(note), note)
        for number, note in enumerate(notes)
    ]
    done = [(each, note) for each, note in described if each is not None]
    unusable = [(each.name, *fault) for each, _ in done for fault in each.left]
    if len(done) < len(shards):
        return Indexed(None, len(shards) - len(done), unusable, [])
    if taken and plan.label is not None and classes is None:
        raise UserError(
            f"--take-counts: shards that are not read do not tell their classes (.{plan.label}): "
            "--classes FILE does, a name a line; or --label none"
        )
    with locked(lock):
        if all(note is None or note.exists() for _, note in done):
            found = _finished(output, work, done, plan, classes, unusable)
        else:  # another part was last
            found = Indexed(read_index(output), 0, unusable, [])
        lock.unlink()
    return found


def _finished(
    output: Path,
    work: Path,
    done: list[tuple[Described, Path | None]],
    plan: _Plan,
    classes: Path | None,
    unusable: list[tuple[str, str, str]],
) -> Indexed:
    described = [each for each, _ in done]
    if not sum(each.samples for each in described):
        fault = ": ".join(unusable[0]) if unusable else "they are empty"
        raise UserError(f"{output}: the shards hold no sample that can be used, such as {fault}")
    labels = {json.loads(text) for each in described for text in each.labels}
    names = classes_of(labels, classes) if classes or not labels else _known(output, labels)
    for each in described:  # before anything is moved
        each.class_rows(0, names)
    empty = [(each.name, "", "holds no samples") for each in described if not each.samples]
    shutil.rmtree(sidecar(output, 0).parent, ignore_errors=True)
    finish(output, done, names, plan.needs, plan.label)
    shutil.rmtree(work)
    index = read_index(output)
    return Indexed(index, 0, [*unusable, *empty], list(_remarks(described, index)))


def _known(output: Path, labels: set[Any]) -> list[str]:
    """The classes of numbers and texts; their names as an index of before has them there."""
    names = classes_of(labels, None)
    try:
        before = read_index(output)
    except UserError:
        return names
    texts = any(isinstance(label, str) for label in labels)
    fits = before.given is not None and len(before.classes) >= len(names) and not texts
    return list(before.classes) if fits else names


def _taken(shards: Sequence[str], folder: Path, plan: _Plan) -> dict[int, Described]:
    """The shards that are not read, since others have counted their samples, by their number."""
    counts = known_counts(shards)
    return {
        number: Described(
            _relative(shard, folder), shard_size(shard) or None, None, counts[shard], [], {}, []
        )
        for number, shard in enumerate(shards)
        if shard in counts
    }


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".json":
        raise UserError(f"{output}: is no name of an index, allowed is such as {INDEX_NAME}")
    if output.is_dir():
        raise UserError(f"{output}: is a folder; name a file in it")
    if output.exists() and not overwrite and _is_current(output):
        raise UserError(f"{output}: exists already, --overwrite replaces it; or name another file")
    check_can_be_made(output.parent)


def _is_current(path: Path) -> bool:
    """Whether a file is anything else than an index of an earlier version."""
    try:
        return read_index(path).given is None
    except UserError:
        return True


def _begin(work: Path, shards: Sequence[str], label: str | None, part: Part | None) -> _Plan:
    """What was begun there, or a new plan, from the first shard."""
    places = [shard if is_remote(shard) else os.path.abspath(shard) for shard in shards]
    listed = hashlib.sha256(json.dumps([places, label]).encode())
    path = work / GATHERED
    try:
        digest, *values = json.loads(path.read_text("utf-8"))
        if digest == listed.hexdigest():
            return _Plan(values[0], tuple(values[1]))
        if part is not None:
            raise UserError(f"{work}: holds what was begun with other shards or labels; delete it")
        for entry in work.iterdir():
            entry.unlink()
    except UserError:
        raise
    except (OSError, ValueError):
        pass
    plan = _plan_of(shards, label)
    with atomic_write(path) as aside:
        aside.write_text(json.dumps([listed.hexdigest(), *plan]), "utf-8")
    return plan


def _plan_of(shards: Sequence[str], label: str | None) -> _Plan:
    """What most samples of the first shard that has any have, and their label."""
    for shard in shards:
        samples = _read(shard, _Plan(None, ()))[0].samples
        if samples:
            break
    else:
        raise UserError(f"{shown(shards[0])}: holds no samples, nor does any other shard")
    needs = needed_kinds(samples)
    if label == NO_LABEL:
        return _Plan(None, needs)
    for text in LABELS if label is None else (label,):
        if set(Field("label", text).extensions) & set(needs):
            labels = _read(shard, _Plan(text, needs))[1]
            if 2 * len(labels) > len(samples) or label is not None:
                return _Plan(text, needs)
    if label is None:
        return _Plan(None, needs)
    raise UserError(
        f"--label is {label}, but most samples of {shown(shard)} have only "
        f"{', '.join(f'.{kind}' for kind in needs)}"
    )


def _read(shard: str, plan: _Plan) -> tuple[Scanned, dict[str, Any]]:
    try:
        with open_shard(shard) as file:
            return usable(file, plan.needs, plan.label)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(shard)}: {one_line(error)}") from None


def _is_done(shard: str, note: Path) -> bool:
    """Whether a shard has been described as it is now."""
    known = read_note(note)
    if known is None:
        return False
    if is_remote(shard):
        return shard_size(shard) in (0, known.bytes)
    info = os.stat(shard)
    return known.bytes == info.st_size and info.st_mtime <= note.stat().st_mtime


def _describe_all(jobs: list[Any], workers: int | None, progress: bool) -> None:
    count = min(workers or os.cpu_count() or 1, len(jobs))
    bar = tqdm(total=len(jobs), unit="shard", disable=not progress or not jobs)
    with bar:
        if count <= 1:
            for job in jobs:
                _describe_one(job)
                bar.update()
            return
        # A process of its own: parsing headers holds the interpreter's lock.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(count, context) as pool:
            try:
                for _ in pool.map(_describe_one, jobs):
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _describe_one(job: tuple[str, str, Path, _Plan]) -> None:
    shard, name, note, plan = job
    describe(name, *_read(shard, plan), note)


def _tell_cost(shards: Sequence[str], workers: int | None) -> None:
    """Says how much is read, and how long that takes at the speed of a local disk."""
    with ThreadPoolExecutor(16) as pool:
        size = sum(pool.map(shard_size, shards))
    seconds = size / SPEED / (workers or os.cpu_count() or 1)
    if seconds > 2:
        took = time.strftime("%H:%M:%S", time.gmtime(seconds))
        say(f"{len(shards)} shard(s), {size / 2**30:.1f} GiB, are read once: {took} or more")


def _relative(shard: str, folder: Path) -> str:
    """As the index has it: relative where it lies beside or below it."""
    if is_remote(shard):
        return shard
    absolute = os.path.abspath(shard)
    inner = os.path.relpath(absolute, folder)
    return absolute if inner.startswith("..") else inner


def _remarks(described: Sequence[Described], index: Index) -> Iterator[str]:
    """What a training run must know."""
    kinds = [len(each.labels) for each in described if each.samples]
    classes = len(index.classes)
    if classes > 1 and kinds and sum(kinds) / len(kinds) < min(classes, 8) / 2:
        yield (
            f"sorted by class: {sum(kinds) / len(kinds):.1f} of {classes} classes in a shard, so "
            "a batch mixes as many as it has streams"
        )
    if index.label is None:
        yield "no labels; --label says where they are, if there are any"
    first = dict.fromkeys(tuple(each.extensions) for each in described)
    for fault in dict.fromkeys(text for one in first for text in Fields(USUAL).unclear(one)):
        yield f"a sample has {fault}"
    if not index.unique_keys:
        yield "keys are there in several shards: samples are called SHARD/KEY"
    counts = index.class_counts()
    if counts is not None and 0 in counts:
        empty = [name for name, count in zip(index.classes, counts, strict=True) if not count]
        yield f"classes without samples: {', '.join(empty[:8])} ({len(empty)})"
