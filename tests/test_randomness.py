"""Random streams: by key, the same in every process, and none of a GPU's in mid-step."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dr2dist.data.randomness import seed_device, seeded
from dr2dist.reversible.calls.replay import stable_seed
from dr2dist.tasks.transforms import ImageData, RandAugment, train_transform
from tests.images import classification, labelled, on_image

ROOT = Path(__file__).parent.parent
NORMAL = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
STREAMS = """
import json, random, numpy, torch
from dr2dist.data.randomness import seeded, seed_device
from dr2dist.reversible.calls.replay import stable_seed
with seeded(7, -1, 3):
    found = [torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()]
seed_device(torch.device("cpu"), 7, 2, 5)
print(json.dumps([*found, torch.rand(3).tolist(), stable_seed(1, -2, 3)]))
"""


def test_streams_do_not_depend_on_the_process() -> None:
    # One whose hashes are other ones than this one's, which are drawn.
    found = subprocess.check_output(
        [sys.executable, "-c", STREAMS],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        text=True,
        timeout=240,
    )
    with seeded(7, -1, 3):
        wanted = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
    seed_device(torch.device("cpu"), 7, 2, 5)
    assert json.loads(found) == [*wanted, torch.rand(3).tolist(), stable_seed(1, -2, 3)]
    assert stable_seed(1, 2, 3) != stable_seed(1, 3, 2)


def test_a_seed_is_a_function_of_its_whole_key() -> None:
    keys: list[tuple[int, ...]] = [
        (),
        (0,),
        (0, 0),
        (1, 2),
        (2, 1),
        (-1,),
        (2**64 - 1,),
        (2**62, 1),
    ]
    seeds = {stable_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    # Python's own hash cannot tell these apart.
    assert hash((-1,)) == hash((-2,)) and stable_seed(-1) != stable_seed(-2)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator]:
    """Two GPUs' generators, which no call that seeds all of them may touch."""

    def refuse(*_: object) -> None:
        raise AssertionError("every GPU is seeded")

    generators = [torch.Generator().manual_seed(index) for index in (5, 6)]
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "default_generators", tuple(generators))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return generators


def test_augmentation_and_mixing_leave_gpus_alone(gpus: list[torch.Generator]) -> None:
    with pytest.raises(AssertionError, match="every GPU"):
        torch.manual_seed(0)
    transform = train_transform(
        (16, 16),
        *NORMAL,
        ImageData(train="", vflip=True, scale=(0.3, 1.0), rand_augment=RandAugment(), erase=0.9),
    )
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    image, task = Image.fromarray(pixels), classification(3, mixup=0.5, cutmix=0.5)
    before = [generator.get_state() for generator in gpus]
    torch.default_generator.manual_seed(1)
    cpu = torch.get_rng_state()

    def draw(*key: int) -> Any:
        with seeded(*key):
            images = torch.stack([on_image(transform, image) for _ in range(4)])
            return task.augment(labelled(torch.tensor([0, 1, 2, 0]), images)).inputs["image"]

    one, other, again = draw(1, 2), draw(1, 3), draw(1, 2)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(cpu, torch.get_rng_state())
    assert all(map(torch.equal, before, (generator.get_state() for generator in gpus)))


def test_a_step_seeds_the_device_that_it_runs_on(gpus: list[torch.Generator]) -> None:
    other = gpus[0].get_state()
    seed_device(torch.device("cuda", 1), 3, 4)
    wanted = torch.Generator().manual_seed(stable_seed(3, 4)).get_state()
    assert torch.equal(gpus[1].get_state(), wanted) and torch.equal(gpus[0].get_state(), other)
    assert torch.equal(torch.get_rng_state(), wanted)
    seed_device(torch.device("cuda"), 5)
    assert gpus[0].initial_seed() == stable_seed(5) != gpus[1].initial_seed()
