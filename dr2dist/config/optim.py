"""The section `optim`: optimiser, learning rates and their schedule."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dr2dist.config.section import Section, Unit

Share = Annotated[float, Field(gt=0, lt=1)]


class Group(Section):
    """Parameters with a learning rate or weight decay of their own."""

    match: str = Field(description="pattern of parameter names, such as head.* or blocks.1?.*")
    lr_scale: float = Field(1.0, gt=0, description="times optim.lr and layer decay")
    weight_decay: float | None = Field(None, ge=0, description="null: as without this group")


class Optim(Section):
    """The optimiser and its learning rate."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="torch's optimiser")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(
        0.05, ge=0, description="decoupled for adamw; vectors and embeddings are left out"
    )
    betas: tuple[Unit, Unit] = Field((0.9, 0.999), description="adamw's decay rates")
    momentum: Unit = Field(0.0, description="sgd's momentum")
    layer_decay: float | None = Field(
        None, gt=0, lt=1, description="factor of the learning rate from layer to layer, to the stem"
    )
    groups: tuple[Group, ...] = Field((), description="the first one that matches counts")
    schedule: Literal["cosine", "tanh", "poly", "multistep"] = Field(
        "cosine", description="timm's schedule after warming up"
    )
    power: float = Field(1.0, gt=0, description="poly's exponent; 1 is linear")
    decay_at: tuple[Share, ...] = Field((), description="multistep: shares of the run")
    decay_rate: Share = Field(0.1, description="multistep: factor at each of them")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the run that warms up linearly")
    min_lr: float = Field(0.0, ge=0, description="where the schedule ends")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null: no clipping")

    def idle(self) -> dict[str, str]:
        """See Section."""
        found: dict[str, str] = {{"adamw": "momentum", "sgd": "betas"}[self.name]: self.name}
        if self.schedule != "poly":
            found["power"] = self.schedule
        if self.schedule == "multistep":
            found["min_lr"] = self.schedule
        else:
            found |= {"decay_at": self.schedule, "decay_rate": self.schedule}
        return found

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, allowed is up to lr, {self.lr}")
        if self.groups and not {"lr_scale", "weight_decay"} & self.groups[-1].model_fields_set:
            raise ValueError(
                f"groups: the last, {self.groups[-1].match}, has no effect: it says neither "
                "lr_scale nor weight_decay, and takes parameters from no group behind it"
            )
        if self.schedule == "multistep" and not self.decay_at:
            raise ValueError("decay_at is empty, multistep needs shares such as [0.5, 0.8]")
        if list(self.decay_at) != sorted(set(self.decay_at)):
            raise ValueError(f"decay_at is {list(self.decay_at)}, allowed is a rising order")
        return self
