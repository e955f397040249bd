"""The gradient's kernel; and all kernels compiled for a GPU, without one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dr2dist.reversible import round_coefficient
from dr2dist.reversible.arithmetic.gradient import couple
from dr2dist.reversible.arithmetic.triton_kernels import couple_gradients

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
"""Of a sum that is rounded once; in fp32 and fp64 of each of its terms too."""
ROUNDING[torch.float64] = 2.0**-51


def drawn(seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 7, 150, generator=generator).to(device, dtype)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_are_coupled_with_one_rounding(
    dtype: torch.dtype, through: bool, beta: float, device: torch.device
) -> None:
    alpha, beta = 0.75, round_coefficient(beta)
    dx, dy, of_x = (drawn(seed, dtype, device) for seed in range(3))
    exact = alpha * dx.double() + beta * dy.double() + (of_x.double() if through else 0)
    most = dx.double().abs() + dy.double().abs() + of_x.double().abs()
    for kind in (couple, couple_gradients):
        target = dy.clone() if beta else torch.full_like(dy, torch.nan)
        given = of_x.transpose(0, 2).contiguous().transpose(0, 2) if through else None
        kind(target, dx, given, alpha, beta)
        assert target.dtype == dtype
        # Triton's interpreter, on the CPU, cuts bf16 off where kernels on a GPU round.
        bound = ROUNDING[dtype] * most * (2 if device.type == "cpu" else 1)
        assert ((target.double() - exact).abs() <= bound).all()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import triton.language as tl
from dr2dist.reversible.arithmetic import triton_kernels as kernels

data = {"now": "*i32", "f": "*bf16", "remainders": "*u8", "sums": "*i64", "largest": "*i64",
    "count": "i32",
    "place": "i64", "alpha": "fp32", "beta": "fp32", "scales": "*fp32", "before": "*i32",
    "after": "*i32", "out": "*i32", "deviations": "*i64", "total": "*i64", "value": "*bf16",
    "state": "*i32", "x": "*bf16", "h": "*bf16", "steps": "*fp32", "peaks": "*i64",
    "target": "*bf16", "dx": "*bf16", "of_x": "*bf16"}
constants = {"bits": 4, "share": kernels.BYTES, "block": kernels.ELEMENTS, "wide": tl.float32,
    "channels": 1, "inner": 1, "narrow": False, "peaked": False,
    "through": True, "kept": True}
if NARROW:
    data |= dict.fromkeys(("now", "before", "after", "out", "state"), "*i16")
    constants |= {"channels": 384, "narrow": True, "peaked": True}
for kernel in (kernels.advance, kernels.retreat, kernels.deviation, kernels.start, kernels.tokens,
        kernels.sum_bits, kernels.gradient):
    own = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in own else data[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, own)
    code = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    if kernel not in (kernels.tokens, kernels.sum_bits, kernels.gradient):
        assert "0d4338000000000000" in code and "0dC338000000000000" in code, "rounding is gone"
    if kernel in (kernels.tokens, kernels.gradient):
        assert "cvt.rn.bf16" in code, "what is stored is not rounded to nearest"
    if kernel not in (kernels.tokens, kernels.start, kernels.gradient):
        assert "add.u64" in code and "atom" in code, "programs do not add to one sum"
        # As signed numbers; the last step of the mixing must shift zeros in.
        assert "shr.u64" in code, "the mixing of places is gone"
"""


@pytest.mark.parametrize("narrow", [False, True])
def test_kernels_compile_for_a_gpu_and_keep_their_rounding(narrow: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"NARROW = {narrow}\n{COMPILE}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
