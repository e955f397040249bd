"""Films that lie as one image a frame: a zip archive of them in a shard, read like any film."""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Resampling

from dr2dist.data.broken import BrokenError
from dr2dist.data.film import SLACK, Footage, Size, covering
from dr2dist.data.images import is_image, of_8_bits, open_image, upright
from dr2dist.data.records import Readable
from dr2dist.errors import UserError, one_line

BICUBIC = Resampling.BICUBIC
RATE = 25.0
"""Frames a second of a folder of frames of which nothing is said."""
FASTEST = 1e4
"""Frames a second that are no mistake."""
LARGEST_FRAME = 2**28
"""Bytes of a frame that are read at most: archives can promise any number."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names of frames in the order of their numbers, padded or not: frame2 before frame10."""
    return sorted(names, key=lambda name: ([_number(each) for each in _PARTS.split(name)], name))


_PARTS = re.compile(r"(\d+)")  # every other part is a number


def _number(part: str) -> int | str:
    return int(part) if part.isdecimal() else part


class Frames(Footage):
    """A film of images, in the order of their names' numbers, as even over time as its archive
    says.

    data: a zip archive, whose comment may be JSON with `rate`, frames a second. Raises BrokenError
    for one without images, or whose first image cannot be decoded.
    """

    def __init__(self, data: bytes) -> None:
        with _opened(data) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            self.names = in_order(name for name in names if is_image(name))
            self.rate = _rate_of(archive.comment)
        if not self.names:
            raise BrokenError("has no images")
        super().__init__(data)

    @cached_property
    def times(self) -> NDArray[np.float64]:
        """See Footage."""
        return np.arange(len(self.names)) / self.rate

    @property
    def seconds(self) -> float:
        """See Footage."""
        return len(self.names) / self.rate

    def read(self, times: Sequence[float], cover: Size = None) -> NDArray[np.uint8]:
        """See Footage. All are as large as the first."""
        places = np.floor((np.asarray(times, np.float64) + SLACK) * self.rate).astype(int)
        wanted = places.clip(0, len(self.names) - 1).tolist()
        with _opened(self.data) as archive:
            found = {place: self._frame(archive, self.names[place], cover) for place in set(wanted)}
        return np.stack([found[place] for place in wanted])

    def _frame(self, archive: zipfile.ZipFile, name: str, cover: Size) -> NDArray[np.uint8]:
        with archive.open(name) as file:
            data = file.read(LARGEST_FRAME + 1)
        if len(data) > LARGEST_FRAME:
            raise BrokenError(f"{name} has more than {LARGEST_FRAME} bytes")
        try:
            image = of_8_bits(upright(open_image(io.BytesIO(data))))
        except ValueError as error:
            raise BrokenError(f"{name}: {error}") from None
        # What is read first is the first frame itself.
        own = self.size if hasattr(self, "_first") else (image.height, image.width)
        height, width = covering(own, cover)
        resized = image.size != (width, height)
        return np.asarray(image.resize((width, height), BICUBIC) if resized else image)


@contextmanager
def _opened(data: bytes) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise BrokenError(f"is no readable archive: {one_line(error)}") from None


def _rate_of(comment: bytes) -> float:
    if not comment:
        return RATE
    try:
        rate = float(json.loads(comment)["rate"])
    except (ValueError, KeyError, TypeError):
        return RATE  # another program's comment
    if not 0 < rate < FASTEST:
        raise BrokenError(f"says {rate:g} frames a second")
    return rate


def at_rate(files: Sequence[Readable], rate: float) -> list[Readable]:
    """The files, of which folders of frames are `rate` frames a second.

    Raises UserError for another number than one of more than 0 and below 10,000, or where no file
    is a folder of frames: the rate would say nothing.
    """
    if not 0 < rate < FASTEST:
        raise UserError(f"frame-rate is {rate:g}, allowed is more than 0, below {FASTEST:.0f}")
    if not any(isinstance(file, FrameFolder) for file in files):
        raise UserError("frame-rate is given, and no film is a folder of frames")
    return [replace(file, rate=rate) if isinstance(file, FrameFolder) else file for file in files]


@dataclass(frozen=True)
class FrameFolder:
    """A folder of frames, as the file of a sample (a `Readable`): an archive of its images.

    files: the images. rate: frames a second.
    """

    path: Path
    files: tuple[Path, ...]
    rate: float = RATE

    def read_bytes(self) -> bytes:
        """The archive; the same images give the same bytes. Raises OSError."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            images = {image.name: image for image in self.files}
            for name in in_order(images):
                archive.writestr(zipfile.ZipInfo(name), images[name].read_bytes())
            archive.comment = json.dumps({"rate": self.rate}).encode()
        return file.getvalue()

    def stat(self) -> os.stat_result:
        """Of the folder. Raises OSError."""
        return self.path.stat()

    def __fspath__(self) -> str:
        return os.fspath(self.path)
