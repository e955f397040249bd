"""Several sources in one order: at every position as many samples of each as its share says."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from dr2dist.data.order import Item, Numbers, Order, Use

CHUNK = 4096
"""Places that are dealt at a time."""
KEPT = 64
"""Chunks that are kept."""


class Deal:
    """Which source each place of an epoch is of.

    lengths: samples of each source in an epoch, M together. Among the first p places source s has
    more than p lengths[s] / M - 1 and fewer than p lengths[s] / M + 1: each place goes to the
    source with the earliest deadline among those that may have one (Tijdeman, The chairman
    assignment problem, 1980).
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.total = tuple(lengths), sum(lengths)
        self._dealt: list[tuple[int, ...]] = [(0,) * len(self.lengths)]
        self._chunks: OrderedDict[int, tuple[Numbers, Numbers]] = OrderedDict()

    def at(self, places: Numbers) -> tuple[Numbers, Numbers]:
        """(sources, how many of the same source come before) of places: int64 [P], any order."""
        sources, numbers = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        chunks, offsets = np.divmod(places, CHUNK)
        for chunk in np.unique(chunks):
            own = chunks == chunk
            dealt, counted = self._chunk(int(chunk))
            sources[own], numbers[own] = dealt[offsets[own]], counted[offsets[own]]
        return sources, numbers

    def first(self, source: int, number: int) -> int:
        """A place before which the number-th sample of a source, from 0 on, cannot be."""
        return number * self.total // self.lengths[source]

    def last(self, source: int, number: int) -> int:
        """A place after which it cannot be."""
        return -(-(number + 1) * self.total // self.lengths[source]) - 1

    def _chunk(self, chunk: int) -> tuple[Numbers, Numbers]:
        while len(self._dealt) <= chunk:  # each chunk begins where the one before has ended
            self._deal(len(self._dealt) - 1)
        if chunk not in self._chunks:
            self._deal(chunk)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    def _deal(self, chunk: int) -> None:
        total, lengths, counts = self.total, self.lengths, list(self._dealt[chunk])
        every = range(len(lengths))
        deadlines = [self.last(source, counts[source]) for source in every]
        stop = min((chunk + 1) * CHUNK, total)
        sources, numbers = [], []
        for place in range(chunk * CHUNK, stop):
            allowed = [s for s in every if counts[s] * total < (place + 1) * lengths[s]]
            source = min(allowed, key=deadlines.__getitem__)
            sources.append(source)
            numbers.append(counts[source])
            counts[source] += 1
            deadlines[source] = self.last(source, counts[source])
        if len(self._dealt) == chunk + 1:
            self._dealt.append(tuple(counts))
        self._chunks[chunk] = np.array(sources, np.int64), np.array(numbers, np.int64)
        if len(self._chunks) > KEPT:
            self._chunks.popitem(last=False)


class MixedOrder:
    """The order of several sources' samples, again and again: an Order of all of them.

    Each source goes on in its own order from epoch to epoch, so that a part of a pass is the
    beginning of it and the next epoch has what follows. A sample's epoch is its source's.

    parts: each source's. passes: of each in an epoch, to the nearest sample and at least one.
    """

    def __init__(self, parts: Sequence[Order], passes: Sequence[float]) -> None:
        self.parts, self.passes = tuple(parts), tuple(passes)
        each = zip(self.parts, self.passes, strict=True)
        self.deal = Deal([max(1, round(part.num_samples * count)) for part, count in each])
        self.lengths, self.num_samples = self.deal.lengths, self.deal.total
        self.streams = max(part.streams for part in self.parts)
        self.counts = tuple(count for part in self.parts for count in part.counts)
        self._samples = (0, *accumulate(part.num_samples for part in self.parts))
        self._shards = (0, *accumulate(len(part.counts) for part in self.parts))

    def items(self, positions: Numbers) -> list[Item]:
        """See Order; a sample's index counts those of the sources before."""
        sources, numbers = self._dealt(positions)
        found: list[Item] = [(0, 0)] * len(positions)
        for source, part in enumerate(self.parts):
            own = np.flatnonzero(sources == source)
            items = part.items(numbers[own])
            for place, (epoch, index) in zip(own.tolist(), items, strict=True):
                found[place] = epoch, index + self._samples[source]
        return found

    def owners(self, positions: Numbers, nodes: int) -> Numbers:
        """See Order. Of two sources one is dealt to the nodes forth and one back, so that where one
        of them ends the other begins, and each node has as many; of more sources, nearly."""
        sources, numbers = self._dealt(positions)
        owners = np.empty(len(positions), np.int64)
        for source, part in enumerate(self.parts):
            own = sources == source
            each = part.owners(numbers[own], nodes)
            owners[own] = nodes - 1 - each if source % 2 else each
        return owners

    def _dealt(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """(sources, positions in their orders)."""
        epochs, places = np.divmod(positions, self.num_samples)
        sources, numbers = self.deal.at(places)
        return sources, numbers + epochs * np.array(self.lengths)[sources]

    def uses(self, epoch: int, node: int = 0, nodes: int = 1) -> list[Use]:
        """See Order."""
        return [
            Use(
                use.shard + self._shards[source],
                self._position(self.deal.first, source, use.first),
                self._position(self.deal.last, source, use.last),
            )
            for source, part in enumerate(self.parts)
            for own in self._epochs(epoch, source)
            for use in part.uses(own, nodes - 1 - node if source % 2 else node, nodes)
        ]

    def _epochs(self, epoch: int, source: int) -> range:
        """A source's epochs that this one has something of."""
        length, samples = self.lengths[source], self.parts[source].num_samples
        return range(epoch * length // samples, -(-(epoch + 1) * length // samples))

    def _position(self, place_of: Callable[[int, int], int], source: int, number: int) -> int:
        epoch, own = divmod(number, self.lengths[source])
        return epoch * self.num_samples + place_of(source, own)

    def span(self) -> int:
        """See Order."""
        return max(
            -(-part.span() * self.num_samples // length)
            for part, length in zip(self.parts, self.lengths, strict=True)
        )

    def window_most(self) -> int:
        """See Order."""
        return max(part.window_most() for part in self.parts)

    def within(self, window: int) -> MixedOrder:
        """See Order."""
        return MixedOrder([part.within(window) for part in self.parts], self.passes)

    def describe(self) -> str:
        """In a few words."""
        return (
            f"{len(self.parts)} sources of {len(self.counts)} shard(s), each in up to "
            f"{self.streams} streams mixed within {self.window_most()} samples"
        )
