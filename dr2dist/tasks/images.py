"""What tasks on single images share: the field, its preparation, and a look at some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torchvision.transforms import v2

from dr2dist.data.batch import Batch
from dr2dist.data.fields import USUAL
from dr2dist.data.images import upright
from dr2dist.data.stream import Values
from dr2dist.errors import UserError
from dr2dist.pictures import plain
from dr2dist.tasks.task import Task
from dr2dist.tasks.transforms import (
    EVALUATION,
    ImageData,
    OnImage,
    eval_transform,
    train_transform,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGE = USUAL["image"]
"""What may carry an image."""

SHOWN = 8
"""Images of a look."""


class ImageTask(Task):
    """A task whose network takes one image a sample.

    preprocessing: size (height, width), mean and std of each channel, resize, see
    `eval_transform`, and orientation: "exif" where images are turned as their files say, which
    files of versions before do not have.
    """

    Data = ImageData
    inputs: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        mean, std = (self.preprocessing.get(name) for name in ("mean", "std"))
        channels = self.preprocessing.get("channels", 3)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != channels:
                raise UserError(
                    f"data.{name} has {len(values)} values, the model takes {channels} channels: "
                    "allowed is one for each"
                )

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task."""
        said = self.preprocessing
        shape = (tuple(said["size"]), said["mean"], said["std"])
        turned = [OnImage(upright)] if said.get("orientation") == "exif" else []
        if data is None:
            return v2.Compose([*turned, eval_transform(*shape, said.get("resize", "timm"))])
        if data.rand_augment is not None and said.get("channels", 3) != 3:
            raise UserError("data.rand_augment: allowed with images of three channels only")
        return v2.Compose([*turned, train_transform(*shape, data)])

    def pretrained_cfg(self) -> dict[str, Any]:
        """See Task: timm's `create_transform` makes of it what `predict` and `evaluate` do with
        8-bit RGB images."""
        said = self.preprocessing
        return {
            **EVALUATION,
            "input_size": (said.get("channels", 3), *said["size"]),
            "mean": tuple(said["mean"]),
            "std": tuple(said["std"]),
            "num_classes": self.options.outputs(),
            "label_names": self.classes,
        }

    def show(self, batch: Batch, titles: Sequence[tuple[str, str, bool]]) -> Figure:
        """The first images of a batch: (what is predicted, what is true, whether that is right)."""
        from matplotlib.figure import Figure

        images: Tensor = batch.inputs["image"][: len(titles)].float().cpu()[:, :3]
        low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))
        figure = Figure(figsize=(2 * len(images), 2.4), layout="constrained")
        parts = zip(images, titles, low, high, strict=True)
        for place, (image, (predicted, true, right), least, most) in enumerate(parts):
            axes = figure.add_subplot(1, len(images), place + 1)
            scaled = (image - least) / (most - least).clamp(min=1e-6)
            seen = scaled if len(scaled) == 3 else scaled[:1].expand(3, -1, -1)
            axes.imshow(seen.permute(1, 2, 0).numpy())
            axes.set_title(plain(predicted), color="black" if right else "red")
            axes.set_xlabel(plain(true))
            axes.set_xticks([], [])
            axes.set_yticks([], [])
        return figure
