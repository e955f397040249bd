"""torchvision's VisionTransformer: its own calls and outputs, reversed exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import dr2dist
from tests.models import images
from tests.modes import one_step
from tests.test_backbones import CONVENTIONAL, assert_close, assert_state_is_of

DEPTH = 4


def build(seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=DEPTH,
        num_heads=3,
        hidden_dim=48,
        mlp_dim=96,
        num_classes=5,
        **options,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


STEM = [ConvStemConfig(out_channels=8, kernel_size=3, stride=2) for _ in range(3)]


@pytest.mark.parametrize("options", [{}, {"representation_size": 7}, {"conv_stem_configs": STEM}])
def test_conventional_setting_is_the_model_itself(options: dict[str, Any]) -> None:
    model = build(**options).eval()
    net = dr2dist.convert(model, **CONVENTIONAL)
    assert_state_is_of(net, model)
    assert isinstance(net, VisionTransformer) and len(net.chains[0].functions) == 2 * DEPTH
    assert_close(net(images()), model(images()))
    seen: list[Tensor] = []
    hook = model.encoder.register_forward_hook(lambda *given: seen.append(given[-1]))
    model(images())
    hook.remove()
    assert_close(net.forward_features(images()), seen[0])
    with torch.no_grad():  # where torch takes its own fast attention
        assert_close(net(images()), model(images()))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_reversal_is_exact_with_dropout_and_slices(bf16: bool) -> None:
    model = build(dropout=0.1, attention_dropout=0.1)
    for slices in ({}, {"chunk_size": 2}, {"chunk_size": 1, "chunk_tokens": 6}):
        found = one_step(model, images(3), bf16, **slices)
        for memory in ("store", "checkpoint"):
            wanted = one_step(model, images(3), bf16, memory=memory, **slices)
            assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_mlps_run_on_some_tokens_and_attention_on_all() -> None:
    seen: dict[str, int] = {}
    net = dr2dist.convert(build(), chunk_size=1, chunk_tokens=6)
    kinds = {module: name.rpartition(".")[2] for name, module in net.named_modules()}

    def note(module: nn.Module, args: Any) -> None:
        kind = kinds.get(module)
        if kind in ("self_attention", "mlp"):
            seen[kind] = max(seen.get(kind, 0), args[0].shape[1])

    with register_module_forward_pre_hook(note):  # one of their own would see whole samples
        net(images(2)).sum().backward()
    assert seen == {"self_attention": 17, "mlp": 6}


def test_copies_hooks_and_what_cannot_be_done(tmp_path: Path) -> None:
    net = dr2dist.convert(build().eval())
    assert torch.equal(copy.deepcopy(net)(images()), net(images()))
    with pytest.raises(dr2dist.UserError, match="torchvision-vit models give no intermediate"):
        net.forward_intermediates(images())
    with pytest.raises(dr2dist.UserError, match=r"make it with timm\.create_model"):
        dr2dist.save(net, tmp_path / "x.safetensors")
    hook = net.encoder.register_forward_hook(lambda *given: None)
    with pytest.raises(dr2dist.UserError, match="encoder has a hook"):
        net(images())
    hook.remove()
    net.encoder.layers[1].mlp[0] = nn.Linear(48, 96)
    assert net(images()).shape == (5, 5)


class OwnEncoder(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.layers, self.ln = encoder.layers, encoder.ln

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(x))


def test_another_encoder_is_refused() -> None:
    model: Any = build()
    model.encoder = OwnEncoder(model.encoder)
    with pytest.raises(dr2dist.UserError, match="is built as torchvision's VisionTransformer, but"):
        dr2dist.convert(model)
