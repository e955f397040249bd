"""The order of samples of versions before 0.3, for runs that were begun by them.

Samples are cut into streams, contiguous in the shards. In an epoch each stream is permuted by
itself and they are dealt round-robin; what is left of an epoch after its last whole global batch is
not used in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dr2dist.data.order import Item


@lru_cache(maxsize=2)
def epoch_order(num_samples: int, streams: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """All samples of an epoch in order: int64 [num_samples]."""
    parts = np.array_split(np.arange(num_samples), min(streams, num_samples))
    order = np.full((len(parts[0]), len(parts)), -1)
    for number, part in enumerate(parts):
        generator = np.random.default_rng((seed, epoch, number))
        order[: len(part), number] = generator.permutation(part)
    flat = order.reshape(-1)
    return flat[flat >= 0]


def dealt_batches(
    num_samples: int,
    streams: int,
    seed: int,
    *,
    micro_batch: int,
    accumulate: int,
    rank: int,
    ranks: int,
    start: int = 0,
) -> Iterator[list[Item]]:
    """One rank's micro-batches, without end, from optimiser step `start` on.

    A step takes the next global batch of micro_batch * accumulate * ranks samples. What is left
    of an epoch after its last whole one is not used in that epoch.
    """
    size = micro_batch * accumulate * ranks
    per_epoch = num_samples // size
    step = start
    while per_epoch:
        epoch, place = divmod(step, per_epoch)
        order = epoch_order(num_samples, streams, seed, epoch)
        batch = order[place * size : (place + 1) * size].reshape(accumulate, ranks, micro_batch)
        for part in batch[:, rank]:
            yield [(epoch, int(index)) for index in part]
        step += 1
