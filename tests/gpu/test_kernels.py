"""Kernels beside the plain arithmetic: every width, other devices than the current one, streams."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import dr2dist
from dr2dist.reversible import Setting, State
from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.exact import ExactArithmetic
from dr2dist.reversible.arithmetic.fused import FusedArithmetic
from tests.models import build, images

COUNT = {"cpu": 50, "cuda": 1_000_003}


@pytest.mark.parametrize("bits", range(17))
def test_remainders_of_every_width_bring_a_state_back(bits: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(bits)
    count = COUNT[device.type]
    before, now = (
        torch.randint(-(2**29), 2**29, (count,), generator=generator).int().to(device)
        for _ in range(2)
    )
    f = torch.randn(count, generator=generator).to(device, torch.bfloat16)
    setting = Setting(0.25, 2.0**-bits)
    assert setting.remainder_bits == bits
    found = []
    for kind in (ExactArithmetic, FusedArithmetic):
        arithmetic, first, again = (
            kind(setting, torch.float32),
            OutputChecksum.on(device),
            OutputChecksum.on(device),
        )
        out = State(torch.empty_like(now), now)
        rest = arithmetic.advance(State(now, before), f, out, True, first)
        assert rest is not None
        back = arithmetic.retreat(State(out.current.clone(), now), f, rest, again)
        assert torch.equal(back.previous, before)
        assert torch.equal(first.bits, again.bits)
        found.append(out.current)
    assert torch.equal(*found)


def step(device: torch.device, wait: bool = False) -> dict[str, Tensor]:
    """Output and gradients of a small network's training step, on the host.

    wait: what the step needs is ready only after a while.
    """
    net: Any = dr2dist.convert(build("vit", depth=2), chunk_size=2).to(device).train()
    x = images(5).pin_memory()
    if wait:
        torch.cuda._sleep(200_000_000)
    output = net(x.to(device, non_blocking=True))
    output.square().sum().backward()
    assert net.certificate().messages == ()
    found = {"output": output.detach(), **{name: p.grad for name, p in net.named_parameters()}}
    return {name: value.cpu() for name, value in found.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.gpu
def test_a_step_on_a_side_stream_is_the_same() -> None:
    wanted = step(torch.device("cuda", 0))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = step(torch.device("cuda", 0), wait=True)
    assert_equal(wanted, found)


FIRST_STEP = """
import timm, torch, dr2dist
model = timm.create_model("vit_small_patch16_224", num_classes=3, depth=2)
net = dr2dist.convert(model, on_failure="record").cuda().bfloat16().train()
net(torch.randn(8, 3, 224, 224, device="cuda").bfloat16()).square().mean().backward()
print(net.certificate().messages)
"""


@pytest.mark.gpu
def test_attention_is_the_same_in_both_runs_of_a_processs_first_step() -> None:
    """Torch changes its order of kernels when attention first runs, on some GPUs."""
    line = [sys.executable, "-c", FIRST_STEP]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "()", done.stdout + done.stderr


@pytest.mark.gpu
def test_a_step_on_another_device_than_the_current_one_is_the_same(two_gpus: None) -> None:
    wanted = step(torch.device("cuda", 0))
    with torch.cuda.device(0):
        assert_equal(wanted, step(torch.device("cuda", 1), wait=True))
