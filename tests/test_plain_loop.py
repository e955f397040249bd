"""Converted networks in a loop of one's own: what works on timm's model works on them, rightly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.layers import Mlp
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

import dr2dist
from tests.functions import assert_same
from tests.models import build, images

FAMILIES = (
    "vit",
    "vit-parallel-things",
    "eva-rope",
    "beit-shared-bias",
    "relpos-shared-bias",
    "swin",
)
CONVENTIONAL: dict[str, Any] = {"alpha": 1, "beta": 0, "arithmetic": "float", "memory": "store"}
PAIRS = ((0.9, 0.1), (0.5, 0.5))
MODES: tuple[dict[str, Any], ...] = (
    {},
    {"memory": "checkpoint"},
    {"memory": "budget", "memory_budget": 300_000},
)


def small(kind: str, seed: int = 0) -> nn.Module:
    """A model of a family, as shallow as it can be."""
    return build(kind, seed, depth=3).train()


def loss_of(output: Tensor) -> Tensor:
    """Something smooth of an output [B, classes]."""
    return output.square().mean()


def in_block(net: Any) -> str:
    """The name of a weight inside the second block, or the second stage."""
    names = [name for name, _ in net.named_parameters() if name.endswith("qkv.weight")]
    return names[1] if names else "blocks.1.attns.0.attn.qkv.weight"


def hooked(net: nn.Module) -> dict[str, Tensor]:
    """Gradients where a tensor hook halves each parameter's; every hook is called once."""
    calls: dict[str, list[str]] = {name: [] for name, _ in net.named_parameters()}
    handles = []
    for name, parameter in net.named_parameters():

        def halve(grad: Tensor, name: str = name) -> Tensor:
            calls[name].append("hook")
            return grad * 0.5

        def after(_: Tensor, name: str = name) -> None:
            calls[name].append("accumulated")

        handles.append(parameter.register_hook(halve))
        handles.append(parameter.register_post_accumulate_grad_hook(after))
    net.zero_grad()
    loss_of(net(images(3))).backward()
    for handle in handles:
        handle.remove()
    assert all(found == ["hook", "accumulated"] for found in calls.values()), calls
    return {f"hooked {name}": parameter.grad for name, parameter in net.named_parameters()}


def asked_for(net: nn.Module) -> dict[str, Tensor]:
    """Gradients by autograd.grad and backward(inputs=), which fill nothing else."""
    net.zero_grad()
    x, named = images(3).requires_grad_(), dict(net.named_parameters())
    names = [in_block(net), next(iter(named))]
    of_x, *grads = torch.autograd.grad(loss_of(net(x)), [x, *(named[name] for name in names)])
    assert all(parameter.grad is None for parameter in named.values())
    loss_of(net(x)).backward(inputs=[named[names[0]]])
    filled = [name for name, parameter in named.items() if parameter.grad is not None]
    assert filled == names[:1] and x.grad is None
    found = {f"asked {name}": grad for name, grad in zip(names, grads, strict=True)}
    return {"x": of_x, **found, "inputs=": named[names[0]].grad}


def adversarial(net: nn.Module) -> dict[str, Tensor]:
    """Gradients of a step on images that a gradient by the input has moved."""
    net.zero_grad()
    x = images(3).requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(net(x)), x)
    loss_of(net(x.detach() + 0.01 * grad)).backward()
    return {f"moved {name}": parameter.grad for name, parameter in net.named_parameters()}


def outcomes(net: nn.Module) -> dict[str, Tensor]:
    """All of it."""
    found = {"output": net(images(3)).detach()}
    for way in (hooked, asked_for, adversarial):
        found |= {name: value.clone() for name, value in way(net).items()}
    return found


def replace(net: Any) -> None:
    """Changes of the kinds that people make to a model: an adapter, a norm, a head."""
    holder = next(
        module for module in net.modules() if isinstance(getattr(module, "mlp", None), nn.Module)
    )
    torch.manual_seed(5)
    width = next(module for module in holder.mlp.modules() if isinstance(module, nn.Linear))
    holder.mlp = nn.Sequential(holder.mlp, Mlp(width.in_features, 8))
    for owner in net.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(owner, name, nn.LayerNorm(child.normalized_shape, eps=1e-2))
                return


