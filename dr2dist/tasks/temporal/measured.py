"""Mean average precision of spans, by COCO's evaluator on boxes of height one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dr2dist.data.batch import Batch
from dr2dist.errors import UserError
from dr2dist.tasks.metrics import KeyedMetrics
from dr2dist.tasks.temporal.spans import Spans
from dr2dist.tasks.temporal.windows import Actions

LONGEST = 1e10
"""Seconds of a span that is counted."""
UNLIMITED = 10**6
"""Spans of a film that are counted."""

Film = tuple[Spans, Actions]
"""What is found in a film, and what is there."""


def average_precision(
    films: Sequence[Film], label: int, thresholds: Sequence[float]
) -> NDArray[np.float64] | None:
    """Of one class, [thresholds]; None where no film has it.

    Spans of all films take, by falling score and of equal ones by the films' order, the free action
    of the highest tIoU, if it is at least the threshold. Precision is the highest at that recall or
    a higher one, averaged over the recalls of all actions (PASCAL VOC 2011, ActivityNet's code).
    """
    count = sum(int((there[:, 2] == label).sum()) for _, there in films)
    if not count:
        return None
    evaluator = _evaluator(films, label)
    parameters = evaluator.params
    parameters.iouThrs = np.array(thresholds)
    parameters.recThrs = np.arange(1, count + 1) / count
    parameters.maxDets, parameters.useCats = [UNLIMITED], 1
    parameters.areaRng, parameters.areaRngLbl = [[0.0, LONGEST]], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    found: NDArray[np.float64] = evaluator.eval["precision"][:, :, 0, 0, 0].mean(1)
    return found.clip(min=0.0)


def _evaluator(films: Sequence[Film], label: int) -> Any:
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError(
            "detection is measured by pycocotools: pip install 'dr2dist[detection]'"
        ) from None
    true: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    for number, (spans, there) in enumerate(films):
        of = {"image_id": number, "category_id": 1}
        for start, stop in there[there[:, 2] == label, :2]:
            true.append({**_box(start, stop), "iscrowd": 0, "id": len(true) + 1, **of})
        own = spans.chosen(np.flatnonzero(spans.labels == label))
        for (start, stop), score in zip(own.segments, own.scores, strict=True):
            found = {**_box(start, stop), "score": float(score), "id": len(said) + 1}
            said.append({**found, "iscrowd": 0, **of})
    images = [{"id": number} for number in range(len(films))]
    with contextlib.redirect_stdout(io.StringIO()):
        both = [_dataset(COCO(), images, entries) for entries in (true, said)]
        return COCOeval(*both, iouType="bbox")


def _box(start: float, stop: float) -> dict[str, Any]:
    return {"bbox": [float(start), 0.0, float(stop - start), 1.0], "area": float(stop - start)}


def _dataset(coco: Any, images: list[Any], entries: list[Any]) -> Any:
    coco.dataset = {"images": images, "categories": [{"id": 1}], "annotations": entries}
    coco.createIndex()
    return coco


class SpanMetrics(KeyedMetrics):
    """map: the mean over thresholds of the mean average precision over classes that there are
    actions of; map_THRESHOLD at each.

    told_by_class: what a report has of class_map by name, see `ClassTask`; None for none.
    """

    def __init__(
        self,
        classes: Sequence[str],
        thresholds: Sequence[float],
        told_by_class: Callable[[str, Mapping[str, float | None]], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.thresholds, self._told = classes, tuple(thresholds), told_by_class

    def entries(self, predictions: Any, batch: Batch) -> Sequence[tuple[str, Any]]:
        """See KeyedMetrics. predictions: FilmSpans of each film."""
        spans = (found.spans for found in predictions)
        actions = (each.cpu().numpy() for each in batch.targets["actions"])
        return list(zip(batch.keys, zip(spans, actions, strict=True), strict=True))

    def score(self, samples: list[tuple[str, Any]]) -> dict[str, Any]:
        """See KeyedMetrics."""
        films = [film for _, film in samples]
        found = [average_precision(films, k, self.thresholds) for k in range(len(self.classes))]
        there = [each for each in found if each is not None]
        means = np.mean(there, 0) if there else np.full(len(self.thresholds), np.nan)
        each = {f"map_{t:g}": float(m) for t, m in zip(self.thresholds, means, strict=True)}
        values = {"map": float(means.mean()), **each}
        if self._told is None:
            return values
        by_class = {
            name: None if each is None else float(each.mean())
            for name, each in zip(self.classes, found, strict=True)
        }
        return {**values, **self._told("class_map", by_class)}
