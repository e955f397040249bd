"""What `check` says of right families and of wrong ones."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dr2dist
from dr2dist.backbones import convert as registry
from dr2dist.backbones.branch import BranchSpec, branches
from tests.models import VIDEO, build, images, inputs
from tests.test_torchvision import build as build_torchvision

WIDTH, TOKENS = 12, 5


class Layer(nn.Module):
    """x + F(x + a bias), where the bias may be each sample's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def branch(self, x: Tensor, bias: Tensor, own: Tensor) -> Tensor:
        return self.drop(self.linear(self.norm(x + bias + own))).tanh()

    def forward(self, x: Tensor, bias: Tensor, own: Tensor) -> Tensor:
        return x + self.branch(x, bias, own)


class Net(nn.Module):
    """A user's own model of a dict of tensors, with a shared input and one of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.bias = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.own = nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def sides(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"bias": self.bias * 2, "own": self.own(given["context"])[:, None]}

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        x, sides = self.enter(given["x"]), self.sides(given)
        for layer in self.layers:
            x = layer(x, **sides)
        return {"logits": self.leave(x)}


def branch(part: Any, x: Tensor, **sides: Any) -> Tensor:
    return part.branch(x, **sides)


def with_residual(part: Any, x: Tensor, **sides: Any) -> Tensor:
    return x + part.branch(x, **sides)


def with_foreign_random(part: Any, x: Tensor, **sides: Any) -> Tensor:
    return part.branch(x, **sides) * (1 + 0.1 * random.random() * part.training)


def halved(part: Any, x: Tensor, **sides: Any) -> Tensor:
    return 0.5 * part.branch(x, **sides)


class NetBackbone(dr2dist.Backbone):
    """Right as it stands; tests make it wrong in one way each."""

    name, patterns = "net-of-tests", ("a net of tests",)
    compute: Any = staticmethod(branch)
    batched: tuple[str, ...] = ("own",)
    input = None

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Net)

    def layers(self, model: Any) -> list[Any]:
        spec = BranchSpec(None, self.compute, ("bias", "own"))
        return [dr2dist.ChainOf("layers", branches(model.layers, {Layer: (spec,)}, "layers"))]

    def stem(self, model: Any, images: Any, /, **options: Any) -> dr2dist.Stem:
        return dr2dist.Stem(model.enter(images["x"]), model.sides(images), self.batched)

    def norm(self, model: Any, tokens: Tensor) -> Tensor:
        return tokens

    def head(self, model: Any, features: Tensor) -> Any:
        return {"logits": model.leave(features)}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_families", list(registry._families))


def example(batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (batch, TOKENS, 6), "context": (batch, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def wrong_lines(report: dr2dist.CheckReport) -> dict[str, str]:
    """What was found by what was tried, of all that is wrong."""
    rows = [(line[:7].strip(), line[7:23].strip(), line[23:]) for line in report.lines]
    assert {mark for mark, _, _ in rows} <= {"ok", "WRONG"}
    assert str(report) == "\n".join(report.lines)
    assert report.ok == all(mark == "ok" for mark, _, _ in rows)
    return {what: found for mark, what, found in rows if mark == "WRONG"}


def checked(**wrong: Any) -> dict[str, str]:
    """The lines of a check of a family that is wrong in some way."""
    dr2dist.register_backbone(type("Wrong", (NetBackbone,), wrong)())
    return wrong_lines(dr2dist.check(net(), example()))


def test_a_right_family_of_ones_own_is_right() -> None:
    dr2dist.register_backbone(NetBackbone())
    model, given = net(), example()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = dr2dist.check(model, given)
    assert report.ok and len(report.lines) == 6, str(report)
    assert "x + F(x) is what the block gives, 3 block(s)" in report.lines[2]
    assert "bias (shared), own (by sample)" in report.lines[0]
    assert "bias of layers, own of layers" in report.lines[5]
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    converted = dr2dist.convert(model, 0.5, 0.5, chunk_size=1)
    assert dr2dist.check(converted, given) == report and converted.coefficients == (0.5, 0.5)


@pytest.mark.parametrize(
    "kind", ["vit", "vit-parallel-things", "eva-rope", "eva-mixed-rope", "beit-shared-bias", "swin"]
)
def test_the_families_of_timm_are_right(kind: str) -> None:
    report = dr2dist.check(build(kind), images(3))
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", VIDEO)
def test_the_families_of_video_are_right(kind: str) -> None:
    report = dr2dist.check(build(kind), inputs(kind))
    assert report.ok, str(report)


@pytest.mark.parametrize("kind", ["relpos", "relpos-shared", "relpos-post-norm"])
def test_relative_positions_are_right_with_their_dropout(kind: str) -> None:
    model = build(kind)
    for name, module in model.named_modules():
        if "rel_pos" in name and isinstance(module, nn.Dropout):
            module.p = 0.125
    report = dr2dist.check(model, images(3))
    assert report.ok, str(report)
    assert ("shared_rel_pos (shared)" in report.lines[0]) == (kind == "relpos-shared")


def test_torchvisions_is_right() -> None:
    report = dr2dist.check(build_torchvision(dropout=0.1), images(3))
    assert report.ok, str(report)


def test_a_branch_that_keeps_its_residual_is_named() -> None:
    found = checked(compute=staticmethod(with_residual))
    assert found["functions"].startswith("layers.0: x + F(x) is not what the block gives")
    assert "of the largest value" in found["outputs"]
    assert found.keys() == {"outputs", "functions"}


def test_functions_without_blocks_are_known_by_their_outputs() -> None:
    class Whole(nn.Module):
        def __init__(self, layer: Layer) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, **sides: Any) -> Tensor:
            return self.layer(x, **sides)

    def layers(self: Any, model: Any) -> list[Any]:
        return [dr2dist.ChainOf("layers", [Whole(layer) for layer in model.layers])]

    assert checked(layers=layers).keys() == {"outputs"}


def test_another_branch_is_named() -> None:
    found = checked(compute=staticmethod(halved))
    assert found.keys() == {"outputs", "functions"}


def test_a_shared_side_that_is_named_in_batched() -> None:
    found = checked(batched=("own", "bias"))
    assert found["sides"] == "bias is [5, 12]: named in batched, dim 0 must be 4"
    assert "slices" in found


def test_a_side_of_each_sample_that_is_not_named_in_batched() -> None:
    found = checked(batched=())
    assert found["sides"] == "own differs from sample to sample, and is not named in batched"
    assert "slices" in found


def test_random_numbers_that_are_not_torchs() -> None:
    found = checked(compute=staticmethod(with_foreign_random))
    assert "random numbers must be torch's" in found["reversal"]
    assert "side gradients" in found and "outputs" not in found


def test_what_raises_is_a_line_and_too_few_samples_are_refused() -> None:
    def head(self: Any, model: Any, features: Tensor) -> Any:
        return model.leave(features)

    def norm(self: Any, model: Any, tokens: Tensor) -> Tensor:
        raise KeyError("norm")

    assert "have the structure" in checked(head=head)["outputs"]
    assert "raises KeyError: 'norm'" in checked(norm=norm)["reversal"]
    dr2dist.register_backbone(NetBackbone())
    with pytest.raises(dr2dist.UserError, match=r"the example has 1 sample\(s\), two or more"):
        dr2dist.check(net(), example(1))
    with pytest.raises(dr2dist.UserError, match="is not supported"):
        dr2dist.check(nn.Linear(2, 2), example())


def test_what_a_converted_networks_own_class_computes_is_not_compared() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    net = dr2dist.convert(build("vit", depth=2))
    parametrize.register_parametrization(net, "pos_embed", Half())
    with pytest.raises(dr2dist.UserError, match="check the model that it was converted from"):
        dr2dist.check(net, images(2))
    model = build("vit", depth=2)
    parametrize.register_parametrization(model, "pos_embed", Half())
    assert dr2dist.check(model, images(2)).ok
