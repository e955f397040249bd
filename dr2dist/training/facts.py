"""What has to be the same on all ranks of a run: of its program, its configuration, its data."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from dr2dist.config import Config
from dr2dist.config.text import flat
from dr2dist.launching.survey import installed
from dr2dist.training.lock import LOCK
from dr2dist.training.plan import Plan
from dr2dist.version import __version__

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "pillow", "webdataset")
CHANGING = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Variables that change the bits of a product."""
SEEN = 30.0
"""Seconds until what rank 0 has written must be seen on other hosts: file systems remember for a
while what was not there."""


def facts_of_program(allow: Collection[str]) -> dict[str, str]:
    """Versions, source, threads, device and environment. allow: kinds that are left out."""
    kinds = {
        "versions": _versions,
        "source": lambda: {"dr2dist's source": source_digest()},
        "threads": lambda: {"threads (OMP_NUM_THREADS)": str(torch.get_num_threads())},
        "device": lambda: {"device": _device()},
        "environment": lambda: {name: os.environ.get(name, "unset") for name in CHANGING},
    }
    parts = [read() for kind, read in kinds.items() if kind not in allow]
    return {name: value for part in parts for name, value in part.items()}


def facts_of_config(config: Config) -> dict[str, str]:
    """Every setting by its whole name."""
    return {name: str(value) for name, value in flat(config.effective()).items()}


def facts_of_data(plan: Plan) -> dict[str, str]:
    """The indexes, whole: a node's own copy may be another one."""
    indexes = {"data.train": plan.train, "data.val": plan.val}
    return {
        f"{name}'s index": index.fingerprint()[:16]
        for name, index in indexes.items()
        if index is not None
    }


def facts_of_output(folder: Path, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """The lock of this start, which tells one folder from another of the same name. wanted: what
    rank 0 has found, which is waited for, for SEEN seconds."""
    end = time.monotonic() + SEEN
    while True:
        found = {f"output ({folder}, which all nodes must share)": _read(folder / LOCK)}
        if wanted is None or found == wanted or time.monotonic() > end:
            return found
        time.sleep(0.5)


def _read(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        return str(error.strerror)


def _versions() -> dict[str, str]:
    found = {"dr2dist": __version__, "python": platform.python_version()}
    found.update({name: installed(name) for name in PACKAGES})
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def source_digest() -> str:
    """Of dr2dist's own files: a version number says little of a checkout."""
    found = hashlib.sha256()
    for path in _sources():
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    folder = Path(__file__).parents[1]
    yield from sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix())
