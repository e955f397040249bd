"""The schema of configs/*.yaml, checked as a whole once."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dr2dist.config.coefficients import CoefficientPath, Conserve, Constant, Section, with_kind
from dr2dist.reversible import Setting

Unit = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Triple = tuple[float, float, float]
Deviation = Annotated[float, Field(gt=0)]


class Model(Section):
    """The backbone."""

    name: str = Field(description="timm's name of the model")
    weights: str | None = Field(
        None, description="null: random; hub: timm's own; otherwise a .safetensors file"
    )
    image_size: Positive | None = Field(None, description="side in pixels; null: the model's own")
    drop_path: Unit = Field(0.0, description="stochastic depth of the last block")
    dropout: Unit = Field(0.0, description="dropout after projections")


class Reversible(Section):
    """How the backbone is reversed."""

    arithmetic: Literal["exact", "float"] = Field("exact", description="exact: bit for bit")
    memory: Literal["reverse", "store", "checkpoint"] = Field(
        "reverse", description="how the backward pass comes by its activations"
    )
    chunk_size: Positive | None = Field(None, description="samples per slice; null: all at once")
    fraction_bits: int = Field(18, ge=0, le=28, description="resolution of exact states, 2^-bits")

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.arithmetic == "float" and "fraction_bits" in self.model_fields_set:
            raise ValueError("fraction_bits has no effect with arithmetic float: leave it out")
        return self


class Task(Section):
    """What is learnt."""

    name: Literal["classification"] = Field("classification", description="the task")
    num_classes: int = Field(ge=2, description="classes of the head")


class Data(Section):
    """Shards and how their images are prepared."""

    train: str = Field(description="a folder of shards, or a brace pattern of shards")
    val: str | None = Field(None, description="the same for validation; null: none")
    num_workers: int = Field(0, ge=0, description="loader processes of each rank")
    hflip: bool = Field(True, description="random left-right flips")
    vflip: bool = Field(False, description="random upside-down flips")
    scale: tuple[float, float] = Field(
        (0.7, 1.0), description="range of the share of the area that a random crop keeps"
    )
    mean: Triple | None = Field(None, description="channel means; null: the model's")
    std: tuple[Deviation, Deviation, Deviation] | None = Field(
        None, description="channel deviations; null: the model's"
    )

    @model_validator(mode="after")
    def _scale_in_order(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale is {list(self.scale)}, allowed is 0 < low <= high <= 1")
        return self


class Optim(Section):
    """The optimiser and its learning rate."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="torch's optimiser")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0, description="decoupled for adamw")
    betas: tuple[Unit, Unit] = Field((0.9, 0.999), description="adamw's decay rates")
    momentum: Unit = Field(0.0, description="sgd's momentum")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the run that warms up linearly")
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        idle = {"adamw": "momentum", "sgd": "betas"}[self.name]
        if idle in self.model_fields_set:
            raise ValueError(f"{idle} has no effect with {self.name}: leave it out")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, allowed is up to lr, {self.lr}")
        return self


class Train(Section):
    """The run."""

    steps: Positive | None = Field(None, description="optimiser steps; or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; or steps")
    micro_batch: Positive = Field(description="samples of a rank in one forward pass")
    accumulate: Positive = Field(1, description="micro-batches of a rank in one optimiser step")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="what F computes in")
    seed: int = Field(0, ge=0, description="of the data's order, augmentation and new weights")
    log_every: Positive = Field(10, description="optimiser steps between logged ones")
    validate_every: Positive | None = Field(
        None, description="optimiser steps between validations; null: at every epoch's end"
    )

    checkpoint_every: Positive = Field(500, description="optimiser steps between checkpoints")
    keep: Positive = Field(2, description="checkpoints kept, beside the best one")

    @model_validator(mode="before")
    @classmethod
    def _no_fp16(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("precision") == "fp16":
            raise ValueError(
                "precision fp16 is not supported: its gradients need loss scaling; use bf16"
            )
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class Parallel(Section):
    """How the model is spread over ranks."""

    zero: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage")
    deepspeed: str | None = Field(None, description="a JSON file of DeepSpeed's own settings")


class Config(Section):
    """A whole run."""

    model: Model
    reversible: Reversible = Reversible()
    coefficients: Annotated[CoefficientPath, BeforeValidator(with_kind)] = Conserve()
    task: Task
    data: Data
    optim: Optim
    train: Train
    parallel: Parallel = Parallel()
    output: str = Field(description="folder of the run")

    @model_validator(mode="after")
    def _conventional_or_reversible(self) -> Self:
        path = self.coefficients
        if isinstance(path, Constant):
            Setting(
                path.alpha,
                path.beta,
                self.reversible.arithmetic,
                self.reversible.memory,
                self.reversible.chunk_size,
            )
        if self.train.validate_every is not None and self.data.val is None:
            raise ValueError("train.validate_every has no effect without data.val")
        return self

    def setting(self) -> Setting:
        """The chains' setting at the start of the run."""
        alpha, beta = self.coefficients.schedule(1).at(0)
        part = self.reversible
        return Setting(
            alpha, beta, part.arithmetic, part.memory, part.chunk_size, part.fraction_bits
        )
