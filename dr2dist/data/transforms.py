"""Images to normalised tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from dr2dist.config.data import RandAugment

Transform = Callable[[Image.Image], Tensor]
Resize = Literal["timm", "floor"]

EVALUATION: dict[str, Any] = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"}
"""What timm is told of evaluation, beside size, mean and std."""

_BICUBIC = v2.InterpolationMode.BICUBIC


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB; deeper ones are scaled from their format's own range."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode != "F":
            values = values / 257  # 16 bits to 8
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def train_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    hflip: bool,
    vflip: bool,
    scale: tuple[float, float],
    rand_augment: RandAugment | None = None,
    erase: float = 0.0,
) -> Transform:
    """Random crop, flips, RandAugment, then fp32 [3, *size], in which rectangles are erased.

    size: height, width. scale: range of the area's share that a crop keeps. erase: a
    probability. Draws from the global streams of torch, numpy and random.
    """
    height, width = size
    shape = width / height
    crop = v2.RandomResizedCrop(
        size, scale=scale, ratio=(3 / 4 * shape, 4 / 3 * shape), interpolation=_BICUBIC
    )
    steps: list[Any] = [to_rgb, crop]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if vflip:
        steps.append(v2.RandomVerticalFlip())
    if rand_augment is not None:
        part = rand_augment
        name = f"rand-m{part.magnitude:g}-n{part.layers}-mstd{part.noise:g}-inc1"
        colour = tuple(round(255 * value) for value in mean)
        options = {"img_mean": colour, "translate_const": int(0.45 * min(size))}
        steps.append(rand_augment_transform(name, options))
    steps += _to_tensor(mean, std)
    if erase:
        steps.append(RandomErasing(erase, mode="pixel", device="cpu"))
    return v2.Compose(steps)


def eval_transform(
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    resize: Resize = "timm",
) -> Transform:
    """The centre of the image that just covers `size` (height, width): fp32 [3, *size].

    resize: how the covering image's longer side is rounded; "timm" makes 8-bit RGB images the very
    tensors of timm's own `create_transform` with EVALUATION, "floor" is that of files exported
    without the field.
    """
    if resize == "timm":
        prepare = create_transform(size, mean=tuple(mean), std=tuple(std), **EVALUATION)
        return v2.Compose([to_rgb, prepare])
    steps = [to_rgb, partial(_cover, size=size), v2.CenterCrop(size), *_to_tensor(mean, std)]
    return v2.Compose(steps)


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    width, height = image.size
    scale = max(size[0] / height, size[1] / width)
    wanted = [max(size[0], int(height * scale)), max(size[1], int(width * scale))]
    resized: Image.Image = v2.functional.resize(image, wanted, interpolation=_BICUBIC)
    return resized


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
