"""The reversible mathematics: exact and floating arithmetic, segments, chains, certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dr2dist.lazily import lazily

if TYPE_CHECKING:
    from dr2dist.reversible.arithmetic.setting import Setting, round_coefficient
    from dr2dist.reversible.arithmetic.state import Gradient, State
    from dr2dist.reversible.budget.planner import Planner
    from dr2dist.reversible.calls.runner import FunctionRunner, PlainRunner
    from dr2dist.reversible.calls.slices import Layout
    from dr2dist.reversible.certificate import ChainCertificate
    from dr2dist.reversible.chain import Chain, Recorded
    from dr2dist.reversible.piece import Piece
    from dr2dist.reversible.segment import Segment
    from dr2dist.reversible.tape import Sides, Tape

__all__ = [
    "Chain",
    "ChainCertificate",
    "FunctionRunner",
    "Gradient",
    "Layout",
    "Piece",
    "PlainRunner",
    "Planner",
    "Recorded",
    "Segment",
    "Setting",
    "Sides",
    "State",
    "Tape",
    "round_coefficient",
]

__getattr__ = lazily(
    __name__,
    {
        "dr2dist.reversible.arithmetic.setting": "Setting round_coefficient",
        "dr2dist.reversible.arithmetic.state": "Gradient State",
        "dr2dist.reversible.budget.planner": "Planner",
        "dr2dist.reversible.calls.runner": "FunctionRunner PlainRunner",
        "dr2dist.reversible.calls.slices": "Layout",
        "dr2dist.reversible.certificate": "ChainCertificate",
        "dr2dist.reversible.chain": "Chain Recorded",
        "dr2dist.reversible.piece": "Piece",
        "dr2dist.reversible.segment": "Segment",
        "dr2dist.reversible.tape": "Sides Tape",
    },
)
