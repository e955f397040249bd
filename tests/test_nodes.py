"""Two nodes with a network between them: the bits of one, and a cut link ends both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.faults import ranks_of
from benchmarks.nodes import NAMES, Nodes, lacking, two_nodes
from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from tests.images import make_small_shards
from tests.pool import Pool, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]
CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 2}}
task: {num_classes: 2}
data: {train: shards/train, val: shards/val, num_workers: 0}
optim: {lr: 1e-3}
train: {steps: 4, micro_batch: 2, accumulate: 2, log_every: 1}
parallel: PARALLEL
output: OUTPUT
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    make_small_shards(folder)
    with two_nodes(folder) as found:
        yield found


def config(nodes: Nodes, name: str, parallel: str) -> Path:
    path = nodes.folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("PARALLEL", parallel).replace("OUTPUT", f"runs/{name}"))
    return path


@pytest.mark.parametrize(
    "parallel", ["{zero: 1}", "{zero: 2}", "{zero: 3}", "{zero: 0, stages: 2}"]
)
def test_two_nodes_give_the_bits_of_one(parallel: str, nodes: Nodes, four_ranks: Pool) -> None:
    name = "".join(filter(str.isalnum, parallel))
    command = nodes.begin(config(nodes, name, parallel), "--hostfile", str(nodes.folder / "hosts2"))
    out, err = command.communicate(timeout=300)
    assert command.returncode == 0, out + err
    assert all(f"({host}): 2 rank(s)" in out for host in NAMES)
    one = str(nodes.folder / "runs" / f"{name}-one")
    path = str(config(nodes, name, parallel))
    four_ranks.run(
        "tests.host_cases:run_apart",
        path=path,
        folders=[str(nodes.folder)] * 4,
        overrides=[[f"output={one}"]] * 4,
    )
    there, here = (
        Checkpoint(checkpoints(Path(folder))[-1]) for folder in (nodes.folder / "runs" / name, one)
    )
    assert there.shapes == here.shapes
    for key in here.shapes:
        for kind in here.kinds(key):
            assert torch.equal(there.read(kind, key), here.read(kind, key)), (key, kind)


@pytest.mark.parametrize(("seconds", "ends"), [(8, False), (999, True)], ids=["blip", "cut"])
def test_a_link_that_is_cut_ends_both_nodes_and_a_blip_does_not(
    seconds: float, ends: bool, nodes: Nodes
) -> None:
    name = f"link-{seconds}"
    path = config(nodes, name, "{zero: 2}")
    steps = ("train.steps=100000", "train.validate_every=100000", "checkpoint.steps=20")
    command = nodes.begin(path, "--hostfile", str(nodes.folder / "hosts1"), *steps)
    output = nodes.folder / "runs" / name
    try:
        wait_for(lambda: bool(checkpoints(output)), "a checkpoint")
        ranks = ranks_of(nodes)
        assert len(ranks) == 2
        nodes.link("down")
        if ends:
            begin = time.monotonic()
            _, err = command.communicate(timeout=60)
            left = max(0.0, 60 - (time.monotonic() - begin))
            alive = psutil.wait_procs(ranks, left)[1]
            assert not alive and command.returncode == 75, err
        else:
            time.sleep(seconds)
            nodes.link("up")
            before = (output / "metrics.jsonl").stat().st_size
            wait_for(lambda: (output / "metrics.jsonl").stat().st_size > before, "a step", 60)
            command.terminate()
            assert command.wait(60) == 75
    finally:
        nodes.link("up")
        command.kill()
        command.wait()
