"""Clips of films: when their frames are shown, how they are prepared, what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dr2dist.config.task import sections_of
from dr2dist.data.batch import Batch
from dr2dist.data.broken import BrokenError
from dr2dist.data.decoders import decode
from dr2dist.data.film import Film
from dr2dist.errors import UserError
from dr2dist.tasks.film_transforms import Cover
from dr2dist.tasks.registry import make_task
from dr2dist.tasks.sampling import Sampling
from dr2dist.tasks.task import Task
from tests.films import film, numbers

PREPARED = {"frames": 4, "size": [16, 16], "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}


def shown(clip: torch.Tensor) -> list[int]:
    """Which frames of `tests.films.film` a clip [C, T, H, W] of whole pictures is made of."""
    return numbers((255 * clip).round().byte().permute(1, 2, 3, 0).numpy())


def section(**said: Any) -> Any:
    return sections_of("video_classification")[1].model_validate({"train": "here", **said})


def made(said: Any = None, **options: Any) -> Task:
    kind = sections_of("video_classification")[0]
    options = {"name": "video_classification", "num_classes": 6, **options}
    prepared = {**PREPARED, **(said or section()).preprocessing()}
    return make_task(kind.model_validate(options), tuple("abcdef"), prepared)


@pytest.mark.parametrize("rate", [10, 25])
def test_windows_of_a_stride(rate: int) -> None:
    found = Film(film(40, rate))
    spread = Sampling(4, stride=3, views=3).spread(found)
    # Ten frames long: 30 are free. Middles of frames would do as well as their starts.
    assert [numbers(found.read(times)) for times in spread] == [
        [0, 3, 6, 9],
        [15, 18, 21, 24],
        [30, 33, 36, 39],
    ]
    (middle,) = Sampling(4, stride=3).spread(found)
    assert numbers(found.read(middle)) == [15, 18, 21, 24]
    starts = set()
    for seed in range(300):
        torch.manual_seed(seed)
        seen = numbers(found.read(Sampling(4, stride=3).drawn(found)))
        assert np.diff(seen).tolist() == [3, 3, 3] and 0 <= seen[0] <= 30
        starts.add(seen[0])
    assert len(starts) > 25


def test_a_stride_of_a_stated_rate_and_of_uneven_frames() -> None:
    found = Film(film(40, 20))
    (times,) = Sampling(4, stride=1, rate=5).spread(found)
    assert np.diff(numbers(found.read(times))).tolist() == [4, 4, 4]
    uneven = Film(film(20, times=[*np.arange(10) / 10, *(1 + np.arange(10) / 2)]))
    (times,) = Sampling(6, stride=2, rate=2).spread(uneven)
    assert np.diff(times).tolist() == pytest.approx([1.0] * 5)


def test_a_frame_of_each_segment() -> None:
    found = Film(film(40))
    (times,) = Sampling(4, "segments").spread(found)
    assert numbers(found.read(times)) == [5, 15, 25, 35]
    two = Sampling(4, "segments", views=2).spread(found)
    assert [numbers(found.read(times)) for times in two] == [[2, 12, 22, 32], [7, 17, 27, 37]]
    for seed in range(50):
        torch.manual_seed(seed)
        seen = numbers(found.read(Sampling(4, "segments").drawn(found)))
        assert [number // 10 for number in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["stride", "segments"])
def test_nothing_outside_of_a_span_is_seen(kind: Any) -> None:
    found = Film(film(40))
    for seed in range(50):
        torch.manual_seed(seed)
        for times in (
            Sampling(4, kind, stride=1).drawn(found, (1.0, 1.5)),
            *Sampling(4, kind, stride=5, views=2).spread(found, (1.0, 1.5)),
        ):
            seen = numbers(found.read(times))
            assert min(seen) >= 10 and max(seen) <= 14


@pytest.mark.parametrize("frames", [1, 2])
def test_films_shorter_than_a_clip_end_in_their_last_frame(frames: int) -> None:
    found = Film(film(frames))
    for kind in ("stride", "segments"):
        sampling = Sampling(4, kind, stride=1, views=2)  # type: ignore[arg-type]
        for times in (sampling.drawn(found), *sampling.spread(found)):
            seen = numbers(found.read(times))
            assert len(seen) == 4 and seen == sorted(seen) and max(seen) <= frames - 1


def test_training_sees_one_clip_and_evaluation_all_views() -> None:
    data = section(stride=2, views=2, crops=3, scale=[1.0, 1.0], hflip=False)
    task = made(data)
    values = {"video": decode("mp4", film(40, size=(16, 32))), "label": "c"}
    torch.manual_seed(0)
    trained = task.transform(data)(dict(values))
    assert trained["video"].shape == (3, 4, 16, 16) and trained["label"] == 2
    seen = task.transform()(dict(values))
    assert seen["video"].shape == (6, 3, 4, 16, 16)
    assert [shown(view)[0] for view in seen["video"]] == [0, 0, 0, 33, 33, 33]
    inputs, targets = task.collate([seen, seen])
    assert inputs["video"].shape == (12, 3, 4, 16, 16) and targets["label"].tolist() == [2, 2]


def test_crops_are_the_ends_and_the_middle_of_the_longer_side() -> None:
    columns = torch.arange(32).expand(2, 3, 16, 32).byte()
    wide = [view[0, 0, 0, 0].item() for view in Cover((16, 16), 3)(columns)]
    assert wide == [0, 8, 16]
    tall = [view[0, 0, 0, 0].item() for view in Cover((16, 16), 3)(columns.mT.contiguous())]
    assert tall == [0, 8, 16]
    (middle,) = Cover((8, 8))(columns)
    assert middle.shape == (2, 3, 8, 8)


def test_augmentation_is_the_same_in_all_frames() -> None:
    data = section(rand_augment={}, erase=0.9, sampling="segments")
    still = Film(film(1, size=(40, 40)))
    for seed in range(10):
        torch.manual_seed(seed)
        clip = made(data).transform(data)({"video": still, "label": 0})["video"]
        assert all(torch.equal(clip[:, 0], clip[:, place]) for place in range(1, 4))


def test_views_are_averaged_as_probabilities() -> None:
    task, random = made(), torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 6, generator=random)
    batch = Batch({}, {"label": torch.tensor([1, 4])}, ["a", "b"], 2)
    shares = outputs.double().softmax(-1).view(2, 3, 6).mean(1)
    found = task.predictions(outputs, batch)
    assert torch.allclose(found.double().softmax(-1), shares, atol=1e-6)
    loss = task.loss(outputs, batch, 2.0, training=False)
    wanted = -(shares[0, 1].log() + shares[1, 4].log()) / 2
    assert loss.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert loss.finite.shape == (2,)
    metrics = task.metrics(torch.device("cpu"))
    metrics.update(found, batch)
    assert set(metrics.compute()) == {"accuracy", "accuracy_top5", "balanced_accuracy"}


@pytest.mark.parametrize("first", range(6))
def test_metrics_are_their_own_however_alike_they_begin(first: int) -> None:
    """A first batch whose samples are all right, or all wrong, in all ways is often seen."""
    task, random = made(), torch.Generator().manual_seed(first)
    logits, labels = torch.randn(64, 6, generator=random), torch.arange(64) % 6
    logits[:2] = functional.one_hot((labels[:2] + first) % 6, 6) - 0.1 * torch.arange(6)
    metrics = task.metrics(torch.device("cpu"))
    for part in range(0, 64, 2):
        batch = Batch({}, {"label": labels[part : part + 2]}, ["a", "b"], 2)
        metrics.update(logits[part : part + 2], batch)
    right = logits.argmax(1) == labels
    among = (logits.topk(5).indices == labels[:, None]).any(1)
    recalls = [right[labels == label].double().mean() for label in range(6)]
    wanted = {"accuracy": right.double().mean(), "accuracy_top5": among.double().mean()}
    wanted["balanced_accuracy"] = torch.stack(recalls).mean()
    assert metrics.compute() == pytest.approx({k: v.item() for k, v in wanted.items()}, abs=1e-6)


def test_cutmix_cuts_through_all_frames() -> None:
    task = made(cutmix=1.0)
    clips = torch.stack([torch.zeros(3, 4, 16, 16), torch.ones(3, 4, 16, 16)])
    np.random.seed(0)
    mixed = task.augment(Batch({"video": clips}, {"label": torch.tensor([0, 1])}, ["a", "b"], 2))
    found = mixed.inputs["video"]
    assert found.shape == clips.shape and 0 < found[0].mean() < 1
    assert torch.equal(found[0], found[0][:1, :1].expand_as(found[0]))
    assert mixed.targets["label"][0, 1].item() == pytest.approx(found[0].mean().item())


@pytest.mark.parametrize("span", [[2], "late", [3, 1], [-1, 2], [9, 10]])
def test_a_span_that_is_none_is_said(span: Any) -> None:
    """One after its film's end counts as unreadable: the film may be cut, or damaged."""
    values = {"video": Film(film(40)), "span": span, "label": 0}
    with pytest.raises(BrokenError if span == [9, 10] else ValueError, match="span is"):
        made().transform()(values)


