"""Temporal action detection: windows, what points are to say, losses, suppression, precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dr2dist.backbones.backbone import FeatureInfo
from dr2dist.data.film import Film
from dr2dist.errors import UserError
from dr2dist.tasks.temporal.measured import average_precision
from dr2dist.tasks.temporal.points import Points, Targets, class_loss, reach_loss
from dr2dist.tasks.temporal.pyramid import PyramidHead
from dr2dist.tasks.temporal.samples import actions_of
from dr2dist.tasks.temporal.spans import Spans, said, soft_nms
from dr2dist.tasks.temporal.windows import Window, WindowSampling, different
from tests.films import film

CLASSES = ("jump", "throw")


def actions(*each: tuple[float, float, int]) -> Any:
    return np.array(each, np.float64).reshape(-1, 3)


def spans(*each: tuple[float, float, float, int]) -> Spans:
    whole = np.array(each, np.float64).reshape(-1, 4)
    return Spans(whole[:, :2], whole[:, 2], whole[:, 3].astype(np.int64))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("frames", [5, 8, 20, 39, 40, 41, 100])
def test_windows_cover_a_film_once_and_overlap(overlap: float, frames: int) -> None:
    long, sampling = Film(film(40, rate=10)), WindowSampling(frames, stride=1, overlap=overlap)
    windows = sampling.spread(long)
    starts = [window.start for window in windows]
    assert starts[0] == 0 and len(set(starts)) == len(starts)
    assert all(window.step == pytest.approx(0.1) for window in windows)
    length = frames / 10
    if length >= long.seconds - 1e-3:
        assert len(windows) == 1
        return
    assert starts[-1] + length == pytest.approx(long.seconds)
    hops = np.diff(starts)
    assert (hops <= length * (1 - overlap) + 1e-6).all()
    # No more than are needed.
    needed = math.ceil((long.seconds - length) / (length * (1 - overlap)) - 1e-6)
    assert len(hops) == needed


def test_a_film_in_segments_is_one_window() -> None:
    long, sampling = Film(film(40, rate=10)), WindowSampling(8, "segments")
    (window,) = sampling.spread(long)
    assert window == (0.0, pytest.approx(0.5))
    assert sampling.drawn(long, actions()) == window
    np.testing.assert_allclose(sampling.times(long, window), np.arange(8) * 0.5)
    single = Film(film(1))
    assert sampling.times(single, sampling.spread(single)[0]).tolist() == [0.0] * 8


def test_a_drawn_window_has_an_action_where_there_is_one() -> None:
    torch.manual_seed(0)
    long, sampling = Film(film(40, rate=10)), WindowSampling(8, stride=1)
    there = actions((3.0, 3.3, 0))
    for _ in range(20):
        window = sampling.drawn(long, there)
        assert 0 <= window.start <= 3.2
        (found,) = sampling.seen(there, window)
        assert (found[1] - found[0]) / 0.3 >= 0.75 - 1e-9
    starts = [sampling.drawn(long, actions()).start for _ in range(50)]
    assert min(starts) < 1 and max(starts) > 2


def test_of_an_action_at_the_edge_what_is_seen_is_learnt() -> None:
    sampling, window = WindowSampling(10, stride=1), Window(1.0, 0.1)
    there = actions((0.9, 1.3, 0), (0.0, 1.3, 1), (1.2, 1.4, 0), (1.9, 2.02, 1))
    np.testing.assert_allclose(
        sampling.seen(there, window), [(1.0, 1.3, 0), (1.2, 1.4, 0), (1.9, 2.0, 1)]
    )


def test_actions_without_length_and_twice_the_same_count_once() -> None:
    found = different([(1, 2, 0), (1.0005, 2, 0), (1, 2, 1), (3, 3.0005, 0), (1, 2.1, 0)])
    assert found.tolist() == [[1, 2, 0], [1, 2, 1], [1, 2.1, 0]]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"a": 1}, "allowed is a list"),
        ([{"segment": [0, 1]}], "an action is"),
        ([{"label": "jump", "segment": [1]}], "an action is"),
        ([{"label": "jump", "segment": [2, 1]}], "start <= stop"),
        ([{"label": "jump", "segment": [-1, 1]}], "start <= stop"),
        ([{"label": "jump", "segment": [0, float("nan")]}], "start <= stop"),
        ([{"label": "fall", "segment": [0, 1]}], "one of jump, throw"),
        ([{"label": 2, "segment": [0, 1]}], "0 to 1"),
    ],
)
def test_what_is_no_action_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        actions_of(given, CLASSES, 10.0)


def test_actions_are_cut_to_their_film() -> None:
    said = [{"label": "throw", "segment": [9, 12]}, {"label": 0, "segment": ["11", 12]}]
    assert actions_of(said, CLASSES, 10.0).tolist() == [[9, 10, 1]]
    assert actions_of([], CLASSES, 10.0).shape == actions_of(None, CLASSES, 10.0).shape == (0, 3)


def targets_by_hand(points: Points, levels: int, there: Any, classes: int, length: float) -> Any:
    """Point by point, as ActionFormer's paper says it."""
    labels = torch.zeros(len(points.at), classes, dtype=torch.bool)
    reach = torch.zeros(len(points.at), 2)
    for number, (at, step) in enumerate(zip(points.at.tolist(), points.step.tolist(), strict=True)):
        level = round(math.log2(step))
        low = 0 if level == 0 else 2 * 2**level
        high = math.inf if level == levels - 1 else 4 * 2**level
        found = []
        for start, stop, label in there.tolist():
            middle = (start + stop) / 2
            left, right = at - start, stop - at
            near = max(start, middle - 1.5 * step) < at < min(stop, middle + 1.5 * step)
            if at < length and near and low <= max(left, right) <= high:
                found.append((stop - start, int(label), left / step, right / step))
        if found:
            shortest = min(found)
            labels[number, [f[1] for f in found if f[0] - shortest[0] <= 1e-3]] = True
            reach[number] = torch.tensor(next(f[2:] for f in found if f[0] == shortest[0]))
    return labels, reach


