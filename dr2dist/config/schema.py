"""The schema of configs/*.yaml, checked as a whole once."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, field_validator, model_validator

from dr2dist.config.coefficients import CoefficientPath, Conserve, Constant, Guarded, with_kind
from dr2dist.config.names import OWN_SETTINGS
from dr2dist.config.optim import Optim
from dr2dist.config.section import Place, Positive, Section, Unit
from dr2dist.config.task import Data, TaskOptions
from dr2dist.reversible import Setting


def _square(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Size = Annotated[tuple[Positive, Positive], BeforeValidator(_square)]
"""Height and width in pixels; one number is both."""


Scalar = Annotated[bool | int | float | str | None, Field(union_mode="smart")]
Option = Annotated[Scalar | tuple[Scalar, ...], Field(union_mode="smart")]


Allowed = Literal["versions", "source", "threads", "device", "environment"]
"""What ranks may differ in if somebody has said so."""


class Lora(Section):
    """Low-rank adapters, which are trained with the head alone (peft; dr2dist[lora])."""

    rank: Positive = Field(8, description="of an adapter's two matrices")
    alpha: float = Field(16.0, gt=0, description="alpha / rank is what adapters are scaled by")
    dropout: Unit = Field(0.0, description="dropout of an adapter's input")
    targets: tuple[str, ...] = Field(
        ("*",),
        min_length=1,
        description="patterns of names of linear layers in residual functions, such as *.attn.qkv",
    )


class Model(Section):
    """The backbone."""

    name: str = Field(description="timm's name of the model")
    weights: Place = Field(
        description="random, hub (timm's own), or a .safetensors, .pth, .pt or .bin file"
    )
    in_channels: Positive = Field(
        3, description="channels of an image; weights of others are adapted as timm does"
    )
    image_size: Size | None = Field(
        None, description="side, or [height, width], in pixels; null: the model's own"
    )
    drop_path: Unit = Field(0.0, description="stochastic depth of the last block")
    dropout: Unit = Field(0.0, description="dropout after projections")
    freeze: tuple[str, ...] = Field(
        (), description="patterns of parameter names that stay as they are, such as blocks.0.*"
    )
    lora: Lora | None = Field(None, description="low-rank adapters; null: none")
    options: dict[str, Option] = Field(
        {}, description="timm's arguments of the model, such as {depth: 40, embed_dim: 192}"
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        if value is None:
            raise ValueError(f"found null, allowed is {cls.model_fields['weights'].description}")
        return value

    @property
    def given_weights(self) -> str | None:
        """As `build_model` takes them: None for random ones."""
        return None if self.weights == "random" else self.weights

    def idle(self) -> dict[str, str]:
        """See Section."""
        return {} if self.lora is None else {"freeze": "lora, which trains adapters and the head"}

    @model_validator(mode="after")
    def _one_place_for_each(self) -> Self:
        for name in self.options:
            if name in OWN_SETTINGS:
                raise ValueError(f"options: {name} has a setting of its own, {OWN_SETTINGS[name]}")
        return self


class Reversible(Section):
    """How the backbone is reversed."""

    arithmetic: Literal["exact", "float"] = Field("exact", description="exact: bit for bit")
    memory: Literal["reverse", "store", "checkpoint", "budget"] = Field(
        "reverse", description="how the backward pass comes by its activations"
    )
    memory_budget: ByteSize | None = Field(
        None,
        description="memory budget: bytes per rank for functions that keep their activations",
    )
    chunk_size: int | Literal["auto"] | None = Field(
        None, description="samples per slice; null: all at once; auto: as chunk_budget allows"
    )
    chunk_budget: ByteSize | None = Field(
        None, description="chunk_size auto: bytes for the working set of one function"
    )
    chunk_tokens: Positive | None = Field(
        None, description="tokens per slice inside a sample, with chunk_size 1; null: all"
    )
    state_bits: Literal[16, 32] = Field(
        32,
        description="of exact states: 16 has a scale for each channel; 16 is the default with "
        "train.precision bf16",
    )
    fraction_bits: int = Field(
        18, ge=0, le=28, description="resolution of exact states of 32 bits, 2^-bits"
    )
    remainders: Literal["device", "host"] = Field(
        "device", description="where discarded bits wait: host is pinned memory, out of the way"
    )
    gain: Literal["none", "consistent"] = Field(
        "none", description="consistent: all functions but a chain's first count 1 + beta times"
    )
    hand_on: Literal["last", "mean"] = Field(
        "last", description="what a chain gives: its last tokens, or the mean of its last two"
    )
    compile: bool = Field(
        False, description="run functions by torch.compile, forth and back; not with zero 3"
    )

    def idle(self) -> dict[str, str]:
        """See Section."""
        if self.arithmetic == "float":
            return dict.fromkeys(("fraction_bits", "state_bits"), "arithmetic float")
        return {"fraction_bits": "state_bits 16"} if self.state_bits == 16 else {}

    @model_validator(mode="after")
    def _budgets_and_slices(self) -> Self:
        # The coefficients are checked where they are known.
        Setting(**self.of_chains())
        return self

    def of_chains(self) -> dict[str, Any]:
        """What is said of Setting's fields."""
        return self.model_dump(exclude={"compile"})


