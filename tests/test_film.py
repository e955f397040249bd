"""Films: the frames that are seen at given times, however they are kept, and what is wrong."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dr2dist.data.broken import BrokenError
from dr2dist.data.decoders import decode
from dr2dist.data.fields import Fields
from dr2dist.data.film import Film
from dr2dist.data.index import read_index
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import video_folder
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.tasks.sampling import Sampling
from tests.commands import call
from tests.films import DARKEST, STEP, film, joined, numbers, sound, with_sound

KINDS = [
    *(("libx264", kind) for kind in ("mp4", "matroska", "avi")),  # with B-frames
    ("mpeg4", "avi"),
    ("libvpx-vp9", "webm"),
]


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


def test_a_film_cut_without_decoding_begins_at_the_cut() -> None:
    """Frames from the key frame before are there, for what follows, and are not shown."""
    found = Film(joined(film(40), start=1.2))
    assert found.seconds == pytest.approx(2.8) and len(found.times) == 28
    assert numbers(found.read(found.times.tolist())) == list(range(12, 40))


def test_a_last_frame_is_shown_as_long_as_the_file_says() -> None:
    assert Film(joined(film(10, codec="mpeg4"), last=5.0)).seconds == pytest.approx(5.9)


def test_frames_of_other_sizes_are_as_large_as_the_first() -> None:
    parts = [film(5, codec="libvpx-vp9", kind="webm", size=size) for size in ((48, 64), (96, 80))]
    found = Film(joined(*parts, kind="webm")).read([0.2, 0.7])
    assert found.shape == (2, 48, 64, 3) and numbers(found) == [2, 2]


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


def _archive(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def _picture(side: int) -> bytes:
    return _saved(Image.new("RGB", (side, side)))


def _saved(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "png", **options})
    return file.getvalue()


def test_frames_are_seen_as_single_images_are() -> None:
    ramp = np.tile(np.linspace(0, 1, 64), (16, 1))
    deep = Image.fromarray((65535 * ramp).astype(np.uint16))
    floats = Image.fromarray(ramp.astype(np.float32))
    for name, data in (("a.png", _saved(deep)), ("a.tif", _saved(floats, format="tiff"))):
        (found,) = decode("zip", _archive({name: data})).read([0.0])
        assert np.abs(found - 255 * ramp[..., None]).max() <= 1
    exif = Image.Exif()
    exif[274] = 6  # held by its side
    turned = _saved(Image.new("RGB", (64, 48)), exif=exif)
    assert decode("zip", _archive({"a.png": turned})).size == (64, 48)


def test_frames_go_by_their_numbers() -> None:
    for name in ("{}.png", "shot 1/frame{}.png", "frame-{:03d}.png"):
        grey = {
            name.format(k): _saved(Image.new("L", (8, 8), DARKEST + STEP * k)) for k in range(12)
        }
        frames = decode("zip", _archive(grey))
        assert numbers(frames.read(frames.times.tolist())) == list(range(12))


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


def _folder_of_frames(folder: Path, count: int) -> None:
    """Images whose brightness says their number, as in tests.films."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.full((16, 24, 3), DARKEST + STEP * number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_folders_of_frames_are_films(tmp_path: Path, capfd: Any, caplog: Any) -> None:
    source = tmp_path / "films"
    _folder_of_frames(source / "pan" / "one", 12)
    _folder_of_frames(source / "turn" / "far" / "two", 5)
    (source / "turn" / "three.mp4").write_bytes(film(7))
    Image.new("RGB", (9, 9)).save(source / "turn" / "loose.png")
    make = ("shards", "make", "--from", "videofolder", "--source", str(source))
    output = tmp_path / "shards"
    status, out, err = call(capfd, *make, "--output", str(output), "--frame-rate", "5")
    assert status == 0 and "3 samples of 2 classes" in out, err
    assert "a film's frames lie in a folder of their own in it: 1" in caplog.text
    fields = Fields({"video": "mp4;zip", "label": "cls"})
    found = _values(ShardDataset(read_index(output), fields, lambda values: values))
    said = sorted((int(v["label"]), len(v["video"].times), v["video"].seconds) for v in found)
    assert [(label, count) for label, count, _ in said] == [(0, 12), (1, 5), (1, 7)]
    assert [seconds for *_, seconds in said] == pytest.approx([2.4, 1.0, 0.7])
    (frames,) = [v["video"] for v in found if len(v["video"].times) == 12]
    assert numbers(frames.read([0.0, 1.0, 0.39, 99.0])) == [0, 5, 1, 11] and frames.size == (16, 24)
    status, _, err = call(capfd, *make, "--output", str(output / "no"), "--frame-rate", "-1")
    assert status == 2 and "frame-rate is -1, allowed is more than 0" in err


