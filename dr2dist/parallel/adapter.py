"""All that is used of DeepSpeed beyond its documented interface.

Tested with DeepSpeed 0.19.8. Any release may change what is used here, so setup.py allows no 0.20:
a newer DeepSpeed means this file, and the tests of engines, stages and checkpoints.

Documented are `initialize`, `init_distributed`, the engine's methods, `zero.Init`,
`zero.GatheredParameters` and the schedules of `runtime.pipe`; dr2dist/parallel uses them itself.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.comm.config import CommsLoggerConfig as CommsLoggerConfig
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig as DeepSpeedThroughputTimerConfig
from torch import Tensor, nn

from dr2dist.parallel.fragment import Fragment

# The process


class ProcessState(NamedTuple):
    """What DeepSpeed sets for a whole process.

    levels: of its logger and its handlers. comms_logger, groups: its own objects.
    """

    levels: list[int]
    comms_logger: Any
    groups: Any

    @classmethod
    def now(cls) -> ProcessState:
        """As it is."""
        levels = [target.level for target in (logger, *logger.handlers)]
        return cls(levels, comm.comms_logger, deepspeed.utils.groups.mpu)

    def with_groups(self, groups: Any) -> ProcessState:
        """The same with a grid of process groups, None for none, and a new log of communication."""
        return self._replace(comms_logger=type(comm.comms_logger)(), groups=groups)

    def set(self) -> None:
        """Puts it in force."""
        for target, level in zip((logger, *logger.handlers), self.levels, strict=True):
            target.setLevel(level)
        comm.comms_logger = self.comms_logger
        deepspeed.utils.groups.mpu = self.groups


def forget_network(net: nn.Module) -> None:
    """Takes a network off the list on which ZeRO-3 keeps every one."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not net]


def refuse_compiled_collectives() -> None:
    """Leaves ranks without GPUs to gloo.

    DeepSpeed would compile a shared-memory collective at first use, which takes a compiler and a
    minute; gloo does the same work.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# The configuration


# Stages


def stage_groups(stages: int, replicas: int) -> Any:
    """DeepSpeed's grid of process groups, for `initialize`; every rank must call it."""
    topology = PipeDataParallelTopology(stages, replicas)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return PipelineParallelGrid(topology)


def same_stage(groups: Any) -> Any:
    """The process group of this rank's stage, of all ranks (None) where there are no stages."""
    return None if groups is None else groups.get_data_parallel_group()


def same_replica(groups: Any) -> Any:
    """The process group of this rank's replica, one rank from each stage."""
    return groups.get_pipe_parallel_group()


def count_in_norm(parameters: Iterable[nn.Parameter]) -> None:
    """Has DeepSpeed's norm of the gradient count parameters that are on this stage alone."""
    for parameter in parameters:
        parameter.model_parallel = True  # type: ignore[attr-defined]


def exchange_one_norm(engine: Any, group: Any) -> None:
    """Has ZeRO-1 exchange one norm between stages in each step. group: see same_replica.

    By itself it does so for each of a stage's parameter groups, and stages that differ in their
    number (by what is frozen, or by layer decay) would wait for each other for ever.
    """
    optimizer = engine.optimizer
    own, exchange = optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        optimizer._model_parallel_all_reduce = lambda tensor, op: None
        try:
            norm = torch.as_tensor(own(norm_type), dtype=torch.float32)
        finally:
            optimizer._model_parallel_all_reduce = exchange
        # DeepSpeed says -1 for a norm that is not finite.
        squared = torch.where(norm < 0, torch.inf, norm.square())
        dist.all_reduce(squared, group=group)
        return torch.where(squared.isfinite(), squared.sqrt(), -1.0)

    optimizer.scaled_global_norm = scaled_global_norm


