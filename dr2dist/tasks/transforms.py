"""Samples with an image to samples with a normalised tensor; boxes, masks and the like that are
torchvision's tv_tensors go along with the image's geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from dr2dist.config.section import Positive, Section, Unit
from dr2dist.config.task import Data
from dr2dist.data.images import of_8_bits
from dr2dist.data.stream import Transform, Values

Resize = Literal["timm", "floor"]
Deviation = Annotated[float, Field(gt=0)]

EVALUATION: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
"""What timm is told of evaluation, beside size, mean and std."""

MOST_MAGNITUDE = 9.99
"""Of RandAugment: at 10, where noise may lead, timm's posterize keeps 0 bits, which Pillow refuses
from version 13 on."""

_BICUBIC = v2.InterpolationMode.BICUBIC


class RandAugment(Section):
    """timm's RandAugment: random operations on each training image."""

    magnitude: int = Field(9, ge=0, le=10, description="strength of the operations")
    layers: Positive = Field(2, description="operations on each image")
    noise: float = Field(0.5, ge=0, description="standard deviation of the magnitude")


class PixelData(Data):
    """What images and clips are prepared by alike."""

    hflip: bool = Field(True, description="random left-right flips")
    scale: tuple[float, float] = Field(
        (0.7, 1.0), description="range of the share of the area that a random crop keeps"
    )
    mean: tuple[float, ...] | None = Field(None, description="channel means; null: the model's")
    std: tuple[Deviation, ...] | None = Field(
        None, description="channel deviations; null: the model's"
    )

    def preprocessing(self) -> dict[str, Any]:
        """See Data."""
        said = {"mean": self.mean, "std": self.std}
        return {name: list(value) for name, value in said.items() if value is not None}

    @model_validator(mode="after")
    def _scale_in_order(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale is {list(self.scale)}, allowed is 0 < low <= high <= 1")
        return self


class ImageData(PixelData):
    """Shards and how their images are prepared."""

    vflip: bool = Field(False, description="random upside-down flips")
    orientation: Literal["exif", "stored"] = Field(
        "exif",
        description="exif: images are turned as their files say; stored: only those that are "
        "turned while they are read, as TIFF",
    )
    rand_augment: RandAugment | None = Field(None, description="null: none; {}: the defaults")
    erase: Unit = Field(0.0, description="probability that noise replaces a random rectangle")

    def preprocessing(self) -> dict[str, Any]:
        """See Data."""
        return {**super().preprocessing(), "orientation": self.orientation}


def to_channels(image: Any, channels: int = 3) -> Any:
    """Any image, as `open_image` gives it, as 8-bit with 1, 3 or 4 channels; deeper ones are scaled
    from their range. An array [H, W] or [H, W, C] becomes a tensor image [C, H, W] with its own
    values.

    Raises ValueError for a number of channels that the image cannot have.
    """
    if isinstance(image, np.ndarray):
        return _tensor_image(image, channels)
    return of_8_bits(image, channels)


def _to_pillow(image: Any, channels: int) -> Image.Image:
    """Any image of 8 bits as Pillow's, of which timm's operations are. Raises ValueError for an
    array of others."""
    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        raise ValueError(
            f"data.rand_augment: allowed with 8-bit images only, this is an array of {image.dtype}"
        )
    found = to_channels(image, channels)
    return v2.functional.to_pil_image(found) if isinstance(found, Tensor) else found


def _tensor_image(array: Any, channels: int) -> Tensor:
    values = array[..., None] if array.ndim == 2 else array
    if values.ndim != 3 or values.shape[-1] != channels:
        raise ValueError(f"an array {list(array.shape)}, allowed is [H, W, {channels}]")
    if values.dtype not in (np.uint8, np.uint16, np.float16, np.float32, np.float64):
        raise ValueError(f"an array of {values.dtype}, allowed are uint8, uint16 and floats")
    if values.dtype == np.uint16:  # what torch cannot resize
        values = values.astype(np.float32) / 65535
    return tv_tensors.Image(torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))))


class OnImage(nn.Module):
    """Applies a function to a sample's image alone."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, sample: Values) -> Values:
        """The sample with its image changed."""
        return {**sample, "image": self.function(sample["image"])}


def train_transform(
    size: tuple[int, int], mean: Sequence[float], std: Sequence[float], data: ImageData
) -> Transform:
    """Random crop, flips, RandAugment (of 8-bit images), then fp32 [C, *size], in which rectangles
    are erased.

    size: height, width. mean, std: one for each of C channels. Draws from the global streams of
    torch, numpy and random.
    """
    height, width = size
    shape = width / height
    ratio = (3 / 4 * shape, 4 / 3 * shape)
    read = to_channels if data.rand_augment is None else _to_pillow
    steps: list[Any] = [
        OnImage(partial(read, channels=len(mean))),
        v2.RandomResizedCrop(size, scale=data.scale, ratio=ratio, interpolation=_BICUBIC),
    ]
    if data.hflip:
        steps.append(v2.RandomHorizontalFlip())
    if data.vflip:
        steps.append(v2.RandomVerticalFlip())
    if data.rand_augment is not None:
        part = data.rand_augment
        name = f"rand-m{part.magnitude}-n{part.layers}-mstd{part.noise:f}-inc1"
        colour = tuple(round(255 * value) for value in mean)
        options = {
            "img_mean": colour,
            "translate_const": int(0.45 * min(size)),
            "magnitude_max": MOST_MAGNITUDE,
        }
        steps.append(OnImage(rand_augment_transform(name, options)))
    steps.append(OnImage(_to_tensor(mean, std)))
    if data.erase:
        steps.append(OnImage(RandomErasing(data.erase, mode="pixel", device="cpu")))
    return v2.Compose(steps)


def eval_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resize: Resize = "timm",
) -> Transform:
    """The centre of the image that just covers `size` (height, width): fp32 [C, *size].

    resize: how the covering image's longer side is rounded; "timm" makes 8-bit RGB images the very
    tensors of timm's own `create_transform` with EVALUATION, "floor" is that of files exported
    without the field.
    """
    prepare: Any = v2.Compose(
        [partial(_cover, size=size), v2.CenterCrop(size), _to_tensor(mean, std)]
    )
    if resize == "timm":
        of_pil = create_transform(size, mean=tuple(mean), std=tuple(std), **EVALUATION)
        prepare = partial(_prepared, of_pil=of_pil, of_tensor=prepare)
    return v2.Compose([OnImage(partial(to_channels, channels=len(mean))), OnImage(prepare)])


def _prepared(image: Any, of_pil: Any, of_tensor: Any) -> Tensor:
    result: Tensor = (of_tensor if isinstance(image, Tensor) else of_pil)(image)
    return result


def _cover(image: Any, size: tuple[int, int]) -> Any:
    height, width = v2.functional.get_size(image)
    scale = max(size[0] / height, size[1] / width)
    wanted = [max(size[0], int(height * scale)), max(size[1], int(width * scale))]
    return v2.functional.resize(image, wanted, interpolation=_BICUBIC)


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    return v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
