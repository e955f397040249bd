"""DeepSpeed's configuration: what the run says, and what a JSON file may add to it.

DeepSpeed accepts unknown keys without a word, so the file is checked here, as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from dr2dist.errors import UserError, nearest

Precision = Literal["fp32", "bf16", "fp16"]

FP16_LOSS_SCALE = 1024
"""Fixed, since a scale that is found by overflowing would need steps that cannot be proven."""


class _Precision(BaseModel):
    enabled: StrictBool = False


class _Timers(BaseModel):
    throughput: DeepSpeedThroughputTimerConfig = None


class _File(BaseModel):
    """What a file may hold; DeepSpeed's own models stand for its sections."""

    train_batch_size: StrictInt = 0
    train_micro_batch_size_per_gpu: StrictInt = 0
    gradient_accumulation_steps: StrictInt = 0
    gradient_clipping: StrictInt | StrictFloat = 0
    zero_allow_untested_optimizer: StrictBool = True
    zero_optimization: DeepSpeedZeroConfig = None
    bf16: _Precision = _Precision()
    fp16: _Precision = _Precision()
    comms_logger: CommsLoggerConfig = None
    timers: _Timers = _Timers()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    steps_per_print: StrictInt | None = Field(None, ge=1)
    disable_python_gc: StrictBool = False
    dump_state: StrictBool = False
    memory_breakdown: StrictBool = False
    wall_clock_breakdown: StrictBool = False


_SAID_HERE = {
    "train_batch_size": "train.micro_batch, train.accumulate and the number of ranks",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "optim.clip",
    "zero_allow_untested_optimizer": "the optimiser is torch's",
}

