"""Random streams by key: what is drawn is a function of the key, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dr2dist.reversible.calls.replay import stable_seed


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the global CPU streams of torch, numpy and random by the key; puts them back after.

    Libraries of transforms draw from whichever of the three they like. Generators of GPUs are left
    alone: a step may be drawing from them.
    """
    words = np.random.SeedSequence([part & (2**64 - 1) for part in key]).generate_state(4)
    torchs, python, legacy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    # torch.manual_seed would seed every GPU as well.
    torch.default_generator.manual_seed(int(words[0]) << 31 ^ int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))
    try:
        yield
    finally:
        torch.set_rng_state(torchs)
        random.setstate(python)
        np.random.set_state(legacy)


def seed_device(device: torch.device, *key: int) -> None:
    """Seeds torch's global streams of the CPU and of this device, if it is a GPU, by the key."""
    seed = stable_seed(*key)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
