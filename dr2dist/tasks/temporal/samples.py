"""Films to windows of frames, with what their points are to say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from dr2dist.data.film import Footage
from dr2dist.data.labels import class_index
from dr2dist.data.stream import Values
from dr2dist.tasks.film_transforms import Cover, as_video, random_steps, to_floats
from dr2dist.tasks.temporal.points import Points
from dr2dist.tasks.temporal.windows import Actions, Window, WindowSampling, different


class Windowed:
    """A sample's transform: video [W, C, T, H, W'], windows fp64 [W, 3], and of a film whose
    actions are known, points (`Targets` of W windows) and actions [A, 3].

    preprocessing: size, mean, std and tubelet of the task's. data: the section `data` in training,
    None in evaluation. W is 1 in training.
    """

    def __init__(
        self,
        sampling: WindowSampling,
        points: Points,
        classes: Sequence[str],
        preprocessing: Mapping[str, Any],
        data: Any,
    ) -> None:
        self.sampling, self.points, self.classes = sampling, points, tuple(classes)
        self.tubelet, self.training = int(preprocessing["tubelet"]), data is not None
        size = tuple(preprocessing["size"])
        normalise = to_floats(preprocessing["mean"], preprocessing["std"])
        self.prepare: Callable[[Any], Tensor]
        if data is None:
            self.cover = size
            self.prepare = v2.Compose([Cover(size), _only, normalise])
        else:
            # No more pixels than the smallest random crop can use.
            self.cover = tuple(math.ceil(side / math.sqrt(data.scale[0])) for side in size)
            self.prepare = v2.Compose([*random_steps(size, data), normalise])

    def __call__(self, values: Values) -> Values:
        """Raises ValueError for actions that are none."""
        film, actions = values["video"], None
        if "actions" in values:
            actions = actions_of(values["actions"], self.classes, film.seconds)
        known = different(()) if actions is None else actions
        sampling = self.sampling
        windows = [sampling.drawn(film, known)] if self.training else sampling.spread(film)
        video = torch.stack([self._frames(film, window) for window in windows])
        found = {"video": video, "windows": self._told(film, windows)}
        if actions is None:
            return found
        each = [self._targets(film, actions, window) for window in windows]
        points = [torch.stack(parts) for parts in zip(*each, strict=True)]
        return {**found, "points": points, "actions": torch.from_numpy(actions)}

    def _frames(self, film: Footage, window: Window) -> Tensor:
        times = self.sampling.times(film, window)
        return self.prepare(as_video(film.read(times.tolist(), self.cover)))

    def _told(self, film: Footage, windows: Sequence[Window]) -> Tensor:
        rows = [(window.start, window.step * self.tubelet, film.seconds) for window in windows]
        return torch.tensor(rows, dtype=torch.float64)

    def _targets(self, film: Footage, actions: Actions, window: Window) -> Any:
        token, seen = window.step * self.tubelet, self.sampling.seen(actions, window)
        seen[:, :2] = (seen[:, :2] - window.start) / token
        length = (film.seconds - window.start) / token
        return self.points.targets(seen, len(self.classes), length)


def _only(crops: Sequence[Tensor]) -> Tensor:
    (crop,) = crops
    return crop


def actions_of(said: Any, classes: Sequence[str], seconds: float) -> Actions:
    """What a sample says of its film, as far as it lies in it, each action once.

    said: a list, null for none. Raises ValueError for what is no list of actions, or names a class
    that is not known.
    """
    said = [] if said is None else said
    if not isinstance(said, list):
        raise ValueError(f"actions are {said!r:.60}, allowed is a list")
    found = [_action(each, classes) for each in said]
    inside = [(start, min(stop, seconds), label) for start, stop, label in found]
    return different(inside)


def _action(said: Any, classes: Sequence[str]) -> tuple[float, float, int]:
    try:
        start, stop = (float(value) for value in said["segment"])
        label = said["label"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f'an action is {said!r:.60}, allowed is {{"label": ..., "segment": [start, stop]}}'
        ) from None
    if not 0 <= start <= stop < math.inf:
        raise ValueError(f"an action is at {[start, stop]}, allowed is 0 <= start <= stop, seconds")
    return start, stop, class_index(label, classes)
