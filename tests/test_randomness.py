"""Random streams: by key, the same in every process, and none of a GPU's in mid-step."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import DropPath

import dr2dist
from dr2dist.data.randomness import seed_device, seeded
from dr2dist.reversible.calls.replay import stable_seed
from dr2dist.tasks.transforms import ImageData, RandAugment, train_transform
from tests.images import classification, labelled, on_image
from tests.models import build, images

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


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize(
    "setting", [{}, {"memory": "store"}, {"chunk_size": 2}, {"state_bits": 16}]
)
def test_a_pass_without_gradients_draws_as_one_with_them(
    setting: dict[str, Any], frozen: int
) -> None:
    net = dr2dist.convert(build("vit", depth=3, proj_drop_rate=0.2, drop_path_rate=0.3), **setting)
    net.head_drop.p = 0.2  # in a piece
    for block in net.blocks[:frozen]:
        block.requires_grad_(False)
    net.train()
    start, found = torch.get_rng_state(), []
    for gradients in (True, True, False):  # the first finds scales, and may widen them
        torch.set_rng_state(start)
        with torch.set_grad_enabled(gradients):
            output = net(images()).detach()
        found.append((output, torch.get_rng_state()))
    assert all(map(torch.equal, *found[1:]))
    assert not torch.equal(output, net(images()))


@pytest.mark.parametrize("graph", [True, False])
def test_chains_that_stages_run_apart_do_not_drop_the_same(graph: bool) -> None:
    """Each stage begins a step with the same random state."""
    net = dr2dist.convert(build("swin", drop_path_rate=0.5)).train()
    kept: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.5

            def note(module: Any, given: Any, output: torch.Tensor, name: str = name) -> None:
                kept.setdefault(name, output.detach().flatten(1).abs().amax(1) > 0)

            module.register_forward_hook(note)
    widths = [chain.functions[0].block.dim for chain in net.chains]
    for chain, width, size in zip(net.chains, widths, (8, 4, 2), strict=True):
        torch.manual_seed(0)
        with torch.set_grad_enabled(graph):
            chain(torch.randn(64, size, size, width, requires_grad=graph))
    first = [mask for name, mask in kept.items() if name.endswith("blocks.1.drop_path1")]
    assert len(first) == 3
    for one, other in pairwise(first):
        assert 0 < int((one == other).sum()) < 64
