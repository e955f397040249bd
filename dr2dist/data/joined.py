"""Several sources' indexes as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from dr2dist.data.cache import Wanted
from dr2dist.data.index import Index, Shard
from dr2dist.data.members import ShardMembers
from dr2dist.errors import UserError


@dataclass(frozen=True)
class Joined(Index):
    """The shards of several indexes, in their order. Shards' numbers and samples count on from one
    to the next.

    parts: the indexes. passes: of each in an epoch.
    """

    parts: tuple[Index, ...] = field(default=(), repr=False)
    passes: tuple[float, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Index], passes: Sequence[float]) -> Joined:
        """Raises UserError for indexes of other classes than the first one's."""
        for part in parts[1:]:
            if part.classes != parts[0].classes:
                raise UserError(
                    f"data.train: the classes of {part.base} ({', '.join(part.classes[:5])}) are "
                    f"not those of {parts[0].base} ({', '.join(parts[0].classes[:5])})"
                )
        shards = [(part, shard) for part in parts for shard in part.shards]
        return cls(
            base=" and ".join(part.base for part in parts),
            stem="index",
            classes=parts[0].classes,
            shards=tuple(
                shard._replace(number=number, name=part.where(shard))
                for number, (part, shard) in enumerate(shards)
            ),
            unique_keys=False,
            parts=tuple(parts),
            passes=tuple(passes),
        )

    def _own(self, shard: Shard) -> tuple[Index, Shard]:
        """A shard's index, and what it is there."""
        number = shard.number
        for part in self.parts:
            if number < len(part.shards):
                return part, part.shards[number]
            number -= len(part.shards)
        raise IndexError(shard.number)

    @property
    def sources(self) -> tuple[Index, ...]:
        """See Index."""
        return self.parts

    def where(self, shard: Shard) -> str:
        """See Index."""
        part, own = self._own(shard)
        return part.where(own)

    def fields_of(self, shard: Shard) -> dict[str, str]:
        """See Index."""
        part, own = self._own(shard)
        return part.fields_of(own)

    def wanted(self, shard: Shard) -> Wanted:
        """See Index."""
        part, own = self._own(shard)
        return part.wanted(own)

    def members(self, shard: Shard) -> ShardMembers:
        """See Index."""
        part, own = self._own(shard)
        return part.members(own)

    def checked(self, shard: Shard, found: ShardMembers) -> ShardMembers:
        """See Index."""
        part, own = self._own(shard)
        return part.checked(own, found)

    def class_counts(self) -> list[int] | None:
        """See Index; samples of an epoch."""
        totals = [0.0] * len(self.classes)
        for part, passes in zip(self.parts, self.passes, strict=True):
            counts = part.class_counts()
            if counts is None:
                return None
            totals = [total + passes * n for total, n in zip(totals, counts, strict=True)]
        return [round(total) for total in totals]

    def digest(self) -> str:
        """See Index; of shares too."""
        said = [(part.digest(), count) for part, count in zip(self.parts, self.passes, strict=True)]
        return hashlib.sha256(repr(said).encode()).hexdigest()
