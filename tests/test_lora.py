"""Adapters: which layers get one, what is trained, and what is written of it."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import dr2dist
from dr2dist.assembly import Blueprint, assemble
from dr2dist.config import load_config
from dr2dist.config.schema import Lora
from dr2dist.errors import UserError
from dr2dist.inference.exported import export
from dr2dist.tasks.registry import options_from
from dr2dist.training.described_plan import describe
from dr2dist.training.plan import make_plan
from tests.images import make_small_shards
from tests.pool import Pool
from tests.runs import metrics

SIZE = {"depth": 3, "embed_dim": 48, "num_heads": 2}
CONFIG = """
model:
  name: vit_tiny_patch16_224
  image_size: 32
  options: {depth: 3, embed_dim: 48, num_heads: 2}
  weights: FOLDER/given.safetensors
  lora: {rank: 2, alpha: 6, dropout: 0.1}
task: {num_classes: 2}
data: {train: FOLDER/shards/train, val: FOLDER/shards/val, num_workers: 0}
optim: {name: sgd, lr: 1.0e-2}
train: {steps: 6, micro_batch: 2, accumulate: 2, log_every: 1, validate_every: 6}
checkpoint: {steps: 2}
output: FOLDER/NAME
"""


def blueprint(name: str, lora: Lora | None, **options: Any) -> Blueprint:
    task = options_from({"name": "classification", "num_classes": 3}, ())
    return Blueprint(
        model=name, task=task, classes=("a", "b", "c"), options=options, lora=lora, seed=1
    )


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}, ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
        # Their attention takes the weights of qkv without calling it.
        ("beit_base_patch16_224", {"depth": 1}, ("attn.proj", "mlp.fc1", "mlp.fc2")),
        ("eva02_tiny_patch14_224", {"depth": 1}, ("attn.proj", "mlp.fc1", "mlp.fc2")),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1)},
            ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        ),
    ],
)
def test_adapters_are_where_they_have_an_effect_and_are_trained_alone(
    name: str, options: dict[str, Any], layers: tuple[str, ...]
) -> None:
    said = blueprint(name, Lora(rank=2, dropout=0.5), **options)
    model = assemble(said).model
    adapted = {key.partition(".lora_A")[0] for key in model.state_dict() if ".lora_A" in key}
    assert {".".join(key.split(".")[-2:]) for key in adapted} == set(layers)
    plain = assemble(replace(said, lora=None)).model
    images = torch.randn(2, 3, 224, 224)
    assert_close(model.eval()(images), plain.eval()(images))  # B is zero
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert all(".lora_" in key or key.startswith("head") for key in trained)
    for key, value in model.named_parameters():
        if ".lora_B" in key:
            torch.nn.init.normal_(value, std=0.1)
    gradients = []
    for memory in ("reverse", "store"):
        net = dr2dist.convert(model.train(), memory=memory)
        torch.manual_seed(3)
        net(images).square().sum().backward()
        gradients.append({k: v.grad.clone() for k, v in model.named_parameters() if k in trained})
        model.zero_grad()
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in trained)
    assert all(value.abs().sum() > 0 for value in gradients[0].values())


def test_adapters_made_in_parts_have_the_same_bits() -> None:
    said = blueprint("vit_tiny_patch16_224", Lora(rank=2, targets=("*.qkv",)), depth=2)
    whole, (parts, _, read) = assemble(said).model, assemble(said, "in parts")
    assert read is not None
    assert dict(parts.named_parameters()).keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(value, read(key)) for key, value in whole.named_parameters())
    other = assemble(replace(said, seed=2)).model.state_dict()
    key = "blocks.1.attn.qkv.lora_A.default.weight"
    assert whole.state_dict()[key].abs().max() <= 192**-0.5
    assert not torch.equal(whole.state_dict()[key], other[key])


@pytest.mark.parametrize(
    ("name", "target", "line"),
    [
        ("vit_tiny_patch16_224", "*.atn.qkv", "'*.atn.qkv' matches no linear layer of the"),
        ("vit_tiny_patch16_224", "head", "'head' matches head, which is outside of the residual"),
        ("beit_base_patch16_224", "*.qkv", "'*.qkv' matches blocks.0.attn.qkv, which is outside"),
    ],
)
def test_targets_without_effect_are_refused(name: str, target: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        assemble(blueprint(name, Lora(targets=(target,)), depth=1), "meta")
    assert f"model.lora.targets: {line}" in str(error.value)


def test_without_peft_a_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return known(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install 'dr2dist\\[lora\\]'"):
        assemble(blueprint("vit_tiny_patch16_224", Lora(), depth=1), "meta")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shards, and weights that the runs begin with."""
    folder = tmp_path_factory.mktemp("lora")
    make_small_shards(folder)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **SIZE)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), folder / "given.safetensors")
    return folder


