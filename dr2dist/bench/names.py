"""The names of the ways to train that are compared, and the options of those that are ours."""

from __future__ import annotations

from typing import Any

from dr2dist.errors import UserError, nearest

CONVENTIONAL, PER_BLOCK, BUDGET = "conventional", "checkpoint per block", "budget"
PER_TWO, PER_FOUR = "checkpoint per 2 blocks", "checkpoint per 4 blocks"
GROUPS = {PER_TWO: 2, PER_FOUR: 4}
EXACT_COMPILED = "exact compiled"
FAR = "exact 16 bits sliced, remainders offloaded"
WHOLE_BLOCK = "checkpoint per block, no early stop"
"""Torch's checkpointing ends a recompute at the last tensor that gradients need, before a block's
last matrix product, whose output no reversal can do without. This runs all of it again."""

CONVERTED: dict[str, dict[str, Any]] = {
    "checkpoint per function": {"arithmetic": "float", "memory": "checkpoint"},
    "float": {"arithmetic": "float"},
    "float sliced": {"arithmetic": "float", "sliced": True},
    "exact": {},
    "exact sliced": {"sliced": True},
    "exact 16 bits": {"state_bits": 16},
    "exact 16 bits sliced": {"state_bits": 16, "sliced": True},
    FAR: {"state_bits": 16, "sliced": True, "remainders": "host"},
    BUDGET: {"memory": "budget"},
    EXACT_COMPILED: {"compile": True},
}
"""Cases that `convert` makes, with its options; `sliced` stands for the slices asked for."""

LIBRARIES = ("revlib", "momentumnet")
"""Packages from PyPI that reverse a run of functions, by other couplings than Dr2Net's."""

CASES = (CONVENTIONAL, PER_BLOCK, WHOLE_BLOCK, *GROUPS, *CONVERTED, *LIBRARIES)

USUAL = tuple(case for case in CASES if case not in (EXACT_COMPILED, FAR, *GROUPS))
"""What is measured where nothing is asked for: compiling needs a C++ compiler on a CPU, where
nothing goes to another memory."""

OFFLOADED = "checkpoint per block, offloaded"
"""What checkpoints keep goes to the host's memory, and comes back when it is needed."""
COMPILED = "checkpoint per compiled block"
ON_GPU = (OFFLOADED, COMPILED, FAR)
"""Further cases, for `benchmarks/gpu.sh`: on a CPU they save nothing, or need a C++ compiler."""


def check_case(case: str) -> None:
    """Raises UserError for a case that is unknown."""
    if case not in CASES:
        raise UserError(
            f"case '{case}' is unknown, allowed are {', '.join(CASES)}{nearest(case, CASES)}"
        )
