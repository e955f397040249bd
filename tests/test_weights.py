"""Weights of files in the layouts that others publish, and images of any number of channels."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dr2dist
from dr2dist.assembly import Blueprint
from dr2dist.backbones.build import build_deferred, build_model
from dr2dist.backbones.channels import input_channels
from dr2dist.backbones.measure import measure, on_meta, training_flops
from dr2dist.backbones.weights import read_weights
from dr2dist.config import load_config
from dr2dist.errors import UserError
from dr2dist.parallel.pipeline.layers import layers_of
from tests.test_config import MAIN

NAME = "test_vit"
State = dict[str, Tensor]


def state_of(seed: int = 0, **options: Any) -> State:
    torch.manual_seed(seed)
    model = timm.create_model(NAME, **{"num_classes": 4, **options})
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def others(state: State) -> State:
    """The same names with other values."""
    return {name: value + 1 for name, value in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": NAME},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "module": lambda state: {"module": state, "ds_version": "0.1"},
    "arguments": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3)},
    "averaged": lambda state: {"state_dict": others(state), "state_dict_ema": state},
    "model_ema": lambda state: {"model": others(state), "model_ema": state},
    "no average": lambda state: {"state_dict": state, "state_dict_ema": None},
    "distributed": lambda state: {"state_dict": prefixed("module.", state)},
    "compiled": lambda state: prefixed("_orig_mod.module.", state),
    "teacher": lambda state: {
        "student": prefixed("backbone.", others(state)),
        "teacher": prefixed("module.backbone.", state) | {"module.dino_head.weight": torch.ones(2)},
    },
    "lightning": lambda state: {"state_dict": prefixed("model.", state), "hparams_name": "x"},
    "nested": lambda state: {"model": {"state_dict": state}},
    "parameters": lambda state: {n: nn.Parameter(value) for n, value in state.items()},
}


def assert_holds(model: nn.Module, state: State) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_are_read(layout: str, tmp_path: Path) -> None:
    state = state_of()
    for ending, archive in ((".pth", True), (".pt", False), (".bin", True)):
        path = tmp_path / f"weights{ending}"
        torch.save(LAYOUTS[layout](state), path, _use_new_zipfile_serialization=archive)
        model = build_model(NAME, weights=str(path), image_size=None, num_classes=4)
        assert_holds(model, state)


def test_files_are_mapped_and_values_have_the_models_dtype(tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    torch.save({"model": {name: value.half() for name, value in state_of().items()}}, path)
    found = read_weights(path)
    assert found and str(path) in Path("/proc/self/maps").read_text()
    options: dict[str, Any] = {"image_size": (96, 64), "num_classes": 3, "in_channels": 5}
    torch.manual_seed(1)
    whole = build_model(NAME, weights=str(path), **options)
    torch.manual_seed(1)
    model, read = build_deferred(NAME, weights=str(path), **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    for name, value in whole.named_parameters():
        assert value.dtype == torch.float32 and torch.equal(read(name), value), name


def test_names_that_deit_3_was_published_with(tmp_path: Path) -> None:
    name = "deit3_small_patch16_224"
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    state = timm.create_model(name, num_classes=4, **options).state_dict()
    published = {key.replace("ls1.gamma", "gamma_1"): value for key, value in state.items()}
    published = {key.replace("ls2.gamma", "gamma_2"): value for key, value in published.items()}
    torch.save({"model": published}, tmp_path / "deit3.pth")
    weights = str(tmp_path / "deit3.pth")
    model = build_model(name, weights=weights, image_size=None, num_classes=4, options=options)
    assert "blocks.0.gamma_1" in published
    assert_holds(model, state)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def _script(path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))


def _cut(path: Path) -> None:
    torch.save(state_of(), path)
    path.write_bytes(path.read_bytes()[:5000])


WRONG: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "code.pth",
        lambda p: torch.save({"model": Code()}, p),
        "code.pth holds posix.mkdir, not",
    ),
    ("module.pt", lambda p: torch.save(nn.Linear(2, 2), p), "holds torch.nn.modules.linear.Linear"),
    ("script.pt", _script, "script.pt is a TorchScript archive, allowed is a state dict"),
    ("noise.pth", lambda p: p.write_bytes(bytes(range(256)) * 9), "damaged, or not written by tor"),
    (
        "empty.bin",
        lambda p: p.write_bytes(b""),
        "empty.bin is damaged, or not written by",
    ),
    ("cut.pth", _cut, "cut.pth is damaged, or not written by torch.save"),
    ("list.pth", lambda p: torch.save([1, 2], p), "holds a list, allowed is a state dict"),
    ("run.pth", lambda p: torch.save({"epoch": 3}, p), "holds no weights but ['epoch'], allowed"),
    ("x.safetensors", lambda p: torch.save({}, p), "is damaged, or not of safetensors"),
    ("folder.pth", lambda p: p.mkdir(), "folder.pth is a folder, a file is needed"),
    ("weights.npz", lambda p: p.write_bytes(b""), "ends in '.npz', allowed is .safetensors, .pth"),
    (
        "other.pth",
        lambda p: torch.save({"fc.weight": torch.ones(2, 2)}, p),
        "other.pth does not fit VisionTransformer: missing ['blocks.0",
    ),
    (
        "strange.pth",
        lambda p: torch.save(state_of() | {"pos_embed": torch.ones(3)}, p),
        "strange.pth does not fit VisionTransformer: IndexError",
    ),
]


@pytest.mark.parametrize(("name", "write", "message"), WRONG, ids=[wrong[0] for wrong in WRONG])
def test_what_is_wrong_with_a_file_is_told_in_one_line(
    name: str,
    write: Callable[[Path], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    for build in (build_model, build_deferred):
        with pytest.raises(UserError) as caught:
            build(NAME, weights=str(tmp_path / name), image_size=None, num_classes=4)
        text = str(caught.value)
        assert text.startswith("model.weights: ") and message in text, text
        assert "\n" not in text and "weights_only" not in text, text
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "dinov2_small.pth").touch()
    with pytest.raises(UserError, match=r"does not exist; did you mean 'dinov2_small\.pth'\?"):
        read_weights(tmp_path / "dinov2_smal.pth")
    with pytest.raises(UserError, match=r"does not exist$"):
        read_weights(tmp_path / "nowhere" / "x.pth")


@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (3, 4), (3, 8), (4, 3), (1, 3), (2, 2)])
def test_the_first_convolution_is_adapted_as_timm_does(
    given: int, wanted: int, tmp_path: Path
) -> None:
    state = state_of(in_chans=given)
    path = tmp_path / "trained.safetensors"
    save_file(state, path)
    options: dict[str, Any] = {"image_size": None, "num_classes": 4, "in_channels": wanted}
    model = build_model(NAME, weights=str(path), **options)
    cfg = {"file": str(path), "input_size": (given, 160, 160), "num_classes": 4}
    theirs = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=4, in_chans=wanted
    )
    assert_holds(model, theirs.state_dict())
    _, read = build_deferred(NAME, weights=str(path), **options)
    for name, value in theirs.named_parameters():
        assert torch.equal(read(name), value), name
    assert model(torch.randn(1, wanted, 160, 160)).shape == (1, 4)


def test_models_of_other_channels_are_counted_and_cut_into_layers() -> None:
    config = load_config(MAIN, ["model.in_channels=5"])
    assert Blueprint.of(config, ("a", "b")).in_channels == 5
    flops = {}
    for channels in (3, 5):
        with torch.device("meta"):
            model = build_model(
                NAME, weights=None, image_size=(32, 32), num_classes=4, in_channels=channels
            )
        assert input_channels(model) == channels
        assert input_channels(nn.Sequential(nn.Identity(), model)) == channels
        net = dr2dist.convert(model)
        flops[channels] = training_flops(measure(on_meta(net)))
        patches, width = layers_of(net)[0].shape[1:]
        patches -= model.num_prefix_tokens
    # Two more channels of 16 x 16 pixels a patch, forward and back.
    assert flops[5] - flops[3] == 3 * 2 * patches * width * 2 * 16 * 16


def test_channels_have_a_setting_of_their_own() -> None:
    with pytest.raises(UserError, match=r"in_chans has a setting of its own, model\.in_channels"):
        load_config(MAIN, ["model.options={in_chans: 4}"])
    with pytest.raises(UserError, match=r"model\.in_channels: found 0"):
        load_config(MAIN, ["model.in_channels=0"])
