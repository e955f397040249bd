"""What tasks on clips share: the fields, how clips are taken from films, and a look at some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from dr2dist.config.section import Positive, Section, Unit
from dr2dist.data.batch import Batch
from dr2dist.data.film import FILM_TYPES
from dr2dist.data.stream import Values
from dr2dist.errors import UserError
from dr2dist.pictures import plain
from dr2dist.tasks.sampling import Kind, Sampling
from dr2dist.tasks.task import Task
from dr2dist.tasks.transforms import PixelData

VIDEO = ";".join((*FILM_TYPES, "zip"))
"""What may carry a film: a file of one, or an archive of its frames."""

SHOWN = 4
"""Clips of a look."""


class ClipAugment(Section):
    """torchvision's RandAugment: the same random operations on all frames of a training clip."""

    magnitude: int = Field(9, ge=0, le=30, description="strength of the operations")
    layers: Positive = Field(2, description="operations on each clip")


class ClipData(PixelData):
    """Shards and how clips are taken from their films and prepared."""

    sampling: Kind = Field(
        "stride",
        description="stride: a window of even steps; segments: a frame of each of equal parts",
    )
    stride: Positive = Field(4, description="frames of the film from one of the clip to the next")
    rate: float | None = Field(
        None, gt=0, description="frames a second that the stride counts; null: the film's own"
    )
    views: Positive = Field(1, description="clips of a film in evaluation, which are averaged")
    crops: Literal[1, 3] = Field(
        1, description="squares of each of them: the middle, or three along its longer side"
    )
    rand_augment: ClipAugment | None = Field(None, description="null: none; {}: the defaults")
    erase: Unit = Field(0.0, description="probability that a random rectangle is left out")

    def preprocessing(self) -> dict[str, Any]:
        """See Data."""
        taken = {"sampling": self.sampling, "stride": self.stride, "rate": self.rate}
        return {**super().preprocessing(), **taken, "views": self.views, "crops": self.crops}

    def idle(self) -> dict[str, str]:
        """See Section."""
        own = dict.fromkeys(("stride", "rate"), "sampling segments")
        return {**super().idle(), **(own if self.sampling == "segments" else {})}