@pytest.mark.parametrize(("length", "levels"), [(16, 3), (13, 4), (48, 5), (5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_points_stand_for_the_shortest_action_that_they_reach(
    length: int, levels: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    points = Points(length, levels)
    starts, lengths = random.uniform(0, length - 1, 6), random.uniform(0.3, length / 2, 6)
    stops = np.minimum(starts + lengths, length)
    there = np.stack([starts, stops, random.integers(0, 2, 6)], 1)
    there = np.concatenate([there, [[*there[0, :2], 1 - there[0, 2]]]])  # two classes at one time
    film_end = length - 1.2
    found = points.targets(there, 2, film_end)
    labels, reach = targets_by_hand(points, levels, there, 2, film_end)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.reach, reach)
    assert found.labels.any() and torch.equal(found.valid, points.at < film_end)
    nothing = points.targets(actions(), 2, film_end)
    assert not nothing.labels.any() and nothing.reach.shape == reach.shape


def test_what_points_are_to_say_is_read_back_as_the_actions() -> None:
    """Targets as outputs give the actions, of every length that the pyramid reaches."""
    points, token = Points(64, 5), 0.2
    there = actions((2, 5, 0), (10, 22, 1), (20, 60, 0), (30.3, 31.7, 1), (0, 64, 1))
    found = points.targets(there, 2, 64.0)
    spoken = said(points, found.labels.double(), found.reach.double(), (0.0, token, 12.8))
    best = soft_nms(spoken, 0.5, 5)
    read = sorted(map(tuple, np.round(np.c_[best.segments / token, best.labels], 4).tolist()))
    assert read == sorted(map(tuple, there.tolist()))


def test_losses_and_their_gradients_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 7, 3, dtype=torch.float64).float().requires_grad_()
    reach = torch.rand(2, 7, 2).requires_grad_()
    valid = torch.rand(2, 7) > 0.2
    labels = (torch.rand(2, 7, 3) > 0.7) & valid[..., None]
    there = Targets(labels, torch.rand(2, 7, 2) + 0.1, valid)
    p = logits.double().sigmoid()
    right = torch.where(labels, p, 1 - p)
    weight = torch.where(labels, 0.25, 0.75)
    focal = (-weight * (1 - right) ** 2 * right.log() * valid[..., None]).sum()
    total = torch.zeros((), dtype=torch.float64)
    for w, k in labels.any(-1).nonzero().tolist():
        (a, b), (c, d) = reach[w, k].double(), there.reach[w, k].double()
        inter = min(a, c) + min(b, d)
        iou = inter / (a + b + c + d - inter)
        distance = ((b - a) / 2 - (d - c) / 2) / (max(a, c) + max(b, d))
        total = total + 1 - iou + distance**2
    for found, wanted, leaf in (
        (class_loss(logits, there), focal, logits),
        (reach_loss(reach, there), total, reach),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
        (one,) = torch.autograd.grad(found, leaf)
        (other,) = torch.autograd.grad(wanted, leaf)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    empty = Targets(torch.zeros_like(labels), there.reach, valid)
    nothing = reach_loss(reach, empty)
    assert nothing == 0 and nothing.requires_grad


def test_soft_nms_lowers_what_overlaps_a_better_span_of_its_class() -> None:
    found = soft_nms(
        spans((0, 10, 0.9, 0), (0, 8, 0.8, 0), (0, 10, 0.7, 1), (20, 30, 0.6, 0)), 0.5, 10
    )
    lowered = 0.8 * math.exp(-(0.8**2) / 0.5)
    assert found.labels.tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.6, lowered])
    assert len(soft_nms(found, 0.5, 2).scores) == 2
    assert len(soft_nms(spans(), 0.5, 2).scores) == 0


def precision_by_hand(films: Any, label: int, threshold: float) -> float:
    """PASCAL VOC 2011, from the definition."""
    said = [
        (-score, number, place)
        for number, (found, _) in enumerate(films)
        for place, score in enumerate(found.scores)
        if found.labels[place] == label
    ]
    free = [[row for row in there.tolist() if row[2] == label] for _, there in films]
    count = sum(map(len, free))
    rights = []
    for _, number, place in sorted(said):
        start, stop = films[number][0].segments[place]
        best, which = threshold, None
        for row in free[number]:
            inter = min(stop, row[1]) - max(start, row[0])
            value = max(inter, 0) / (stop - start + row[1] - row[0] - max(inter, 0))
            if value >= best:
                best, which = value, row
        rights.append(which is not None)
        if which is not None:
            free[number].remove(which)
    precision = np.cumsum(rights) / np.arange(1, len(rights) + 1)
    total = 0.0
    for number, right in enumerate(rights):
        if right:
            total += precision[number:].max() / count
    return total


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_its_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    films = []
    for _ in range(5):
        starts = random.uniform(0, 80, 12)
        said = np.stack([starts, starts + random.uniform(2, 20, 12)], 1)
        scores = random.choice([0.2, 0.4, 0.6, 0.8], 12)  # many ties
        order = np.argsort(-scores, kind="stable")
        found = Spans(said[order], scores[order], random.integers(0, 2, 12)[order])
        there = said[:5] + random.normal(0, 1.5, (5, 2))
        films.append((found, np.c_[there, random.integers(0, 2, 5)]))
    thresholds = (0.3, 0.5, 0.7)
    for label in (0, 1):
        wanted = [precision_by_hand(films, label, threshold) for threshold in thresholds]
        found = average_precision(films, label, thresholds)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert average_precision(films, 2, thresholds) is None


def test_average_precision_of_cases_that_one_can_count() -> None:
    there = actions((0, 10, 0), (20, 30, 0))
    perfect = spans((0, 10, 0.9, 0), (20, 30, 0.8, 0))
    twice = spans((0, 10, 0.9, 0), (0, 10, 0.8, 0), (20, 30, 0.7, 0))
    half = spans((0, 5, 0.9, 0))  # tIoU is 0.5 exactly
    for found, wanted in ((perfect, 1.0), (twice, (1 + 2 / 3) / 2), (spans(), 0.0), (half, 0.5)):
        assert average_precision([(found, there)], 0, [0.5]) == pytest.approx([wanted])
    assert average_precision([(half, there)], 0, [0.51]) == pytest.approx([0.0])


INFO = FeatureInfo("output", 0, 3, 12, 16, "BNC", 2, (4, 2, 3))


def head(window: int | None = 3, levels: int = 3) -> PyramidHead:
    torch.manual_seed(0)
    return PyramidHead(INFO, 2, 16, 4, levels, window)


def test_a_head_says_something_at_every_point() -> None:
    torch.manual_seed(1)
    tokens = torch.randn(2 * 2, 4 * 2 * 3, 12)
    found = head()([tokens])
    count = len(Points(8, 3).at)
    assert found["logits"].shape == (2, count, 2) and found["reach"].shape == (2, count, 2)
    assert found["reach"].min() >= 0
    maps = tokens.view(2, 2, 4, 2, 3, 12).flatten(1, 2)  # [B, T, H, W, C]
    net = head()
    for layout, given in (("BTHWC", maps), ("BHTWC", maps.transpose(1, 2))):
        net.sequence.info = FeatureInfo("output", 0, 3, 12, 16, layout)
        for name, value in net([given]).items():
            torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-5)


