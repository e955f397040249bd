"""Writes a safetensors file tensor by tensor, so that one at a time is copied to host memory.

The library's own writer needs all of them there at once: as much again as the training state.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls types."""


class Source(NamedTuple):
    """A tensor on any device, perhaps a view, and the type that it is written in."""

    values: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.values.numel() * self.dtype.itemsize

    def read(self) -> memoryview:
        """Its bytes in host memory."""
        values = self.values.detach().to("cpu", self.dtype).contiguous()
        array: Any = values.reshape(-1).view(torch.uint8).numpy()
        return memoryview(array)


def write_tensors(
    path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str] | None = None
) -> str:
    """Writes them to disk; the file's SHA-256. Raises OSError."""
    # The largest types first, so that every tensor is aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    digest = hashlib.sha256()
    parts: Iterator[Any] = map(Source.read, ordered.values())
    with path.open("wb") as file:
        for part in itertools.chain([_header(ordered, metadata)], parts):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Source], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, source in tensors.items():
        start, end = end, end + source.nbytes
        shape, kind = list(source.values.shape), _NAMES[source.dtype]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
