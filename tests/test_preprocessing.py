"""Images are prepared for evaluation by timm's own transform, as an exported file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms.v2 import functional

import dr2dist
from dr2dist.assembly import ExportMetadata
from dr2dist.inference.exported import ready
from dr2dist.inference.predict import predict
from dr2dist.tasks.transforms import eval_transform
from tests.images import on_image

MEAN, STD = (0.31, 0.42, 0.53), (0.21, 0.22, 0.23)
SIZES = [(32, 32), (48, 32), (32, 80)]
# Width, height: portrait, landscape, smaller than the size, odd; some whose longer side is an exact
# multiple that floating point misses.
SHAPES = [(40, 40), (333, 777), (801, 203), (17, 9), (1, 1), (31, 33), (64, 64), (5, 91), (90, 49)]
SHAPES += [(49 * k, 7 * k + 30) for k in range(1, 6)]


def picture(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng((width, height))
    return Image.fromarray(generator.integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.fixture(params=SIZES, ids=str)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # A model whose pretrained_cfg asks for another crop, and for yet another one in tests.
    options = {"depth": 1, "num_classes": 3, "img_size": request.param, "embed_dim": 48}
    model = timm.create_model("deit3_small_patch16_224", num_heads=3, **options)
    model.pretrained_cfg |= {"test_input_size": (3, 64, 64), "test_crop_pct": 0.5}
    assert model.pretrained_cfg["crop_pct"] != 1.0
    path = tmp_path / "file.safetensors"
    dr2dist.save(dr2dist.convert(model), path, mean=MEAN, std=STD)
    return path


def test_timms_transform_of_a_loaded_model_is_that_of_evaluation(file: Path) -> None:
    net, ours = dr2dist.load(file), ready(file)[0].task.transform()
    size = net.pretrained_cfg["input_size"][1:]
    in_runs = eval_transform(size, MEAN, STD)
    for use_test_size in (False, True):
        config = resolve_model_data_config(net, use_test_size=use_test_size)
        theirs: Any = create_transform(**config, is_training=False)
        for shape in SHAPES:
            image = picture(*shape)
            found = on_image(ours, image)
            assert found.shape == (3, *size) and found.dtype == torch.float32
            assert torch.equal(found, theirs(image)), shape
            assert torch.equal(found, on_image(in_runs, image)), shape


def test_predictions_are_those_of_timms_transform(file: Path, tmp_path: Path) -> None:
    net = dr2dist.load(file)
    transform: Any = create_transform(**resolve_model_data_config(net), is_training=False)
    paths = [tmp_path / f"{width}x{height}.png" for width, height in SHAPES]
    for path, shape in zip(paths, SHAPES, strict=True):
        picture(*shape).save(path)
    rows = predict(file, paths, progress=False)
    with torch.inference_mode():
        shares = net(torch.stack([transform(Image.open(path)) for path in paths])).softmax(1)
    for row, each in zip(rows, shares.tolist(), strict=True):
        assert [row[f"p_{label}"] for label in range(3)] == [round(share, 6) for share in each]


def test_files_of_earlier_versions_keep_their_preprocessing(file: Path, tmp_path: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    # Versions before had one task, and these keys in place of its preprocessing.
    said = json.loads(metadata.pop("preprocessing"))
    del metadata["task"]
    metadata |= {key: json.dumps(said[key]) for key in ("mean", "std")}
    metadata["input_size"] = json.dumps(said["size"])
    earlier = tmp_path / "earlier.safetensors"
    save_file(load_file(file), earlier, metadata)
    assert (
        ExportMetadata.read(file).preprocessing["resize"] == "timm"
        and ExportMetadata.read(earlier).preprocessing["resize"] == "floor"
    )
    size, differing = said["size"], 0
    for shape in SHAPES:
        image = picture(*shape)
        scale = max(size[0] / image.height, size[1] / image.width)
        side = [max(n, int(m * scale)) for n, m in zip(size, shape[::-1], strict=True)]
        resized = functional.resize(image, side, interpolation=Image.Resampling.BICUBIC)
        cropped = functional.center_crop(resized, list(size))
        values = np.asarray(cropped, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
        wanted = (torch.from_numpy(values) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
            STD
        ).view(3, 1, 1)
        found = on_image(ready(earlier)[0].task.transform(), image)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        differing += not torch.equal(found, on_image(ready(file)[0].task.transform(), image))
    assert differing or size == (32, 32)
