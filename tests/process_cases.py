"""What an engine changes in the process that it runs in; called in the ranks of a pool."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.comm import comm
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import logger
from torch import nn

import dr2dist
from dr2dist.backbones.build import build_deferred
from dr2dist.parallel.deepspeed_json import deepspeed_config
from dr2dist.parallel.engine import ReversibleEngine
from tests.cases import make_engine, take_step

Names = dict[tuple[str, str], Any]


def public() -> Names:
    """What torch's modules and classes hold by name."""
    places: dict[str, Any] = {
        "torch": torch,
        "torch.Tensor": torch.Tensor,
        "torch.autograd": torch.autograd,
        "torch.cuda": torch.cuda,
        "torch.distributed": torch.distributed,
        "torch.nn": nn,
        "torch.nn.Parameter": nn.Parameter,
        "torch.nn.functional": nn.functional,
        "torch.nn.init": nn.init,
        "torch.optim": torch.optim,
    }
    for space in (nn, torch.optim):
        classes = {name: found for name, found in vars(space).items() if isinstance(found, type)}
        places |= {f"{space.__name__}.{name}": found for name, found in classes.items()}
    return {
        (place, name): value
        for place, holder in places.items()
        for name, value in vars(holder).items()
        if not isinstance(value, types.ModuleType)
    }


def settings() -> dict[str, Any]:
    """Of the process, which numbers or DeepSpeed's own lines depend on."""
    return {
        "level": [target.level for target in (logger, *logger.handlers)],
        "comms": vars(comm.comms_logger).copy(),
        "groups": deepspeed.utils.groups.mpu,
        "modules": list(parameter_offload.FWD_MODULE_STACK),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "collecting": gc.isenabled(),
    }


def left_by(zero: int, bf16: bool, extra: dict[str, Any], deferred: bool = False) -> dict[str, Any]:
    """Which of torch's names, and which settings, are others while an engine is there and after it
    was dropped, and what of it is left then."""
    _use_once()
    names, before = public(), settings()
    engine = _deferred(bf16) if deferred else make_engine("vit", zero, bf16=bf16, extra=extra)
    if not deferred:
        take_step(engine, 0)
    during = _changed(names, public())
    parts: dict[str, Callable[[], Any]] = {
        "network": weakref.ref(engine.net),
        "engine": weakref.ref(engine._engine),
        "optimizer": weakref.ref(engine._engine.optimizer),
        "weight": weakref.ref(next(iter(engine.net.parameters()))),
    }
    del engine
    gc.collect()
    return {
        "during": during,
        "after": _changed(names, public()),
        "settings": [key for key, value in settings().items() if value != before[key]],
        "left": [key for key, part in parts.items() if part() is not None],
    }


def alive_after_steps(zero: int, memory: str) -> list[int]:
    """How many tensors there are after each of some steps."""
    engine = make_engine("vit", zero, memory=memory)
    found = []
    for step in range(4):
        take_step(engine, step)
        gc.collect()
        found.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    return found


def _use_once() -> None:
    """What torch itself sets up when its parts, the compiler too, are first used."""
    take_step(make_engine("vit", 0), 0)
    one, other = (nn.Parameter(torch.ones(1)) for _ in range(2))
    torch.utils.swap_tensors(one, other)
    torch.optim.SGD([one], 0.1).step()
    torch.compile(lambda: None)
    gc.collect()


def _changed(before: Names, after: Names) -> list[str]:
    gone = object()
    found = [key for key, value in before.items() if after.get(key, gone) is not value]
    return sorted(map(".".join, [*found, *(after.keys() - before.keys())]))


def _deferred(bf16: bool) -> ReversibleEngine:
    """Sharded while it is built."""
    model, read = build_deferred(
        "vit_tiny_patch16_224", weights=None, image_size=(32, 32), num_classes=3
    )
    net = dr2dist.convert(model)
    precision: Any = "bf16" if bf16 else "fp32"
    config = deepspeed_config(
        zero=3, precision=precision, micro_batch=1, accumulate=1, replicas=1, clip=None
    )
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    return ReversibleEngine(net, optimizer, config, precision, weights=read)