def config_of(folder: Path, name: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(folder)).replace("NAME", name))
    return path


@pytest.fixture(scope="module")
def curve(folder: Path, two_ranks: Pool) -> list[float]:
    """The losses of ZeRO-0 without dropout, whose masks are a replica's own."""
    overrides = ["parallel.zero=0", "model.lora.dropout=0"]
    two_ranks.run(
        "tests.cases:run_config", path=str(config_of(folder, "first")), overrides=overrides
    )
    losses = [line["loss"] for line in metrics(folder / "first") if "loss" in line]
    assert len(set(losses)) == 6
    return losses


@pytest.mark.parametrize("layout", ["zero=1", "zero=2", "zero=3", "stages=2 zero=0"])
def test_layouts_follow_one_curve_and_exports_agree(
    layout: str, folder: Path, curve: list[float], two_ranks: Pool
) -> None:
    name = layout.replace(" ", "_")
    accumulate = 4 if "stages" in layout else 2
    overrides = [f"parallel.{value}" for value in layout.split()]
    overrides += ["model.lora.dropout=0", f"train.accumulate={accumulate}"]
    path = str(config_of(folder, name))
    two_ranks.run("tests.cases:run_until", path=path, overrides=overrides, step=3)
    two_ranks.run("tests.cases:run_config", path=path, overrides=overrides)
    losses = [line["loss"] for line in metrics(folder / name) if "loss" in line]
    assert losses == pytest.approx(curve, rel=1e-4)
    merged, apart = folder / f"{name}-merged.safetensors", folder / f"{name}-apart.safetensors"
    export(folder / name, merged, "last")
    export(folder / name, apart, "last", lora="apart")
    given, kept = load_file(folder / "given.safetensors"), load_file(apart)
    for key, value in kept.items():
        if ".lora_" not in key and not key.startswith("head"):
            assert torch.equal(value, given[key.replace(".base_layer.", ".")]), key
    assert load_file(merged).keys() == given.keys()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        one, other = (dr2dist.load(file)(images) for file in (merged, apart))
        before = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, **SIZE)
        assert (one - before(images)).abs().max() > 1e-2
    assert (one - other).abs().max() <= 1e-6


def test_a_run_with_dropout_goes_on_to_the_same_bits(folder: Path, two_ranks: Pool) -> None:
    for name, steps in (("quiet", []), ("broken", [3])):
        path = str(config_of(folder, name))
        for step in steps:
            two_ranks.run("tests.cases:run_until", path=path, overrides=[], step=step)
        two_ranks.run("tests.cases:run_config", path=path, overrides=[])
        export(folder / name, folder / f"{name}.safetensors", "last", lora="apart")
    assert metrics(folder / "quiet") == metrics(folder / "broken")
    ours, theirs = (load_file(folder / f"{name}.safetensors") for name in ("quiet", "broken"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_the_plan_says_where_adapters_are(folder: Path) -> None:
    shown = describe(make_plan(load_config(config_of(folder, "plan"), []), 1))
    assert (
        "adapters      rank 2 on 12 linear layers: blocks.*.attn.proj, blocks.*.attn.qkv" in shown
    )


def test_adapters_of_a_run_without_any_are_refused(folder: Path, one_rank: Pool) -> None:
    path = config_of(folder, "bare")
    path.write_text(path.read_text().replace("  lora: {rank: 2, alpha: 6, dropout: 0.1}\n", ""))
    one_rank.run("tests.cases:run_config", path=str(path), overrides=["train.steps=1"])
    with pytest.raises(UserError, match="--lora: has no effect"):
        export(folder / "bare", folder / "bare.safetensors", "last", lora="apart")
    assert not (folder / "bare.safetensors").exists()
