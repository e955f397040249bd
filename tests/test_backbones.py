"""Converted models against timm's own, family by family."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import dr2dist
from dr2dist.backbones import convert as registry
from dr2dist.training.groups import parameter_groups
from tests.bounds import float_bound
from tests.chain_helpers import error
from tests.models import DEPTH, MAPS, MODELS, build, images

CONVENTIONAL: dict[str, Any] = {
    "alpha": 1.0,
    "beta": 0.0,
    "arithmetic": "float",
    "memory": "store",
}


def assert_close(found: Any, wanted: Any) -> None:
    """Equal structure, tensors within fp32's roundings of 1 or the largest value, if larger."""
    if isinstance(wanted, Tensor):
        assert found.shape == wanted.shape
        bound = float_bound(2 * DEPTH)
        assert (found - wanted).abs().max() <= bound * wanted.abs().max().clamp(min=1)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(found[key], value)
    else:
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)


def assert_state_is_of(net: nn.Module, model: nn.Module) -> None:
    """The model's own names in their order; the coefficients besides."""
    names = list(net.state_dict())
    names.remove("reversible_alpha_beta")
    assert names == list(model.state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_conventional_setting_is_the_model_itself(kind: str) -> None:
    model = build(kind).eval()
    net = dr2dist.convert(model, **CONVENTIONAL)
    x = images()
    assert_state_is_of(net, model)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert isinstance(net, type(model))
    assert_close(net(x), model(x))
    features = model.forward_features(x)
    assert_close(net.forward_features(x), features)
    for pre_logits in (False, True):
        wanted = model.forward_head(features, pre_logits=pre_logits)
        assert_close(net.forward_head(features, pre_logits=pre_logits), wanted)


def _intermediate_options(kind: str) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [
        {"indices": 2},
        {"indices": [0, 2], "norm": True},
        {"indices": [1], "stop_early": True},
        {"indices": 1, "intermediates_only": True},
    ]
    if kind not in MAPS:
        options += [{"indices": [3, 1], "return_prefix_tokens": True, "output_fmt": "NLC"}]
    if kind.startswith("vit"):
        options += [{"indices": 2, "return_prefix_tokens": True, "output_dict": True}]
    return options


@pytest.mark.parametrize("kind", MODELS)
def test_intermediate_features_are_those_of_timm(kind: str) -> None:
    model = build(kind).eval()
    net = dr2dist.convert(model, **CONVENTIONAL)
    for options in _intermediate_options(kind):
        wanted = model.forward_intermediates(images(), **options)
        assert_close(net.forward_intermediates(images(), **options), wanted)


def test_masks_reach_the_functions_and_are_cut_with_the_batch() -> None:
    x = images(4)
    tokens = 17
    masks = [torch.rand(tokens, tokens) > 0.3, torch.rand(4, 1, tokens, tokens) > 0.3]
    for kind in ("vit", "eva-rope"):
        model = build(kind).eval()
        net = dr2dist.convert(model, **CONVENTIONAL, chunk_size=3)
        for mask in masks:
            mask = mask | torch.eye(tokens, dtype=torch.bool)
            assert_close(net(x, attn_mask=mask), model(x, attn_mask=mask))
        assert_close(net(x, is_causal=True), model(x, is_causal=True))


@pytest.mark.parametrize("kind", MODELS)
def test_slices_of_tokens_compute_what_timm_does(kind: str) -> None:
    # In fp64: post-norm models amplify what fp32 rounds off. The last slice is shorter.
    chunk_tokens = 48 if kind in MAPS else 5
    model = build(kind, depth=4).train().double()
    x = images(2).double().requires_grad_()
    wanted = model(x)
    total = sum(wanted) if isinstance(wanted, tuple) else wanted
    total.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    of_input, x.grad = x.grad, None
    for memory in ("store", "checkpoint"):
        settings = {**CONVENTIONAL, "memory": memory}
        net = dr2dist.convert(model, **settings, chunk_size=1, chunk_tokens=chunk_tokens)
        model.zero_grad()
        output = net(x)
        assert_close(output, wanted)
        output = sum(output) if isinstance(output, tuple) else output
        output.square().sum().backward()
        assert error(x.grad, of_input) < 1e-9
        x.grad = None
        for name, grad in grads.items():
            found = net.get_parameter(name).grad
            assert grad is None or grad.norm() < 1e-9 or error(found, grad) < 1e-6, name


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("vit", 7),
        ("eva-rope", 7),
        ("beit", 7),
        ("relpos", 7),
        ("swin", 4 * 16),
        ("swin-v2", 4 * 16),
    ],
)
def test_slices_of_tokens_are_taken_where_functions_allow_it(kind: str, most: int) -> None:
    seen: dict[str, int] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        name = type(module).__name__
        if name in watched:
            seen[name] = max(seen.get(name, 0), args[0][..., 0].numel())

    net = dr2dist.convert(build(kind), chunk_size=1, chunk_tokens=7)
    named = dict(net.named_modules()).items()
    watched = {type(m).__name__ for name, m in named if name.endswith((".attn", ".mlp"))}
    with register_module_forward_pre_hook(note):  # one of their own would see whole samples
        net(images(2)).square().sum().backward()
    # A row of windows is the least that Swin's attention can take.
    assert len(seen) == 2 and max(seen.values()) <= most, seen
    assert net.certificate().failures == 0


