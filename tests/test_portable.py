"""Programs without dr2dist: what they compute is what the network and its task do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import dr2dist
from dr2dist.inference.exported import load_with_task
from dr2dist.inference.portable import export_portable, plain
from dr2dist.inference.predict import predict
from tests.images import on_image
from tests.models import build, images


@pytest.mark.parametrize(
    "kind", ["vit", "eva-rope", "beit", "relpos-shared", "swin", "vit-map-pool"]
)
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_plain_chains_are_the_chains(kind: str, arithmetic: Any) -> None:
    net = dr2dist.convert(build(kind), 0.7, 0.3, arithmetic).eval()
    with torch.inference_mode():
        found, wanted = plain(net)(images()), net(images())
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)
        if arithmetic == "exact":
            assert torch.equal(found, wanted)
            assert not torch.equal(found, dr2dist.convert(build(kind), 0.6, 0.3).eval()(images()))


def test_a_portable_regression_gives_targets_in_their_units(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=2)
    net = dr2dist.convert(model, 0.9, 0.1)
    file, program = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    task = {"targets": ["age", "size"], "mean": [40.0, 3.0], "std": [12.0, 0.5]}
    dr2dist.save(net, file, task={"name": "regression", **task})
    export_portable(file, program)
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "image.png")
    (row,) = predict(file, [tmp_path / "image.png"])
    loaded = load_with_task(file)
    with Image.open(tmp_path / "image.png") as image:
        given = on_image(loaded.task.transform(), image)[None]
    found = torch.export.load(program).module()(given)[0]
    assert found.tolist() == pytest.approx([row["age"], row["size"]], rel=1e-6)
    assert abs(found.tolist()[0]) > 20


@pytest.mark.parametrize(("mean", "std"), [([1e4, 0.0], [1.0, 1.0]), ([0.0, 0.0], [1e6, 1e-3])])
def test_units_do_not_hide_that_a_program_computes_something_else(
    mean: list[float], std: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2, depth=2)
    file, program = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    task = {"name": "regression", "targets": ["year", "size"], "mean": mean, "std": std}
    dr2dist.save(dr2dist.convert(model, 0.9, 0.1), file, task=task)
    assert export_portable(file, program) < 1e-5

    class Shifted(torch.nn.Module):
        def __init__(self, net: Any) -> None:
            super().__init__()
            self.net = plain(net)

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.net(inputs) + torch.tensor([0.0, 0.1])

    monkeypatch.setattr("dr2dist.inference.portable.plain", Shifted)
    with pytest.raises(dr2dist.UserError, match="computes other outputs than the module"):
        export_portable(file, program, overwrite=True)