class ClipTask(Task):
    """A task whose network takes clips of one film a sample.

    In evaluation a sample may have several clips, its views, which are rows of the batch one after
    the other: inputs are [B * views, C, T, H, W]; a task merges their outputs. The optional field
    `span` is [start, stop] in seconds, outside of which nothing is taken.

    preprocessing: frames, size (height, width), channels, mean and std, and of ClipData.
    """

    Data = ClipData
    inputs: ClassVar[tuple[str, ...]] = ("video",)
    clip_fields: ClassVar[Mapping[str, str]] = {"video": VIDEO, "span": "json#span?"}

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        said = self.preprocessing
        if said.get("channels", 3) != 3:
            raise UserError(f"model.in_channels is {said['channels']}, films have 3 channels")
        for name in ("mean", "std"):
            if name in said and len(said[name]) != 3:
                raise UserError(
                    f"data.{name} has {len(said[name])} values, allowed are 3: films have three "
                    "channels"
                )

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task. Training takes one clip, [C, T, H, W], evaluation all views of it, as
        [views, C, T, H, W]."""
        said = self.preprocessing
        if "frames" not in said:
            raise UserError(
                f"task.name is {self.name}: the model takes no clips; allowed are video models, "
                "such as videomae_small_patch16"
            )
        names = ("sampling", "stride", "rate", "views")
        sampling = Sampling(said["frames"], *(said[name] for name in names))
        size, normalise = tuple(said["size"]), _to_floats(said["mean"], said["std"])
        if data is None:
            return _Views(sampling, Cover(size, said["crops"]), normalise)
        return _Drawn(sampling, v2.Compose([*_random(size, data), normalise]))

    def collate(self, samples: Sequence[Values]) -> tuple[dict[str, Tensor], Any]:
        """See Task."""
        inputs, targets = super().collate(samples)
        clips = inputs["video"]
        return {"video": clips.flatten(0, 1) if clips.ndim == 6 else clips}, targets

    def show(self, batch: Batch, titles: Sequence[tuple[str, str, bool]]) -> Figure:
        """Frames of the first films of a batch: (what is predicted, what is true, whether that is
        right)."""
        views = len(batch.inputs["video"]) // len(batch)
        clips = batch.inputs["video"][::views][: len(titles)].float().cpu()
        figure = Figure(figsize=(8, 2.2 * len(clips)), layout="constrained")
        for row, (clip, (predicted, true, right)) in enumerate(zip(clips, titles, strict=True)):
            frames = clip[:, torch.linspace(0, clip.shape[1] - 1, 4).round().long()]
            scaled = (frames - clip.min()) / (clip.max() - clip.min()).clamp(min=1e-6)
            axes = figure.add_subplot(len(clips), 1, row + 1)
            axes.imshow(torch.cat(list(scaled.permute(1, 2, 3, 0)), 1).numpy())
            axes.set_title(plain(predicted), color="black" if right else "red")
            axes.set_xlabel(plain(true))
            axes.set_xticks([], [])
            axes.set_yticks([], [])
        return figure


class _Drawn:
    """One random clip of a film."""

    def __init__(self, sampling: Sampling, prepare: Callable[[Any], Tensor]) -> None:
        self.sampling, self.prepare = sampling, prepare

    def __call__(self, values: Values) -> Values:
        film, span, rest = _taken(values)
        clip = self.prepare(_video(film.read(self.sampling.drawn(film, span))))
        return {**rest, "video": clip}


class _Views:
    """All views of a film, those of one clip after the other; decoded a clip at a time."""

    def __init__(
        self,
        sampling: Sampling,
        crops: Callable[[Tensor], list[Tensor]],
        prepare: Callable[[Any], Tensor],
    ) -> None:
        self.sampling, self.crops, self.prepare = sampling, crops, prepare

    def __call__(self, values: Values) -> Values:
        film, span, rest = _taken(values)
        found: list[Tensor] = []
        for times in self.sampling.spread(film, span):
            found += [self.prepare(view) for view in self.crops(_video(film.read(times)))]
        return {**rest, "video": torch.stack(found)}


def _taken(values: Values) -> tuple[Any, tuple[float, float] | None, Values]:
    """(film, span, the other fields). Raises ValueError for a span that is none."""
    rest = dict(values)
    film, span = rest.pop("video"), rest.pop("span", None)
    if span is None:
        return film, None, rest
    try:
        start, stop = (float(value) for value in span)
    except (TypeError, ValueError):
        raise ValueError(f"span is {span!r}, allowed is [start, stop] in seconds") from None
    if not 0 <= start < stop:
        raise ValueError(f"span is {span!r}, allowed is 0 <= start < stop, in seconds")
    if start >= film.seconds:
        raise ValueError(f"span is {span!r}, the film ends at {film.seconds:.3f} seconds")
    return film, (start, min(stop, film.seconds)), rest


def _video(frames: NDArray[np.uint8]) -> Tensor:
    """Frames [T, H, W, C] as [T, C, H, W], which torchvision changes all alike."""
    video: Tensor = tv_tensors.Video(torch.from_numpy(frames).permute(0, 3, 1, 2))
    return video


def _random(size: tuple[int, int], data: ClipData) -> list[Any]:
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


def _to_floats(mean: Sequence[float], std: Sequence[float]) -> Callable[[Any], Tensor]:
    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std)), _frames_second]
    )


def _frames_second(video: Tensor) -> Tensor:
    """[T, C, H, W] as a plain tensor [C, T, H, W]."""
    return video.as_subclass(Tensor).transpose(0, 1).contiguous()
