"""Random streams by key: what is drawn is a function of the key, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def keyed(*key: int) -> Iterator[None]:
    """Seeds the global CPU streams of torch, numpy and random by the key; puts them back after.

    Libraries of transforms draw from whichever of the three they like.
    """
    words = np.random.SeedSequence([part & (2**64 - 1) for part in key]).generate_state(4)
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
        np.random.seed(words[2])
        random.seed(int(words[3]))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
