"""Shards as batches of tensors."""

from __future__ import annotations

import bisect
import io
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dr2dist.data.index import Sample, read_index
from dr2dist.data.order import Item
from dr2dist.data.randomness import seeded
from dr2dist.data.sources import IMAGE_TYPES, open_image
from dr2dist.data.transforms import Transform
from dr2dist.errors import UserError

log = logging.getLogger(__name__)


class Batch(TypedDict):
    """image: fp32 [B, 3, H, W]. label: int64 [B]. keys: B names.

    count: samples that count: all, or none of a batch that only fills in. skipped: images left
    out as unreadable.
    """

    image: Tensor
    label: Tensor
    keys: list[str]
    count: int
    skipped: int


class ShardDataset(Dataset[dict[str, Any]]):
    """Samples of a folder of shards by (epoch, index), read by seeking: nothing is unpickled.

    pattern: see read_index. transform: image to tensor. Randomness in it is keyed by
    (seed, epoch, sample), whatever rank or worker reads the sample. unreadable: what becomes of
    an image that cannot be read: "fail" raises UserError, "next" takes the next readable one,
    "blank" gives zeros that do not count.
    """

    def __init__(
        self,
        pattern: str | Path,
        transform: Transform,
        seed: int = 0,
        unreadable: Literal["fail", "next", "blank"] = "fail",
    ) -> None:
        self.folder, self.index = read_index(pattern)
        self.transform = transform
        self.seed = seed
        self.unreadable = unreadable
        self._ends = list(accumulate(len(shard.samples) for shard in self.index.shards))

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, item: Item) -> dict[str, Any]:
        """A sample; one of a negative epoch does not count.

        Raises UserError naming shard and sample if the image cannot be read and must be.
        """
        epoch, first = item
        for skipped in range(len(self)):
            index = (first + skipped) % len(self)
            path, sample = self._locate(index)
            try:
                image = _decode(path, sample)
            except UserError as error:
                if self.unreadable == "fail":
                    raise
                log.warning("left out: %s", error)
                if self.unreadable == "blank":
                    blank = self._transformed(Image.new("RGB", (8, 8)), epoch, index)
                    return _item(torch.zeros_like(blank), sample, count=False, skipped=1)
                continue
            tensor = self._transformed(image, epoch, index)
            return _item(tensor, sample, count=epoch >= 0, skipped=skipped)
        raise UserError(f"{self.folder}: no image can be read")

    def _transformed(self, image: Image.Image, epoch: int, index: int) -> Tensor:
        with seeded(self.seed, epoch, index):
            return self.transform(image)

    def _locate(self, index: int) -> tuple[Path, Sample]:
        number = bisect.bisect_right(self._ends, index)
        shard = self.index.shards[number]
        start = self._ends[number] - len(shard.samples)
        return self.folder / shard.name, shard.samples[index - start]


def _item(image: Tensor, sample: Sample, *, count: bool, skipped: int) -> dict[str, Any]:
    return {
        "image": image,
        "label": sample.label,
        "key": sample.key,
        "count": count,
        "skipped": skipped,
    }


def _decode(path: Path, sample: Sample) -> Image.Image:
    if sample.extension not in IMAGE_TYPES:
        allowed = ", ".join(IMAGE_TYPES)
        raise UserError(f"{path}: {sample.key}.{sample.extension}: allowed types are {allowed}")
    try:
        with path.open("rb") as file:
            file.seek(sample.offset)
            return open_image(io.BytesIO(file.read(sample.size)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: sample '{sample.key}' cannot be read: {error}") from None


def loader(
    dataset: ShardDataset, batches: Iterable[list[Item]], num_workers: int
) -> Iterable[Batch]:
    """The batches in order, as often as it is iterated. Workers stay alive in between.

    A batch of which nothing counts becomes one sample that does not. Torch's global random stream
    is left alone. Where there is a GPU, batches are in pinned memory.
    """
    gpu = torch.cuda.is_available()
    return DataLoader(
        dataset,
        batch_sampler=_Filled(batches),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_collate,
        generator=torch.Generator(),
        pin_memory=gpu,
        multiprocessing_context=_clean_server() if gpu and num_workers else None,
    )


def _clean_server() -> Any:
    """Starts workers from a process that has never touched a GPU.

    This one has by now: a fork of it holds copies of CUDA's and NCCL's locks, but none of the
    threads that would release them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class _Filled:
    """Marks the filler of an empty batch by a negative epoch."""

    def __init__(self, batches: Iterable[list[Item]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Item]]:
        return (batch or [(-1, 0)] for batch in self.batches)


def _collate(samples: list[dict[str, Any]]) -> Batch:
    counting = [sample for sample in samples if sample["count"]]
    kept = counting or samples[:1]
    return Batch(
        image=torch.stack([sample["image"] for sample in kept]),
        label=torch.tensor([sample["label"] for sample in kept]),
        keys=[sample["key"] for sample in kept],
        count=len(counting),
        skipped=sum(sample["skipped"] for sample in samples),
    )
