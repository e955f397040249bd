"""States of sixteen bits: the same bits in all memory modes, scales that follow the states, and
errors below those of tokens in bf16."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import dr2dist
from dr2dist.errors import UserError
from dr2dist.reversible import Chain, Setting
from tests.functions import make_chain, tokens
from tests.models import MODELS, build, images

MODES: list[dict[str, Any]] = [
    {"memory": "store"},
    {"memory": "reverse"},
    {"memory": "checkpoint"},
    {"memory": "budget", "memory_budget": 150_000},
]


def train(net: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor | None]:
    """Output and gradients of a step."""
    net.zero_grad()
    torch.manual_seed(3)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output: Any = net(x)
    output = sum(output) if isinstance(output, tuple) else output
    output.float().square().sum().backward()
    return [output, *(parameter.grad for parameter in net.parameters())]


def assert_same(one: list[Tensor | None], other: list[Tensor | None]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


FAMILIES = ("vit", "eva-mixed-rope", "beit-shared-bias", "relpos", "swin")
FIRST = (("swin", "fp32"), ("vit", "bf16"))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, "autocast") for kind in FAMILIES),
        *FIRST,
        *(
            pytest.param(kind, precision, marks=pytest.mark.slow)
            for kind in FAMILIES
            for precision in ("fp32", "bf16")
            if (kind, precision) not in FIRST
        ),
    ],
)
def test_memory_modes_agree_in_every_bit(kind: str, precision: str) -> None:
    slices = [{}, {"chunk_size": 2}, {"chunk_size": 1, "chunk_tokens": 16 if kind == "swin" else 7}]
    for number, layout in enumerate(slices):
        found = []
        for mode in MODES:
            beta = (0.1, 0.25, 1.0)[number]
            options = {"drop_path_rate": 0.2}
            net = dr2dist.convert(
                build(kind, depth=3, **options), 1 - beta, beta, state_bits=16, **mode, **layout
            )
            x = images(3)
            if precision == "bf16":
                net, x = net.bfloat16(), x.bfloat16()
            auto = precision == "autocast"
            train(net, x, auto)  # finds scales, and measures where there is a budget
            found.append(train(net, x, auto))
            assert net.certificate().failures == 0
        for other in found[1:]:
            assert_same(found[0], other)


@pytest.mark.parametrize("kind", MODELS)
def test_every_family_is_reversed_to_its_first_state(kind: str) -> None:
    equal = []
    for bits in (32, 16):
        net = dr2dist.convert(build(kind, depth=3), state_bits=bits, chunk_size=2)
        train(net, images(3))  # some channels may want room after it
        found = train(net, images(3))
        assert net.certificate().failures == 0
        assert all(chain.verified for chain in net.certificate().chains)
        with torch.no_grad():
            output: Any = net(images(3))  # held in 32 bits, on the same grid
        output = sum(output) if isinstance(output, tuple) else output
        equal.append(torch.equal(output, found[0]))
    # Where attention has a trained bias, its kernel is another one without gradients.
    assert all(equal) or kind.startswith(("beit", "relpos", "swin"))
    assert set(net.scales) == {chain.name for chain in net.chains}


def test_a_recorded_pass_is_undone_to_its_input_on_the_grid() -> None:
    chain = make_chain(24, state_bits=16)
    x = tokens(4)
    recorded = chain.record(x)
    assert recorded.state.current.dtype == torch.int16
    first = chain.reverse(recorded)
    assert chain.scales is not None
    step = torch.tensor([2.0**exponent for exponent in chain.scales.exponents])
    assert torch.equal(first, (x.double() / step).round().mul(step).float())
    assert chain.certificate().failures == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_bits": 8}, "state_bits is 8, allowed is 16, 32"),
        ({"arithmetic": "float"}, "state_bits is 16, which has an effect only with arithmetic"),
        ({"fraction_bits": 22}, "fraction_bits has an effect only with state_bits 32"),
        ({"alpha": 1.0, "beta": 0.1}, "grow 67.2 times over 48 functions, too much for states of"),
    ],
)
def test_what_16_bits_cannot_hold_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain([nn.Identity() for _ in range(48)], **{"state_bits": 16, **options})
    Chain([nn.Identity() for _ in range(24)], alpha=1.0, beta=0.1, state_bits=16)


def normed(net: Any, x: Tensor) -> Tensor:
    found: Tensor = net.forward_features(x)
    return found.float()


def massive() -> Any:
    """A ViT whose channels differ by a factor of 1,000, as large pretrained ones do."""
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, img_size=64, init_values=1.0
    )
    sizes = torch.ones(192)
    sizes[7], sizes[100], sizes[30:40] = 1000.0, 200.0, 1e-2
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.03)
        model.pos_embed.normal_().mul_(sizes)
        for block in model.blocks:
            block.ls1.gamma.copy_(0.3 * sizes)
            block.ls2.gamma.copy_(0.3 * sizes)
            # Massive channels must not be all that norms let through.
            block.norm1.weight.copy_(5 / sizes.clamp(1))
            block.norm2.weight.copy_(5 / sizes.clamp(1))
        model.norm.weight.copy_(5 / sizes.clamp(1))
    return model


class Rounded(nn.Module):
    """A residual function whose sum with its input is one of tokens in bf16."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        block = self.block
        x = (x + block.ls1(block.attn(block.norm1(x)))).bfloat16().float()
        return (x + block.ls2(block.mlp(block.norm2(x)))).bfloat16().float()


