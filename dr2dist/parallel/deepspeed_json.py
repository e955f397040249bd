"""DeepSpeed's configuration: what the run says, and what a JSON file may add to it.

DeepSpeed accepts unknown keys without a word, so the file is checked here, as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from dr2dist.errors import UserError, nearest

Precision = Literal["fp32", "bf16", "fp16"]

FP16_LOSS_SCALE = 1024
"""Fixed, since a scale that is found by overflowing would need steps that cannot be proven."""

_ALL = (0, 1, 2, 3)
_REDUCING = (1, 2, 3)
_FLAT = (1, 2)
_SHARDED = (3,)

ACCEPTED: dict[str, tuple[int, ...]] = {
    # What the run says already: equal values are allowed.
    "train_batch_size": _ALL,
    "train_micro_batch_size_per_gpu": _ALL,
    "gradient_accumulation_steps": _ALL,
    "gradient_clipping": _ALL,
    "zero_allow_untested_optimizer": _ALL,
    "bf16.enabled": _ALL,
    "fp16.enabled": _ALL,
    "zero_optimization.stage": _ALL,
    # How gradients and weights travel.
    "communication_data_type": _ALL,
    "zero_optimization.contiguous_gradients": _REDUCING,
    "zero_optimization.overlap_comm": _REDUCING,
    "zero_optimization.reduce_bucket_size": _REDUCING,
    "zero_optimization.reduce_scatter": _REDUCING,
    "zero_optimization.allgather_bucket_size": _FLAT,
    "zero_optimization.parameter_alignment": _FLAT,
    "zero_optimization.round_robin_gradients": _FLAT,
    "zero_optimization.use_multi_rank_bucket_allreduce": _FLAT,
    "zero_optimization.enable_sanity_checks": _SHARDED,
    "zero_optimization.log_trace_cache_warnings": _SHARDED,
    "zero_optimization.stage3_allgather_sequential": _SHARDED,
    "zero_optimization.stage3_max_live_parameters": _SHARDED,
    "zero_optimization.stage3_max_reuse_distance": _SHARDED,
    "zero_optimization.stage3_model_persistence_threshold": _SHARDED,
    "zero_optimization.stage3_param_persistence_threshold": _SHARDED,
    "zero_optimization.stage3_prefetch_bucket_size": _SHARDED,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": _SHARDED,
    "zero_optimization.sub_group_size": _SHARDED,
    # What DeepSpeed writes of it all.
    "comms_logger.debug": _ALL,
    "comms_logger.enabled": _ALL,
    "comms_logger.prof_all": _ALL,
    "comms_logger.prof_ops": _ALL,
    "comms_logger.verbose": _ALL,
    "dump_state": _ALL,
    "log_level": _ALL,
    "memory_breakdown": _ALL,
    "steps_per_print": _ALL,
    "timers.throughput.enabled": _ALL,
    "timers.throughput.synchronized": _ALL,
    "wall_clock_breakdown": _ALL,
}
"""The keys that a file may hold, each with the ZeRO stages on which it has an effect. All of them
are run by the tests, on those stages; what is not here is refused."""

_SECTIONS = {
    key.rsplit(".", depth)[0] for key in ACCEPTED for depth in range(1, key.count(".") + 1)
}


_SAID_HERE = {
    "train_batch_size": "train.micro_batch, train.accumulate and the number of ranks",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "optim.clip",
    "zero_allow_untested_optimizer": "the optimiser is torch's",
}

_CHECKPOINTS = "checkpoints are dr2dist's own"
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
    "disable_python_gc": "objects that refer to each other would never be let go of",
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
    "zero_optimization.allgather_partitions": "DeepSpeed does not look at it",
    "zero_optimization.compute_grad_norm": "the norm is what a step is judged and recorded by",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.ignore_unused_parameters": "false would end a run in mid-step",
    "zero_optimization.leaf_module": "parameters are gathered by residual function",
    "zero_optimization.legacy_stage1": "DeepSpeed does not have it any more",
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.memory_efficient_linear": (
        "it would replace torch's linear function for the whole process, by one that rounds twice "
        "in bf16; it is off always"
    ),
    "zero_optimization.mics_shard_size": _UNSUPPORTED,
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.override_module_apply": "no module is built while parameters are sharded",
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "there is no Muon",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": _CHECKPOINTS,
    "zero_optimization.stage3_module_granularity_threshold": (
        "parameters are gathered by residual function"
    ),
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
    _check_keys(extra, "", zero, source)
    _check_values(extra, source)
    for key, value in ours.items():
        if extra.get(key, value) != value:
            raise UserError(
                f"{source}: {key} is {extra[key]}, but the configuration says {value} "
                f"({_SAID_HERE[key]}): leave it out"
            )
    _check_even(extra, source)
    _check_precision(extra, precision, source)
    _check_stage(extra, zero, source)
    return _complete({**extra, **ours}, zero, precision, offload_optimizer)


def _check_keys(values: Any, place: str, zero: int, source: str) -> None:
    """Refuses keys that are not accepted, down to the last section."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: {place.rstrip('.')} is {values!r}, allowed is an object")
    for key, value in values.items():
        whole = place + key
        if whole in _REFUSED:
            raise UserError(f"{source}: {whole} is refused: {_REFUSED[whole]}")
        if whole in _SECTIONS:
            _check_keys(value, f"{whole}.", zero, source)
        elif whole not in ACCEPTED:
            known = [name.removeprefix(place) for name in ACCEPTED if name.startswith(place)]
            here = dict.fromkeys(name.partition(".")[0] for name in known)
            raise UserError(f"{source}: {whole}: unknown key{nearest(key, here)}")
        elif zero not in ACCEPTED[whole]:
            raise UserError(f"{source}: {whole} has no effect with ZeRO-{zero}")


