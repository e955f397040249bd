"""What tasks on clips share: the fields, how clips are taken from films, and a look at some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import v2

from dr2dist.config.section import Positive
from dr2dist.data.batch import Batch
from dr2dist.data.fields import USUAL
from dr2dist.data.stream import Values
from dr2dist.data.video_records import check_span
from dr2dist.errors import UserError
from dr2dist.pictures import plain
from dr2dist.tasks.film_transforms import Cover, FilmData, as_video, random_steps, to_floats
from dr2dist.tasks.sampling import Sampling
from dr2dist.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIDEO = USUAL["video"]
"""What may carry a film: a file of one, or an archive of its frames."""

SHOWN = 4
"""Clips of a look."""


class ClipData(FilmData):
    """Shards and how clips are taken from their films and prepared."""

    views: Positive = Field(1, description="clips of a film in evaluation, which are averaged")
    crops: Literal[1, 3] = Field(
        1, description="squares of each of them: the middle, or three along its longer side"
    )

    def preprocessing(self) -> dict[str, Any]:
        """See Data."""
        return {**super().preprocessing(), "views": self.views, "crops": self.crops}


class ClipTask(Task):
    """A task whose network takes clips of one film a sample.

    In evaluation a sample may have several clips, its views, which are rows of the batch one after
    the other: inputs are [B * views, C, T, H, W]; a task merges their outputs. The optional field
    `span` is [start, stop] in seconds, outside of which nothing is taken.

    preprocessing: frames, size (height, width), channels, mean and std, and of ClipData.
    """

    Data: ClassVar[type[FilmData]] = ClipData
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

    @property
    def frames(self) -> int:
        """Of a clip. Raises UserError for a model that takes none."""
        if "frames" not in self.preprocessing:
            raise UserError(
                f"task.name is {self.name}: the model takes no clips; allowed are video models, "
                "such as videomae_small_patch16"
            )
        return int(self.preprocessing["frames"])

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task. Training takes one clip, [C, T, H, W], evaluation all views of it, as
        [views, C, T, H, W]."""
        said = self.preprocessing
        names = ("sampling", "stride", "rate", "views")
        sampling = Sampling(self.frames, *(said[name] for name in names))
        size, normalise = tuple(said["size"]), to_floats(said["mean"], said["std"])
        if data is None:
            return _Views(sampling, Cover(size, said["crops"]), normalise)
        return _Drawn(sampling, v2.Compose([*random_steps(size, data), normalise]))

    def collate(self, samples: Sequence[Values]) -> tuple[dict[str, Tensor], Any]:
        """See Task."""
        inputs, targets = super().collate(samples)
        clips = inputs["video"]
        return {"video": clips.flatten(0, 1) if clips.ndim == 6 else clips}, targets

    def show(self, batch: Batch, titles: Sequence[tuple[str, str, bool]]) -> Figure:
        """Frames of the first films of a batch: (what is predicted, what is true, whether that is
        right)."""
        from matplotlib.figure import Figure

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
        clip = self.prepare(as_video(film.read(self.sampling.drawn(film, span))))
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
            found += [self.prepare(view) for view in self.crops(as_video(film.read(times)))]
        return {**rest, "video": torch.stack(found)}


def _taken(values: Values) -> tuple[Any, tuple[float, float] | None, Values]:
    """(film, span, the other fields). Raises ValueError for a span that is none, BrokenError for
    one after the film's end."""
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
    check_span((start, stop), film)
    return film, (start, min(stop, film.seconds)), rest
