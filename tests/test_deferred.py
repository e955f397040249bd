"""Models built without memory: the same bits, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from dr2dist.backbones.build import build_deferred, build_model
from dr2dist.backbones.deferred import deferred, make_buffers
from dr2dist.errors import UserError
from tests.models import MODELS, VIDEO
from tests.pool import Pool


@pytest.mark.parametrize("kind", [*MODELS, *VIDEO])
def test_every_tensor_has_the_bits_of_the_model_built_whole(kind: str) -> None:
    torch.manual_seed(3)
    make: Any = {**MODELS, **VIDEO}[kind]
    whole, after = make(), torch.rand(3)
    torch.manual_seed(3)
    with deferred() as maker:
        model = make()
    assert torch.equal(after, torch.rand(3))
    pairs = list(zip(whole.named_parameters(), model.named_parameters(), strict=True))
    for (name, value), (other, place) in reversed(pairs):  # any order will do
        assert name == other and place.is_meta
        assert torch.equal(maker.make(place), value), name
    make_buffers(model, maker)
    for (name, value), (other, place) in zip(
        whole.named_buffers(), model.named_buffers(), strict=True
    ):
        assert name == other and torch.equal(place, value), name


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224"]
)
def test_weights_of_a_file_and_a_new_head(name: str, tmp_path: Path) -> None:
    trained = timm.create_model(name, num_classes=9)
    save_file(trained.state_dict(), tmp_path / "trained.safetensors")
    size = (112, 224)  # other than the file's: embeddings are resized
    options = {"weights": str(tmp_path / "trained.safetensors"), "image_size": size}
    torch.manual_seed(5)
    whole = build_model(name, num_classes=4, **options)  # type: ignore[arg-type]
    torch.manual_seed(5)
    model, read = build_deferred(name, num_classes=4, **options)  # type: ignore[arg-type]
    for key, value in whole.named_parameters():
        assert torch.equal(read(key), value), key
    assert all(parameter.is_meta for parameter in model.parameters())
    for (key, value), (_, other) in zip(whole.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(value, other), key
    with pytest.raises(UserError, match="hub builds the whole model"):
        build_deferred(name, weights="hub", image_size=None, num_classes=4)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_zero_3_holds_one_whole_parameter_at_a_time(bf16: bool, two_ranks: Pool) -> None:
    for held, largest, whole, equal in two_ranks.run("tests.cases:sharded_build", bf16=bf16):
        # Its shards, the one that is being made, and no more.
        assert held <= 0.51 * whole and largest < 0.05 * whole
        assert equal
