"""dr2dist.save: a plain loop's network as a file that load, evaluate and predict take."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import dr2dist
from dr2dist.backbones.build import build_model
from dr2dist.data.stream import ShardDataset
from dr2dist.inference.evaluate import evaluate
from dr2dist.inference.exported import ready
from dr2dist.inference.predict import predict
from tests.images import FIELDS, make_small_shards

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 64}),
    "vit-other": (
        "vit_tiny_patch16_224",
        {"depth": 2, "img_size": (32, 48), "patch_size": 8, "embed_dim": 96, "num_heads": 4}
        | {"init_values": 0.1, "reg_tokens": 2, "global_pool": "avg", "qk_norm": True}
        | {"mlp_ratio": 2.0, "pre_norm": True, "no_embed_class": True, "class_token": True},
    ),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 64}),
    "clip": (
        "vit_base_patch16_clip_224",
        {"depth": 1, "img_size": 64, "embed_dim": 96, "num_heads": 4},
    ),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 56}),
    "beit": (
        "beit_base_patch16_224",
        {"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads": 4},
    ),
    "relpos": (
        "vit_srelpos_small_patch16_224",
        {"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads": 4, "class_token": True},
    ),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 48, "window_size": 4}),
}


def trained(kind: str, classes: int = 2, **setting: Any) -> Any:
    """A converted network in training mode whose weights are not those of its start."""
    name, options = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=classes, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return dr2dist.convert(model, **{"alpha": 0.7, "beta": 0.3, **setting}).train()


def state(net: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = {name: value.clone() for name, value in net.state_dict().items()}
    return {**values, "modes": [module.training for module in net.modules()]}


def output(net: nn.Module, batch: int = 3) -> Tensor:
    size: Any = net.patch_embed.img_size
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: Tensor = copy.deepcopy(net).eval()(images)
    return result


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "setting", [{}, {"arithmetic": "float", "alpha": 0.9, "beta": 0.1, "hand_on": "mean"}]
)
def test_what_is_saved_computes_the_same(
    kind: str, setting: dict[str, Any], tmp_path: Path
) -> None:
    net, path = trained(kind, **setting), tmp_path / "deep" / "file.safetensors"
    net.patch_embed.eval()  # modules may differ in their modes
    before, stream = state(net), torch.get_rng_state()
    dr2dist.save(net, path)
    after = state(net)
    assert before.pop("modes") == after.pop("modes")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(stream, torch.get_rng_state())
    assert [entry.name for entry in path.parent.iterdir()] == ["file.safetensors"]
    again = dr2dist.load(path)
    assert torch.equal(output(again), output(net))
    assert again.coefficients == net.coefficients and not again.training
    name, _ = MODELS[kind]
    with safe_open(path, "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()
                 if key != "WARNING"}  # fmt: skip
        assert "OTHER OUTPUTS" in file.metadata()["WARNING"]
    model = build_model(
        name,
        weights=None,
        image_size=tuple(facts["image_size"]),
        num_classes=2,
        options=facts["options"],
    )
    model.load_state_dict(load_file(path), strict=True)
    assert facts["classes"] == ["0", "1"] and facts["step"] is None
    dr2dist.save(again, path)  # and once more, over the file
    assert torch.equal(output(dr2dist.load(path)), output(net))


def test_evaluate_and_predict_take_it(tmp_path: Path) -> None:
    shards, path = make_small_shards(tmp_path) / "val", tmp_path / "file.safetensors"
    net = trained("vit")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    dr2dist.save(net, path, classes=["bright", "dark"], mean=mean, std=std)
    cfg = dr2dist.load(path).pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["label_names"]) == (mean, std, ("bright", "dark"))
    task = ready(path)[0].task
    dataset = ShardDataset(shards, FIELDS, task.transform())
    samples = [dataset[0, index].values for index in range(len(dataset))]
    images = torch.stack([sample["image"] for sample in samples])
    with torch.no_grad():
        logits = copy.deepcopy(net).eval()(images)
    labels = torch.tensor([sample["label"] for sample in samples])
    right = (logits.argmax(1) == labels).float().mean()
    report = evaluate(path, shards, progress=False)
    assert report["accuracy"] == pytest.approx(float(right))
    assert report["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))
    rows = predict(path, [tmp_path / "images"], progress=False)[:3]
    assert {row["class"] for row in rows} <= {"bright", "dark"}


def test_copies_and_other_types_are_saved(tmp_path: Path) -> None:
    path, net = tmp_path / "file.safetensors", trained("vit")
    averaged = torch.optim.swa_utils.AveragedModel(net)
    with pytest.raises(dr2dist.UserError, match=r"AveragedModel is around .*save its module"):
        dr2dist.save(averaged, path)
    dr2dist.save(averaged.module, path)
    assert torch.equal(output(dr2dist.load(path)), output(net))
    half = copy.deepcopy(net).bfloat16()
    dr2dist.save(half, path)
    assert {value.dtype for value in load_file(path).values()} == {torch.float32}
    widened = copy.deepcopy(half).float()
    assert torch.equal(output(dr2dist.load(path)), output(widened))
    sliced = trained("vit", chunk_size=1, chunk_tokens=5, memory="checkpoint")
    dr2dist.save(sliced, path)
    torch.testing.assert_close(output(dr2dist.load(path)), output(sliced))


def test_options_that_cannot_be_read_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("mine")
    given: dict[str, Any] = {"img_size": 32, "depth": 1, "num_classes": 2}
    scaled = timm.create_model("vit_tiny_patch16_224", **given, scale_mlp_norm=True)
    with pytest.raises(
        dr2dist.UserError, match=r"blocks\.0\.mlp\.norm\.bias is \[768\], in timm's"
    ):
        dr2dist.save(dr2dist.convert(scaled), path)
    assert path.read_text() == "mine"
    dr2dist.save(dr2dist.convert(scaled), path, scale_mlp_norm=True)
    # The same names and shapes, and another function.
    name, size = "vit_medium_patch16_rope_reg1_gap_256", {"img_size": 64, "num_classes": 2}
    turned = timm.create_model(name, depth=1, rope_temperature=7.0, **size)
    with pytest.raises(dr2dist.UserError, match=r"computes other outputs .*; give the options"):
        dr2dist.save(dr2dist.convert(turned), path)
    dr2dist.save(dr2dist.convert(turned), path, rope_temperature=7.0)
    assert torch.equal(output(dr2dist.load(path)), output(dr2dist.convert(turned)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.safetensors"]


def test_options_may_be_lists(tmp_path: Path) -> None:
    path, sizes = tmp_path / "file.safetensors", {"img_size": 64, "window_size": 2}
    depths = {"depths": (1, 2, 1, 1), "num_classes": 2}
    swin = timm.create_model("swin_tiny_patch4_window7_224", **sizes, **depths)
    dr2dist.save(dr2dist.convert(swin), path, depths=[1, 2, 1, 1], window_size=2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        loaded, own = dr2dist.load(path), dr2dist.convert(swin).eval()
        assert torch.equal(loaded.eval()(images), own(images))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    net = trained("vit")
    adapted = copy.deepcopy(net)
    adapted.blocks[0].adapter = nn.Linear(2, 2)
    broken = copy.deepcopy(net)
    broken.head.weight.data[0] = torch.nan
    homeless = copy.deepcopy(net)
    homeless.pretrained_cfg = {}
    features = dr2dist.convert(timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0))
    plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    for wrong, options, message in [
        (
            torch.compile(net),
            {},
            "OptimizedModule is around a network: save its module, net._orig",
        ),
        (plain, {}, "VisionTransformer is not converted; give what dr2dist.convert returns"),
        (adapted, {}, r"blocks\.0\.adapter\.bias is \[2\], in timm's .*not there"),
        (broken, {}, "output on a random sample is not finite"),
        (homeless, {}, "pretrained_cfg names no architecture"),
        (features, {}, "it needs a classifier"),
        (net, {"classes": ["a"]}, "classes are 1 names, 1 of them different; the .* 2 outputs"),
        (net, {"classes": ["a", "a"]}, "classes are 2 names, 1 of them different"),
        (net, {"depths": {2: 2}}, r"depths is \{2: 2\}, allowed are numbers, texts, truth values"),
        (net, {"mean": (0.5,)}, "mean"),
        (net, {"dephh": 2}, "cannot be built with .*'dephh'"),
        (net, {"depth": 3}, r"blocks\.2\.attn\.proj\.bias is not there, in timm's .*depth=3"),
    ]:
        with pytest.raises(dr2dist.UserError, match=message) as error:
            dr2dist.save(wrong, path, **options)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
