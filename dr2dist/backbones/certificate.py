"""What a converted network's last backward pass verified."""

from __future__ import annotations

from dataclasses import dataclass

from dr2dist.reversible import ChainCertificate
from dr2dist.reversible.certificate import worst_drift


@dataclass(frozen=True)
class Certificate:
    """What the last backward pass verified, over all chains.

    chains: one record for each chain that has been reversed.
    """

    chains: tuple[ChainCertificate, ...]

    @property
    def failures(self) -> int:
        """How many failures were found; 0 proves the reversal in exact arithmetic."""
        return sum(chain.failures for chain in self.chains)

    @property
    def messages(self) -> tuple[str, ...]:
        """One line for each failure, which names chain and function."""
        return tuple(line for chain in self.chains for line in chain.messages)

    @property
    def remainder_bytes(self) -> int:
        """Bytes of remainders that the pass held, all chains."""
        return sum(chain.remainder_bytes for chain in self.chains)

    @property
    def drift(self) -> float | None:
        """Largest relative error of a chain's reconstructed start, on a sample of it.

        None where nothing drifts: in exact arithmetic, and where no state is reconstructed.
        """
        return worst_drift(chain.drift for chain in self.chains)
