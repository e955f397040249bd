"""Recipes: groups, averaged weights, schedules, mixing, weights of classes, ending early."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import dr2dist
from dr2dist.backbones.parameters import freeze
from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.config import load_config
from dr2dist.config.optim import Group, Optim
from dr2dist.data.order import Order
from dr2dist.data.positions import batches as training_batches
from dr2dist.data.randomness import seeded
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.tasks.transforms import eval_transform
from dr2dist.training.groups import parameter_groups
from dr2dist.training.plan import make_plan
from dr2dist.training.schedule import learning_rate
from tests.commands import call
from tests.images import FIELDS, batches, classification, labelled, make_small_shards
from tests.models import build
from tests.pool import Pool
from tests.runs import records

STEPS, BATCH, DECAY, LAYER_DECAY, DEPTH = 6, 6, 0.7, 0.6, 4
MODEL, SIZE = "vit_tiny_patch16_224", {"img_size": (32, 32), "depth": DEPTH}
CONFIG = f"""
model: {{name: {MODEL}, weights: random, image_size: 32, options: {{depth: {DEPTH}}}}}
coefficients: {{kind: constant, alpha: 0.9, beta: 0.1}}
task: {{name: classification, num_classes: 2}}
data: {{train: SHARDS/train, val: SHARDS/val, hflip: false, scale: [1.0, 1.0]}}
optim:
  {{name: sgd, momentum: 0.9, lr: 0.02, weight_decay: 0.1, layer_decay: {LAYER_DECAY}, clip: null,
    groups: [{{match: "head.*", lr_scale: 3}}]}}
train: {{steps: {STEPS}, micro_batch: {BATCH}, ema: {DECAY}, log_every: 1, validate_every: 3}}
output: OUTPUT
"""
NORMAL = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"), size=32)


def write_config(folder: Path, shards: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(shards)).replace("OUTPUT", str(folder / name)))
    return path


def run(pool: Pool, path: Path, *overrides: str) -> dict[str, Any]:
    results = pool.run("tests.cases:run_config", path=str(path), overrides=list(overrides))
    summary: dict[str, Any] = results[0]
    return summary


def scale_of(name: str) -> float:
    """BEiT's layer decay by hand for a ViT: stem 0, blocks 1 to DEPTH, then the head."""
    if name.startswith("blocks."):
        layer = int(name.split(".")[1]) + 1
    else:
        # timm counts the last norm with the last block.
        layer = {"head": DEPTH + 1, "norm": DEPTH}.get(name.partition(".")[0], 0)
    return float(LAYER_DECAY ** (DEPTH + 1 - layer)) * (3 if layer == DEPTH + 1 else 1)


