"""Shards, run folders, checkpoints and files of the version before are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dr2dist.assembly import ExportMetadata
from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.data.index import read_index
from dr2dist.data.shards import verify_shards
from dr2dist.inference.evaluate import evaluate
from dr2dist.inference.exported import export
from tests.images import make_small_shards
from tests.manifests import change
from tests.pool import Pool

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val, orientation: stored, order: dealt}
optim: {lr: 1.0e-3}
train: {steps: 4, micro_batch: 4}
checkpoint: {steps: 2}
output: OUTPUT
"""


def as_format_1(folder: Path) -> None:
    """An index as version 0.1 wrote it: one image a sample, with its class."""
    index = read_index(folder)
    shards = []
    for shard in index.shards:
        members, data = index.members(shard), (folder / shard.name).read_bytes()
        samples: list[Any] = []
        for key, places, _ in (members[number] for number in range(shard.samples)):
            start, size = places.pop("cls")
            ((extension, place),) = places.items()
            samples.append([key, extension, *place, int(data[start : start + size])])
        said = {"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256}
        shards.append({**said, "samples": samples})
    shutil.rmtree(folder / "index.members")
    file = {"format": 1, "classes": index.classes, "streams": 64, "shards": shards}
    (folder / "index.json").write_text(json.dumps(file))


def as_before(run: Path) -> None:
    """A run's folder as version 0.1 wrote it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["plugins"], config["data"]["fields"], config["model"]["in_channels"]
    del (
        config["data"]["orientation"],
        config["data"]["order"],
        config["model"]["lora"],
        config["train"]["loggers"],
    )
    config["train"] |= {"checkpoint_every": 2, "keep": config.pop("checkpoint")["keep"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for folder in checkpoints(run):
        change(folder, _as_before)


def _as_before(state: dict[str, Any]) -> None:
    said = state.pop("preprocessing")
    for name in ("task", "plugins", "fields", "in_channels"):
        del state[name]
    state |= {"input_size": said["size"], "mean": said["mean"], "std": said["std"]}
    state["resize"] = "timm"
    del state["progress"]["consumed"]


def run(pool: Pool, path: Path, case: str = "run_config", **more: Any) -> Any:
    return pool.run(f"tests.cases:{case}", path=str(path), overrides=[], **more)[0]


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, Path]:
    shards = make_small_shards(tmp_path, 24, 32)
    found = {}
    for name in ("whole", "broken"):
        path = tmp_path / f"{name}.yaml"
        text = CONFIG.replace("SHARDS", str(shards))
        path.write_text(text.replace("OUTPUT", str(tmp_path / name)))
        found[name] = path
    return found


def test_a_run_of_the_version_before_goes_on(
    configs: dict[str, Path], tmp_path: Path, one_rank: Pool
) -> None:
    run(one_rank, configs["whole"])
    run(one_rank, configs["broken"], "run_until", step=3)
    for part in ("train", "val"):
        as_format_1(tmp_path / "shards" / part)
        verify_shards(tmp_path / "shards" / part, progress=False)
    as_before(tmp_path / "broken")
    with pytest.raises(AssertionError, match=r"data\.orientation: stored, now it is exif"):
        turned = ["data.orientation=exif"]
        one_rank.run("tests.cases:run_config", path=str(configs["broken"]), overrides=turned)
    assert run(one_rank, configs["broken"])["steps"] == 4
    one, other = (Checkpoint(checkpoints(tmp_path / n)[-1]) for n in ("whole", "broken"))
    for name in one.names("master"):
        assert torch.equal(one.tensor("master", name), other.tensor("master", name)), name
    assert read_index(tmp_path / "shards/val").class_counts() is not None


def test_a_checkpoint_of_the_version_before_is_exported(
    configs: dict[str, Path], tmp_path: Path, one_rank: Pool
) -> None:
    summary = run(one_rank, configs["whole"])
    as_before(tmp_path / "whole")
    file = tmp_path / "file.safetensors"
    export(tmp_path / "whole", file, "last")
    facts = ExportMetadata.read(file)
    assert facts.task == {"name": "classification", "num_classes": 2}
    assert facts.classes == ("bright", "dark") and facts.in_channels == 3
    report = evaluate(file, tmp_path / "shards/val", progress=False)
    assert report["loss"] == pytest.approx(summary["last"]["loss"], rel=1e-5)