class Train(Section):
    """The run."""

    steps: Positive | None = Field(None, description="optimiser steps; or epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; or steps")
    micro_batch: Positive = Field(description="samples of a rank in one forward pass")
    accumulate: Positive = Field(1, description="micro-batches of a rank in one optimiser step")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="what F computes in; fp16 is untested and needs a GPU"
    )
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of averaged weights, which are validated and exported"
    )
    seed: int = Field(0, ge=0, description="of the data's order, augmentation and new weights")
    log_every: Positive = Field(10, description="optimiser steps between logged ones")
    loggers: tuple[str, ...] = Field(
        ("tensorboard",),
        description="of tensorboard, wandb, mlflow (dr2dist[loggers]), and what plugins register",
    )
    validate_every: Positive | None = Field(
        None, description="optimiser steps between validations; null: at every epoch's end"
    )
    patience: Positive | None = Field(
        None, description="validations without a better metric until the run ends; null: never"
    )
    on_bad_batch: Literal["stop", "skip"] = Field(
        "stop", description="what a step does whose loss, gradient or states are not finite"
    )
    bad_batches: Positive = Field(10, description="how many in a row are skipped at most")
    step_limit: float | None = Field(
        None,
        gt=0,
        description="seconds after which a step hangs; null: 10 times the median, at least 300",
    )
    grace: float = Field(
        60.0, gt=0, description="seconds that a run has to end its step when it is told to stop"
    )
    profile: tuple[int, int] | None = Field(
        None, description="[first, last]: torch's profiler after first up to last applied steps"
    )

    def idle(self) -> dict[str, str]:
        """See Section."""
        return {"bad_batches": "on_bad_batch stop"} if self.on_bad_batch == "stop" else {}

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("give one of steps and epochs")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}, allowed is one of them: the "
                "other is undone by train.epochs=null or train.steps=null"
            )
        return self

    @model_validator(mode="after")
    def _window_in_order(self) -> Self:
        if self.profile is not None and not 0 <= self.profile[0] < self.profile[1]:
            raise ValueError(f"profile is {list(self.profile)}, allowed is 0 <= first < last")
        return self


class Checkpoints(Section):
    """When a run's state is written, beside each best validation and the end."""

    steps: Positive | None = Field(None, description="optimiser steps between them; null: any")
    minutes: float | None = Field(
        15.0, gt=0, description="minutes between them, by rank 0's clock; null: any"
    )
    keep: Positive = Field(2, description="how many are kept, beside the best one")


