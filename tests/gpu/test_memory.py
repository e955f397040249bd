"""Peak memory of a training step is what docs/memory.md says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dr2dist
from dr2dist.reversible import Layout, PlainRunner
from dr2dist.reversible.budget.costs import Meter, Watermark
from dr2dist.reversible.tape import Sides
from tests.models import build

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {},
    "cuda": {"img_size": 224, "embed_dim": 384, "num_heads": 6},
}
BATCH = {"cpu": 4, "cuda": 32}
DEPTHS = {"cpu": (1, 2), "cuda": (2, 6)}


def growth(net: Any, images: Tensor) -> int:
    """Bytes by which a step's peak grows, after a first one; gradients are there already."""
    net(images).square().mean().backward()
    if images.device.type == "cpu":
        with Watermark() as mark:
            net(images).square().mean().backward()
        return mark.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    net(images).square().mean().backward()
    # What was asked for: a block given may be up to 1 MiB larger, depending on what was freed.
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"]) - before


def network(device: torch.device, depth: int, beta: float, **options: Any) -> Any:
    """As in an engine, which takes each function's gradients as they come."""
    model = build("vit", depth=depth, **SIZES[device.type])
    net = dr2dist.convert(model, 1 - beta, beta, **options).to(device).train()
    for user in (*net.chains, *net.pieces):
        user.runner = PlainRunner(nested=True)
    return net


def images(device: torch.device) -> Tensor:
    size = SIZES[device.type].get("img_size", 32)
    return torch.ones(BATCH[device.type], 3, size, size, device=device)


def tokens(net: Any, device: torch.device) -> Tensor:
    with torch.no_grad():
        found: Tensor = net.family.stem(net, images(device)).tokens
    return found


@pytest.mark.parametrize(("beta", "bits"), [(0.5, 1), (0.1, 4)])
def test_a_function_costs_its_remainders_and_no_more(
    device: torch.device, beta: float, bits: int
) -> None:
    depths = DEPTHS[device.type]
    nets = [network(device, depth, beta, chunk_size=2) for depth in depths]
    shallow, deep = (growth(net, images(device)) for net in nets)
    functions = 2 * (depths[1] - depths[0])
    remainders = bits * functions * tokens(nets[0], device).numel() // 8
    assert remainders <= deep - shallow <= remainders + 8 * functions  # 8 bytes for its sum


@pytest.mark.parametrize("slices", [{}, {"chunk_size": 2}])
def test_a_chain_holds_five_token_tensors_and_one_functions_working_set(
    device: torch.device, slices: dict[str, int]
) -> None:
    net = network(device, DEPTHS[device.type][1], 0.5, **slices)
    (chain,) = net.chains
    x = tokens(net, device)
    meter = Meter(chain.runner, x, Sides({}), True)
    layout = Layout.given(chain.setting)
    working = max(meter.working_set(function, layout) for function in chain.functions)
    held = (5 + len(chain.functions) / 32) * x.numel() * 4
    # Gradients of the parameters, summed over slices, stand beside those of the slice at work.
    summed = max(4 * sum(p.numel() for p in f.parameters()) for f in chain.functions)
    # Kernels need nothing; in plain arithmetic a slice's coupling and sums do, in 8 bytes each.
    coupling = 8 * 8 * x[: slices.get("chunk_size")].numel() if device.type == "cpu" else 0
    # Libraries' own working memory: a tenth.
    assert growth(net, images(device)) <= 1.1 * (held + working + summed + coupling)
