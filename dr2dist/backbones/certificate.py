"""What a converted network's last backward pass verified."""

from __future__ import annotations

from dataclasses import dataclass

from dr2dist.reversible import ChainCertificate
from dr2dist.reversible.certificate import worst_drift


@dataclass(frozen=True)
class Certificate:
    """What the last backward pass verified, over all chains.

    chains: one record each. failures: their sum, 0 proves the reversal in exact arithmetic.
    remainder_bytes: held for the pass, all chains. drift: the worst, float arithmetic only.
    """

    chains: tuple[ChainCertificate, ...]

    @property
    def failures(self) -> int:
        """How many failures were found."""
        return sum(chain.failures for chain in self.chains)

    @property
    def messages(self) -> tuple[str, ...]:
        """One line for each failure."""
        return tuple(line for chain in self.chains for line in chain.messages)

    @property
    def remainder_bytes(self) -> int:
        """Bytes of remainders that the pass held."""
        return sum(chain.remainder_bytes for chain in self.chains)

    @property
    def drift(self) -> float | None:
        """Largest relative error of a reconstructed start; None where nothing drifts."""
        return worst_drift(chain.drift for chain in self.chains)
