"""Peak memory of one training step, each case in a process of its own.

    python benchmarks/step_memory.py --depth 24 --batch 32

A ViT of width 384 at 224 pixels, fp32, on the CPU. Growth is the peak of resident memory during
a step less what was resident before it (weights and their gradients are there already), with an
allocator that gives back at once what is freed. A token tensor is one fp32 [197, 384] per sample.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import dr2dist

WIDTH, TOKENS = 384, 197
CASES: dict[str, dict[str, Any] | None] = {
    "conventional (timm)": None,
    "checkpoint per block (timm)": {"timm_checkpoint": True},
    "checkpoint per function": {"memory": "checkpoint"},
    "exact reversal": {"memory": "reverse"},
    "exact reversal, slices of 4": {"memory": "reverse", "chunk_size": 4},
}


def build(case: str, depth: int, beta: float) -> nn.Module:
    """The model of a case."""
    torch.manual_seed(0)
    options = CASES[case]
    model = VisionTransformer(depth=depth, embed_dim=WIDTH, num_heads=6, num_classes=10)
    if options is None:
        return model
    if "timm_checkpoint" in options:
        model.set_grad_checkpointing(True)
        return model
    net: nn.Module = dr2dist.convert(model, 1 - beta, beta, **options)
    return net


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(case: str, depth: int, batch: int, beta: float) -> int:
    """Growth in bytes, after a step of one sample that warms up."""
    model = build(case, depth, beta)
    images = torch.randn(batch, 3, 224, 224)
    model(images[:1]).sum().backward()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = status("VmRSS")
    model(images).sum().backward()
    return status("VmHWM") - before


def run_case(case: str, given: argparse.Namespace) -> int:
    """Measures a case in a fresh process."""
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = [f"--{k}={getattr(given, k)}" for k in ("depth", "batch", "beta")]
    done = subprocess.run(
        [sys.executable, __file__, "--case", case, *arguments],
        env={**os.environ, **limits},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=24, help="blocks, of two functions each")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process")
    given = parser.parse_args()
    if given.case:
        print(measure(given.case, given.depth, given.batch, given.beta))
        return
    threads = torch.get_num_threads()
    print(
        f"{datetime.date.today()}, {platform.machine()}, {threads} threads, torch "
        f"{torch.__version__}: depth {given.depth}, batch {given.batch}, beta {given.beta}\n"
    )
    print("| | growth of peak memory | token tensors per sample |")
    print("|---|---|---|")
    for case in CASES:
        growth = run_case(case, given)
        tensors = growth / (given.batch * TOKENS * WIDTH * 4)
        print(f"| {case} | {growth / 2**20:.0f} MiB | {tensors:.1f} |", flush=True)


if __name__ == "__main__":
    main()