def test_errors_are_at_most_those_of_tokens_in_bf16() -> None:
    """Of the normed output and of the gradient, F in bf16, channels 1,000 apart."""
    model = massive()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))

    def results(net: Any, autocast: bool) -> list[Tensor]:
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = normed(net, x)
        output[:, 0].sum().backward()
        grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return [output.detach(), torch.cat(grads)]

    errors = {}
    rounded = copy.deepcopy(model)
    rounded.blocks = nn.Sequential(*map(Rounded, rounded.blocks))
    # alpha 1 is the conventional network, but for a beta that is next to nothing.
    tiny = {"alpha": 1 - 2.0**-16, "beta": 2.0**-16, "memory": "store"}
    wanted = results(copy.deepcopy(model), False)
    for name, net in {
        "bf16 tokens": rounded,
        "16 bits": dr2dist.convert(copy.deepcopy(model), state_bits=16, **tiny),
        "32 bits": dr2dist.convert(copy.deepcopy(model), fraction_bits=15, **tiny),
    }.items():
        found = results(net, True)
        errors[name] = [
            float((one - other).norm() / other.norm())
            for one, other in zip(found, wanted, strict=True)
        ]
    for place in (0, 1):
        assert errors["16 bits"][place] <= errors["bf16 tokens"][place], errors
        assert errors["32 bits"][place] <= errors["bf16 tokens"][place], errors
        assert all(math.isfinite(error[place]) for error in errors.values())


def test_a_file_has_the_scales_and_computes_the_same(tmp_path: Path) -> None:
    net: Any = dr2dist.convert(
        timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32), state_bits=16
    )
    x = torch.randn(2, 3, 32, 32)
    net(x).sum().backward()
    path = tmp_path / "net.safetensors"
    dr2dist.save(net, path)
    again: Any = dr2dist.load(path)
    assert again.scales == net.scales
    with torch.no_grad():
        assert torch.equal(again(x), net.eval()(x))
    with pytest.raises(UserError, match="no chain is called 'block'; did you mean 'blocks'"):
        net.set_scales({"block": [1]})


def test_a_state_goes_on_with_the_same_bits() -> None:
    """In a loop of one's own, from state_dict alone; a network of 32 bits takes such a state."""
    net: Any = dr2dist.convert(build("swin"), state_bits=16)
    train(net, images(3, seed=7))
    state = net.state_dict()
    again: Any = dr2dist.convert(build("swin", seed=1), state_bits=16)
    again.load_state_dict(state)
    assert_same(train(again, images(3)), train(net, images(3)))
    wide: Any = dr2dist.convert(build("swin", seed=1))
    wide.load_state_dict(state)
    assert wide.scales == {}
    again.load_state_dict({k: v for k, v in state.items() if not k.startswith("reversible_")})
    with pytest.raises(RuntimeError, match=r"reversible_scale\.blocks"):
        again.load_state_dict({**state, "reversible_scale.blocks": torch.zeros(1)})


def test_gradients_of_states_have_the_tokens_dtype() -> None:
    chain = make_chain(4, state_bits=16).bfloat16()
    x = tokens(4).bfloat16().requires_grad_()
    output = chain(x)
    tape = next(iter(chain._tapes))
    assert tape.dtype == torch.bfloat16
    output.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert Setting(state_bits=16).by_channel


def test_averages_made_before_the_first_pass_follow_by_the_order_of_entries() -> None:
    net = dr2dist.convert(build("vit", depth=2), state_bits=16)
    average = ModelEmaV3(net, decay=0.5)
    train(net, images(2))
    average.update(net)  # goes over both states side by side
    assert list(net.state_dict())[-1] == "reversible_scales.blocks"
