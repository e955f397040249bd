"""DeepSpeed's configuration: what the run says, and what a JSON file may add to it.

DeepSpeed accepts unknown keys without a word, so the file is checked here, as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dr2dist.errors import UserError, nearest

_TOP = {
    "communication_data_type",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "wall_clock_breakdown",
}
_SECTIONS: dict[str, set[str]] = {
    "zero_optimization": {f.alias or n for n, f in DeepSpeedZeroConfig.model_fields.items()},
    "comms_logger": set(CommsLoggerConfig.model_fields),
    "bf16": {"enabled"},
    "fp16": {"enabled"},
    "timers": {"throughput"},
}
_SAID_HERE = {
    "train_batch_size": "train.micro_batch, train.accumulate and the number of ranks",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "optim.clip",
}
_REFUSED = {
    "optimizer": "the optimiser is set by optim in the YAML file",
    "scheduler": "the learning rate is set by optim in the YAML file",
    "pipeline": "pipeline stages are not supported yet",
    "activation_checkpointing": "use reversible.memory",
    "elasticity": "elastic training is not supported",
    "compression_training": "compression is not supported",
    "data_efficiency": "the order of samples is set by the shards",
    "curriculum_learning": "the order of samples is set by the shards",
    "hybrid_engine": "it is for generation",
    "autotuning": "it is not supported",
    "amp": "use train.precision",
    "torch_autocast": "use train.precision",
    "flops_profiler": "a reversal runs functions a second time, which it would count wrongly",
    "compile": "it is not supported",
}
_REFUSED_ZERO = {
    "offload_param": "offloading is not supported yet",
    "offload_optimizer": "offloading is not supported yet",
    "cpu_offload": "offloading is not supported yet",
    "cpu_offload_params": "offloading is not supported yet",
    "zenflow": "it is not supported",
}


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """The file's settings. Raises UserError if it cannot be read or holds no JSON object."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object")
    return values


def deepspeed_config(
    *,
    zero: int,
    bf16: bool,
    micro_batch: int,
    accumulate: int,
    replicas: int,
    clip: float | None,
    extra: Mapping[str, Any] | None = None,
    source: str = "deepspeed JSON",
) -> dict[str, Any]:
    """The whole configuration for `deepspeed.initialize`.

    replicas: data-parallel ranks. extra: a user's own settings, from `source`.
    Raises UserError for an unknown key, a refused one, or one that contradicts the run.
    """
    ours = {
        "train_batch_size": micro_batch * accumulate * replicas,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": clip or 0.0,
    }
    extra = dict(extra or {})
    _check_keys(extra, source)
    for key, value in ours.items():
        if extra.get(key, value) != value:
            raise UserError(
                f"{source}: {key} is {extra[key]}, but {_SAID_HERE[key]} say {value}: leave it out"
            )
    _check_precision(extra, bf16, source)
    section = dict(extra.get("zero_optimization", {}))
    if section.get("stage", zero) != zero:
        raise UserError(
            f"{source}: zero_optimization.stage is {section['stage']}, but parallel.zero says "
            f"{zero}: leave it out"
        )
    # Without ZeRO DeepSpeed keeps bf16 weights without fp32 masters, so there the weights stay
    # in fp32 and the engine casts while it computes.
    return {
        **extra,
        **ours,
        "zero_optimization": {**section, "stage": zero},
        "bf16": {"enabled": bf16 and zero > 0},
        "zero_allow_untested_optimizer": True,
    }


def _check_keys(extra: Mapping[str, Any], source: str) -> None:
    known = _TOP | set(_SAID_HERE) | set(_SECTIONS)
    for key, value in extra.items():
        if key in _REFUSED:
            raise UserError(f"{source}: {key} is refused: {_REFUSED[key]}")
        if key not in known:
            raise UserError(f"{source}: {key}: unknown or unsupported key{nearest(key, known)}")
        if key in _SECTIONS:
            _check_section(key, value, source)


def _check_section(name: str, values: Any, source: str) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {name} is {values!r}, allowed is an object")
    for key in values:
        if name == "zero_optimization" and key in _REFUSED_ZERO:
            raise UserError(f"{source}: {name}.{key} is refused: {_REFUSED_ZERO[key]}")
        if key not in _SECTIONS[name]:
            hint = nearest(key, _SECTIONS[name])
            raise UserError(f"{source}: {name}.{key}: unknown key{hint}")
    if name == "zero_optimization":
        try:
            DeepSpeedZeroConfig(**values)
        except ValueError as error:
            raise UserError(f"{source}: {name}: {' '.join(str(error).split())}") from None


def _check_precision(extra: Mapping[str, Any], bf16: bool, source: str) -> None:
    for key, wanted in (("bf16", bf16), ("fp16", False)):
        enabled = extra.get(key, {}).get("enabled", wanted)
        if enabled != wanted:
            raise UserError(
                f"{source}: {key}.enabled is {enabled}, but train.precision is "
                f"{'bf16' if bf16 else 'fp32'}: leave it out"
            )