def test_a_frame_rate_without_frames_is_refused(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "films" / "pan").mkdir(parents=True)
    (tmp_path / "films" / "pan" / "a.mp4").write_bytes(film(4))
    make = ("shards", "make", "--from", "videofolder", "--source", str(tmp_path / "films"))
    status, _, err = call(capfd, *make, "--output", str(tmp_path / "no"), "--frame-rate", "5")
    assert status == 2 and "no film is a folder of frames" in err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK nothing", "is no readable archive"),
        (_archive({}), "has no images"),
        (_archive({"a.png": b"none"}), "a.png: is no image"),
        (_archive({"a.txt": b"none"}), "has no images"),
    ],
    ids=["no zip", "empty", "no image", "no frame"],
)
def test_what_is_no_archive_of_frames_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode("zip", data).read([0.0, 1.0])


def test_frames_are_as_large_as_the_first() -> None:
    frames = decode("zip", _archive({"a.png": _picture(8), "b.png": _picture(9)}))
    assert frames.read([0.0, 1.0, 0.0]).shape[:2] == (3, *frames.size)[:2]
    assert {len(frames.read([moment])[0]) for moment in (0.0, 1.0)} == {frames.size[0]}


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_seconds_are_those_that_players_tell(kind: str) -> None:
    """Sound may come first: what people say of a film counts from there."""
    late = Film(with_sound(film(40), 1.0, kind))
    assert late.times[[0, -1]] == pytest.approx([1.0, 4.9], abs=0.03)
    assert late.seconds == pytest.approx(5.0, abs=0.03)
    assert numbers(late.read([0.0, 0.5, 2.05, 4.95])) == [0, 0, 10, 39]
    assert late.read([3.05]).tolist() == late.read([0.0, 3.05])[1:].tolist()  # sought or not
    # A clip of the whole is where there are pictures.
    assert Sampling(4).spread(late)[0].min() >= 1.0


def test_columns_that_are_nearly_start_and_stop_are_named(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "a.mp4").write_bytes(film(4))
    table = tmp_path / "spans.csv"
    table.write_text("path,label,Start,Stop\na.mp4,x,0,1")
    make = ("shards", "make", "--from", "csv", "--source", str(table))
    status, _, err = call(capfd, *make, "--output", str(tmp_path / "out"))
    assert status == 2 and "has the column 'Start'; allowed is 'start'" in err
    table.write_text("path,label,start,stop")
    status, _, err = call(capfd, *make, "--output", str(tmp_path / "out"))
    assert status == 2 and f"{table}: has a header and no rows" in err


def test_samples_with_and_without_a_span_are_indexed_alike(tmp_path: Path, capfd: Any) -> None:
    for name in ("a.mp4", "b.mkv"):
        (tmp_path / name).write_bytes(film(8, kind="matroska" if name == "b.mkv" else "mp4"))
    _folder_of_frames(tmp_path / "c", 8)
    table, output = tmp_path / "spans.csv", tmp_path / "out"
    rows = ("a.mp4,x,0,0.5,train", "a.mp4,y,0.5,0.8,val", "b.mkv,y,,,train", "c,x,,,train")
    table.write_text("\n".join(("path,label,start,stop,part", *rows)))
    make = ("shards", "make", "--from", "csv", "--source", str(table), "--output", str(output))
    status, out, err = call(capfd, *make, "--split-by", "part")
    assert status == 0 and "train: 3 samples: y 1, x 2" in out, err
    again = ("shards", "index", str(output / "train"), "--output", str(tmp_path / "again.json"))
    status, out, err = call(capfd, *again)
    assert status == 0 and "3 samples" in out and "left out" not in err, err


def test_a_film_that_is_there_twice_is_in_one_part(tmp_path: Path) -> None:
    """By links; it may be of two classes."""
    for name in ("pan", "turn"):
        (tmp_path / "films" / name).mkdir(parents=True)
    for number in range(6):
        (tmp_path / "films" / "pan" / f"{number}.mp4").write_bytes(film(4 + number))
        other = tmp_path / "films" / "turn" / f"again {number}.mp4"
        other.symlink_to(tmp_path / "films" / "pan" / f"{number}.mp4")
    records, classes = video_folder(tmp_path / "films")
    for seed in range(3):
        output = tmp_path / str(seed)
        make_shards(records, classes, output, val_fraction=0.3, seed=seed, progress=False)
        fields = Fields({"video": "mp4"})
        lengths = [
            {
                len(v["video"].times)
                for v in _values(ShardDataset(read_index(output / part), fields, lambda v: v))
            }
            for part in ("train", "val")
        ]
        assert lengths[0] and lengths[1] and not lengths[0] & lengths[1]


