"""Stages x replicas: where every rank stands."""

from __future__ import annotations

from dataclasses import dataclass

from dr2dist.errors import UserError


@dataclass(frozen=True)
class Grid:
    """Ranks in order: all replicas of stage 0, then all of stage 1, and so on.

    The replicas of a stage exchange their gradients, more bytes than stages hand on, and launchers
    number the ranks of a node one after the other: so this traffic stays inside a node where it
    can.
    """

    stages: int
    replicas: int

    @classmethod
    def of(cls, ranks: int, stages: int) -> Grid:
        """The grid of a number of ranks. Raises UserError if stages do not divide them."""
        if ranks % stages:
            raise UserError(
                f"parallel.stages is {stages}, which does not divide the {ranks} rank(s)"
            )
        return cls(stages, ranks // stages)

    def rank(self, stage: int, replica: int) -> int:
        """The rank at a place."""
        return stage * self.replicas + replica

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, replica) of a rank."""
        return divmod(rank, self.replicas)

    def name(self, rank: int) -> str:
        """How messages call a rank."""
        if self.stages == 1:
            return f"rank {rank}"
        stage, replica = self.place(rank)
        return f"rank {rank} (stage {stage}, replica {replica})"

    def bubble(self, micro_batches: int) -> float:
        """The share of a step that a stage is idle, if all take equally long (1F1B)."""
        return (self.stages - 1) / (micro_batches + self.stages - 1)
