"""Shards as batches of tensors."""

from __future__ import annotations

import bisect
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from dr2dist.data.batch import Batch
from dr2dist.data.broken import BrokenError
from dr2dist.data.cache import Cache
from dr2dist.data.compared import check_clear
from dr2dist.data.fields import Fields
from dr2dist.data.index import Index, Shard, read_index
from dr2dist.data.opened import LostShardError, OpenShards
from dr2dist.data.order import Item, stand_in
from dr2dist.data.randomness import seeded
from dr2dist.errors import PlaceError, UserError
from dr2dist.status import STOP_SIGNALS

log = logging.getLogger(__name__)

Values = dict[str, Any]
"""A sample's fields by name."""
Unreadable = Literal["fail", "other", "drop"]
LOST_AT_ONCE = 8
"""Shards that cannot be opened, one after the other, before that is an error however samples are
to be skipped: their server is gone, not they."""
IMPORTED_ONCE = [__name__, "timm.data", "torchvision.transforms.v2"]
"""What prepares samples and takes seconds to import, and memory: workers that start from a clean
process share it."""
Transform = Callable[[Values], Values]
Collate = Callable[[Sequence[Values]], tuple[dict[str, torch.Tensor], Any]]
"""Samples to inputs of the network, by name, and targets."""


class PreparationError(UserError):
    """A sample that was read, of which a transform says that it is none of the task's."""


@dataclass(frozen=True)
class Read:
    """A sample that was read. values: after its transform. count: whether it counts. skipped:
    1 where it stands for one that was left out as unreadable."""

    key: str
    values: Values
    count: bool
    skipped: int


class ShardDataset(Dataset[Read]):
    """Samples of shards by (epoch, index), read by seeking: nothing is unpickled.

    pattern: see read_index, or an index. fields: what is decoded. transform: of a sample's fields.
    Randomness in it is keyed by (seed, epoch, sample), whatever rank or worker reads the sample.
    unreadable: what becomes of a sample that cannot be read: "fail" raises UserError, "other" takes
    one from anywhere, "drop" the one before, which does not count. cache, most: see OpenShards.
    """

    def __init__(
        self,
        pattern: str | Path | Index,
        fields: Fields,
        transform: Transform,
        seed: int = 0,
        unreadable: Unreadable = "fail",
        cache: Cache | None = None,
        most: int | None = None,
    ) -> None:
        self.index = pattern if isinstance(pattern, Index) else read_index(pattern)
        check_clear(self.index, fields, self.index.base if pattern is self.index else str(pattern))
        self.fields, self.transform = fields, transform
        self._told_fields: dict[tuple[tuple[str, str], ...], Fields] = {}
        self.seed = seed
        self.unreadable = unreadable
        self._stand_in: Read | None = None
        self._ends = list(accumulate(shard.samples for shard in self.index.shards))
        self._open = OpenShards(self.index, cache, most)
        self._told: set[str] = set()
        stems = [Path(shard.name).stem for shard in self.index.shards]
        self._by_stem = len(set(stems)) == len(stems)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, item: Item) -> Read:
        """A sample; one of a negative epoch does not count.

        Raises UserError naming shard and sample if it cannot be read and must be.
        """
        epoch, index = item
        lost, fault = set[str](), "there is none"
        for attempt in range(len(self)):
            try:
                found = self._transformed(*self._read(index), epoch, index)
            except (PlaceError, PreparationError):
                raise
            except UserError as error:
                if isinstance(error, LostShardError):
                    lost.add(str(error))
                if self.unreadable == "fail" or len(lost) > LOST_AT_ONCE:
                    raise
                fault = str(error)
                self._tell(error)
                if self._stand_in is not None:
                    return replace(self._stand_in, skipped=int(epoch >= 0))
                index = self._another(item, attempt, index, isinstance(error, LostShardError))
                continue
            skipped = int(attempt > 0 and epoch >= 0)
            if self.unreadable == "drop":
                self._stand_in = replace(found, count=False)
                return replace(self._stand_in, skipped=skipped) if attempt else found
            return replace(found, skipped=skipped)
        raise UserError(f"{self.index.base}: no sample can be read: {fault}")

    def _another(self, item: Item, attempt: int, index: int, lost: bool) -> int:
        """What is read instead of a sample that cannot be."""
        if self.unreadable == "drop":  # any readable one does: the next, or of the next shard
            end = self._ends[bisect.bisect_right(self._ends, index)] if lost else index + 1
            return end % len(self)
        return stand_in(self.seed, item, attempt, len(self))

    def _tell(self, error: UserError) -> None:
        """Once of each: a shard that is lost is met at all of its samples."""
        if str(error) not in self._told:
            self._told.add(str(error))
            log.warning("left out: %s", error)

    def _transformed(self, key: str, values: Values, epoch: int, index: int) -> Read:
        try:
            with seeded(self.seed, epoch, index):
                return Read(key, self.transform(values), count=epoch >= 0, skipped=0)
        except ValueError as error:
            path = self.index.where(self._locate(index)[0])
            if isinstance(error, BrokenError):  # films are decoded here
                raise UserError(f"{path}: sample '{key}' cannot be read: {error}") from None
            raise PreparationError(f"{path}: sample '{key}': {error}") from None

    def _locate(self, index: int) -> tuple[Shard, int]:
        """A sample's shard, and its number there."""
        number = bisect.bisect_right(self._ends, index)
        shard = self.index.shards[number]
        return shard, index - (self._ends[number] - shard.samples)

    def _read(self, index: int) -> tuple[str, Values]:
        shard, number = self._locate(index)
        fields = self._fields_of(shard)
        opened = self._open[shard]
        sample = opened.members[number]
        try:
            members = {}
            for extension in fields.wanted(sample.extensions):
                if extension in sample.members:
                    members[extension] = opened.read(*sample.members[extension])
                else:  # what the index alone says
                    members[extension] = str(sample.label).encode()
            values = fields.decode(members or dict.fromkeys(sample.members, b""))
        except (OSError, ValueError) as error:
            path = self.index.where(shard)
            raise UserError(f"{path}: sample '{sample.key}' cannot be read: {error}") from None
        return self._key(shard, sample.key), values

    def _fields_of(self, shard: Shard) -> Fields:
        """Where a shard's index says that they are, unless the run says otherwise."""
        told = self.index.fields_of(shard)
        key = tuple(told.items())
        if key not in self._told_fields:
            self._told_fields[key] = self.fields.as_told(told)
        return self._told_fields[key]

    def _key(self, shard: Shard, key: str) -> str:
        """A sample's, with its shard's name where several shards have it."""
        if self.index.unique_keys:
            return key
        name = Path(shard.name).stem if self._by_stem else os.path.splitext(shard.name)[0]
        return f"{name}/{key}"


