"""A backbone and a task from outside the package do what those inside do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dr2dist
from dr2dist.backbones.heads import attach_head
from dr2dist.cli import main
from dr2dist.inference.exported import export
from tests.outside.clouds import POINTS, CloudOptions, Clouds, CloudsBackbone, CloudTask
from tests.pool import Pool
from tests.runs import masters, records

PLUGIN = "tests.outside.clouds"
CONFIG = f"""
plugins: [{PLUGIN}]
model: {{name: little_clouds, weights: random, options: {{depth: 2}}}}
coefficients: {{kind: constant, alpha: 0.5, beta: 0.5}}
task: {{name: clouds}}
data: {{train: SHARDS/train, val: SHARDS/val}}
optim: {{name: sgd, momentum: 0.9, lr: 0.05, clip: null, warmup: 0}}
train: {{steps: 4, micro_batch: 4, log_every: 1}}
checkpoint: {{steps: 2, keep: 9}}
parallel: {{zero: 0}}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clouds in one or two parts, of 1 to 12 points, the third of none."""
    root = tmp_path_factory.mktemp("clouds")
    generator = np.random.default_rng(0)
    (root / "files").mkdir()
    for cloud in range(12):
        for part in range(1 + cloud % 2):
            count = 0 if cloud == 2 else int(generator.integers(1, POINTS + 1))
            points = generator.normal(size=(count, 3)).astype(np.float32)
            name = root / "files" / f"cloud{cloud:02}_part{part}"
            np.save(f"{name}.points.npy", points)
            np.save(f"{name}.labels.npy", (points[:, 0] > 0).astype(np.int64))
    for share in ("train", "val"):
        line = ["shards", "make", "--from", "files", "--source", str(root / "files")]
        with pytest.raises(SystemExit) as ended:
            main([*line, "--output", str(root / share)])
        assert not ended.value.code
    return root


def write_config(folder: Path, shards: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(folder / name)))
    return path


def model() -> Clouds:
    torch.manual_seed(0)
    net, task = Clouds(), CloudTask(CloudOptions())
    head = task.head(CloudsBackbone().features(net))
    attach_head(net, *head)
    return net.train()


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    there = torch.arange(POINTS) < torch.tensor([12, 5, 1, 9])[:, None]
    return {"points": torch.randn(4, POINTS, 3), "there": there}


def by_hand(net: Clouds, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network written out."""
    x, sides = net.enter(given["points"]), {"mask": {"there": given["there"]}, "bias": net.bias}
    fine = None
    for number, function in enumerate(net.fine):
        x = x + function(x, **{name: sides[name] for name in function.sides})
        fine = x if number == 1 else fine
    x, sides = net.halve(x, sides)
    for function in net.coarse:
        x = x + function(x, **{name: sides[name] for name in function.sides})
    return net.task_head.module([fine, net.norm(x)])


