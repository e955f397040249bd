"""The keys of DeepSpeed's JSON that a run accepts, with the values that tests try."""

from __future__ import annotations

from typing import Any

RESTATED: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1e6,
    "zero_allow_untested_optimizer": True,
    "bf16.enabled": None,
    "fp16.enabled": False,
    "zero_optimization.stage": None,
}
"""What the tests' runs say already; None stands for what a run has there."""

LOGS: dict[str, list[Any]] = {
    "comms_logger.debug": [True],
    "comms_logger.enabled": [True],
    "comms_logger.prof_all": [True],
    "comms_logger.prof_ops": [["all_reduce"]],
    "comms_logger.verbose": [True],
    "dump_state": [True],
    "log_level": ["debug", "error"],
    "memory_breakdown": [True],
    "steps_per_print": [1],
    "timers.throughput.enabled": [True],
    "timers.throughput.synchronized": [False],
    "wall_clock_breakdown": [True],
}
"""What DeepSpeed writes, with the values that are tried."""

VALUES: dict[str, list[Any]] = {
    "communication_data_type": ["fp32", "bf16", "fp16"],
    "zero_optimization.contiguous_gradients": [False],
    "zero_optimization.overlap_comm": [True, False],
    "zero_optimization.reduce_bucket_size": [1, 1000],
    "zero_optimization.reduce_scatter": [False],
    "zero_optimization.allgather_bucket_size": [0, 2, 1000],
    "zero_optimization.parameter_alignment": [True],
    "zero_optimization.round_robin_gradients": [True],
    "zero_optimization.use_multi_rank_bucket_allreduce": [False],
    "zero_optimization.enable_sanity_checks": [True],
    "zero_optimization.log_trace_cache_warnings": [True],
    "zero_optimization.stage3_allgather_sequential": [True],
    "zero_optimization.stage3_max_live_parameters": [0, 1000],
    "zero_optimization.stage3_max_reuse_distance": [0, 1000],
    "zero_optimization.stage3_model_persistence_threshold": [0, 1000],
    "zero_optimization.stage3_param_persistence_threshold": [0, 10**9],
    "zero_optimization.stage3_prefetch_bucket_size": [0, 1000],
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": [True],
    "zero_optimization.sub_group_size": [0, 1000],
    **LOGS,
}
"""Each key is tried alone, but those that need others to be seen (NEEDS)."""

NEEDS: dict[str, dict[str, Any]] = {
    "comms_logger": {"comms_logger.enabled": True},
    "dump_state": {"log_level": "info"},
    "memory_breakdown": {"log_level": "info"},
    "steps_per_print": {"log_level": "info"},
    "timers": {"steps_per_print": 1, "log_level": "info"},
    "wall_clock_breakdown": {"log_level": "info"},
}
"""What goes along with a key or a section."""

ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}
"""At most this part of a number is lost where gradients travel in a type: half of its epsilon would
do for rounding to nearest, all of it stands for any rounding."""


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The JSON of keys with dots."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def settings(key: str, value: Any) -> dict[str, Any]:
    """The JSON that tries a key."""
    return nested({**NEEDS.get(key.partition(".")[0], {}), key: value})
