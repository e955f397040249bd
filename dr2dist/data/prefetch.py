"""Fetches a node's shards before they are read, and says which are not needed soon."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

from dr2dist.data.cache import Cache, room_for
from dr2dist.data.index import Index
from dr2dist.data.order import Item, Use
from dr2dist.data.positions import AnyOrder, open_at_most
from dr2dist.errors import UserError

log = logging.getLogger(__name__)

STRIDES = 100
"""Looks ahead for each window that a stream is read on."""
EPOCHS = 2
"""Epochs whose uses are known ahead."""
RATE = 1.25
"""Of the mean rate at which shards are fetched, where that is in time."""


class _Due(NamedTuple):
    """A use of a shard, and the position from which on it is fetched."""

    use: Use
    since: float


class Prefetcher:
    """A thread that goes ahead of a node's position in the order.

    It fetches shards in the order of their first use, half a window ahead of it, as long as those
    that are used sooner leave room; sooner where many are used first at once, as at an epoch's
    beginning. What it cannot fetch is left to those who read it, who then say why.
    """

    def __init__(self, cache: Cache, index: Index, order: AnyOrder, node: int, nodes: int) -> None:
        self.cache, self.index, self.order = cache, index, order
        self.node, self.nodes, self.ahead = node, nodes, order.span()
        self._wanted = [index.wanted(shard) for shard in index.shards]
        self._names = [wanted.name for wanted in self._wanted]
        self._dues: dict[int, list[_Due]] = {}
        self._position = 0
        self._moved, self._ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="prefetcher", daemon=True)

    def follow(self, batches: Iterator[list[Item]], start: int, each: int) -> Iterator[list[Item]]:
        """The same batches, each of which moves the position on by `each`."""
        self._position = start
        self._thread.start()
        try:
            for batch in batches:
                yield batch
                with self._moved:
                    self._position += each
                    self._moved.notify()
        finally:
            with self._moved:
                self._ended = True
                self._moved.notify()

    def _work(self) -> None:
        done, stride = -self.ahead, max(1, self.ahead // STRIDES)
        while not self._ended:
            if self._position < done + stride:
                with self._moved:
                    self._moved.wait(5)
                continue
            done = self._position
            try:
                self.look(done)
            except UserError as error:
                log.info("not fetched ahead: %s", error)
            except Exception:
                log.exception("the prefetcher has ended; shards are fetched when they are read")
                return

    def look(self, position: int) -> None:
        """Says what is used when, and fetches what is used soon."""
        dues = self._next_dues(position)
        first_uses = {shard: max(0, due.use.first - position) for shard, due in dues.items()}
        # A file may be a shard of several sources.
        soon = {self._names[shard]: first_uses[shard] for shard in reversed(first_uses)}
        self.cache.plan(soon, self.ahead)
        room = self.cache.limit
        for shard, samples in first_uses.items():
            room -= room_for(self._wanted[shard].bytes or 0)
            if self._ended or dues[shard].since > position or room < 0:
                return
            self.cache.fetch(self._wanted[shard], samples)

    def _next_dues(self, position: int) -> dict[int, _Due]:
        """Each shard's present or next use; the first first."""
        epoch = position // self.order.num_samples
        if epoch not in self._dues:
            self._dues = {epoch: self._schedule(epoch)}
        found: dict[int, _Due] = {}
        for due in self._dues[epoch]:
            if due.use.last >= position:
                found.setdefault(due.use.shard, due)
        return found

    def _schedule(self, epoch: int) -> list[_Due]:
        """As late as it is in time at a bounded rate: from the last use on back."""
        epochs = [self.order.uses(epoch + k, self.node, self.nodes) for k in range(EPOCHS)]
        uses = sorted((use for each in epochs for use in each), key=_first)
        sizes = [self._wanted[use.shard].bytes or 1 for use in uses]
        rate = RATE * sum(sizes) / (EPOCHS * self.order.num_samples)
        margin = max(self.ahead // 2, self.order.num_samples // len(self._wanted))
        found, since = [], math.inf
        for use, size in zip(reversed(uses), reversed(sizes), strict=True):
            since = min(use.first - margin, since - size / rate)
            found.append(_Due(use, since))
        return found[::-1]


def _first(use: Use) -> int:
    return use.first


def check_limit(cache: Cache, index: Index, order: AnyOrder, nodes: int) -> None:
    """Raises UserError for a cache that cannot hold what a node has open at a time and the shard
    that is fetched meanwhile."""
    least = least_cache(index, order, nodes)
    if cache.limit >= least:
        return
    window = order.window_most()
    while window > 1 and least_cache(index, order.within(window), nodes) > cache.limit:
        window //= 2
    fits = least_cache(index, order.within(window), nodes) <= cache.limit
    more = f", or a data.shuffle_window of {window} samples" if fits else ""
    raise UserError(
        f"data.cache.limit is {cache.limit} bytes, and a node has shards of up to {least} open at "
        f"a time: allowed are so many{more}"
    )


def least_cache(index: Index, order: AnyOrder, nodes: int = 1) -> int:
    """Bytes that any node's cache needs."""
    sizes = [room_for(shard.bytes or 0) for shard in index.shards]
    several = range(min(nodes, order.streams))
    most = max(open_at_most(order, sizes, node, nodes) for node in several)
    return min(sum(sizes), most + max(sizes, default=0))
