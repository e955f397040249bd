"""The values that a file of DeepSpeed's settings may hold, by DeepSpeed's own models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, StrictBool, StrictFloat, StrictInt

from dr2dist.parallel.adapter import (
    CommsLoggerConfig,
    DeepSpeedThroughputTimerConfig,
    DeepSpeedZeroConfig,
)


class _Switch(BaseModel):
    enabled: StrictBool = False


class _Timers(BaseModel):
    throughput: DeepSpeedThroughputTimerConfig = None


class File(BaseModel):
    """The values that a file may hold; DeepSpeed's own models stand for its sections."""

    train_batch_size: StrictInt = 0
    train_micro_batch_size_per_gpu: StrictInt = 0
    gradient_accumulation_steps: StrictInt = 0
    gradient_clipping: StrictInt | StrictFloat = 0
    zero_allow_untested_optimizer: StrictBool = True
    zero_optimization: DeepSpeedZeroConfig = None
    bf16: _Switch = _Switch()
    fp16: _Switch = _Switch()
    comms_logger: CommsLoggerConfig = None
    timers: _Timers = _Timers()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    steps_per_print: StrictInt | None = Field(None, ge=1)
    dump_state: StrictBool = False
    memory_breakdown: StrictBool = False
    wall_clock_breakdown: StrictBool = False
