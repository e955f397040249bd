"""Films: the frames that are seen at given times, however they are kept, and what is wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dr2dist.data.decoders import decode
from dr2dist.data.fields import Fields
from dr2dist.data.film import Film
from dr2dist.data.index import read_index
from dr2dist.data.stream import ShardDataset
from tests.commands import call
from tests.films import film, numbers, sound

KINDS = [("libx264", "mp4"), ("mpeg4", "avi"), ("libvpx-vp9", "webm"), ("libx264", "matroska")]


@pytest.mark.parametrize(("codec", "kind"), KINDS)
def test_frames_are_those_that_are_seen_at_the_times(codec: str, kind: str) -> None:
    found = Film(film(codec=codec, kind=kind))
    assert found.size == (48, 64) and found.seconds == pytest.approx(4.0, abs=0.02)
    assert np.allclose(found.times, np.arange(40) / 10, atol=2e-3)
    wanted = [3.9, 0, 0.15, 2.0, 0.3, 100, -1, 0.1999]
    assert numbers(found.read(wanted)) == [39, 0, 1, 20, 3, 39, 0, 1]
    times = np.random.default_rng(0).uniform(0, 4, 30)
    assert numbers(found.read(times.tolist())) == [int(10 * time) for time in times]
    assert np.array_equal(found.read([3.0, 3.1]), found.read(np.arange(0, 4, 0.1).tolist())[30:32])


def test_variable_rates_are_read_by_time() -> None:
    times = np.cumsum([0.0] + [0.1, 0.3] * 10)
    found = Film(film(21, times=times.tolist()))
    assert np.allclose(found.times, times, atol=2e-3)
    assert numbers(found.read([0.05, 0.1, 0.39, 0.4, 3.99, 4.0])) == [0, 1, 1, 2, 19, 20]


def test_one_frame_is_a_film() -> None:
    found = Film(film(1))
    assert len(found.times) == 1 and numbers(found.read([0.0, 3.0])) == [0, 0]


def rotated(data: bytes) -> bytes:
    """The file, whose track is now turned by a quarter, clockwise when it is shown."""
    place = data.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + len(matrix) :]


def test_frames_are_turned_as_the_file_says() -> None:
    """What was bright above is bright at the right."""
    plain, turned = Film(film(3)), Film(rotated(film(3)))
    assert turned.size == (64, 48)
    assert np.array_equal(turned.read([0.1])[0], np.rot90(plain.read([0.1])[0], -1))


def broken(data: bytes) -> bytes:
    """Without its second half, the index being at the beginning or not needed."""
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is no film"),
        (b"nothing of the kind" * 50, "is no film"),
        (sound(), "has no pictures, only sound"),
        (broken(film()), "is no film"),  # an mp4's index lies at its end
    ],
    ids=["empty", "text", "sound", "cut"],
)
def test_what_is_no_film_is_said_in_a_line(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"\.mp4: {reason}") as caught:
        decode("mp4", data)
    assert "\n" not in str(caught.value)


def test_a_film_that_breaks_off_ends_there() -> None:
    found = Film(broken(film(codec="libvpx-vp9", kind="webm")))
    last = numbers(found.read([100.0]))[0]
    assert 5 < last < 39 and numbers(found.read([0.0, 0.3])) == [0, 3]
    data = film(kind="matroska")
    with pytest.raises(ValueError, match="has no frame that can be decoded"):
        Film(data[: len(data) // 5])


def test_shards_of_films_with_classes(
    tmp_path: Path, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name, count in (("turn", 3), ("pan", 2)):
        (tmp_path / "films" / name).mkdir(parents=True)
        for number in range(count):
            path = tmp_path / "films" / name / f"{number}.MP4"
            path.write_bytes(film(4 + number))
    (tmp_path / "films" / "pan" / "broken.mp4").write_bytes(b"x" * 100)
    (tmp_path / "films" / "notes").mkdir()
    make = ("shards", "make", "--source", str(tmp_path / "films"), "--from", "videofolder")
    status, _, err = call(capfd, *make, "--output", str(tmp_path / "no"))
    assert status == 2 and "broken.mp4: cannot be read: .mp4: is no film" in err.splitlines()[-1]
    output = tmp_path / "shards"
    status, out, err = call(capfd, *make, "--output", str(output), "--skip-unreadable")
    assert status == 0 and "5 samples of 2 classes, 1 left out" in out, err
    assert "folders without films, which are no classes: 1" in caplog.text
    index = read_index(output)
    assert index.classes == ("pan", "turn") and index.class_counts() == [2, 3]
    fields = Fields({"video": "mp4", "label": "cls"})
    found = ShardDataset(index, fields, lambda values: values)
    lengths = sorted((int(v["label"]), len(v["video"].times)) for v in _values(found))
    assert lengths == [(0, 4), (0, 5), (1, 4), (1, 5), (1, 6)]


def _values(dataset: ShardDataset) -> list[Any]:
    return [dataset[0, number].values for number in range(len(dataset))]