def _check_values(extra: Mapping[str, Any], source: str) -> None:
    if not extra:
        return
    # Not above: DeepSpeed takes seconds to import, and without a file there is nothing to ask it.
    from dr2dist.parallel.deepspeed_file import File

    try:
        File.model_validate(extra)
    except ValidationError as error:
        first = error.errors()[0]
        # A union's members follow the key itself; they mean nothing to a reader.
        key = ".".join(p for p in map(str, first["loc"]) if not p.startswith(("int", "float")))
        raise UserError(f"{source}: {key}: found {first['input']!r}; {first['msg']}") from None


def _check_even(extra: Mapping[str, Any], source: str) -> None:
    """What DeepSpeed would only say when it gathers weights for the first time."""
    size = extra.get("zero_optimization", {}).get("allgather_bucket_size", 0)
    if size % 2:
        raise UserError(
            f"{source}: zero_optimization.allgather_bucket_size is {size}, allowed are even numbers"
        )


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


def _complete(
    given: Mapping[str, Any], zero: int, precision: str, offload_optimizer: bool
) -> dict[str, Any]:
    """A configuration with what keeps DeepSpeed from doing other than it was asked.

    given: all else, as in its JSON. precision: fp32, bf16 or fp16.
    """
    section = {**given.get("zero_optimization", {}), "stage": zero}
    # Otherwise ZeRO-3 replaces torch's linear function, in the whole process and for good, by one
    # that rounds twice in bf16. What it saves are activations, which reversal does not keep.
    section["memory_efficient_linear"] = False
    config = {
        # Otherwise every step would wait for the device, for a speed that is not written.
        "timers": {"throughput": {"enabled": False}},
        **given,
        "zero_optimization": section,
        # Without ZeRO DeepSpeed keeps bf16 weights without fp32 masters, so there the weights stay
        # in fp32 and the engine casts while it computes.
        "bf16": {"enabled": precision == "bf16" and zero > 0},
        "fp16": {"enabled": precision == "fp16", "loss_scale": FP16_LOSS_SCALE},
    }
    if precision == "bf16" and zero > 1:
        # Sums over hundreds of micro-batches in bf16 lose what is small beside them. Of ZeRO-1
        # DeepSpeed would make another optimiser, which keeps its masters elsewhere.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if offload_optimizer:
        # torch's own optimisers: DeepSpeed's for the CPU would have to be compiled first.
        section["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    return config
