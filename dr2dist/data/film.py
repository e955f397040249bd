"""Films as members of samples: frames at given times, decoded when they are wanted (PyAV)."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dr2dist.data.broken import BrokenError
from dr2dist.errors import UserError, one_line

FILM_TYPES = ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "webm", "wmv")
"""Extensions of films."""
GAP = 1.0
"""Seconds between wanted frames from which on it is sought, not decoded, what lies between."""
SLACK = 1e-4
"""Seconds by which a time may miss its frame's own, for times have been fractions."""


Size = tuple[int, int] | None


def covering(size: tuple[int, int], cover: Size) -> tuple[int, int]:
    """Height and width of frames of a size that are shrunk to just cover another, in whole pixels;
    they are never enlarged."""
    if cover is None:
        return size
    scale = min(max(cover[0] / size[0], cover[1] / size[1]), 1.0)
    height, width = (
        max(round(side * scale), least) for side, least in zip(size, cover, strict=True)
    )
    return min(height, size[0]), min(width, size[1])


class Footage(ABC):
    """Frames that are shown at times, of which some are decoded at a time.

    data: a whole file. Its first frame is decoded at once.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._first = self.read([0.0])[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of frames, turned as the file says."""
        height, width = self._first.shape[:2]
        return int(height), int(width)

    @property
    @abstractmethod
    def times(self) -> NDArray[np.float64]:
        """When each frame is shown, in seconds of the film's own time, as players tell it: [N],
        rising. The first is at 0 unless sound comes before it."""

    @property
    @abstractmethod
    def seconds(self) -> float:
        """When the last frame ends, which is shown as long as others are where its own end is not
        said."""

    @abstractmethod
    def read(self, times: Sequence[float], cover: Size = None) -> NDArray[np.uint8]:
        """The frames that are seen at these seconds, in any order: RGB [T, H, W, 3].

        cover: (height, width) that larger frames are shrunk to just cover, one by one; None leaves
        them. Before the first frame that is the first, after the last the last. Raises BrokenError
        for what cannot be decoded.
        """


