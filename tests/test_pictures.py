"""Pictures of any type, depth and orientation are seen as they are meant, or refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dr2dist.data.decoders import decode
from dr2dist.data.images import IMAGE_TYPES, upright
from dr2dist.tasks.transforms import to_channels


def test_every_type_that_is_taken_can_be_read(tmp_path: Path) -> None:
    assert {"jpg", "jfif", "jpe", "avif", "jp2", "webp", "png", "tif", "mpo"} <= set(IMAGE_TYPES)
    written = 0
    for ending in IMAGE_TYPES:
        kind = Image.registered_extensions().get(f".{ending}")
        if kind not in Image.SAVE or ending == "pfm":
            continue
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (100, 90, 80)).save(data, kind)
        assert decode(ending, data.getvalue()).size == (8, 8), ending
        written += 1
    assert written > 15


RAMP = np.tile(np.linspace(0, 1, 64), (16, 1))


def saved(array: Any, kind: str, **options: Any) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind, **options)
    return data.getvalue()


def tiff16(values: Any, tags: dict[int, int]) -> bytes:
    """A TIFF of 16 bits with other tags than Pillow writes: 262 photometric, 339 sample format."""
    data = bytearray(saved(values.astype(np.uint16), "TIFF"))
    count = int.from_bytes(data[(start := int.from_bytes(data[4:8], "little")) :][:2], "little")
    known = {}
    for number in range(count):
        place = start + 2 + 12 * number
        known[int.from_bytes(data[place : place + 2], "little")] = place
    for tag, value in tags.items():
        data[known[tag] + 8 : known[tag] + 10] = value.to_bytes(2, "little")
    return bytes(data)


DEEP: dict[str, Callable[[], bytes]] = {
    "floats from 0 to 1": lambda: saved(RAMP.astype(np.float32), "TIFF"),
    "16-bit PNG": lambda: saved((RAMP * 65535).round().astype(np.uint16), "PNG"),
    "16-bit TIFF": lambda: saved((RAMP * 65535).round().astype(np.uint16), "TIFF"),
    "white is zero": lambda: tiff16(((1 - RAMP) * 65535).round(), {262: 0}),
    "8 bits": lambda: saved((RAMP * 255).round().astype(np.uint8), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_pictures_of_more_than_8_bits_are_their_own_greys(name: str) -> None:
    ending = "png" if "PNG" in name else "tif"
    found = np.asarray(to_channels(decode(ending, DEEP[name]()))).astype(float)
    assert np.abs(found - 255 * RAMP[..., None]).max() <= 1.01


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RAMP.astype(np.float32) * 255, "has floats from 0 to 255, allowed are those from 0 to 1"),
        (RAMP.astype(np.float32) * np.nan, "has floats from nan to nan"),
        ((RAMP * 255).astype(np.int32), "has whole numbers of 32 bits, which have no range"),
    ],
)
def test_pictures_without_a_range_are_refused(array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode("tif", saved(array, "TIFF"))


def turned(path: Path, orientation: int) -> Path:
    """A picture stored as a camera stores it that was held in another way."""
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:24] = (220, 40, 40)
    pixels[24:, :16] = (30, 200, 60)
    ways = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    way, exif = ways[orientation], Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if way is None else image.transpose(way)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_picture_is_the_upright_one(tmp_path: Path, ending: str, orientation: int) -> None:
    one = turned(tmp_path / f"upright.{ending}", 1)
    other = turned(tmp_path / f"turned.{ending}", orientation)
    seen = [np.asarray(upright(decode(ending, file.read_bytes()))) for file in (one, other)]
    limit = 40 if ending == "webp" else 0
    assert np.abs(seen[0].astype(int) - seen[1].astype(int)).max() <= limit


def test_damaged_metadata_turn_nothing() -> None:
    image = Image.new("RGB", (8, 4))
    image.info["exif"] = b"Exif\x00\x00II*\x00\xff\xff\xff\xff"
    assert upright(image).size == (8, 4)
    assert upright(np.zeros((4, 8, 3))).shape == (4, 8, 3)
