"""What `convert` cannot take: each is told in one line what it is, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

import dr2dist
from dr2dist.backbones import videomae
from dr2dist.backbones.convert import known_families
from tests.models import build

MODULES = {
    "timm.models.beit",
    "timm.models.convnext",
    "timm.models.deit",
    "timm.models.eva",
    "timm.models.swin_transformer",
    "timm.models.swin_transformer_v2",
    "timm.models.vision_transformer",
    "timm.models.vision_transformer_hybrid",
    "timm.models.vision_transformer_relpos",
    "timm.models.vitamin",
}
"""Where timm builds the models of the supported families, and no others."""


class Engine(nn.Module):
    """Like DeepSpeed's, around a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled_in_place() -> nn.Module:
    model = build("vit")
    model.compile()
    return model


GIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "name": (lambda: "vit_small_patch16_224", r"timm\.create_model\('vit_small_patch16_224'\)"),
    "misspelt name": (lambda: "vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
    "path": (lambda: Path("a/b.pth"), r"'a/b\.pth' is a path, .* dr2dist\.load reads an exported"),
    "path as text": (lambda: "x.safetensors", r"'x\.safetensors' is a path"),
    "state dict": (lambda: build("vit").state_dict(), r"a state dict of \d+ entries .*load_state"),
    "checkpoint": (lambda: {"epoch": 1, "model": {}}, "a dict of 2 entries is given, a model is"),
    "none": (lambda: None, "None is given, a model is needed"),
    "list": (lambda: [1], "a list is given, a model is needed"),
    "class": (lambda: VisionTransformer, "VisionTransformer is a class, a model is needed"),
    "data parallel": (lambda: nn.DataParallel(build("vit")), r"DataParallel is .* its \.module"),
    "engine": (lambda: Engine(build("vit")), r"Engine is around a model: convert its \.module"),
    "compiled": (lambda: torch.compile(build("vit")), r"convert\(model\._orig_mod, compile=True"),
    "compiled in place": (compiled_in_place, r"convert\(copy\.deepcopy\(model\), compile=True\)"),
    "converted": (lambda: dr2dist.convert(build("vit")), "converted already"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_is_no_model_or_is_around_one(kind: str) -> None:
    make, message = GIVEN[kind]
    with pytest.raises(dr2dist.UserError, match=message) as caught:
        dr2dist.convert(make())
    assert "\n" not in str(caught.value)


class OwnBlock(Block):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x) * 0.5


class OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward_features(x) * 0.5


class OwnForward(VisionTransformer):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return super().forward(x * 2)


class OwnHead(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x) * 0.5


def _replaced(method: str) -> nn.Module:
    model = build("vit")
    own = getattr(model, method)
    setattr(model, method, lambda x: own(x * 2))
    return model


def _with_replaced_block() -> nn.Module:
    model: Any = build("vit")
    model.blocks[1].forward = nn.Identity().forward
    return model


def _with_other_block() -> nn.Module:
    model: Any = build("vit")
    model.blocks[3] = nn.Linear(48, 48)
    return model


_small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}

UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "resnet": (
        lambda: timm.create_model("resnet18"),
        r"ResNet of timm\.models\.resnet is not supported: .* such as layer1\.0, a BasicBlock; ",
    ),
    "mvit": (lambda: timm.create_model("mvitv2_tiny"), r"stages\.1\.blocks\.0, a MultiScaleBlock"),
    "swinv2": (
        lambda: timm.create_model("swinv2_cr_tiny_ns_224"),
        r"stages\.0\.blocks\.0, a SwinTransformerV2CrBlock",
    ),
    "torchvision": (
        lambda: torchvision.models.resnet18(),
        r"ResNet of torchvision\.models\.resnet is not supported: .*layer1\.0, a BasicBlock",
    ),
    "without blocks": (lambda: nn.Linear(2, 2), "Linear .*it has no list of like blocks"),
    "own features": (
        lambda: OwnFeatures(depth=1, **_small),
        "it is built as timm's VisionTransformer, but has a forward_features of its own",
    ),
    "own forward": (lambda: OwnForward(depth=1, **_small), "but has a forward of its own"),
    "own head": (lambda: OwnHead(depth=1, **_small), "but has a forward_head of its own"),
    "replaced forward": (lambda: _replaced("forward"), "the model's forward was replaced"),
    "replaced head": (lambda: _replaced("forward_head"), "the model's forward_head was replaced"),
    "replaced block": (_with_replaced_block, r"blocks\.1 is a Block with a forward of its own"),
    "own block": (
        lambda: VisionTransformer(depth=2, block_fn=OwnBlock, **_small),
        r"blocks\.0 is a OwnBlock with a forward of its own, which need not be x \+ F\(x\); supp",
    ),
    "other block": (_with_other_block, r"blocks\.3 is a Linear; supported blocks are Block, "),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_model_that_is_not_supported_is_told_what_is_missing(kind: str) -> None:
    make, message = UNSUPPORTED[kind]
    with torch.device("meta"):
        model = make()
    with pytest.raises(dr2dist.UserError, match=message) as caught:
        dr2dist.convert(model)
    text = str(caught.value)
    assert "\n" not in text
    assert "docs/backbones.md" in text and "dr2dist.register_backbone" in text


def listed_patterns() -> list[str]:
    """The patterns of names that a refusal says are supported, classes left out."""
    with pytest.raises(dr2dist.UserError) as caught:
        dr2dist.convert(nn.Linear(2, 2))
    families = re.findall(r"\(([^()]*)\)", str(caught.value).partition("supported families: ")[2])
    return [p for f in families for p in f.rpartition(": ")[2].split(", ")]


def test_a_refusal_lists_every_family_and_no_name_of_another_models() -> None:
    patterns = listed_patterns()
    assert patterns == [p for found in dr2dist.supported_backbones().values() for p in found]
    # Other tests may have registered families of their own.
    own = [each for each in known_families() if type(each).__module__.startswith("dr2dist.")]
    told = [pattern for family in own for pattern in family.patterns]
    assert len(told) > 15
    names = {*timm.list_models(), *torchvision.models.list_models(), *videomae.SHAPES}
    for pattern in told:
        assert any(fnmatchcase(name, pattern) for name in names), pattern
    for name in timm.list_models():
        listed = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if timm.models.model_entrypoint(name).__module__ not in MODULES:
            assert not listed, (name, listed)
        else:
            assert listed or name.startswith("test_"), name


@pytest.mark.slow
def test_a_name_is_listed_if_and_only_if_its_model_converts() -> None:
    # Of the names that are not listed one of each of timm's modules.
    patterns, modules, converted = listed_patterns(), set(), 0
    for name in timm.list_models():
        listed = any(fnmatchcase(name, pattern) for pattern in patterns)
        module = timm.models.model_entrypoint(name).__module__
        if not listed and (module in modules or name.startswith("test_")):
            continue
        modules.add(module)
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except (RuntimeError, NotImplementedError):
                continue  # a model of another family that cannot be built on meta
        try:
            net = dr2dist.convert(model)
        except dr2dist.UserError as error:
            assert not listed and "is not supported" in str(error), name
            continue
        assert listed, name
        names = list(net.state_dict())
        names.remove("reversible_alpha_beta")
        assert names == list(model.state_dict()), name
        converted += 1
    assert converted > 280, converted