class Film(Footage):
    """A film in a file of one.

    Raises BrokenError for one without a film, or whose first frame cannot be
    decoded.
    """

    @cached_property
    def times(self) -> NDArray[np.float64]:
        """See Footage. Read from the packets; nothing is decoded."""
        return np.array(list(self._shown) or [0.0], np.float64)

    @property
    def seconds(self) -> float:
        """See Footage."""
        times, last = self.times, next(reversed(self._shown.values()), 0.0)
        usual = np.median(np.diff(times)) if len(times) > 1 else 0.0
        return float(times[-1] + (last or usual))

    @cached_property
    def _shown(self) -> dict[float, float]:
        """When each frame is shown, rising, and for how long, 0 where that is not said; seconds of
        the film."""
        with _opened(self.data) as container:
            stream = container.streams.video[0]
            when = attrgetter("dts" if _guesses_times(container) else "pts")
            # What a file's edits leave out is decoded for what follows, and not shown.
            found = {when(p): p.duration or 0 for p in container.demux(stream) if not p.is_discard}
            found.pop(None, None)  # the end's
            base = float(stream.time_base)
            start = _beginning(container, min(found, default=0) * base)
        return {time * base - start: found[time] * base for time in sorted(found)}

    def read(self, times: Sequence[float], cover: Size = None) -> NDArray[np.uint8]:
        """See Footage."""
        with _opened(self.data) as container:
            order = np.argsort(np.asarray(times, np.float64), kind="stable")
            reader = _Reader(container)
            frames: list[Any] = [None] * len(times)
            for place in order:
                frames[place] = reader.at(float(times[place]), cover)
        return np.stack(frames)


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    """A container of a file's bytes. Raises BrokenError in one line for what is wrong with it."""
    try:
        import av
    except ImportError:
        raise UserError("films need PyAV: pip install 'dr2dist[video]'") from None
    try:
        container = av.open(io.BytesIO(data), metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BrokenError(f"is no film: {_reason(error)}") from None
    with container:
        if not container.streams.video:
            raise BrokenError("has no pictures, only sound")
        try:
            yield container
        except av.FFmpegError as error:
            raise BrokenError(f"cannot be decoded: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _beginning(container: Any, first: float) -> float:
    """When a film's own time is 0, in seconds of its streams. first: when its first frame is shown.

    That is where the first of its streams begins, so frames may come after sound; what lies before
    0, as encoders of sound leave it, no player tells.
    """
    said = container.start_time  # microseconds
    return first if said is None else min(max(said / 1e6, 0.0), first)


def _guesses_times(container: Any) -> bool:
    """Whether libavformat guesses when packets are shown: AVI only says when they are decoded. For
    H.264 with B-frames the guesses are wrong."""
    return str(container.format.name) == "avi"


class _Reader:
    """Frames of a container by time, for times that rise."""

    def __init__(self, container: Any) -> None:
        self.container, self.stream = container, container.streams.video[0]
        self.base = float(self.stream.time_base)
        # Loader processes share the cores: threads would cost more than they bring.
        self.stream.codec_context.thread_count = 1
        self.guessed, self.most = _guesses_times(container), 0
        self.frames = self._decoded()
        self.next = self._next()
        if self.next is None:
            raise BrokenError("has no frame that can be decoded")
        self.shown, self.start = self.next, _beginning(container, self.next[0])
        self.first = self.shown[1]

    def at(self, time: float, cover: Size = None) -> NDArray[np.uint8]:
        """The frame that is shown at a time, in seconds of the film."""
        wanted = self.start + max(time, 0.0) + SLACK
        if wanted - self.shown[0] > GAP:
            self._seek(wanted)
        while self.next is not None and self.next[0] <= wanted:
            self.shown, self.next = self.next, self._next()
        return self._pixels(self.shown[1], cover)

    def _pixels(self, frame: Any, cover: Size) -> NDArray[np.uint8]:
        """As large and turned as the first frame: films of calls change their size as they go."""
        quarters = round(self.first.rotation / 90)  # counterclockwise, as the file says
        if cover is not None and quarters % 2:
            cover = cover[1], cover[0]
        height, width = covering((self.first.height, self.first.width), cover)
        scaled = {"height": height, "width": width, "interpolation": "BICUBIC"}
        how = {} if (height, width) == (frame.height, frame.width) else scaled
        pixels = frame.reformat(format="rgb24", threads=1, **how).to_ndarray()
        return np.ascontiguousarray(np.rot90(pixels, quarters))

    def _seek(self, wanted: float) -> None:
        """To the last key frame before; where that fails, what lies between is decoded."""
        before = self.shown
        self.container.seek(int(wanted / self.base), stream=self.stream, backward=True)
        self.frames = self._decoded()
        found = self._next()
        if found is None or found[0] > wanted:  # an index that is wrong
            self.container.seek(int(self.start / self.base), stream=self.stream, backward=True)
            self.frames = self._decoded()
            found = self._next()
        self.shown, self.next = (before if found is None else found), found

    def _decoded(self) -> Iterator[tuple[int | None, Any]]:
        """(when, frame) from where the container is."""
        waiting: deque[int] = deque()
        for packet in self.container.demux(self.stream):
            if packet.dts is not None:
                waiting.append(packet.dts)
            for frame in packet.decode():
                yield (self._turn(waiting) if self.guessed else frame.pts), frame

    def _turn(self, waiting: deque[int]) -> int | None:
        """The time of the next frame, by the times of packets that the decoder has not answered:
        frames come in the order in which they are shown."""
        self.most = self.most or len(waiting)
        while len(waiting) > self.most:  # packets without a frame
            waiting.popleft()
        return waiting.popleft() if waiting else None

    def _next(self) -> tuple[float, Any] | None:
        """(when, frame); None at the end, or where the file is broken after a frame."""
        import av

        while True:
            try:
                when, frame = next(self.frames)
            except StopIteration:
                return None
            except av.InvalidDataError:
                if hasattr(self, "shown"):
                    return None
                raise
            if when is not None:
                return when * self.base, frame
