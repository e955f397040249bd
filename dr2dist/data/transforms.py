"""Images to normalised tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

Transform = Callable[[Image.Image], Tensor]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB; deeper ones are scaled from their format's own range."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode != "F":
            values = values / 257  # 16 bits to 8
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    return image.convert("RGB")


def train_transform(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    hflip: bool,
    vflip: bool,
    scale: tuple[float, float],
) -> Transform:
    """Random crop, flips, then fp32 [3, size, size]; draws from torch's global stream."""
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC)
    ]
    if hflip:
        steps.append(v2.RandomHorizontalFlip())
    if vflip:
        steps.append(v2.RandomVerticalFlip())
    return v2.Compose([to_rgb, *steps, *_to_tensor(mean, std)])


def eval_transform(size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """The whole shorter side, centred: fp32 [3, size, size]."""
    return v2.Compose(
        [
            to_rgb,
            v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            *_to_tensor(mean, std),
        ]
    )


def _to_tensor(mean: Sequence[float], std: Sequence[float]) -> list[torch.nn.Module]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
