"""What is not trained comes back as it was given, whatever type and layout it was held in."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dr2dist.inference.exported import export
from tests.images import make_small_shards
from tests.models import build
from tests.pool import Pool

FREEZE = ["blocks.0.*", "blocks.2.mlp.*", "patch_embed.*"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero", range(4))
def test_masters_start_from_what_was_given(zero: int, precision: str, two_ranks: Pool) -> None:
    results = two_ranks.run(
        "tests.deepspeed_cases:given", zero=zero, precision=precision, freeze=FREEZE
    )
    state = results[0]["state"]
    assert torch.equal(state.pop("norm.statistic"), torch.full((3,), 1 / 3))
    for name, value in build("vit", depth=3).named_parameters():
        assert torch.equal(state[name], value), name
    bytes_of = [result["bytes"]["masters"] for result in results]
    trained, frozen = results[0]["trained"], results[0]["frozen"]
    assert frozen > 0.3 * trained
    # All ranks together have one fp32 copy of what is held in a narrower type.
    copies = 0 if precision == "fp32" or (precision == "bf16" and not zero) else frozen
    masters = trained if zero else 2 * trained * (precision == "fp16")
    assert sum(bytes_of) == 4 * (copies + masters)


@pytest.mark.parametrize("zero", range(4))
def test_going_on_puts_back_frozen_weights_too(zero: int, two_ranks: Pool, tmp_path: Path) -> None:
    """The engine that goes on was given other weights: its outputs are those of the first."""
    results = two_ranks.run(
        "tests.deepspeed_cases:outcome", folder=str(tmp_path), zero=zero, bf16=True, freeze=FREEZE
    )
    for result in results:
        assert result["again"] == result["steps"][2:]
        assert all(torch.equal(found, result["outputs"][0]) for found in result["outputs"])
    _assert_frozen(load_file(tmp_path / "model.safetensors"), build("vit", depth=3).state_dict())


def _assert_frozen(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    starts = tuple(pattern.removesuffix("*") for pattern in FREEZE)
    for name, value in wanted.items():
        assert torch.equal(found[name], value) == name.startswith(starts), name


CONFIG = """
model:
  name: vit_tiny_patch16_224
  image_size: 32
  options: {depth: 3, embed_dim: 48, num_heads: 2}
  weights: FOLDER/given.safetensors
  freeze: ["blocks.0.*", "blocks.2.mlp.*", "patch_embed.*"]
task: {num_classes: 2}
data: {train: FOLDER/shards/train, val: FOLDER/shards/val, num_workers: 0}
optim: {lr: 1.0e-2, weight_decay: 0.1}
train: {steps: 4, micro_batch: 2, accumulate: 2, precision: bf16, ema: 0.5}
checkpoint: {steps: 2}
output: FOLDER/run
"""


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, "zero=2"), (2, "zero=3"), (4, "stages=2 zero=0"), (4, "stages=2 zero=1")],
)
def test_a_run_exports_frozen_weights_as_they_were_in_the_file(
    ranks: int, layout: str, tmp_path: Path, two_ranks: Pool, four_ranks: Pool
) -> None:
    make_small_shards(tmp_path)
    size = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 2, "num_classes": 2}
    model = timm.create_model("vit_tiny_patch16_224", **size)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), tmp_path / "given.safetensors")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    overrides = [f"parallel.{value}" for value in layout.split()]
    pool = {2: two_ranks, 4: four_ranks}[ranks]
    pool.run("tests.cases:run_until", path=str(path), overrides=overrides, step=3)
    pool.run("tests.cases:run_config", path=str(path), overrides=overrides)
    export(tmp_path / "run", tmp_path / "model.safetensors", "last")
    _assert_frozen(load_file(tmp_path / "model.safetensors"), model.state_dict())
