"""Temporal action detection: when something happens in long films, and what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dr2dist.backbones.backbone import OUTPUT, FeatureInfo
from dr2dist.config.section import Positive, Unit
from dr2dist.data.batch import Batch
from dr2dist.data.index import Index
from dr2dist.data.stream import Values
from dr2dist.errors import UserError
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.classes import ClassOptions, ClassTask
from dr2dist.tasks.clips import VIDEO, ClipTask
from dr2dist.tasks.film_transforms import FilmData
from dr2dist.tasks.task import Head, Loss, Row, finite_samples
from dr2dist.tasks.temporal.measured import SpanMetrics
from dr2dist.tasks.temporal.points import Points, Targets, class_loss, reach_loss
from dr2dist.tasks.temporal.pyramid import PyramidHead
from dr2dist.tasks.temporal.samples import Windowed
from dr2dist.tasks.temporal.spans import FilmSpans, Spans, joined, said, soft_nms
from dr2dist.tasks.temporal.timeline import SHOWN, draw_timelines
from dr2dist.tasks.temporal.windows import WindowSampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = {
    "thumos": (0.3, 0.4, 0.5, 0.6, 0.7),
    "activitynet": tuple(0.5 + 0.05 * k for k in range(10)),
}
"""tIoUs over which mean average precision is averaged."""


class WindowData(FilmData):
    """Shards, and how windows are taken from their films and prepared."""

    overlap: float = Field(
        0.5, ge=0, lt=1, description="share of a window that the next one sees too, in evaluation"
    )
    visible: Unit = Field(
        0.75, description="least share of an action in a window for it to be learnt there"
    )

    def preprocessing(self) -> dict[str, Any]:
        """See Data."""
        return {**super().preprocessing(), "overlap": self.overlap, "visible": self.visible}

    def idle(self) -> dict[str, str]:
        """See Section."""
        own = dict.fromkeys(("overlap", "visible"), "sampling segments")
        return {**super().idle(), **(own if self.sampling == "segments" else {})}


class TemporalActionDetectionOptions(ClassOptions):
    """Spans of time, of one class each, from a pyramid over time."""

    num_classes: int = Field(ge=1, description="classes of actions")
    width: Positive = Field(512, description="channels of the head")
    heads: Positive = Field(4, description="of its attention, a divisor of width")
    levels: Positive = Field(6, description="of the pyramid, each half as long as the one before")
    window: int | None = Field(
        19, ge=1, description="tokens that its attention sees, an odd number; null: all"
    )
    reach_weight: float = Field(1.0, gt=0, description="of the loss of where actions end")
    sigma: float = Field(
        0.5, gt=0, description="of Soft-NMS: larger keeps more of overlapping ones"
    )
    most: Positive = Field(200, description="spans of a film that are said at most")
    thresholds: Literal["thumos", "activitynet"] = Field(
        "thumos", description="tIoUs of the mean average precision: 0.3 to 0.7, or 0.5 to 0.95"
    )

    def outputs(self) -> int:
        """See TaskOptions: the task brings a head."""
        return 0


class TemporalActionDetection(ClassTask, ClipTask):
    """Spans [start, stop] of classes in films, learnt from windows of them.

    A film's actions are a list of {"label": name or number, "segment": [start, stop]}, in seconds.
    Inputs are windows: one of each film in training, all of it in evaluation, [W, C, T, H, W'].
    What they say is merged before suppression.
    """

    name = "temporal_action_detection"
    Options = TemporalActionDetectionOptions
    Data = WindowData
    fields: ClassVar[Mapping[str, str]] = {"video": VIDEO, "actions": "json#annotations"}
    best = ("map", "max")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        said, window = self.options, self.options.window
        if said.width % said.heads:
            raise UserError(f"task.heads is {said.heads}, allowed are divisors of {said.width}")
        if window is not None and window % 2 == 0:
            raise UserError(f"task.window is {window}, allowed are odd numbers")
        tubelet = int(self.preprocessing.get("tubelet", 1))
        tokens = -(-int(self.preprocessing.get("frames", 1)) // tubelet)
        self.points = Points(tokens, said.levels)

    def check_index(self, index: Index, source: str) -> None:
        """See Task."""
        if index.classes:
            self.check_classes(index, source)

    def transform(self, data: Any = None) -> Callable[[Values], Values]:
        """See Task."""
        said = self.preprocessing
        names = ("sampling", "stride", "rate", "overlap", "visible")
        sampling = WindowSampling(self.frames, *(said[name] for name in names))
        return Windowed(sampling, self.points, self.classes, said, data)

    def collate(self, samples: Sequence[Values]) -> tuple[dict[str, Tensor], Any]:
        """Targets: windows, fp64 [W, 3] (see `said`); counts, how many of them each film has; and
        where it is known, `Targets` of all windows and each film's actions."""
        whole = {name: [sample[name] for sample in samples] for name in samples[0]}
        targets: dict[str, Any] = {
            "windows": torch.cat(whole["windows"]),
            "counts": [len(each) for each in whole["windows"]],
        }
        if "points" in whole:
            parts = zip(*whole["points"], strict=True)
            targets["points"] = [torch.cat(each) for each in parts]
            targets["actions"] = whole["actions"]
        return {"video": torch.cat(whole["video"])}, targets

    def head(self, features: Sequence[FeatureInfo]) -> Head:
        """See Task."""
        found = [info for info in features if info.name == OUTPUT]
        if not found:
            raise UserError(f"task.name is {self.name}: the model names no features over time")
        said = self.options
        shape = (said.num_classes, said.width, said.heads, said.levels, said.window)
        return Head(PyramidHead(found[0], *shape), (OUTPUT,))

    def counts(self, batch: Batch) -> float:
        """Points that stand for an action, in a window without any one."""
        labels = Targets(*batch.targets["points"]).labels
        return float(labels.any(-1).sum(-1).clamp(min=1).sum()) if batch.count else 0.0

    def loss(self, outputs: Any, batch: Batch, normaliser: float, training: bool = True) -> Loss:
        """See Task."""
        logits, reach = outputs["logits"], outputs["reach"]
        here = Targets(*(to_device(each, logits.device) for each in batch.targets["points"]))
        own = 1.0 if batch.count else 0.0
        classes = class_loss(logits, here) * own / normaliser
        ends = reach_loss(reach, here) * own * self.options.reach_weight / normaliser
        by_window = finite_samples(outputs).split(batch.targets["counts"])
        finite = torch.stack([each.all() for each in by_window])
        return Loss(classes + ends, finite, {"classes": classes, "ends": ends})

    def predictions(self, outputs: Any, batch: Batch) -> list[FilmSpans]:
        """Of each film: what its windows say, merged, then Soft-NMS."""
        scores = outputs["logits"].double().sigmoid().cpu()
        reach, windows = outputs["reach"].double().cpu(), batch.targets["windows"].tolist()
        each = [said(self.points, *parts) for parts in zip(scores, reach, windows, strict=True)]
        found, first = [], 0
        for count in batch.targets["counts"]:
            whole = joined(each[first : first + count])
            best = soft_nms(whole, self.options.sigma, self.options.most)
            found.append(FilmSpans(best, windows[first][2]))
            first += count
        return found

    def metrics(self, device: torch.device) -> SpanMetrics:
        """map, the mean over classes and `thresholds`, and map_T at each of them."""
        return SpanMetrics(self.classes, THRESHOLDS[self.options.thresholds])

    def report(self, device: torch.device) -> SpanMetrics:
        """All of metrics(), with class_map by name (null where no film has it), absent_classes and
        classes."""
        return SpanMetrics(self.classes, THRESHOLDS[self.options.thresholds], self.told_by_class)

    def rows(self, predictions: list[FilmSpans]) -> list[Row]:
        """seconds of the film, and annotations: label, segment (seconds) and score of each span, by
        falling score."""
        return [
            {"seconds": round(seconds, 3), "annotations": self._annotations(spans)}
            for spans, seconds in predictions
        ]

    def _annotations(self, spans: Spans) -> list[dict[str, Any]]:
        return [
            {
                "label": self.classes[label],
                "segment": [round(float(end), 3) for end in segment],
                "score": round(float(score), 6),
            }
            for segment, score, label in zip(*spans, strict=True)
        ]

    def draw(self, batch: Batch, predictions: list[FilmSpans]) -> Figure | None:
        """Timelines of the first films."""
        rows = self.rows(predictions[:SHOWN])
        titled = [{"path": key, **row} for key, row in zip(batch.keys, rows, strict=False)]
        actions = [each.tolist() for each in batch.targets["actions"][:SHOWN]]
        there = [[(a, b, self.classes[int(k)]) for a, b, k in film] for film in actions]
        return draw_timelines(self.classes, titled, there)

    def draw_rows(self, rows: Sequence[Row]) -> Figure | None:
        """Timelines of the first films."""
        return draw_timelines(self.classes, [row for row in rows if "annotations" in row])