def test_what_is_left_out_is_not_counted(tmp_path: Path, capfd: Any) -> None:
    for number in range(8):
        place = tmp_path / "films" / ("pan", "turn")[number % 2] / f"{number}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"none" if number in (1, 3) else film(4))
    make = ("shards", "make", "--from", "videofolder", "--source", str(tmp_path / "films"))
    more = ("--val-fraction", "0.25", "--skip-unreadable", "--output", str(tmp_path / "out"))
    status, out, err = call(capfd, *make, *more)
    assert status == 0 and "6 samples of 2 classes, 2 left out" in out, err
    lines = [line for line in out.splitlines() if line.startswith(("train: ", "val: "))]
    found = [line.split(": ", 1)[1].partition(" ")[0] for line in lines]
    for part, count in zip(("train", "val"), found, strict=True):
        assert int(count) == read_index(tmp_path / "out" / part).num_samples
    assert sum(map(int, found)) == 6


def test_spans_of_a_table_are_samples(tmp_path: Path, capfd: Any, caplog: Any) -> None:
    (tmp_path / "a.mp4").write_bytes(film(30))
    _folder_of_frames(tmp_path / "b", 10)
    table = tmp_path / "spans.csv"
    rows = ("a.mp4,pan,0,1", "a.mp4,turn,1.5,2.5", "b,pan,,")
    table.write_text("\n".join(("path,label,start,stop", *rows)))
    make = ("shards", "make", "--from", "csv", "--source", str(table))
    status, out, err = call(capfd, *make, "--output", str(tmp_path / "out"))
    assert status == 0 and "3 samples of 2 classes" in out, err
    assert "3 spans are of 2 films" in caplog.text
    fields = Fields({"video": "mp4;zip", "span": "json#span?", "label": "cls"})
    found = _values(ShardDataset(read_index(tmp_path / "out"), fields, lambda values: values))
    said = sorted((len(v["video"].times), v.get("span"), v["label"]) for v in found)
    assert said == [(10, None, 0), (30, [0.0, 1.0], 0), (30, [1.5, 2.5], 1)]


def test_a_span_after_its_films_end_is_unreadable(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "a.mp4").write_bytes(film(30))
    table = tmp_path / "spans.csv"
    table.write_text("path,label,start,stop\na.mp4,pan,0,9\na.mp4,turn,1,2\na.mp4,turn,3.5,4")
    make = ("shards", "make", "--from", "csv", "--source", str(table))
    status, _, err = call(capfd, *make, "--output", str(tmp_path / "no"))
    assert status == 2 and "a.mp4: cannot be read: span is [3.5, 4.0], the film ends at 3.0" in err
    output = ("--output", str(tmp_path / "out"), "--skip-unreadable")
    status, out, err = call(capfd, *make, *output)
    assert status == 0 and "2 samples of 2 classes, 1 left out" in out, err


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("path,label,start", "a.mp4,x,1"), "has the column 'start' and no column 'stop'"),
        (("path,label,start,stop", "a.mp4,x,2,1"), "row 2: start is '2' and stop '1'; allowed is"),
        (("path,label,start,stop", "a.mp4,x,0,1", "a.mp4,x,,1"), "row 3: start is '' and stop '1'"),
        (("path,label,start,stop", "c.png,x,0,1"), "row 2: start and stop are of films"),
        (("path,label,start,stop", "empty,x,0,1"), "row 2: path: 'empty' is no file"),
    ],
    ids=["one", "order", "half", "image", "empty"],
)
def test_spans_that_are_none_are_said(
    tmp_path: Path, capfd: Any, lines: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "a.mp4").write_bytes(film(4))
    (tmp_path / "c.png").write_bytes(_picture(8))
    (tmp_path / "empty").mkdir()
    table = tmp_path / "spans.csv"
    table.write_text("\n".join(lines))
    make = ("shards", "make", "--from", "csv", "--source", str(table))
    status, _, err = call(capfd, *make, "--output", str(tmp_path / "out"))
    assert status == 2 and reason in err.splitlines()[-1]


def test_a_film_that_breaks_when_it_is_seen_counts_as_unreadable(tmp_path: Path) -> None:
    def broken(values: Any) -> Any:
        if len(values["video"].times) == 5:
            raise BrokenError("cannot be decoded")
        return values

    for number in range(4):
        (tmp_path / "pan").mkdir(exist_ok=True)
        (tmp_path / "pan" / f"{number}.mp4").write_bytes(film(4 + number))
    records, classes = video_folder(tmp_path)
    make_shards(records, classes, tmp_path / "out", progress=False)
    fields = Fields({"video": "mp4", "label": "cls"})
    index = read_index(tmp_path / "out")
    with pytest.raises(UserError, match=r"sample 'pan-1' cannot be read: cannot be decoded"):
        _values(ShardDataset(index, fields, broken))
    other = ShardDataset(index, fields, broken, unreadable="other")
    assert sum(other[0, number].skipped for number in range(4)) == 1