class Parallel(Section):
    """How the model is spread over ranks."""

    stages: Positive = Field(
        1, description="pipeline stages, with zero 0 or 1; ranks / stages are replicas"
    )
    zero: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage")
    offload_optimizer: bool = Field(False, description="keep masters and moments in host memory")
    deepspeed: Place | None = Field(None, description="a JSON file of DeepSpeed's own settings")

    @model_validator(mode="after")
    def _sharded(self) -> Self:
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer needs zero 1, 2 or 3: without ZeRO nothing moves")
        return self

    @model_validator(mode="after")
    def _whole_layers(self) -> Self:
        if self.stages > 1 and self.zero > 1:
            raise ValueError(
                f"zero is {self.zero}, allowed with stages is 0 or 1: a stage holds its layers "
                "whole through all micro-batches in flight; use zero 2 or 3 with stages 1"
            )
        return self


class Launch(Section):
    """How ranks find each other, and what has to be the same on all of them."""

    join_limit: float = Field(
        120.0, gt=0, description="seconds that ranks wait for each other at the start"
    )
    allow: tuple[Allowed, ...] = Field((), description="what ranks may differ in")
    env: tuple[str, ...] = Field(
        (), description="variables that other hosts get from here, beside the usual ones"
    )


class Config(Section):
    """A whole run. Its task and data are of the types that the task says.

    Raises pydantic's ValidationError, which `load_config` turns into one line, for unknown keys,
    wrong values, settings without effect and such as contradict each other.
    """

    plugins: tuple[str, ...] = Field(
        (), description="Python modules that register tasks or backbones of your own"
    )
    model: Model
    reversible: Reversible = Reversible()
    coefficients: Annotated[CoefficientPath, BeforeValidator(with_kind)] = Conserve()
    task: TaskOptions
    data: Data
    optim: Optim
    train: Train
    checkpoint: Checkpoints = Checkpoints()
    parallel: Parallel = Parallel()
    launch: Launch = Launch()
    output: Place = Field(min_length=1, description="folder of the run")

    @model_validator(mode="before")
    @classmethod
    def _states_as_precise_as_functions(cls, values: Any) -> Any:
        """Beside functions in bf16 states of 16 bits lose nothing (docs/frontier.md)."""
        if not isinstance(values, dict):
            return values
        train, said = values.get("train"), values.get("reversible") or {}
        if not isinstance(train, dict) or not isinstance(said, dict):
            return values  # which is told as what it is
        exact = said.get("arithmetic", "exact") == "exact"
        if (
            train.get("precision") != "bf16"
            or not exact
            or {"state_bits", "fraction_bits"} & {*said}
        ):
            return values
        return {**values, "reversible": {**said, "state_bits": 16}}

    @model_validator(mode="after")
    def _conventional_or_reversible(self) -> Self:
        path = self.coefficients
        if isinstance(path, Constant):
            Setting(path.alpha, path.beta, **self.reversible.of_chains())
        if isinstance(path, Guarded) and path.drift and self.reversible.arithmetic == "exact":
            raise ValueError(
                "coefficients.drift has no effect with reversible.arithmetic exact, which does "
                "not drift: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in ("validate_every", "patience"):
            if getattr(self.train, name) is not None and self.data.val is None:
                raise ValueError(f"train.{name} has no effect without data.val")
        self.task.check_micro_batch(self.train.micro_batch)
        if self.parallel.stages > 1 and self.setting().measured:
            raise ValueError(
                f"parallel.stages is {self.parallel.stages}: reversible.memory budget and "
                "chunk_size auto are measured on whole chains, allowed with stages 1 only"
            )
        if self.reversible.compile and self.parallel.zero == 3:
            raise ValueError(
                "reversible.compile is true, allowed with parallel.zero 0, 1 or 2: ZeRO-3 calls "
                "functions with gathered weights, which are not compiled"
            )
        if self.train.precision == "fp16" and self.parallel.zero == 0:
            raise ValueError("train.precision fp16 needs parallel.zero 1, 2 or 3")
        return self

    def setting(self) -> Setting:
        """The chains' setting at the start of the run."""
        alpha, beta = self.coefficients.schedule(1).at(0)
        return Setting(alpha, beta, **self.reversible.of_chains())