def _step(model: nn.Module, bf16: bool, **setting: Any) -> Any:
    net = dr2dist.convert(model, **setting).train()
    x = images(3).requires_grad_()
    net.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = net(x)
    output = sum(output) if isinstance(output, tuple) else output
    output.float().square().sum().backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    return output.detach(), x.grad, grads, net.certificate(), torch.get_rng_state()


@pytest.mark.parametrize("kind", MODELS)
def test_reversal_is_exact_with_dropout_and_slices(kind: str) -> None:
    rates = {"proj_drop_rate": 0.1, "drop_path_rate": 0.2}
    model = build(kind, depth=4, **rates)
    in_tokens = {"chunk_size": 1, "chunk_tokens": 48 if kind in MAPS else 6}
    for slices, bf16 in (({}, False), ({"chunk_size": 2}, False), (in_tokens, True)):
        output, of_input, grads, certificate, rng = _step(model, bf16, **slices)
        assert certificate.failures == 0 and certificate.remainder_bytes > 0
        assert all(chain.verified for chain in certificate.chains)
        for memory in ("store", "checkpoint"):
            other = _step(model, bf16, memory=memory, **slices)
            assert torch.equal(output, other[0])
            assert torch.equal(of_input, other[1])
            assert torch.equal(rng, other[4])
            for name, grad in grads.items():
                assert grad is None or torch.equal(grad, other[2][name]), name
        missing = [name for name, grad in grads.items() if grad is None]
        assert not missing, missing


def test_intermediates_carry_gradients() -> None:
    model = build("vit")
    grads = []
    for memory in ("reverse", "store"):
        net = dr2dist.convert(model, memory=memory)
        net.zero_grad()
        final, taken = net.forward_intermediates(images(), indices=[2, 4])
        (final.sum() + sum(part.square().sum() for part in taken)).backward()
        grads.append([p.grad.clone() for n, p in net.named_parameters() if "blocks" in n])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert any(grad.abs().sum() > 0 for grad in grads[0])


@pytest.mark.parametrize("kind", ["vit", "eva-rope", "beit-shared-bias", "relpos-shared", "swin"])
def test_copies_pickles_and_state_dicts(kind: str) -> None:
    model = build(kind).eval()
    net = dr2dist.convert(model)
    wanted = net(images())
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    for other in copies:
        assert torch.equal(other(images()), wanted)
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in net.named_parameters()]
        for parameter in other.parameters():
            parameter.data.zero_()
        assert not torch.equal(other(images()), wanted)
    assert torch.equal(net(images()), wanted)
    fresh = dr2dist.convert(build(kind, seed=7).eval())
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(images()), wanted)
    fresh = dr2dist.convert(build(kind, seed=7).eval())
    fresh.load_state_dict(copy.deepcopy(model.state_dict()), strict=True, assign=True)
    assert torch.equal(fresh(images()), wanted)


