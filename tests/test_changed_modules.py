"""What is done to a converted network's modules: right, or told at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dr2dist
from tests.models import build, images

CONVENTIONAL: dict[str, Any] = {"alpha": 1, "beta": 0, "arithmetic": "float", "memory": "store"}


class Centred(nn.Module):
    """Takes the mean over tokens off."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-2, keepdim=True)


def plain_attention(self: Any, x: Tensor, **_: Any) -> Tensor:
    """An attention that does not ask torch for it."""
    shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
    q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    found = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
    return self.proj(found.transpose(1, 2).reshape(x.shape))


def centre_norm(net: Any) -> None:
    net.blocks[0].norm2 = Centred()


def centre_queries(net: Any) -> None:
    net.blocks[0].attn.q_norm = Centred()


def centre_by_hook(net: Any) -> None:
    net.blocks[0].mlp.fc2.register_forward_hook(lambda module, args, x: Centred()(x))


def patch_attention(net: Any) -> None:
    attention = net.blocks[0].attn
    attention.forward = MethodType(plain_attention, attention)


@pytest.mark.parametrize("change", [centre_norm, centre_queries, centre_by_hook, patch_attention])
def test_tokens_are_cut_only_where_nothing_unknown_looks_at_others(
    change: Callable[[Any], None],
) -> None:
    model = build("vit", depth=2).eval()
    net = dr2dist.convert(copy.deepcopy(model), **CONVENTIONAL, chunk_size=1, chunk_tokens=5)
    change(model)
    change(net)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), model(images()))


def test_all_of_timms_mlps_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return known(self, x)

    known = GeGluMlp.forward
    monkeypatch.setattr(GeGluMlp, "forward", forward)
    model = timm.create_model("vitamin_small_224", img_size=32, depth=1).eval()
    net = dr2dist.convert(model, **CONVENTIONAL, chunk_size=1, chunk_tokens=2)
    with torch.no_grad():
        net(images(1))
    assert len(seen) > 1 and max(seen) <= 2


def test_a_windows_norm_may_look_at_all_of_them() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean((1, 2), keepdim=True)

    model = build("swin", depth=3).eval()
    model.layers[0].blocks[0].norm1 = Whole()  # type: ignore[union-attr,index]
    net = dr2dist.convert(model, **CONVENTIONAL, chunk_size=1, chunk_tokens=16)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), model(images()))


def test_an_attention_of_ones_own_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = build("vit", depth=2).eval()
    net = dr2dist.convert(model, **CONVENTIONAL, chunk_size=1, chunk_tokens=5)
    monkeypatch.setattr(type(model.blocks[0].attn), "forward", plain_attention)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), model(images()))


def test_a_forward_that_would_not_be_called_is_refused() -> None:
    net: Any = dr2dist.convert(build("vit", depth=2))
    own = net.blocks[0].forward
    net.blocks[0].forward = lambda x, **options: own(x)
    with pytest.raises(dr2dist.UserError, match=r"blocks\.0 has a forward that was replaced"):
        net(images())
    del net.blocks[0].forward
    net.forward_features = lambda x: x
    with pytest.raises(dr2dist.UserError, match="network's forward_features was replaced"):
        net(images())


MODES: list[dict[str, Any]] = [{}, {"memory": "store"}, {"memory": "checkpoint"}]
PLACES = [
    ("vit", "head", False),
    ("vit", "norm", False),
    ("vit", "blocks.0.norm1", True),
    ("vit", "blocks.1.mlp", False),
    ("swin", "layers.1.downsample", False),
    ("convnext", "stages.1.downsample", False),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "place", "before"), PLACES)
def test_a_loss_on_an_activation_that_a_hook_took_is_never_silent(
    kind: str, place: str, before: bool, mode: dict[str, Any]
) -> None:
    net, taken = dr2dist.convert(build(kind, depth=3).train(), **mode), []
    module = net.get_submodule(place)
    if before:
        module.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    else:
        module.register_forward_hook(lambda module, args, output: taken.append(output))
    net(images())
    with pytest.raises(RuntimeError, match="forward_features and forward_head"):
        taken[0].mean().backward()
    net(images()).square().sum().backward()  # reading is no loss
    assert net.certificate().failures == 0 and len(taken) > 1


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def double_scale(net: Any) -> None:
    parametrize.register_parametrization(net.blocks[0], "gamma_1", Doubled())


def double_positions(net: Any) -> None:
    parametrize.register_parametrization(net, "pos_embed", Doubled())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", [double_scale, double_positions])
def test_parameters_of_blocks_and_networks_may_be_parametrised(
    change: Callable[[Any], None], after: bool
) -> None:
    def converted(**setting: Any) -> Any:
        model = build("beit", depth=2, use_abs_pos_emb=True)
        if not after:
            change(model)
        net = dr2dist.convert(model, **setting)
        if after:
            change(net)
        return net

    model = build("beit", depth=2, use_abs_pos_emb=True).eval()
    change(model)
    net = converted(**CONVENTIONAL).eval()
    with torch.no_grad():
        assert torch.equal(net(images()), model(images()))
        assert torch.equal(copy.deepcopy(net)(images()), model(images()))
    stored, reversed_ = converted(memory="store"), converted()
    for each in (stored, reversed_):
        each(images()).square().sum().backward()
    assert reversed_.certificate().failures == 0
    for one, other in zip(stored.parameters(), reversed_.parameters(), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad)


def test_a_parametrised_network_is_not_pickled() -> None:
    net = dr2dist.convert(build("vit", depth=2))
    double_positions(net)
    with pytest.raises(dr2dist.UserError, match="cannot be pickled: save its state_dict"):
        pickle.dumps(net)
