"""The order of samples: a pure function of index, seed and position, whatever the ranks.

Shards are permuted once and cut into streams; place p of an epoch is a sample of stream p mod V. In
an epoch each stream permutes its shards and moves each sample within a window, so that few shards
are open at a time. A position, counted from the start of the run, is all that a resume needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Item = tuple[int, int]
"""(epoch, index of the sample)."""
Numbers = NDArray[np.int64]

STREAMS = 64
WINDOW_SHARDS = 10
"""Mean shards of a stream's window, where none is said."""
LEAST = 16
"""Samples of a stream at least; there are fewer streams where there are fewer samples."""
KEPT = 3
"""Windows of a stream that are kept."""


class _Run(NamedTuple):
    """Samples of a stream that follow each other in a shard. shard: its
    number in the order's counts. start: the first one's index."""

    shard: int
    start: int
    length: int


class Use(NamedTuple):
    """first, last: positions between which a shard is read; shard: its number in the counts."""

    shard: int
    first: int
    last: int


class _Epoch(NamedTuple):
    """A stream's shards in an epoch's order, their first samples, and the place where each begins
    and the last one ends."""

    shards: Numbers
    starts: Numbers
    places: Numbers


class Order:
    """The order of all samples of an index, again and again.

    counts: samples of each shard, in the index's order. digest: of the index, in hexadecimal.
    streams: at most so many, and no stream of fewer than 16 samples. window: samples of a stream
    within which it is mixed; None: ten shards. seed: the run's. turned: streams follow each other
    over an epoch's end as they do within it, but for its last round; else each epoch begins with
    the first.
    """

    def __init__(
        self,
        counts: Sequence[int],
        digest: str,
        streams: int = STREAMS,
        window: int | None = None,
        seed: int = 0,
        turned: bool = False,
    ) -> None:
        self.counts, self.digest, self.turned = tuple(counts), digest, turned
        self.num_samples = sum(self.counts)
        self.lengths: tuple[int, ...] = (self.num_samples,)
        self.streams = _fitting(streams, self.num_samples)
        self.window, self.seed = window, seed & (2**64 - 1)
        self._epochs: OrderedDict[tuple[int, int], _Epoch] = OrderedDict()
        self._buckets: OrderedDict[tuple[int, int, int], tuple[int, Numbers]] = OrderedDict()

    @cached_property
    def parts(self) -> list[list[_Run]]:
        """Each stream's shards, of which the first and the last may be cut."""
        firsts = np.concatenate([[0], np.cumsum(self.counts)])
        shards = np.random.default_rng(int(self.digest, 16)).permutation(len(self.counts))
        base, more = divmod(self.num_samples, self.streams)
        parts: list[list[_Run]] = []
        place, used = 0, 0
        for stream in range(self.streams):
            wanted, runs = base + (stream < more), []
            while wanted:
                shard = int(shards[place])
                count = min(wanted, self.counts[shard] - used)
                if count:
                    runs.append(_Run(shard, int(firsts[shard]) + used, count))
                wanted, used = wanted - count, used + count
                if used == self.counts[shard]:
                    place, used = place + 1, 0
            parts.append(runs)
        return parts

    def window_of(self, stream: int) -> int:
        """Samples within which a stream is mixed: all that it has where it is small."""
        runs = self.parts[stream]
        length = sum(run.length for run in runs)
        if self.window is not None:
            return min(self.window, length)
        return length if len(runs) <= WINDOW_SHARDS else -(-length * WINDOW_SHARDS // len(runs))

    def window_most(self) -> int:
        """Samples within which the stream of the largest window is mixed."""
        return max(map(self.window_of, range(self.streams)))

    def span(self) -> int:
        """Positions that a window of each stream takes."""
        return self.window_most() * self.streams

    def within(self, window: int) -> Order:
        """The same with another window."""
        return Order(self.counts, self.digest, self.streams, window, self.seed, self.turned)

    def describe(self) -> str:
        """In a few words."""
        return (
            f"{self.streams} stream(s) of {len(self.counts)} shard(s), each mixed within "
            f"{self.window_most()} samples"
        )

    def items(self, positions: Numbers) -> list[Item]:
        """The samples of positions, counted from the start of the run: int64 [P], any order."""
        epochs, places = np.divmod(positions, self.num_samples)
        steps, streams = places // self.streams, self._turned(positions) % self.streams
        samples = np.empty(len(positions), np.int64)
        keys = epochs * self.streams + streams
        for key in np.unique(keys):
            own = keys == key
            epoch, stream = divmod(int(key), self.streams)
            samples[own] = self._of_stream(epoch, stream, steps[own])
        return list(zip(epochs.tolist(), samples.tolist(), strict=True))

    def owners(self, positions: Numbers, nodes: int) -> Numbers:
        """Which node reads the stream of each position: int64 [P]."""
        return self._turned(positions) % nodes

    def _turned(self, positions: Numbers) -> Numbers:
        """Numbers that name streams by their remainders."""
        places = positions % self.num_samples
        last_round = places >= self.num_samples - self.num_samples % self.streams
        return np.where(last_round, places, positions) if self.turned else places

    def uses(self, epoch: int, node: int = 0, nodes: int = 1) -> list[Use]:
        """When a node reads its shards in an epoch, and a little more."""
        found: list[Use] = []
        for stream in self._streams_of(node, nodes):
            shards, _, places = self._epoch(epoch, stream)
            length, window = int(places[-1]), self.window_of(stream)
            # Ranks differ from places by chance: a few times the root of how many change places.
            reach = length if window >= length else window // 2 + 4 * math.isqrt(window) + 1
            first = np.maximum(0, places[:-1] - reach)
            last = np.minimum(length - 1, places[1:] + reach)
            begin = epoch * self.num_samples
            found += map(
                Use,
                shards.tolist(),
                (begin + first * self.streams).tolist(),
                (begin + (last + 1) * self.streams - 1).tolist(),
            )
        return found

    def _streams_of(self, node: int, nodes: int) -> range:
        """What a node reads: all, where neither number divides the other."""
        if nodes % self.streams == 0:
            return range(node % self.streams, node % self.streams + 1)
        return (
            range(node, self.streams, nodes) if self.streams % nodes == 0 else range(self.streams)
        )

    def _of_stream(self, epoch: int, stream: int, steps: Numbers) -> Numbers:
        """The samples of a stream's steps."""
        by_step, found = np.argsort(steps, kind="stable"), np.empty(len(steps), np.int64)
        window, done, number = self.window_of(stream), 0, 0
        while done < len(steps):
            # Samples move by half a window, so a step lies in its own window or one beside it.
            number = max(number, int(steps[by_step[done]]) // window - 1)
            before, samples = self._bucket(epoch, stream, number)
            stop = int(np.searchsorted(steps[by_step], before + len(samples)))
            found[by_step[done:stop]] = samples[steps[by_step[done:stop]] - before]
            done, number = max(done, stop), number + 1
        return found

    def _bucket(self, epoch: int, stream: int, number: int) -> tuple[int, Numbers]:
        """(how many come before, samples) of the number-th window of a stream's epoch, kept."""
        key = (epoch, stream, number)
        if key not in self._buckets:
            self._buckets[key] = self._sorted(epoch, stream, number)
            if len(self._buckets) > KEPT * self.streams:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(key)
        return self._buckets[key]

    def _sorted(self, epoch: int, stream: int, number: int) -> tuple[int, Numbers]:
        """Samples that have moved to places of a window, in order.

        A sample moves from place u to u + w (r - 1/2), r in [0, 1) by sample and epoch, and as far
        inside where that is beyond the stream's ends. So the ends are mixed as the middle is, and
        only samples of two windows can come into one.
        """
        _, starts, places = self._epoch(epoch, stream)
        length, window = int(places[-1]), self.window_of(stream)
        low, high = number * window, (number + 1) * window
        first = max(0, low - window // 2 - 1)
        near = np.arange(first, min(length, high + window // 2 + 1))
        shards = np.searchsorted(places, near, "right") - 1
        samples = starts[shards] + near - places[shards]
        noise = self._noise(epoch, samples)
        if window >= length:
            moved = noise * length
        else:
            moved = np.abs(near + window * (noise - 0.5))
            moved = np.where(moved > length, 2 * length - moved, moved)
        before = first + int((moved < low).sum())
        own = (moved >= low) & (moved < high)
        return before, samples[own][np.argsort(moved[own], kind="stable")]

    def _epoch(self, epoch: int, stream: int) -> _Epoch:
        key = (epoch, stream)
        if key not in self._epochs:
            runs = self.parts[stream]
            generator = np.random.default_rng((self.seed, epoch, stream))
            shuffled = [runs[number] for number in generator.permutation(len(runs))]
            self._epochs[key] = _Epoch(
                np.array([run.shard for run in shuffled], np.int64),
                np.array([run.start for run in shuffled], np.int64),
                np.cumsum([0, *(run.length for run in shuffled)], dtype=np.int64),
            )
            if len(self._epochs) > 2 * self.streams:
                self._epochs.popitem(last=False)
        return self._epochs[key]

    def _noise(self, epoch: int, samples: Numbers) -> NDArray[np.float64]:
        """In [0, 1), by seed, epoch and sample."""
        word = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        mixed = _mixed(samples.astype(np.uint64) + word)
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stand_in(seed: int, item: Item, attempt: int, samples: int) -> int:
    """The index of what is read instead of a sample that cannot be: one of all, by the sample."""
    key = (seed & (2**64 - 1), item[0] & (2**64 - 1), item[1], attempt)
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] % samples)


def _fitting(streams: int, samples: int) -> int:
    """The most streams that divide those wanted and have LEAST samples each, or one."""
    fitting = (streams // k for k in range(1, streams + 1) if streams % k == 0)
    return next((each for each in fitting if samples >= LEAST * each), 1)


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
