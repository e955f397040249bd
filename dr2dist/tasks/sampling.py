"""When the frames of a clip are shown: windows of even steps, or one frame of each segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dr2dist.data.film import Footage

Kind = Literal["stride", "segments"]
Times = NDArray[np.float64]


def mean_rate(film: Footage) -> float:
    """Frames a second; 1 of a film that has no length."""
    seconds = film.seconds - float(film.times[0])
    return len(film.times) / seconds if seconds else 1.0


@dataclass(frozen=True)
class Sampling:
    """How clips of a number of frames are taken from a film, or a span of one.

    kind: "stride" takes frames that are `stride` frames of `rate` a second apart, the film's own
    mean rate for None; "segments" cuts all into as many parts of one length and takes a frame of
    each. views: clips of an evaluation. What is asked for after the span's end is its last frame.
    """

    frames: int
    kind: Kind = "stride"
    stride: int = 4
    rate: float | None = None
    views: int = 1

    def drawn(self, film: Footage, span: tuple[float, float] | None = None) -> Times:
        """Seconds of a training clip's frames, [frames]. Draws from torch's global stream."""
        return self._clip(film, span, torch.rand(self.frames).numpy().astype(np.float64))

    def spread(self, film: Footage, span: tuple[float, float] | None = None) -> list[Times]:
        """Seconds of the frames of each view, evenly spread: one view is in the middle."""
        count = self.views
        if self.kind == "segments":
            shares = [(view + 0.5) / count for view in range(count)]
        else:
            shares = [view / (count - 1) for view in range(count)] if count > 1 else [0.5]
        return [self._clip(film, span, np.full(self.frames, share)) for share in shares]

    def _clip(self, film: Footage, span: tuple[float, float] | None, shares: Times) -> Times:
        """shares: from 0 to 1, of the room that there is for a frame, or for the whole window."""
        times, seconds = film.times, film.seconds
        start, stop = (float(times[0]), seconds) if span is None else span
        if self.kind == "segments":
            part = (stop - start) / self.frames
            found = start + (np.arange(self.frames) + shares) * part
        else:
            own = mean_rate(film)
            step = self.stride / (self.rate or own)
            room = stop - 1 / own - start - (self.frames - 1) * step
            found = start + max(room, 0.0) * shares[0] + np.arange(self.frames) * step
        inside = times[(times >= start) & (times < stop)]
        # A span between two frames shows the one before it.
        return found.clip(start, max(float(inside[-1]) if len(inside) else start, start))
