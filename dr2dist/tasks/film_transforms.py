"""How frames of films are chosen and prepared: settings, and changes that all frames share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dr2dist.config.section import Positive, Section, Unit
from dr2dist.tasks.sampling import Kind
from dr2dist.tasks.transforms import PixelData


class ClipAugment(Section):
    """torchvision's RandAugment: the same random operations on all frames of a training clip."""

    magnitude: int = Field(9, ge=0, le=30, description="strength of the operations")
    layers: Positive = Field(2, description="operations on each clip")


class FilmData(PixelData):
    """Shards and how frames of their films are taken and prepared."""

    sampling: Kind = Field(
        "stride",
        description="stride: a window of even steps; segments: a frame of each of equal parts",
    )
    stride: Positive = Field(4, description="frames of the film from one of the clip to the next")
    rate: float | None = Field(
        None, gt=0, description="frames a second that the stride counts; null: the film's own"
    )
    rand_augment: ClipAugment | None = Field(None, description="null: none; {}: the defaults")
    erase: Unit = Field(0.0, description="probability that a random rectangle is left out")

    def preprocessing(self) -> dict[str, Any]:
        """See Data."""
        taken = {"sampling": self.sampling, "stride": self.stride, "rate": self.rate}
        return {**super().preprocessing(), **taken}

    def idle(self) -> dict[str, str]:
        """See Section."""
        own = dict.fromkeys(("stride", "rate"), "sampling segments")
        return {**super().idle(), **(own if self.sampling == "segments" else {})}


def as_video(frames: NDArray[np.uint8]) -> Tensor:
    """Frames [T, H, W, C] as [T, C, H, W], which torchvision changes all alike."""
    video: Tensor = tv_tensors.Video(torch.from_numpy(frames).permute(0, 3, 1, 2))
    return video


def random_steps(size: tuple[int, int], data: FilmData) -> list[Any]:
    """Changes of a training clip [T, C, H, W] to a size (height, width), the same in all frames."""
    shape = size[1] / size[0]
    ratio = (3 / 4 * shape, 4 / 3 * shape)
    steps: list[Any] = [v2.RandomResizedCrop(size, scale=data.scale, ratio=ratio)]
    if data.hflip:
        steps.append(v2.RandomHorizontalFlip())
    if data.rand_augment is not None:
        steps.append(v2.RandAugment(data.rand_augment.layers, data.rand_augment.magnitude))
    if data.erase:
        steps.append(v2.RandomErasing(data.erase))
    return steps


class Cover:
    """A clip resized so that it just covers a size (height, width), and cut to it: the middle, or
    the first, middle and last part of its longer side."""

    def __init__(self, size: tuple[int, int], crops: int = 1) -> None:
        self.size, self.crops = size, crops

    def __call__(self, video: Tensor) -> list[Tensor]:
        """video: [T, C, H, W]. Returns one [T, C, *size] for each crop."""
        (height, width), sides = self.size, video.shape[-2:]
        scale = max(height / sides[0], width / sides[1])
        wanted = [max(height, round(sides[0] * scale)), max(width, round(sides[1] * scale))]
        resized = v2.functional.resize(video, wanted)
        room = (wanted[0] - height, wanted[1] - width)
        shares = (0.5,) if self.crops == 1 else (0.0, 0.5, 1.0)
        places = [(round(room[0] * share), round(room[1] * share)) for share in shares]
        return [v2.functional.crop(resized, top, left, height, width) for top, left in places]


def to_floats(mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
    """Of frames uint8 [T, C, H, W] to fp32 [C, T, H, W], by means and deviations of channels."""
    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std)), _frames_second]
    )


def _frames_second(video: Tensor) -> Tensor:
    """[T, C, H, W] as a plain tensor [C, T, H, W]."""
    return video.as_subclass(Tensor).transpose(0, 1).contiguous()
