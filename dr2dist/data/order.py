"""The order of samples: a pure function of (seed, epoch), the same for every number of ranks.

Samples are cut into virtual streams, contiguous in the shards, that the index fixes. In an
epoch each stream is permuted by itself and they are dealt round-robin, so the k-th global batch
is the same set of samples however many ranks share it, and a position is all that a resume needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Item = tuple[int, int]
"""(epoch, index of the sample)."""


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


def train_batches(
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


def validation_batches(num_samples: int, *, batch: int, rank: int, ranks: int) -> list[list[int]]:
    """One rank's share of all samples: each is in exactly one batch of one rank.

    Every rank has the same number of batches, so that collectives meet; some may be empty.
    """
    own = list(range(rank, num_samples, ranks))
    rounds = -(-num_samples // (batch * ranks))
    return [own[k * batch : (k + 1) * batch] for k in range(rounds)]
