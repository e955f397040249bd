"""The section `data`: shards, and how their images are prepared."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dr2dist.config.section import Positive, Section, Unit

Triple = tuple[float, float, float]
Deviation = Annotated[float, Field(gt=0)]


class RandAugment(Section):
    """timm's RandAugment: random operations on each training image."""

    magnitude: float = Field(9.0, ge=0, le=10, description="strength of the operations")
    layers: Positive = Field(2, description="operations on each image")
    noise: float = Field(0.5, ge=0, description="standard deviation of the magnitude")


class Data(Section):
    """Shards and how their images are prepared."""

    train: str = Field(description="a folder of shards, or a brace pattern of shards")
    val: str | None = Field(None, description="the same for validation; null: none")
    num_workers: int = Field(0, ge=0, description="loader processes of each rank")
    unreadable: Literal["fail", "skip"] = Field(
        "fail", description="images that cannot be read; skip: counted, the next one instead"
    )
    hflip: bool = Field(True, description="random left-right flips")
    vflip: bool = Field(False, description="random upside-down flips")
    scale: tuple[float, float] = Field(
        (0.7, 1.0), description="range of the share of the area that a random crop keeps"
    )
    rand_augment: RandAugment | None = Field(None, description="null: none; {}: the defaults")
    erase: Unit = Field(0.0, description="probability that noise replaces a random rectangle")
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