def test_a_span_of_texts_is_that_of_their_numbers() -> None:
    views = [
        made().transform()({"video": Film(film(40)), "span": span, "label": 0})["video"]
        for span in (["1.0", "2"], [1.0, 2.0])
    ]
    assert torch.equal(*views)


def test_what_clips_cannot_be_taken_for() -> None:
    kind = sections_of("video_classification")[0]
    options = kind.model_validate({"name": "video_classification", "num_classes": 2})
    images = {name: value for name, value in PREPARED.items() if name != "frames"}
    with pytest.raises(UserError, match="the model takes no clips; allowed are video models"):
        make_task(options, ("a", "b"), images).transform()
    with pytest.raises(UserError, match=r"data\.mean has 1 values, allowed are 3"):
        make_task(options, ("a", "b"), {**PREPARED, "mean": [0.0]})
    with pytest.raises(ValueError, match="stride"):
        section(sampling="segments", stride=2)


def test_a_head_of_a_network_gets_rows_of_views() -> None:
    task = made(section(views=3))
    seen = task.transform()({"video": Film(film(40)), "label": 0})
    inputs, _ = task.collate([seen])
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 16 * 16, 6))
    batch = Batch(inputs, {}, ["a"], 1)
    (row,) = task.rows(task.predictions(net(inputs["video"]), batch))
    assert sum(row[f"p_{name}"] for name in "abcdef") == pytest.approx(1, abs=1e-4)