def test_attention_is_local() -> None:
    """What is further away than a point's convolutions and windows reach changes nothing."""
    torch.manual_seed(1)
    tokens = torch.randn(1, 200, 12, requires_grad=True)
    for window, is_local in ((3, True), (None, False)):
        net = PyramidHead(INFO._replace(rows=1, places=(200, 1, 1)), 2, 16, 4, 1, window)
        (grad,) = torch.autograd.grad(net([tokens])["logits"][0, 100].sum(), tokens)
        # 2 + 2 x (1 + 1) + 3 tokens of convolutions and attention, to each side.
        reached = grad[0].abs().sum(-1).nonzero()[:, 0]
        assert (int(reached.min()), int(reached.max())) == ((91, 109) if is_local else (0, 199))


def test_a_feature_without_time_is_refused() -> None:
    with pytest.raises(UserError, match="says nothing of time"):
        PyramidHead(FeatureInfo("output", 0, 3, 12, 16, "BNC"), 2, 16, 4, 3, None)


def test_a_span_is_cut_to_its_film_and_none_is_said_beyond() -> None:
    points = Points(8, 1)
    reach: Tensor = torch.full((8, 2), 2.0, dtype=torch.float64)
    scores = torch.full((8, 1), 0.5, dtype=torch.float64)
    found = said(points, scores, reach, (10.0, 1.0, 14.2))
    assert len(found.scores) == 4
    assert found.segments.min() == 8.5 and found.segments.max() == 14.2
