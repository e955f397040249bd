"""Images of files as Pillow decodes them, in their own size and over their whole range; and as they
are seen: of 8 bits, turned as their files say."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dr2dist.errors import one_line

_FORMATS = {
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
}
"""What Pillow decodes by itself: no film, no vector graphics, nothing that starts a program."""


def _image_types() -> tuple[str, ...]:
    Image.init()
    known = Image.registered_extensions().items()
    found = {ending[1:] for ending, kind in known if kind in _FORMATS and kind in Image.OPEN}
    return tuple(sorted({*found, "mpo"}))  # which Pillow opens as JPEG


IMAGE_TYPES = _image_types()
"""Extensions of images."""


def is_image(name: str) -> bool:
    """Whether a file is one by its name."""
    return Path(name).suffix.lower().lstrip(".") in IMAGE_TYPES


def open_image(source: Path | BinaryIO) -> Image.Image:
    """A whole image in its own size, decoded: 8 bits, or one channel of 16 bits over their whole
    range (mode I;16) or of floats from 0 to 1 (mode F). Raises ValueError if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of tags that nothing here needs
            with Image.open(source) as image:
                image.load()
                return _over_range(image)
    except UnidentifiedImageError:  # whose text has an address in memory
        raise ValueError("is no image of a type that Pillow knows") from None
    except Exception as error:  # Pillow's readers raise anything on damaged files
        raise ValueError(one_line(str(error) or type(error).__name__)) from None


_CHANNELS, _BITS, _SIGN, _PHOTOMETRIC = 277, 258, 339, 262
"""Tags of TIFF files."""


def _over_range(image: Any) -> Image.Image:
    """An image of more than 8 bits over its type's range, or its file's where that says one."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_CHANNELS, 1) > 4:
        raise ValueError(
            f"has {tags[_CHANNELS]} channels, allowed are up to 4; more as .npy arrays [H, W, C]"
        )
    if image.mode == "F":
        return _of_floats(image)
    if not image.mode.startswith("I"):
        return image
    bits = tags.get(_BITS, (16,))[0]
    if bits > 16:
        raise ValueError(
            f"has whole numbers of {bits} bits, which have no range of their own; allowed are 8 "
            "and 16 bits, and floats from 0 to 1"
        )
    values = np.asarray(image).astype(np.int64)
    if tags.get(_SIGN, (1,))[0] == 2:
        values += 2 ** (bits - 1)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        values = 2**bits - 1 - values
    scaled = (values * 65535 + (2**bits - 1) // 2) // (2**bits - 1)
    return _like(image, Image.fromarray(scaled.clip(0, 65535).astype(np.uint16)))


def _of_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"has floats from {low:g} to {high:g}, allowed are those from 0 to 1")
    return image


def _like(image: Image.Image, changed: Image.Image) -> Image.Image:
    """The changed image with what the file says of its orientation."""
    said = ("exif", "xmp", "XML:com.adobe.xmp")
    changed.info.update({name: image.info[name] for name in said if name in image.info})
    return changed


_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def of_8_bits(image: Image.Image, channels: int = 3) -> Image.Image:
    """Any image, as `open_image` gives it, as 8-bit with 1, 3 or 4 channels; deeper ones are scaled
    from their range. Raises ValueError for another number of channels."""
    if channels not in _MODES:
        raise ValueError(
            f"the model takes {channels} channels: images are to be .npy arrays [H, W, {channels}]"
        )
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits, or floats up to 1, to 8 bits.
        values = np.asarray(image, dtype=np.float64) * (255 if image.mode == "F" else 1 / 257)
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    return image.convert(_MODES[channels])


def upright(image: Any) -> Any:
    """An image turned and mirrored as its file says (EXIF orientation); arrays stay as they are."""
    if not isinstance(image, Image.Image):
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of whatever damaged metadata make Pillow raise: they say nothing then
        return image