def loader(
    dataset: ShardDataset, batches: Iterable[list[Item]], num_workers: int, collate: Collate
) -> Iterable[Batch]:
    """The batches in order, as often as it is iterated. Workers stay alive in between.

    A batch of which nothing counts becomes one sample that does not. Torch's global random stream
    is left alone. Where there is a GPU, batches are in pinned memory.
    """
    gpu = torch.cuda.is_available()
    index = dataset.index
    threads = gpu or any(map(index.is_remote, index.shards))
    found: Iterable[Batch] = DataLoader(
        dataset,
        batch_sampler=_Filled(batches),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=partial(_collated, collate),
        generator=torch.Generator(),
        pin_memory=gpu,
        multiprocessing_context=_clean_server() if threads and num_workers else None,
        worker_init_fn=_outlive_signals,
    )
    return _InOneLine(found)


class _InOneLine:
    """Batches, with a worker's UserError as it was raised there: torch adds the traceback."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self.batches
        except UserError as error:
            last = str(error).strip().splitlines()[-1]
            raise UserError(last.removeprefix(f"{UserError.__module__}.UserError: ")) from None


def _outlive_signals(worker: int) -> None:
    """A signal to stop that reaches all processes is the rank's to answer: it ends its workers.

    SIGTERM is also how a rank ends a worker that does not end by itself, so a second one does.
    """
    signal.set_wakeup_fd(-1)  # a fork has its rank's
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)


def _end_next_time(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _clean_server() -> Any:
    """Starts workers from a process that has touched no GPU and fetched nothing.

    This one has by now: a fork of it holds copies of CUDA's and NCCL's locks, or of those of a
    thread that fetches shards, but none of the threads that would release them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


class _Filled:
    """Marks the filler of an empty batch by a negative epoch."""

    def __init__(self, batches: Iterable[list[Item]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Item]]:
        return (batch or [(-1, 0)] for batch in self.batches)


def _collated(collate: Collate, samples: Sequence[Read]) -> Batch:
    counting = [sample for sample in samples if sample.count]
    kept = counting or samples[:1]
    inputs, targets = collate([sample.values for sample in kept])
    return Batch(
        inputs,
        targets,
        keys=[sample.key for sample in kept],
        count=len(counting),
        skipped=sum(sample.skipped for sample in samples),
    )
