"""The GPU kernels have the same bits as the plain arithmetic; without a GPU, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dr2dist.reversible import Setting, State
from dr2dist.reversible.certificate import NEVER, Flags, Witness
from dr2dist.reversible.exact import ExactArithmetic
from dr2dist.reversible.fused import FusedArithmetic
from tests.functions import make_chain, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0), (0.63, 0.37), (0.0, 2.0**-16), (0.999, 0.001)]


def states(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**29), 2**29, (count,), generator=generator).int().to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_a_step_forth_and_back_has_the_plain_versions_bits(
    alpha: float, beta: float, dtype: torch.dtype
) -> None:
    setting = Setting(alpha, beta)
    plain = ExactArithmetic(setting, torch.float32)
    kernels = FusedArithmetic(setting, torch.float32)
    for count in (1, 13, 2048, 5003):
        before, now = states(count, 1), states(count, 2)
        f = (torch.randn(count, generator=torch.Generator().manual_seed(3)) * 50).to(DEVICE, dtype)
        found = []
        for arithmetic in (plain, kernels):
            seen, again = Witness(), Witness()
            out = State(torch.empty_like(now), now.clone())
            remainders = arithmetic.advance(State(now, before), f, out, True, seen)
            assert remainders.nbytes == setting.remainder_bits * -(-count // 8)
            x = arithmetic.tokens(out.current)
            state = arithmetic.retreat(
                State(out.current.clone(), now.clone()), f, remainders, again
            )
            assert torch.equal(state.current, now)
            assert torch.equal(state.previous, before)
            found.append((out.current, x, seen.bits, again.bits))
            assert bool(seen.finite)
            assert not seen.outside
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, -1e6])
def test_what_is_not_allowed_is_noted(value: float) -> None:
    kernels = FusedArithmetic(Setting(0.5, 0.5), torch.float32)
    now = states(3000, 1)
    f = torch.zeros(3000, device=DEVICE)
    f[2500] = value
    flags, seen = Flags(f.device), Witness()
    out = State(torch.empty_like(now), now)
    kernels.advance(State(now, now), f, out, False, seen)
    flags.note_function(3, seen)
    assert flags.tensor.tolist()[:2] == [3, NEVER if abs(value) == 1e6 else 3]
    assert bool(kernels.outside(out.current.view(3000, 1))[2500])


def test_a_chain_on_kernels_trains_like_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for kind in (ExactArithmetic, FusedArithmetic):
        monkeypatch.setattr(
            "dr2dist.reversible.segment.arithmetic_of",
            lambda setting, dtype, device, kind=kind: kind(setting, dtype),
        )
        chain = make_chain(5, alpha=0.7, beta=0.3, chunk_size=2).to(DEVICE)
        x = tokens(5).to(DEVICE).requires_grad_()
        output = chain(x)
        output.square().sum().backward()
        certificate = chain.certificate()
        assert certificate is not None
        assert certificate.failures == 0
        assert certificate.verified
        assert x.grad is not None
        results.append([output, x.grad, *(p.grad for p in chain.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dr2dist.reversible import fused

data = {"now": "*i32", "f": "*bf16", "remainders": "*u8", "sums": "*i64", "count": "i32",
    "alpha": "fp32", "beta": "fp32", "scale": "fp32", "bits": "constexpr", "share": "constexpr"}
own = {fused._advance: {"before": "*i32", "out": "*i32", "extremes": "*fp64"},
    fused._retreat: {"after": "*i32"}}
for kernel, more in own.items():
    signature = {name: {**data, **more}[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {"bits": 4, "share": fused.BYTES})
    code = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "0d4338000000000000" in code and "0dC338000000000000" in code, "rounding is gone"
"""


def test_kernels_compile_for_a_gpu_and_keep_their_rounding() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
