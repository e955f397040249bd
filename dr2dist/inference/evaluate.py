"""An exported model on shards that say what is right: numbers as JSON, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from dr2dist.config.task import DEFAULT_TASK
from dr2dist.data.cache import Cache
from dr2dist.data.compared import compare_with_index
from dr2dist.data.fields import Fields
from dr2dist.data.positions import validation_batches
from dr2dist.data.stream import ShardDataset, loader
from dr2dist.errors import UserError
from dr2dist.files import as_json, atomic_write
from dr2dist.inference.exported import ready
from dr2dist.inference.ranks import gathered, own_part, together
from dr2dist.pictures import save_picture
from dr2dist.tasks.metrics import MeanLoss
from dr2dist.tasks.registry import task_of
from dr2dist.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CACHE_LIMIT = 100 * 10**9
"""Bytes of a folder for shards that are elsewhere."""


def evaluate(
    path: str | Path,
    shards: str | Path,
    *,
    batch: int = 32,
    workers: int = 0,
    skip_unreadable: bool = False,
    fields: dict[str, str] | None = None,
    cache: str | Path | None = None,
    cache_limit: int = CACHE_LIMIT,
    progress: bool = True,
) -> dict[str, Any]:
    """The report of an exported file on all samples of the shards, each counted once; in a process
    group every rank must call it, measures a part, and returns the whole.

    path: a file of `export` or `save`; it runs in fp32, on a GPU if there is one. shards: a folder,
    a brace pattern, an index, or a URL of one. batch: samples at a time. workers: loader processes.
    skip_unreadable: leave out samples that cannot be read, instead of an error. fields: members of
    samples instead of the task's, as `data.fields` says them; by default those that the run had.
    cache: a folder for shards that are elsewhere, of at most cache_limit bytes. progress: a bar on
    stderr.

    Returns the task's name, samples and skipped (numbers of them), loss (their mean), and what the
    task reports, all values of JSON; the loss is NaN if an output is not finite. Raises UserError
    if the shards are not what the task learns or what their index says, or a sample cannot be read.
    """
    unreadable: Literal["fail", "drop"] = "drop" if skip_unreadable else "fail"
    with together():
        (net, task, facts), device = ready(path)
        wanted = Fields(task.fields, facts.fields if fields is None else fields)
        kept = None if cache is None else Cache(Path(cache), cache_limit)
        dataset = ShardDataset(shards, wanted, task.transform(), unreadable=unreadable, cache=kept)
        task.check_index(dataset.index, str(shards))
        for source in dataset.index.sources:
            compare_with_index(source, skip_unreadable)
    return {"task": task.name, **_measure(net, task, dataset, device, batch, workers, progress)}


def _measure(
    net: nn.Module,
    task: Task,
    dataset: ShardDataset,
    device: torch.device,
    batch: int,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    metrics, loss = task.report(device), MeanLoss(device)
    samples = skipped = 0
    rank, ranks = own_part()
    batches = validation_batches(len(dataset), batch=batch, rank=rank, ranks=ranks)
    items = [[(0, index) for index in part] for part in batches]
    stream = loader(dataset, items, workers, task.collate)
    with torch.inference_mode(), together():
        for found in tqdm(stream, total=len(items), disable=not progress or rank > 0):
            samples += found.count
            skipped += found.skipped
            if not found.count:
                continue
            here = found.to(device)
            output = net(here.inputs)
            metrics.update(task.predictions(output, here), here)
            loss.update(task, output, here)
    samples, skipped = map(sum, zip(*gathered((samples, skipped)), strict=True))
    with together():
        if not samples:
            raise UserError(f"{dataset.index.base}: no sample can be read")
    mean = float(loss.compute())
    return {"samples": samples, "skipped": skipped, "loss": mean, **metrics.compute()}


def write_report(report: dict[str, Any], path: Path) -> None:
    """Writes a report as JSON, which has no numbers that are not finite: null instead."""
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(as_json(report), indent=1) + "\n", "utf-8")


def draw(report: dict[str, Any], path: str | Path) -> bool:
    """Writes the report as a picture, of the type that the path ends with; False if its task draws
    none, and nothing is written."""
    figure: Figure | None = task_of(report.get("task", DEFAULT_TASK)).picture(report)
    if figure is not None:
        save_picture(figure, path)
    return figure is not None
