"""What a rank reads of a run's data sets."""

from __future__ import annotations

from typing import Any

from dr2dist.config import Config
from dr2dist.data.order import train_batches, validation_batches
from dr2dist.data.stream import loader
from dr2dist.parallel.engine import ReversibleEngine
from dr2dist.tasks.task import Task
from dr2dist.training.datasets import datasets


def streams(config: Config, task: Task, engine: ReversibleEngine, passed: int) -> Any:
    """(training, validation): endless micro-batches of this replica, and its share of the held-out
    samples, None without any. passed: steps' batches that were skipped."""
    data, train = config.data, config.train
    dataset, held_out = datasets(config, task)
    batches = train_batches(
        len(dataset),
        dataset.index.streams,
        train.seed,
        micro_batch=train.micro_batch,
        accumulate=train.accumulate,
        rank=engine.replica,
        ranks=engine.replicas,
        start=engine.applied + passed,
    )
    needed = engine.first or engine.last
    collate = task.collate
    stream = iter(loader(dataset, batches, data.num_workers, collate) if needed else ())
    if held_out is None:
        return stream, None
    own = validation_batches(
        len(held_out), batch=train.micro_batch, rank=engine.replica, ranks=engine.replicas
    )
    items = [[(0, index) for index in batch] for batch in own]
    return stream, loader(held_out, items, data.num_workers, collate) if needed else items
