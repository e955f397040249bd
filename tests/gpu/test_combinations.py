"""Every way to train, as far as every two settings meet, has exact states and store's gradients."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dr2dist
from tests.gpu.combinations import FACTORS, Combination, covering, every
from tests.models import build

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"depth": 2},
    "cuda": {"depth": 4, "img_size": 112, "embed_dim": 384, "num_heads": 6},
}
BATCH = {"cpu": 2, "cuda": 5}
SAMPLES = {"cpu": 1, "cuda": 3}
BUDGET = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Bytes that hold some functions' activations and not all."""

ON_CPU = [
    Combination("reverse", "fp32", "math", True, "samples", False, "16 bits, host"),
    Combination("budget", "bf16 autocast", "flash", False, "none", False, "32 bits"),
    Combination("checkpoint", "bf16 weights", "math", True, "tokens", False, "16 bits"),
    Combination("store", "tf32", "math", False, "samples", False, "32 bits"),
]
CASES = [
    *(pytest.param("cpu", one, id=f"cpu: {one.name}") for one in ON_CPU),
    *(pytest.param("cuda", one, id=one.name, marks=pytest.mark.gpu) for one in covering()),
]


def test_every_two_values_that_go_together_meet() -> None:
    chosen = covering()
    assert len(chosen) <= 30
    assert all(one.allowed for one in chosen)
    met = set().union(*(one.pairs() for one in chosen))
    possible = set().union(*(one.pairs() for one in every()))
    assert met == possible
    # All there are but flash attention with the two precisions of 32 bits, and remainders on the
    # host with the two modes that leave none.
    sizes = [len(values) for values in FACTORS.values()]
    pairs = sum(a * b for i, a in enumerate(sizes) for b in sizes[i + 1 :])
    assert len(possible) == pairs - 4


def make(one: Combination, memory: str, device: str) -> Any:
    """The network with the same weights in every memory mode."""
    noise = {"proj_drop_rate": 0.1, "drop_path_rate": 0.3} if one.dropout else {}
    if one.dropout and device == "cuda":  # on the CPU only the math kernel has it
        noise["attn_drop_rate"] = 0.1
    options: dict[str, Any] = {"memory": memory, "state_bits": int(one.states[:2])}
    if one.states.endswith("host") and memory != "store":
        options["remainders"] = "host"
    if one.slices == "samples":
        options["chunk_size"] = SAMPLES[device]
    if one.slices == "tokens":
        options |= {"chunk_size": 1, "chunk_tokens": 9 if device == "cpu" else 70}
    if memory == "budget":
        options["memory_budget"] = BUDGET[device]
    if one.compile:
        options["compile"] = True
    net = dr2dist.convert(build("vit", **SIZES[device], **noise), **options).to(device)
    return net.bfloat16() if one.precision == "bf16 weights" else net


def inputs(one: Combination, device: str) -> Tensor:
    """Images in the dtype that the network takes."""
    size = SIZES[device].get("img_size", 32)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH[device], 3, size, size, generator=generator).to(device)
    return images.bfloat16() if one.precision == "bf16 weights" else images


def settings(one: Combination, device: str) -> ExitStack:
    """The precision and the kernels of a combination."""
    torch.set_float32_matmul_precision("high" if one.precision == "tf32" else "highest")
    stack = ExitStack()
    if one.attention != "default":
        stack.enter_context(sdpa_kernel([BACKENDS[one.attention]]))
    autocast = one.precision == "bf16 autocast"
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=autocast))
    return stack


def train(one: Combination, memory: str, device: str) -> dict[str, Tensor]:
    """Outputs and gradients of passes, with their certificates looked at."""
    net = make(one, memory, device).train()
    x = inputs(one, device).requires_grad_()
    labels = torch.arange(BATCH[device], device=device) % 5
    found = {}
    torch.manual_seed(3)
    with settings(one, device):
        for number in range(2 if device == "cuda" else 1):
            output = net(x)
            nn.functional.cross_entropy(output.float(), labels).backward()
            certificate = net.certificate()
            assert certificate.messages == ()
            if memory in ("reverse", "budget"):
                assert all(chain.verified for chain in certificate.chains)
            found[f"output {number}"] = output.detach()
    assert x.grad is not None
    return {**found, "images": x.grad, **{n: p.grad for n, p in net.named_parameters()}}


@pytest.mark.parametrize(("device", "one"), CASES)
def test_gradients_are_those_of_stored_activations_in_every_bit(
    device: str, one: Combination
) -> None:
    # Stored activations against themselves: kernels that are not deterministic would show.
    wanted, found = train(one, "store", device), train(one, one.memory, device)
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name
    if not one.dropout:  # which may drop a branch of every sample
        assert all(value.float().abs().sum() > 0 for value in found.values())


@pytest.mark.parametrize(("device", "one"), CASES)
def test_states_come_back_in_every_bit(device: str, one: Combination) -> None:
    net = make(one, "reverse", device)
    chain = net.chains[0]
    with settings(one, device), torch.no_grad():
        tokens = net.family.stem(net, inputs(one, device)).tokens
        recorded = chain.record(tokens)
        found = chain.reverse(recorded)
    certificate = chain.certificate()
    assert certificate is not None and certificate.verified and certificate.failures == 0
    grid: Any = 2.0**chain.setting.fraction_bits
    scales = recorded.tape.arithmetic.scales
    if scales is not None:
        grid = scales.values(tokens.device, onto_grid=True).double()
    on_grid = (tokens.double() * grid).round() / grid
    assert torch.equal(found, on_grid.float().to(found.dtype))