def pass_of(net: Any, seed: int = 3) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(outputs, gradients of parameters)."""
    torch.manual_seed(seed)
    found = net(inputs())
    sum((value.square() * (k + 1)).mean() for k, value in enumerate(found.values())).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return [value.detach() for value in found.values()], grads


def test_it_computes_what_the_model_does_and_every_mode_the_same_bits() -> None:
    plain = model().eval()
    net = dr2dist.convert(copy.deepcopy(plain), 1.0, 0.0, "float", "store").eval()
    for one, other in zip(net(inputs()).values(), by_hand(plain, inputs()).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for pair in ((0.9, 0.1), (0.5, 0.5)):
        for slices in ({}, {"chunk_size": 1}):
            runs = []
            for more in ({"memory": "store"}, {}, {"memory": "checkpoint"}):
                net = dr2dist.convert(model(), *pair, **more, **slices)
                runs.append(pass_of(net))
                assert net.certificate().failures == 0
            wanted, grads = runs[0]
            assert "bias" in grads and grads["bias"].abs().sum() > 0
            assert grads["task_head.module.points.weight"].abs().sum() > 0
            for outputs, others in runs[1:]:
                assert all(map(torch.equal, outputs, wanted))
                assert grads.keys() == others.keys()
                assert all(torch.equal(others[name], value) for name, value in grads.items())


LAYOUTS = {
    "one rank": (1, ["train.micro_batch=8"]),
    "two ranks": (2, ["train.micro_batch=4", "parallel.zero=2"]),
    "micro-batches": (1, ["train.micro_batch=2", "train.accumulate=4"]),
    "stages": (2, ["train.micro_batch=2", "train.accumulate=4", "parallel.stages=2"]),
    "four stages": (4, ["train.micro_batch=2", "train.accumulate=4", "parallel.stages=4"]),
}


def test_a_loss_does_not_depend_on_how_samples_are_cut(
    tmp_path: Path, shards: Path, one_rank: Pool, two_ranks: Pool, four_ranks: Pool
) -> None:
    pools, found = {1: one_rank, 2: two_ranks, 4: four_ranks}, {}
    for name, (ranks, overrides) in LAYOUTS.items():
        path = write_config(tmp_path, shards, name.replace(" ", "_"))
        more = ["model.options={depth: 2, drop: 0.0}", "train.steps=2", "data.val=null"]
        pools[ranks].run("tests.cases:run_config", path=str(path), overrides=[*overrides, *more])[0]
        folder = tmp_path / name.replace(" ", "_")
        found[name] = records(folder), masters(folder)
    steps, wanted = found.pop("one rank")
    for name, (lines, values) in found.items():
        for line, step in zip(lines, steps, strict=True):
            assert line["loss_points"] + line["loss_size"] == pytest.approx(line["loss"])
            for key in ("loss", "gradient_norm"):
                # Products of other shapes may round to the next step of the grid, 2^-18.
                assert line[key] == pytest.approx(step[key], rel=1e-5), name
        away = sum((values[key] - value).square().sum() for key, value in wanted.items())
        whole = sum(value.square().sum() for value in wanted.values())
        assert float(away / whole) ** 0.5 < 1e-7, name  # fp32 holds a weight to 6e-8 of itself


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.zero=0"],
        ["parallel.zero=1", "reversible.chunk_size=1"],
        ["parallel.zero=2", "train.ema=0.5"],
        ["parallel.zero=3", "reversible.chunk_size=2"],
        ["parallel.stages=2", "train.accumulate=2"],
    ],
    ids=lambda layout: layout[0],
)
def test_it_trains_breaks_off_goes_on_and_is_used(
    layout: list[str], tmp_path: Path, shards: Path, two_ranks: Pool, capfd: Any
) -> None:
    whole, broken = (write_config(tmp_path, shards, name) for name in ("whole", "broken"))
    summary = two_ranks.run("tests.cases:run_config", path=str(whole), overrides=layout)[0]
    assert summary["certificate_failures"] == 0 and summary["best"]["clouds"] == 12
    two_ranks.run("tests.cases:run_until", path=str(broken), overrides=layout, step=3)
    two_ranks.run("tests.cases:run_config", path=str(broken), overrides=layout)
    one, other = masters(tmp_path / "whole"), masters(tmp_path / "broken")
    assert one.keys() == other.keys() and "task_head.module.size.bias" in one
    assert all(torch.equal(other[name], value) for name, value in one.items())
    file = tmp_path / "clouds.safetensors"
    facts = export(tmp_path / "whole", file, "last")
    assert facts.task == {"name": "clouds", "num_classes": 2} and facts.plugins == (PLUGIN,)
    net: Any = dr2dist.load(file)
    assert set(net(inputs())) == {"points", "size"}
    report = tmp_path / "report.json"
    line = ["evaluate", str(file), str(shards / "val"), "--output", str(report), "--batch", "5"]
    assert run(*line, "--plugin", PLUGIN) == 0
    said = json.loads(report.read_text())
    for name in ("loss", "cloud_accuracy", "clouds", "samples"):
        assert said[name] == pytest.approx(summary["last"][name], rel=1e-5), name
    rows = tmp_path / "rows.json"
    source = shards / "files" / "cloud01_part0.points.npy"
    assert run("predict", str(file), str(source), "--output", str(rows)) == 0
    (row,) = json.loads(rows.read_text())
    assert len(row["labels"].split()) == POINTS


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)