def test_structure_may_change_through_timms_methods() -> None:
    model = build("vit", dynamic_img_size=False).eval()
    net = dr2dist.convert(copy.deepcopy(model), **CONVENTIONAL)
    x = torch.randn(2, 3, 48, 48)
    model.set_input_size((48, 48))
    net.set_input_size((48, 48))
    assert_close(net(x), model(x))
    assert model.prune_intermediate_layers([3]) == net.prune_intermediate_layers([3])
    assert len(net.chains[0].functions) == 8
    model.reset_classifier(9)
    net.reset_classifier(9)
    assert net(x).shape == model(x).shape


def test_coefficients_change_on_all_chains_or_on_none() -> None:
    net = dr2dist.convert(build("swin"))
    net.set_coefficients(0.5, 0.5)
    assert net.coefficients == (0.5, 0.5)
    with pytest.raises(ValueError, match="beta is 2"):
        net.set_coefficients(0.5, 2)
    pending = net(images()).sum()
    with pytest.raises(RuntimeError, match="waits for its"):
        net.set_coefficients(0.25, 0.75)
    assert {chain.setting.beta for chain in net.chains} == {0.5}
    pending.backward()
    net.set_coefficients(0.25, 0.75)
    assert {chain.setting.beta for chain in net.chains} == {0.75}


def test_what_a_network_cannot_do_is_refused_in_one_line() -> None:
    net = dr2dist.convert(build("vit"))
    with pytest.raises(dr2dist.UserError, match="memory='checkpoint'"):
        net.set_grad_checkpointing(True)
    model: Any = build("vit")
    model.set_grad_checkpointing(True)
    with pytest.raises(dr2dist.UserError, match="gradient checkpointing"):
        dr2dist.convert(model)
    for wrong in ({"arithmetic": "exakt"}, {"memory": "revers"}, {"beta": 0.0}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dr2dist.convert(build("vit"), **wrong)


class Mixer(nn.Module):
    """A user's own model, with no timm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 16)
        parts = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(4)]
        self.layers = nn.ModuleList(parts)
        self.leave = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.leave(x)


class MixerBackbone(dr2dist.Backbone):
    name = "mixer"
    patterns = ("my mixer",)
    tail = ("leave",)

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Mixer)

    def layers(self, model: Any) -> list[dr2dist.ChainOf | dr2dist.Transition]:
        return [dr2dist.ChainOf("layers", list(model.layers))]

    def stem(self, model: Any, tokens: Tensor, /, **options: Any) -> dr2dist.Stem:
        return dr2dist.Stem(model.enter(tokens))

    def norm(self, model: Any, tokens: Tensor) -> Tensor:
        return tokens

    def head(self, model: Any, features: Tensor) -> Tensor:
        return model.leave(features)


def test_a_family_of_ones_own(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_families", list(registry._families))
    caplog.set_level("WARNING", "dr2dist")
    dr2dist.register_backbone(MixerBackbone())
    assert dr2dist.supported_backbones()["mixer"] == ("my mixer",)
    assert not caplog.messages
    again = MixerBackbone()
    dr2dist.register_backbone(again)
    assert caplog.messages == ["the backbone family 'mixer' is replaced by MixerBackbone"]
    assert list(dr2dist.supported_backbones()).count("mixer") == 1
    assert dr2dist.convert(Mixer()).family is again
    model = Mixer()
    x = torch.randn(3, 5, 6)
    assert_close(dr2dist.convert(model, **CONVENTIONAL)(x), model(x))
    net = dr2dist.convert(model)
    net(x).sum().backward()
    assert net.certificate().failures == 0
    assert_state_is_of(net, model)
    groups = parameter_groups(model, 0.1, 0.5)
    scales = {p: group.lr_scale for group in groups for p in group.parameters}
    assert [scales[layer[1].weight] for layer in model.layers] == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    assert (scales[model.enter.weight], scales[model.leave.weight]) == (1 / 32, 1)
