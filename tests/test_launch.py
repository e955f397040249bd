"""The scripts of launch/: the demo's weights, and the report of finished runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from timm.models.vision_transformer import VisionTransformer

LAUNCH = Path(__file__).parent.parent / "launch"


def script(name: str) -> ModuleType:
    """A script of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exported(state: dict[str, torch.Tensor], depth: int) -> onnx.ModelProto:
    """A graph that holds a ViT's weights as the published export does."""
    stored: dict[str, torch.Tensor] = {}
    nodes = []

    def matmul(node: str, weight: torch.Tensor) -> None:
        name = f"onnx::MatMul_{len(stored)}"
        stored[name] = weight.T
        nodes.append(helper.make_node("MatMul", ["x", name], ["y"], name=f"{node}/MatMul"))

    stored["backbone.embeddings.cls_token"] = state["cls_token"]
    for kind in ("weight", "bias"):
        name = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        stored[name] = state[f"patch_embed.proj.{kind}"]
        stored[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    stored["onnx::Concat_1"] = state["pos_embed"][:, :1]
    stored["onnx::Reshape_2"] = state["pos_embed"][:, 1:]
    for index in range(depth):
        old, node = f"backbone.encoder.layer.{index}", f"/backbone/encoder/layer.{index}"
        block = {
            name.removeprefix(f"blocks.{index}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{index}.")
        }
        for part, weight, bias in zip(
            ("query", "key", "value"),
            block["attn.qkv.weight"].chunk(3),
            block["attn.qkv.bias"].chunk(3),
            strict=True,
        ):
            matmul(f"{node}/attention/attention/{part}", weight)
            stored[f"{old}.attention.attention.{part}.bias"] = bias
        matmul(f"{node}/attention/output/dense", block["attn.proj.weight"])
        stored[f"{old}.attention.output.dense.bias"] = block["attn.proj.bias"]
        for layer in ("fc1", "fc2"):
            matmul(f"{node}/mlp/{layer}", block[f"mlp.{layer}.weight"])
            stored[f"{old}.mlp.{layer}.bias"] = block[f"mlp.{layer}.bias"]
        for number in (1, 2):
            stored[f"{old}.layer_scale{number}.lambda1"] = block[f"ls{number}.gamma"]
            for kind in ("weight", "bias"):
                stored[f"{old}.norm{number}.{kind}"] = block[f"norm{number}.{kind}"]
    tensors = [
        numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in stored.items()
    ]
    return helper.make_model(helper.make_graph(nodes, "export", [], [], tensors))


def test_the_exports_weights_are_found_again() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=12, depth=2, num_heads=3, init_values=1, num_classes=0
    )
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    found = script("fetch_demo").timm_state_dict(exported(state, 2), depth=2)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value), name


def test_the_report_shows_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, accuracy in (("one", 0.75), ("two", 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        last = {"samples": 604.0, "accuracy": accuracy, "balanced_accuracy": 0.7, "step": 2}
        summary = {
            **{"alpha": 0.5, "beta": 0.5, "arithmetic": "exact", "memory": "reverse", "steps": 2},
            **{"certificate_failures": 0, "peak_memory_bytes": 2**30, "seconds": 9.0},
            "last": last,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        lines = [{"step": 1, "loss": 1.0, "beta": 0.1}, {"step": 2, "val_accuracy": accuracy}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    picture = tmp_path / "curves.png"
    arguments = ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", arguments)
    script("report").main()
    text = capsys.readouterr().out
    assert "| accuracy | 0.750 | 0.500 |" in text and "1024 MiB" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