_AVERAGE = "gradients are always averaged over the ranks"
_OFFLOAD = "of offloading there is parallel.offload_optimizer in the YAML file"
_PRECISION = "use train.precision"
_RECORDS = "a run writes its own records"
_SAMPLES = "the order of samples is set by the shards"
_UNSUPPORTED = "it is not supported"
_REFUSED = {
    "activation_checkpointing": "use reversible.memory",
    "aio": _OFFLOAD,
    "amp": _PRECISION,
    "autotuning": _UNSUPPORTED,
    "checkpoint": _UNSUPPORTED,
    "comet": _RECORDS,
    "compile": _UNSUPPORTED,
    "compression_training": _UNSUPPORTED,
    "csv_monitor": _RECORDS,
    "curriculum_learning": _SAMPLES,
    "data_efficiency": _SAMPLES,
    "data_types": _PRECISION,
    "dataloader_drop_last": _SAMPLES,
    "elasticity": _UNSUPPORTED,
    "expert_parallel": _UNSUPPORTED,
    "flops_profiler": "a reversal runs functions a second time, which it would count wrongly",
    "gradient_allreduce_op": _AVERAGE,
    "gradient_predivide_factor": _AVERAGE,
    "hybrid_engine": "it is for generation",
    "managed_gradient_accumulation": "use train.accumulate",
    "optimizer": "the optimiser is set by optim in the YAML file",
    "pipeline": "pipeline stages are not supported yet",
    "prescale_gradients": _AVERAGE,
    "scheduler": "the learning rate is set by optim in the YAML file",
    "seq_parallel_communication_data_type": _UNSUPPORTED,
    "sequence_parallel_size": _UNSUPPORTED,
    "sparse_attention": _UNSUPPORTED,
    "sparse_gradients": _UNSUPPORTED,
    "tensor_parallel": _UNSUPPORTED,
    "tensorboard": _RECORDS,
    "torch_autocast": _PRECISION,
    "wandb": _RECORDS,
    "weight_quantization": _UNSUPPORTED,
    "zero_force_ds_cpu_optimizer": "the optimiser is set by optim in the YAML file",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.mics_shard_size": _UNSUPPORTED,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.zenflow": _UNSUPPORTED,
    "zero_optimization.zero_hpz_partition_size": _UNSUPPORTED,
    "zero_optimization.zero_quantized_gradients": _UNSUPPORTED,
    "zero_optimization.zero_quantized_nontrainable_weights": _UNSUPPORTED,
    "zero_optimization.zero_quantized_weights": _UNSUPPORTED,
}


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """The file's settings. Raises UserError if it cannot be read or holds no JSON object."""
    try:
        values = json.loads(
            Path(path).read_text("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key '{key}' is given twice")
        values[key] = value
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def deepspeed_config(
    *,
    zero: int,
    precision: Precision,
    micro_batch: int,
    accumulate: int,
    replicas: int,
    clip: float | None,
    offload_optimizer: bool = False,
    extra: Mapping[str, Any] | None = None,
    source: str = "deepspeed JSON",
) -> dict[str, Any]:
    """The whole configuration for `deepspeed.initialize`.

    replicas: data-parallel ranks. offload_optimizer: masters and moments in host memory. extra: a
    user's own settings, from `source`. Raises UserError for an unknown key, a refused one, or one
    that contradicts the run.
    """
    ours = {
        "train_batch_size": micro_batch * accumulate * replicas,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip or 0.0,
        "zero_allow_untested_optimizer": True,
    }
    extra = dict(extra or {})
    _check_keys(extra, _File, "", source)
    _check_values(extra, source)
    for key, value in ours.items():
        if extra.get(key, value) != value:
            raise UserError(
                f"{source}: {key} is {extra[key]}, but the configuration says {value} "
                f"({_SAID_HERE[key]}): leave it out"
            )
    _check_precision(extra, precision, source)
    _check_stage(extra, zero, source)
    section = {**extra.get("zero_optimization", {}), "stage": zero}
    if offload_optimizer:
        # torch's own optimisers: DeepSpeed's for the CPU would have to be compiled first.
        section["offload_optimizer"] = {"device": "cpu"}
        ours["zero_force_ds_cpu_optimizer"] = False
    # Without ZeRO DeepSpeed keeps bf16 weights without fp32 masters, so there the weights stay
    # in fp32 and the engine casts while it computes.
    return {
        **extra,
        **ours,
        "zero_optimization": section,
        "bf16": {"enabled": precision == "bf16" and zero > 0},
        "fp16": {"enabled": precision == "fp16", "loss_scale": FP16_LOSS_SCALE},
    }


def _check_keys(values: Any, kind: type[BaseModel], place: str, source: str) -> None:
    """Refuses keys that `kind` has no field for, down to the last section."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {place.rstrip('.')} is {values!r}, allowed is an object")
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    for key, value in values.items():
        if place + key in _REFUSED:
            raise UserError(f"{source}: {place}{key} is refused: {_REFUSED[place + key]}")
        if key not in fields:
            raise UserError(f"{source}: {place}{key}: unknown key{nearest(key, fields)}")
        more = fields[key].json_schema_extra
        if isinstance(more, dict) and more.get("deprecated"):
            raise UserError(f"{source}: {place}{key} is refused: it is deprecated")
        section = fields[key].annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            _check_keys(value, section, f"{place}{key}.", source)


def _check_values(extra: Mapping[str, Any], source: str) -> None:
    try:
        _File.model_validate(extra)
    except ValidationError as error:
        first = error.errors()[0]
        # A union's members follow the key itself; they mean nothing to a reader.
        key = ".".join(p for p in map(str, first["loc"]) if not p.startswith(("int", "float")))
        raise UserError(f"{source}: {key}: found {first['input']!r}; {first['msg']}") from None


def _check_precision(extra: Mapping[str, Any], precision: Precision, source: str) -> None:
    for key in ("bf16", "fp16"):
        enabled = extra.get(key, {}).get("enabled", key == precision)
        if enabled != (key == precision):
            raise UserError(
                f"{source}: {key}.enabled is {enabled}, but train.precision is {precision}: "
                "leave it out"
            )


def _check_stage(extra: Mapping[str, Any], zero: int, source: str) -> None:
    section = extra.get("zero_optimization", {})
    if section.get("stage", zero) != zero:
        raise UserError(
            f"{source}: zero_optimization.stage is {section['stage']}, but parallel.zero says "
            f"{zero}: leave it out, or set parallel.deepspeed to another file"
        )
    for key in section:
        if key.startswith("stage3_") and zero != 3:
            raise UserError(f"{source}: zero_optimization.{key} has no effect with ZeRO-{zero}")
