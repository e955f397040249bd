"""Networks that torch.export traces: they leave no trace in the network, whatever it is set to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dr2dist
from dr2dist.inference.portable import export_portable
from dr2dist.reversible.constants import Constants
from tests.models import build, images


def narrow(seed: int = 0) -> Any:
    """A network of 16-bit states in evaluation mode."""
    return dr2dist.convert(build("vit", seed, depth=2), state_bits=16).eval()


def test_a_network_computes_the_same_after_it_was_exported() -> None:
    net, other = narrow(), narrow()
    with torch.no_grad():
        wanted = net(images())
    other.load_state_dict(net.state_dict())
    program = torch.export.export(other, (images(),)).module()
    with torch.no_grad():
        assert torch.equal(other(images()), wanted)
        assert torch.equal(program(images()), wanted)
    other.train()(images()).square().sum().backward()
    assert other.certificate().failures == 0


def test_states_of_sixteen_bits_are_written_as_a_program(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2)
    net = dr2dist.convert(model, state_bits=16)
    net(images(2)).sum().backward()
    file = tmp_path / "net.safetensors"
    dr2dist.save(net, file)
    assert export_portable(file, tmp_path / "net.pt2") < 1e-5
    with torch.no_grad():
        wanted = dr2dist.load(file)(images())
        found = torch.export.load(tmp_path / "net.pt2").module()(images())
    torch.testing.assert_close(found, wanted)


def test_scales_are_found_before_an_export() -> None:
    with pytest.raises(RuntimeError, match=r"blocks: the scales .* before torch\.export"):
        torch.export.export(narrow(), (images(),))


@pytest.mark.parametrize(
    "setting",
    [
        {"memory": "budget", "memory_budget": 10**9},
        {"chunk_size": "auto", "chunk_budget": 10**9},
    ],
)
def test_an_export_settles_no_budget(setting: dict[str, Any]) -> None:
    net = dr2dist.convert(build("vit", depth=2), **setting).eval()
    program = torch.export.export(net, (images(2),)).module()
    assert net.planner.state() == {}
    with torch.no_grad():
        torch.testing.assert_close(program(images(2)), net(images(2)))


def test_what_is_made_in_a_trace_is_not_kept() -> None:
    known = Constants()
    with FakeTensorMode():
        assert type(known.get("one", lambda: torch.ones(1))) is FakeTensor
    one = known.get("one", lambda: torch.ones(1))
    assert type(one) is torch.Tensor and known.get("one", lambda: torch.zeros(1)) is one
