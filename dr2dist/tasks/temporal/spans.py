"""Spans that a pyramid's points say, merged over the windows of a film."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dr2dist.tasks.temporal.points import Points

Floats = NDArray[np.float64]
LEAST_SCORE = 1e-3
"""Of what is said at all, before and after suppression."""
MOST_OF_A_WINDOW = 2000
"""Spans of a window that suppression sees, those of the highest scores."""


class Spans(NamedTuple):
    """What is found in a film, by falling score.

    segments: [N, 2], seconds. scores: [N]. labels: int64 [N].
    """

    segments: Floats
    scores: Floats
    labels: NDArray[np.int64]

    def chosen(self, which: NDArray[np.int64]) -> Spans:
        """Some of them, in the order given."""
        return Spans(self.segments[which], self.scores[which], self.labels[which])


class FilmSpans(NamedTuple):
    """What is said of a film of so many seconds."""

    spans: Spans
    seconds: float


def joined(parts: list[Spans]) -> Spans:
    """All of them, by falling score; of equal ones the earlier first."""
    whole = Spans(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    return whole.chosen(np.argsort(-whole.scores, kind="stable"))


def said(
    points: Points, scores: Tensor, reach: Tensor, window: tuple[float, float, float]
) -> Spans:
    """What the points of one window say.

    scores: probabilities [P, classes] of fp64. reach: fp64 [P, 2]. window: its start, the seconds
    of a token, and the film's seconds, to which spans are cut.
    """
    start, token, end = window
    at, step = points.at.numpy(), points.step.numpy()
    valid = at * token + start < end
    all_ = (scores.numpy() * valid[:, None]).reshape(-1)
    best = np.argsort(-all_, kind="stable")[:MOST_OF_A_WINDOW]
    best = best[all_[best] > LEAST_SCORE]
    point, labels = np.divmod(best, scores.shape[1])
    ends = at[point, None] + (reach.numpy() * step[:, None])[point] * [-1, 1]
    segments = (start + ends * token).clip(0, end)
    found = Spans(segments, all_[best], labels)
    return found.chosen(np.flatnonzero(segments[:, 1] > segments[:, 0]))


def soft_nms(found: Spans, sigma: float, most: int) -> Spans:
    """Scores of a class's spans lowered by exp(-tIoU^2 / sigma) for each better one (Soft-NMS,
    arXiv 1704.04503, Gaussian); the `most` best of all classes that keep a score."""
    parts = [Spans(np.zeros((0, 2)), np.zeros(0), np.zeros(0, np.int64))]
    for label in np.unique(found.labels):
        own = found.chosen(np.flatnonzero(found.labels == label))
        parts.append(_of_one_class(own, sigma, most))
    whole = joined(parts)
    return whole.chosen(np.arange(min(len(whole.scores), most)))


def _of_one_class(found: Spans, sigma: float, most: int) -> Spans:
    scores, order, kept = found.scores.copy(), list[int](), list[float]()
    for _ in range(min(most, len(scores))):
        best = int(scores.argmax())
        if scores[best] <= LEAST_SCORE:
            break
        order.append(best)
        kept.append(float(scores[best]))
        scores *= np.exp(-(tiou(found.segments, found.segments[best]) ** 2) / sigma)
        scores[best] = -1.0
    which = np.array(order, np.int64)
    return found.chosen(which)._replace(scores=np.array(kept, np.float64))


def tiou(segments: Floats, one: Floats) -> Floats:
    """Of each of [N, 2] with one [2]: length of what they share, by that of both together."""
    inter = np.minimum(segments[:, 1], one[1]) - np.maximum(segments[:, 0], one[0])
    inter = inter.clip(min=0)
    both = segments[:, 1] - segments[:, 0] + one[1] - one[0] - inter
    return np.asarray(inter / np.maximum(both, 1e-9))
