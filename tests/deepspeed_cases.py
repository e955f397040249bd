"""What the ranks of a pool run to see what a setting of DeepSpeed does to a run's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

import dr2dist
from dr2dist.backbones.parameters import freeze as freeze_parameters
from dr2dist.checkpoints.folders import checkpoint_folder
from dr2dist.inference.exported import export
from dr2dist.parallel.deepspeed_json import Precision, deepspeed_config
from dr2dist.parallel.engine import DTYPES, ReversibleEngine
from dr2dist.training.checkpoint_manager import CheckpointManager, Progress
from tests.cases import full_state, make_engine, micro_batches, take_step
from tests.models import build, images

FACTS = {
    "model": "a tiny one of the tests",
    "image_size": None,
    "arithmetic": "exact",
    "fraction_bits": 20,
    "classes": ["a", "b", "c", "d", "e"],
    "input_size": (32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.2, 0.2, 0.2),
    "dr2dist": "0",
}
HALF, WHOLE = 2, 4
"""Steps before the checkpoint that is gone on from, and of the whole run."""


def outcome(folder: str, **options: Any) -> dict[str, Any]:
    """What a run of four steps leaves: losses, norms of gradients, outputs on held-out images, and
    the same of a run that goes on from the checkpoint after two steps, in an engine whose weights
    were others. Rank 0 exports the last weights to `folder`, and gives their own outputs."""
    engine = make_engine("vit", **options)
    Path(folder).mkdir(parents=True, exist_ok=True)
    manager = CheckpointManager(Path(folder), 2, FACTS)
    found = _steps(engine, 0, HALF)
    manager.save(engine, Progress())
    found += _steps(engine, HALF, WHOLE)
    manager.save(engine, Progress())
    other = make_engine("vit", seed=1, **options)
    manager.restore(checkpoint_folder(Path(folder), HALF), other)
    again = _steps(other, HALF, WHOLE)
    result = {"steps": found, "again": again, "outputs": [_held_out(engine), _held_out(other)]}
    if dist.get_rank() == 0:
        file = Path(folder) / "model.safetensors"
        export(folder, file, "last")
        result["outputs"].append(_exported(file, engine, bool(options.get("bf16"))))
    return result


def _steps(engine: ReversibleEngine, first: int, last: int) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step."""
    return [
        (take_step(engine, step).loss, float(engine.gradient_norm)) for step in range(first, last)
    ]


def _held_out(engine: ReversibleEngine) -> Tensor:
    engine.net.eval()
    with torch.no_grad():
        return engine.forward({"image": images(3)}).float().clone()


def _exported(file: Path, engine: ReversibleEngine, bf16: bool) -> Tensor:
    """Outputs of the exported weights, computed in the engine's precision."""
    model = build("vit", seed=2, depth=3)
    model.load_state_dict(load_file(file))
    net = dr2dist.convert(model, *engine.coefficients).eval()
    held = DTYPES["bf16" if bf16 and engine.zero else "fp32"]
    for parameter in net.parameters():
        parameter.data = parameter.data.to(held)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not engine.zero):
        return net(images(3).to(held)).float()


def given(zero: int, precision: Precision, freeze: list[str]) -> dict[str, Any]:
    """Weights and a buffer as an engine hands them out before any step, its bytes by kind, and
    numbers of trained and frozen values."""
    # DeepSpeed has no fp16 on CPUs; here nothing is computed in it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        model = build("vit", depth=3)
        model.norm.register_buffer("statistic", torch.full((3,), 1 / 3))
        freeze_parameters(model, freeze)
        net = dr2dist.convert(model)
        config = deepspeed_config(
            zero=zero,
            precision=precision,
            micro_batch=1,
            accumulate=1,
            replicas=dist.get_world_size(),
            clip=None,
        )
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        engine = ReversibleEngine(net, optimizer, config, precision)
    parameters = dict(build("vit", depth=3).named_parameters())
    trained = {name for name, p in engine.net.named_parameters() if p.requires_grad}
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    return {
        "state": full_state(engine),
        "bytes": engine.state_bytes(),
        "trained": sum(size for name, size in sizes.items() if name in trained),
        "frozen": sum(size for name, size in sizes.items() if name not in trained),
    }


def one_step(zero: int, value: str) -> dict[str, Any]:
    """This rank's gradients by plain autograd, and all weights before and after a step of SGD in
    which gradients travel as `value`."""
    extra = {"communication_data_type": value}
    engine = make_engine("vit", zero, sgd=True, clip=1e6, extra=extra)
    before = full_state(engine)
    take_step(engine, 0)
    after = full_state(engine)
    net = dr2dist.convert(build("vit", depth=3), memory="store").train()
    ((inputs, labels),) = micro_batches(0, 1)
    nn.functional.cross_entropy(net(inputs), labels).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    pairs = {} if before is None else {name: (before[name], after[name]) for name in gradients}
    return {"gradients": gradients, "weights": pairs}