# Parameters, sharded by ZeRO-3 or whole


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, of whose values this rank may hold a shard."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def held(parameter: Any) -> Tensor:
    """What this rank holds of a parameter between steps: its shard, flat and padded, or itself."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard


def start_gathering(parameters: Iterable[Any]) -> Any:
    """Begins to gather those sharded ones that are neither there nor on their way.

    Returns what to call `wait()` of, None if there is nothing to wait for.
    """
    missing = [p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    return missing[0].all_gather_coalesced(missing) if missing else None


# Masters and moments


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's optimiser, which has the moments, under whatever DeepSpeed has made around it."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def clear_gradients(engine: Any) -> None:
    """Forgets the gradients of all parameters, also those that ZeRO has put aside."""
    if hasattr(engine.optimizer, "zero_grad"):
        engine.optimizer.zero_grad()
    engine.zero_grad()


def publish(engine: Any, zero: int) -> None:
    """Carries masters over to the weights that the network computes with; on every rank."""
    optimizer = engine.optimizer
    if zero in (1, 2):
        optimizer.update_lp_params()
    if zero == 3:
        flat = zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            strict=True,
        )
        for weights, masters in flat:
            weights.data.copy_(masters.data)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    if not zero:
        for weight, master in _fp32_copies(optimizer).items():
            weight.data.copy_(master.data)


def layout(engine: Any, zero: int) -> Callable[[str, Any], list[Fragment]]:
    """Finds what this rank holds of a parameter by its name and itself, as of now."""
    optimizer = engine.optimizer
    if zero == 3:
        optimizer._partition_all_parameters()
        return partial(_sharded, optimizer)
    if zero:
        return partial(_partitioned, _flat_places(optimizer))
    return partial(_whole, _fp32_copies(optimizer))


def _fp32_copies(optimizer: Any) -> dict[Tensor, Tensor]:
    """Masters by weight where an engine without ZeRO has them, which it does in fp16."""
    pairs = zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    )
    return {w: m for weights, masters in pairs for w, m in zip(weights, masters, strict=True)}


def _whole(copies: dict[Tensor, Tensor], name: str, parameter: nn.Parameter) -> list[Fragment]:
    master = copies.get(parameter, parameter)
    owner = master if parameter.requires_grad else None
    values = master.detach().view(-1)
    beside = master is not parameter
    return [Fragment(name, tuple(parameter.shape), 0, values, True, owner, beside=beside)]


def _flat_places(optimizer: Any) -> dict[Tensor, tuple[Tensor, int]]:
    """ZeRO 1 and 2: this rank's partition that a parameter's group has, and where in it the
    parameter begins; it may begin before the partition, and end after it.

    The flat order is DeepSpeed's own: it may deal parameters out to ranks, or pad them.
    """
    places = {}
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        begin = dist.get_rank(optimizer.real_dp_process_group[group]) * len(flat)
        parameters = optimizer.round_robin_bit16_groups[group]
        offsets = optimizer.round_robin_bit16_offsets[group]
        for parameter, offset in zip(parameters, offsets, strict=True):
            places[parameter] = flat, offset - begin
    return places


def _partitioned(
    places: dict[Tensor, tuple[Tensor, int]], name: str, parameter: nn.Parameter
) -> list[Fragment]:
    if not parameter.requires_grad:
        return _whole({}, name, parameter)
    flat, begin = places[parameter]
    first, last = max(begin, 0), min(begin + parameter.numel(), len(flat))
    if first >= last:
        return []
    values = flat.detach()[first:last]
    return [Fragment(name, tuple(parameter.shape), first - begin, values, False, flat, first)]


def _sharded(optimizer: Any, name: str, parameter: Any) -> list[Fragment]:
    """ZeRO 3: an equal shard of each parameter, the last one padded."""
    shape = tuple(parameter.ds_shape)
    size = parameter.ds_tensor.ds_numel
    start = optimizer._get_param_partition_rank(parameter) * size
    count = max(0, min(size, math.prod(shape) - start))
    if not count:
        return []
    if not parameter.requires_grad:
        values = parameter.ds_tensor.data.view(-1)[:count]
        return [Fragment(name, shape, start, values, False, beside=False)]
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    owner = optimizer.fp32_partitioned_groups_flat[group]
    return [Fragment(name, shape, start, owner.detach()[offset:][:count], False, owner, offset)]
