"""Members of samples to values, by their extensions: a closed list, and nothing is unpickled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from dr2dist.data.film import FILM_TYPES, Film
from dr2dist.data.frames import Frames
from dr2dist.data.images import IMAGE_TYPES, open_image

LARGEST = 2**30
"""Bytes of a member that are read at most."""


def _image(data: bytes) -> Image.Image:
    return open_image(io.BytesIO(data))


def _text(data: bytes) -> str:
    return data.decode("utf-8").strip()


def _number(data: bytes) -> int:
    return int(_text(data))


def _array(data: bytes) -> Any:
    if not data.startswith(b"\x93NUMPY"):  # np.load would take archives and pickles too
        raise ValueError("is no array of numpy")
    return np.load(io.BytesIO(data), allow_pickle=False)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(IMAGE_TYPES, _image),
    **dict.fromkeys(FILM_TYPES, Film),
    "zip": Frames,
    "cls": _number,
    "json": json.loads,
    "npy": _array,
    "txt": _text,
}
"""By the last part of an extension: PIL images, films, archives of a film's frames, a whole number,
JSON, numpy arrays, text."""


def decode(extension: str, data: bytes) -> Any:
    """A member's value, see DECODERS.

    extension: its last part counts, in any case: `npy` of `left.npy`. Raises ValueError for an
    extension that is not known, more than LARGEST bytes, or bad contents.
    """
    kind = extension.rpartition(".")[2].lower()
    if kind not in DECODERS:
        raise ValueError(f".{extension}: allowed types are {', '.join(DECODERS)}")
    if len(data) > LARGEST:
        raise ValueError(f".{extension} has {len(data)} bytes, allowed are {LARGEST}")
    try:
        return DECODERS[kind](data)
    except ValueError as error:
        raise ValueError(f".{extension}: {error}") from None
    except (OSError, EOFError, MemoryError, RecursionError) as error:
        raise ValueError(f".{extension}: {error or type(error).__name__}") from None