def plain_loop(shards: Path) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """(weights, averages, gradient norms) by one process, SGD and EMA written out."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2, **SIZE)
    net = dr2dist.convert(model, 0.9, 0.1, memory="store").train()
    dataset = ShardDataset(shards / "train", FIELDS, eval_transform((32, 32), *NORMAL))
    index = dataset.index
    order = Order([shard.samples for shard in index.shards], index.digest())
    items = training_batches(order, micro_batch=BATCH, accumulate=1, replica=0, replicas=1)
    named = dict(net.named_parameters())
    average = {name: value.detach().clone() for name, value in named.items()}
    speed: dict[str, torch.Tensor] = {}
    norms = []
    optim = Optim(lr=0.02)
    for step, batch in zip(range(STEPS), batches(dataset, items), strict=False):
        net.zero_grad()
        output = net(batch.inputs["image"])
        nn.functional.cross_entropy(output, batch.targets["label"]).backward()
        norms.append(float(sum(p.grad.double().square().sum() for p in named.values()) ** 0.5))
        for name, value in named.items():
            decayed = value.ndim > 1 and name not in ("pos_embed", "cls_token")
            grad = value.grad + (0.1 if decayed else 0.0) * value.detach()
            speed[name] = grad if name not in speed else 0.9 * speed[name] + grad
            value.data -= learning_rate(optim, STEPS)(step) * scale_of(name) * speed[name]
            average[name] = DECAY * average[name] + (1 - DECAY) * value.detach()
    return named, average, norms


@pytest.fixture(scope="module")
def plain(shards: Path) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    return plain_loop(shards)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_layer_decay_groups_and_averages_equal_a_plain_loop_on_every_stage(
    zero: int, tmp_path: Path, shards: Path, plain: Any, two_ranks: Pool
) -> None:
    path = write_config(tmp_path, shards, "run")
    overrides = ["data.mean=[0.5, 0.5, 0.5]", "data.std=[0.5, 0.5, 0.5]", "train.micro_batch=3"]
    offload = ["parallel.offload_optimizer=true"] if zero >= 2 else []
    summary = run(two_ranks, path, f"parallel.zero={zero}", *overrides, *offload)
    saved = Checkpoint(checkpoints(tmp_path / "run")[-1])
    weights, averages, norms = plain
    for name in weights:
        for kind, wanted in (("master", weights), ("ema", averages)):
            assert torch.allclose(saved.tensor(kind, name), wanted[name], rtol=0, atol=1e-5), name
    logged = [line for line in records(tmp_path / "run") if "loss" in line]
    assert [line["gradient_norm"] for line in logged] == pytest.approx(norms, rel=1e-4)
    assert logged[0]["lr_highest"] == pytest.approx(3 * logged[0]["lr"])
    assert logged[0]["lr_lowest"] == pytest.approx(LAYER_DECAY ** (DEPTH + 1) * logged[0]["lr"])
    assert summary["state_bytes"]["average"] < 0.6 * sum(4 * v.numel() for v in weights.values())
    # What is validated and exported is the average.
    dr2dist_file = tmp_path / "out.safetensors"
    from dr2dist.inference.evaluate import evaluate
    from dr2dist.inference.exported import export

    export(tmp_path / "run", dr2dist_file, "last")
    net = dr2dist.load(dr2dist_file)
    for name, value in net.named_parameters():
        assert torch.allclose(value, averages[name], rtol=0, atol=1e-5), name
    found = evaluate(dr2dist_file, shards / "val", progress=False)
    assert found["loss"] == pytest.approx(summary["last"]["loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(summary["last"]["accuracy"])


def test_averages_go_on_to_the_same_bits_and_on_another_layout(
    tmp_path: Path, shards: Path, two_ranks: Pool, three_ranks: Pool
) -> None:
    more = ["checkpoint.steps=2", "task.mixup=0.4", "task.cutmix=1.0", "data.erase=0.5"]
    more += ["data.rand_augment={}", "data.num_workers=0", "train.patience=9"]
    paths = {name: write_config(tmp_path, shards, name) for name in ("quiet", "broken")}
    run(two_ranks, paths["quiet"], "parallel.zero=3", *more)
    two_ranks.run(
        "tests.cases:run_until",
        path=str(paths["broken"]),
        overrides=["parallel.zero=3", *more],
        step=3,
    )
    run(two_ranks, paths["broken"], "parallel.zero=3", *more)
    one, other = (Checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("quiet", "broken"))
    for kind in ("master", "ema", "momentum_buffer"):
        assert one.names(kind) == other.names(kind) != []
        for name in one.names(kind):
            assert torch.equal(one.tensor(kind, name), other.tensor(kind, name)), (kind, name)
    path = write_config(tmp_path, shards, "moved")
    for pool, batch, zero, step in ((two_ranks, 6, 3, 3), (three_ranks, 4, 0, None)):
        overrides = [f"parallel.zero={zero}", f"train.micro_batch={batch}"]
        case = "run_config" if step is None else "run_until"
        steps = {} if step is None else {"step": step}
        overrides += ["checkpoint.steps=2"]
        pool.run(f"tests.cases:{case}", path=str(path), overrides=overrides, **steps)
    path = write_config(tmp_path, shards, "stayed")
    run(two_ranks, path, "parallel.zero=1")
    one, other = (Checkpoint(checkpoints(tmp_path / name)[-1]) for name in ("moved", "stayed"))
    for name in one.names("ema"):
        assert torch.allclose(one.tensor("ema", name), other.tensor("ema", name), atol=1e-5), name


def test_frozen_parameters_stay_and_cost_no_state(
    tmp_path: Path, shards: Path, two_ranks: Pool
) -> None:
    path = write_config(tmp_path, shards, "run")
    frozen = '["blocks.[0-1].*", pos_embed, "patch_embed.*", cls_token]'
    summary = run(two_ranks, path, f"model.freeze={frozen}", "train.steps=2", "parallel.zero=2")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2, **SIZE)
    saved = Checkpoint(checkpoints(tmp_path / "run")[-1])
    moved = {
        name: not torch.equal(saved.tensor("master", name), value)
        for name, value in model.named_parameters()
    }
    still = [name for name, changed in moved.items() if not changed]
    assert {"pos_embed", "cls_token", "blocks.1.mlp.fc2.weight"} <= set(still)
    assert moved["blocks.2.mlp.fc2.weight"] and moved["head.weight"]
    assert set(saved.names("ema")).isdisjoint(still)
    trained = sum(v.numel() for n, v in model.named_parameters() if moved[n])
    assert summary["state_bytes"]["moments"] == pytest.approx(4 * trained / 2, rel=0.01)


def test_groups_are_few_and_wrong_patterns_are_told() -> None:
    model = build("swin")
    named = dict(model.named_parameters())
    groups = parameter_groups(model, 0.05, None)
    assert len(groups) == 2
    decayed = next(group for group in groups if group.weight_decay)
    assert all(value.ndim > 1 for value in decayed.parameters)
    own = [Group(match="head.*", lr_scale=10, weight_decay=0.5), Group(match="*.bias", lr_scale=2)]
    groups = parameter_groups(model, 0.05, None, own)
    assert sorted((g.lr_scale, g.weight_decay) for g in groups) == [
        (1.0, 0.0),
        (1.0, 0.05),
        (2.0, 0.0),
        (10.0, 0.5),
    ]
    head = next(group for group in groups if group.lr_scale == 10)
    assert {id(value) for value in head.parameters} == {
        id(value) for name, value in named.items() if name.startswith("head.")
    }
    assert sum(len(group.parameters) for group in groups) == len(named)
    with pytest.raises(UserError, match=r"optim.groups.0.match: 'haed.fc.weight' matches no"):
        parameter_groups(model, 0.05, None, [Group(match="haed.fc.weight")])
    with pytest.raises(UserError, match=r"model.freeze: 'blcks.\*' matches no parameter"):
        freeze(model, ["blcks.*"])
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(model, ["*"])


def test_schedules_rise_and_end_where_they_say() -> None:
    def rates(**options: Any) -> list[float]:
        rate = learning_rate(Optim(lr=1.0, **options), 40)
        return [rate(step) for step in range(40)]

    for kind in ("cosine", "tanh", "poly"):
        found = rates(schedule=kind, min_lr=0.1, warmup=0.25)
        assert np.diff(found[:11]) == pytest.approx([0.09] * 10, abs=1e-5)
        assert found[10] == pytest.approx(1, abs=1e-4) and 0.1 < found[-1] < 0.15
        assert all(high >= low for high, low in pairwise(found[10:]))
    assert rates(warmup=0)[10] == pytest.approx((1 + np.cos(np.pi / 4)) / 2)
    assert rates(schedule="poly", warmup=0, power=2)[20] == pytest.approx(0.25)
    steps = rates(schedule="multistep", decay_at=(0.5, 0.75), decay_rate=0.2, warmup=0.1)
    assert (steps[19], steps[20], steps[29], steps[30]) == pytest.approx((1, 0.2, 0.2, 0.04))
    rate = learning_rate(Optim(lr=1.0), 40)
    assert rate(7) == [rate(3), rate(30), rate(7)][2]  # a function of the step alone


def test_losses_of_smoothed_weighed_and_mixed_targets() -> None:
    logits, labels = torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    shares = logits.log_softmax(1)
    task = classification(3, label_smoothing=0.3, class_weights=[1.0, 2.0, 4.0])
    target = 0.7 * nn.functional.one_hot(labels, 3) + 0.1
    wanted = -(target * torch.tensor([1.0, 2.0, 4.0]) * shares).sum(1).mean()
    assert torch.allclose(task.loss(logits, labelled(labels), 8).total, wanted)
    parts = (slice(0, 3), slice(3, 8))
    halves = [task.loss(logits[k], labelled(labels[k]), 4).total for k in parts]
    assert torch.allclose((halves[0] + halves[1]) / 2, wanted)
    held_out = task.loss(logits, labelled(labels), 8, training=False).total
    assert torch.allclose(held_out, -shares[range(8), labels].mean())
    images = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16)
    before = images.clone()
    for options in ({"mixup": 1.0}, {"cutmix": 1.0}):
        task = classification(3, **options)
        with seeded(1, 2):
            batch = task.augment(labelled(labels, images))
        with seeded(1, 2):
            again = task.augment(labelled(labels, images)).inputs["image"]
        mixed, targets = batch.inputs["image"], batch.targets["label"]
        assert torch.equal(mixed, again) and torch.equal(images, before)
        # Image k is mixed with image 7 - k; its target says by how much.
        share = mixed.mean((1, 2, 3))
        assert not torch.equal(share, torch.arange(8.0))
        kept = (share - (7 - torch.arange(8.0))) / (2 * torch.arange(8.0) - 7)
        assert torch.allclose(kept, kept[0].expand(8), atol=1e-4)
        one_hot = nn.functional.one_hot(labels, 3).float()
        assert torch.allclose(targets, kept[0] * one_hot + (1 - kept[0]) * one_hot.flip(0))
        assert torch.isfinite(task.loss(logits, batch, 8).total)


def test_balanced_classes_and_an_early_end(
    tmp_path: Path, shards: Path, two_ranks: Pool, one_rank: Pool, capfd: Any
) -> None:
    path = write_config(tmp_path, shards, "run")
    more = ["task.balance_classes=true", "optim.lr=1e-9", "train.steps=30"]
    summary = run(two_ranks, path, *more, "train.validate_every=2", "train.patience=3")
    assert summary["status"] == "finished" and summary["stopped_early"]
    assert summary["steps"] == 8  # the metric has been the same four times
    again = run(two_ranks, path, *more, "train.validate_every=2", "train.patience=3")
    assert again["steps"] == 8
    line = ("train", str(path), "--ranks", "2", "--dry-run", *more, "train.validate_every=2")
    status, _, err = call(capfd, *line, "train.steps=40", "train.patience=2")
    assert status == 2 and "train.patience: is 2, and the last 3 validation(s) of" in err
    assert call(capfd, *line, "train.patience=4")[0] == 0
    with pytest.raises(AssertionError, match="fp16 needs a GPU"):
        run(one_rank, write_config(tmp_path, shards, "half"), "train.precision=fp16")


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        ("videomae", r"blocks\.\d+\."),
        ("swin3d", r"features\.\d*[02468]\.\d+\."),
        ("mvit", r"blocks\.\d+\.(?:attn\.(?:qkv|project)|mlp)"),
    ],
)
def test_layers_of_models_that_do_not_say_theirs_are_blocks(kind: str, block: str) -> None:
    model = build(kind)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales, decays = {}, {}
    for group in parameter_groups(model, 0.05, 0.5):
        for parameter in group.parameters:
            scales[names[parameter]] = group.lr_scale
            decays[names[parameter]] = group.weight_decay
    by_block: dict[str, set[float]] = {}
    for name, scale in scales.items():
        if found := re.match(block, name):
            by_block.setdefault(found[0], set()).add(scale)
    levels = [max(each) for each in by_block.values()]
    assert len(levels) > 1 and all(len(each) == 1 for each in by_block.values())
    assert levels == sorted(levels) and max(levels) == 0.5
    assert {scale for name, scale in scales.items() if name.startswith("head")} <= {1.0}
    stem = next(name for name in names.values() if "embed" in name or "conv_proj" in name)
    assert scales[stem] == min(scales.values()) < min(levels)
    tables = [name for name in decays if re.search("position_bias_table|rel_pos|pos_embed", name)]
    assert all(decays[name] == 0 for name in tables) and 0.05 in decays.values()


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        (["blocks.0.*"], "none of them is trained"),
        (["blocks.1.*", "blocks.1.mlp.*"], "groups before it have taken all of them"),
    ],
)
def test_a_group_without_effect_is_refused(groups: list[str], why: str) -> None:
    model = build("vit")
    freeze(model, ["blocks.0.*"])
    said = [Group(match=match, lr_scale=2.0) for match in groups]
    place = f"optim.groups.{len(groups) - 1}.match: {groups[-1]} has no effect"
    with pytest.raises(UserError, match=re.escape(f"{place}: {why}")):
        parameter_groups(model, 0.05, None, said)


def test_a_part_of_an_epoch_is_not_a_step_too_many(tmp_path: Path) -> None:
    """Though 1.1 x 50 / 5 is a little more than 11."""
    path = write_config(tmp_path, make_small_shards(tmp_path, 71), "run")
    epochs = ["train.steps=null", "train.epochs=1.1", "train.micro_batch=5"]
    plan = make_plan(load_config(path, epochs), 1)
    assert plan.train.num_samples == 50 and plan.steps == 11