@pytest.mark.parametrize("changed", [False, True], ids=["as-built", "replaced"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_works_on_timms_model_gives_the_same_here(kind: str, changed: bool) -> None:
    model = small(kind)
    net = dr2dist.convert(copy.deepcopy(model), **CONVENTIONAL)
    if changed:
        net(images(3))  # modules are replaced after the first pass, too
        replace(model)
        replace(net)
    wanted, found = outcomes(model), outcomes(net)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6 * value.abs().max()), name


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_memory_mode_gives_the_same_bits(kind: str, pair: tuple[float, float]) -> None:
    def found(**setting: Any) -> dict[str, Tensor]:
        net = dr2dist.convert(small(kind), *pair, chunk_size=2, **setting)
        replace(net)
        return outcomes(net)

    wanted = found(memory="store")
    for mode in MODES:
        assert_same(found(**mode), wanted)


@pytest.mark.parametrize("memory", ["reverse", "checkpoint", "store"])
def test_parametrized_and_tied_weights_train(memory: str) -> None:
    def found(conv: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
        net = conv(small("vit"))
        weight_norm(net.blocks[0].attn.qkv)
        net.blocks[1].mlp.fc1.weight = net.blocks[2].mlp.fc1.weight
        return outcomes(net)

    wanted = found(lambda model: model)
    for name, value in found(
        lambda model: dr2dist.convert(model, 1, 2**-16, fraction_bits=22, memory=memory)
    ).items():
        assert torch.allclose(value, wanted[name], rtol=1e-2, atol=1e-3 * wanted[name].abs().max())


@pytest.mark.parametrize("memory", ["reverse", "store"])
def test_parameters_exchanged_before_the_backward_pass_are_told(memory: str) -> None:
    net = dr2dist.convert(small("vit"), memory=memory)
    others = {
        name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()
    }
    output = torch.func.functional_call(net, others, (images(3),))
    with pytest.raises(RuntimeError, match="other tensors than in the forward pass"):
        loss_of(output).backward()


class AtHand(nn.Module):
    """Has a weight at hand that is no parameter of the module that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.weights = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights[0].T)


@pytest.mark.parametrize("memory", ["reverse", "checkpoint", "store"])
def test_weights_reached_in_other_ways_train_too(memory: str) -> None:
    torch.manual_seed(0)
    functions = [AtHand(), AtHand()]
    chain = dr2dist.Chain(functions, alpha=0.5, beta=0.5, fraction_bits=24, memory=memory)
    chain(torch.ones(3, 8)).square().sum().backward()
    found = [function.layer.weight.grad for function in functions]
    weights = [function.layer.weight for function in functions]
    x = torch.ones(3, 8)
    y = 0.5 * x
    for function in functions:
        x, y = function(x) + 0.5 * x + y, 0.5 * x
    for grad, wanted in zip(found, torch.autograd.grad(x.square().sum(), weights), strict=True):
        assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-5)


def test_cached_parametrisations_train_too() -> None:
    def found(cache: bool) -> list[Tensor]:
        torch.manual_seed(0)
        functions = [nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Tanh()) for _ in range(3)]
        chain = dr2dist.Chain(functions)
        with parametrize.cached() if cache else nullcontext():
            chain(torch.ones(2, 8)).sum().backward()
        return [parameter.grad for parameter in chain.parameters()]

    assert_same(found(True), found(False))


def test_a_head_that_was_written_to_is_told() -> None:
    net = dr2dist.convert(small("vit"))
    output = net(images(3))
    with torch.no_grad():
        net.head.weight.mul_(3)
    with pytest.raises(RuntimeError, match="in-place operation"):
        loss_of(output).backward()


def cut_short(net: Any) -> None:
    """Fewer blocks, in a list of their own."""
    if hasattr(net, "blocks"):
        net.blocks = net.blocks[:2]
    else:
        net.layers[2].blocks = net.layers[2].blocks[:1]


def put_other(net: Any) -> None:
    """Another block in the place of one."""
    blocks = net.blocks if hasattr(net, "blocks") else net.layers[1].blocks
    blocks[1] = copy.deepcopy(blocks[0])


@pytest.mark.parametrize("change", [cut_short, put_other])
@pytest.mark.parametrize("kind", FAMILIES)
def test_replaced_blocks_take_effect_at_once(kind: str, change: Callable[[Any], None]) -> None:
    model = small(kind).eval()
    net = dr2dist.convert(copy.deepcopy(model), **CONVENTIONAL)
    before = net(images())
    change(model)
    change(net)
    assert not torch.equal(net(images()), before)
    assert torch.allclose(net(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_a_mode_set_on_a_block_reaches_its_functions() -> None:
    model = build("vit-parallel-scaling", depth=2, attn_drop_rate=0.5).train()
    net = dr2dist.convert(model)
    net.eval()
    assert torch.equal(net(images()), net(images()))
    net.blocks[0].train()
    assert not torch.equal(net(images()), net(images()))


@pytest.mark.parametrize("name", ["blocks", "blocks.1"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_that_would_never_be_called_are_refused(name: str, kind: str) -> None:
    net = dr2dist.convert(small("vit"))
    handle = getattr(net.get_submodule(name), f"register_{kind}_hook")(lambda *given: None)
    with pytest.raises(dr2dist.UserError, match=f"{name} has a hook.*inside of a block"):
        net(images())
    handle.remove()
    net(images())


def test_hooks_inside_of_a_block_are_called() -> None:
    net, called = dr2dist.convert(small("vit")), []
    net.blocks[1].attn.register_forward_hook(lambda *given: called.append("forward"))
    net.blocks[1].attn.register_full_backward_hook(lambda *given: called.append("backward"))
    with torch.no_grad():
        net(images())
    assert called == ["forward"]
    net(images()).sum().backward()
    assert called == ["forward", "forward", "forward", "backward"]  # and in the recompute


@pytest.mark.parametrize("kind", FAMILIES)
def test_copies_that_follow_weights_follow_coefficients(kind: str) -> None:
    net = dr2dist.convert(small(kind)).eval()
    followers: list[Any] = [
        ModelEmaV3(net, decay=0.0),
        AveragedModel(net, avg_fn=lambda own, new, count: new),
    ]
    net.set_coefficients(0.5, 0.5)
    followers[0].update(net)
    followers[1].update_parameters(net)
    followers.append(nn.Module())  # as many loops write it
    followers[2].module = copy.deepcopy(followers[0].module)
    for own, new in zip(followers[2].module.buffers(), net.buffers(), strict=True):
        own.data.copy_(new.data)
    for follower in followers:
        assert follower.module.coefficients == (0.5, 0.5)
        assert torch.equal(follower.module(images()), net(images()))


def test_a_state_brings_its_coefficients() -> None:
    net = dr2dist.convert(small("vit"), 0.7, 0.3)
    state = copy.deepcopy(net.state_dict())
    assert set(state) - set(small("vit").state_dict()) == {"reversible_alpha_beta"}
    other = dr2dist.convert(small("vit", seed=3))
    other.load_state_dict(state)
    assert other.coefficients == net.coefficients
    assert torch.equal(other.eval()(images()), net.eval()(images()))
    wrapped = nn.Sequential(dr2dist.convert(small("vit", seed=3)))
    wrapped.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert torch.equal(wrapped.eval()(images()), net(images()))
    net.load_state_dict(small("vit").state_dict())  # timm's own names alone
    assert net.coefficients == other.coefficients
    conventional = dr2dist.convert(small("vit"), **CONVENTIONAL)
    with pytest.raises(dr2dist.UserError, match="beta is 0"):
        net.load_state_dict(conventional.state_dict())


def test_a_state_may_be_loaded_into_a_network_that_was_on_meta() -> None:
    state = small("vit").state_dict()
    for assign in (False, True):
        with torch.device("meta"):
            net = dr2dist.convert(build("vit", depth=3), 0.7, 0.3)
        net = net.to_empty(device="cpu")
        net.load_state_dict(copy.deepcopy(state), assign=assign)
        assert net.coefficients == dr2dist.convert(small("vit"), 0.7, 0.3).coefficients
        wanted = dr2dist.convert(small("vit"), 0.7, 0.3).eval()
        assert torch.equal(net.eval()(images()), wanted(images()))


def test_exported_programs_have_what_was_replaced() -> None:
    net = dr2dist.convert(small("vit")).eval()
    net(images())
    replace(net)
    net.state_dict()["reversible_alpha_beta"].copy_(
        dr2dist.convert(small("vit"), 0.5, 0.5).state_dict()["reversible_alpha_beta"]
    )
    program = torch.export.export(net.eval(), (images(),)).module()
    assert net.coefficients == (0.5, 0.5)
    assert torch.allclose(program(images()), net(images()), rtol=1e-3, atol=1e-4)


def test_training_is_not_compiled_around_a_chain() -> None:
    net = dr2dist.convert(small("vit"))
    around = torch.compile(nn.Sequential(net), backend="eager")
    with pytest.raises(RuntimeError, match="compile=True"):
        around(images())
    with torch.no_grad():
        assert torch.equal(around(images()), net(images()))
    torch._dynamo.reset()
    net.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compile=True"):
        net(images())
    stored = dr2dist.convert(small("vit"), memory="store")
    loss_of(torch.compile(stored, backend="eager")(images())).backward()
    found = {name: parameter.grad for name, parameter in stored.named_parameters()}
    plain = dr2dist.convert(small("vit"))
    loss_of(plain(images())).backward()
    assert_same(found, {name: parameter.grad for name, parameter in plain.named_parameters()})


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("vit", {}),
        pytest.param("vit", {"memory": "checkpoint"}, marks=pytest.mark.slow),
        *(pytest.param(kind, {}, marks=pytest.mark.slow) for kind in FAMILIES[1:]),
    ],
)
def test_compiled_functions_recompute_their_own_bits(kind: str, setting: dict[str, Any]) -> None:
    def found(**options: Any) -> dict[str, Tensor]:
        model = build(kind, depth=2, proj_drop_rate=0.1).train()
        net = dr2dist.convert(model, chunk_size=2, compile=True, **options)
        torch.manual_seed(3)
        output = net(images(3))
        loss_of(output).backward()
        assert net.certificate().failures == 0
        return {"output": output.detach(), **{n: p.grad for n, p in net.named_parameters()}}

    assert_same(found(**setting), found(memory="store"))


def test_hooks_are_called_where_functions_are_compiled() -> None:
    def found(hooked: bool, **options: Any) -> Tensor:
        net = dr2dist.convert(build("vit", depth=2).train(), **options)
        if hooked:
            net.blocks[0].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
            net.blocks[1].mlp.fc1.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        output: Tensor = net(images(2))
        output.sum().backward()
        assert net.certificate().failures == 0
        return output.detach()

    torch.testing.assert_close(found(True, compile=True), found(True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found(True), found(False), rtol=1e-2)
