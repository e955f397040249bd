"""Longer films of real footage in which a camera moves now and then: DEMO/actions/{train,val}.

    python -m benchmarks.actions_data --output demo/actions

As of moves_data, whose footage and moves they are: what is to be found is when the window moves,
and how. Between moves it rests, and nothing jumps: no frame alone says where a move begins. One
film in eight has none. Which footage is held out is fixed; short footage is shown forth and back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.moves_data import (
    FILMS,
    MOVES,
    RATE,
    SCALES,
    TURN,
    WindowPath,
    encoded,
    fetch,
    footage,
    seen,
)
from dr2dist.cli import main as dr2dist
from dr2dist.data.film import Film

FRAMES = 96
"""Of a film, at RATE a second."""
SHORTEST, LONGEST = 10, 22
"""Frames of a move."""
REST = 6
"""Frames between moves, at least."""
MOST = 3
"""Moves of a film."""
REACH = 0.2
"""How far a window pans at least, as a share of the footage's shorter side."""
CLASSES = tuple(move for move in MOVES if move != "still")


class State(NamedTuple):
    """Of a window that rests; see WindowPath."""

    scale: float
    angle: float
    x: float
    y: float


class Move(NamedTuple):
    """first, last: frames of it; after: the state that it leads to."""

    name: str
    first: int
    last: int
    after: State


def changed(state: State, name: str, room: tuple[float, float], random: Any) -> State | None:
    """The state after a move; None where there is no room for it. room: see moves_data."""
    low, high = (bound / 2 for bound in SCALES)
    if name.startswith("zoom"):
        scale = state.scale * (random.uniform(0.65, 0.75) ** (1 if name == "zoom_in" else -1))
        after = state._replace(scale=scale)
    elif name == "turn":
        way = -np.sign(state.angle) if state.angle else random.choice([-1.0, 1.0])
        after = state._replace(angle=state.angle + way * random.uniform(1.2, 1.6) * TURN)
    else:
        length = random.uniform(REACH, 2 * REACH) * (-1 if name in ("pan_left", "pan_up") else 1)
        sideways = name in ("pan_left", "pan_right")
        after = state._replace(
            x=state.x + (length if sideways else 0), y=state.y + (0 if sideways else length)
        )
    half = after.scale * (np.cos(after.angle) + abs(np.sin(after.angle)))
    fits = abs(after.x) <= room[1] - half and abs(after.y) <= room[0] - half
    return after if fits and low <= after.scale <= high and abs(after.angle) <= TURN else None


def drawn(
    room: tuple[float, float], random: np.random.Generator, counts: Counter[str]
) -> tuple[State, list[Move]]:
    """A first state that fits, and moves one after the other: of those that there is room for, one
    that was drawn least. counts: of moves so far, which are added."""
    low, high = (bound / 2 for bound in SCALES)
    scale, angle = random.uniform(low, high), random.uniform(-TURN, TURN)
    half = scale * (np.cos(angle) + abs(np.sin(angle)))
    x, y = (random.uniform(-1, 1) * max(side - half, 0.0) for side in (room[1], room[0]))
    first = state = State(scale, angle, x, y)
    moves: list[Move] = []
    at = int(random.integers(REST, FRAMES // 3))
    while len(moves) < MOST and at + SHORTEST + REST < FRAMES:
        frames = int(random.integers(SHORTEST, LONGEST + 1))
        found = {name: changed(state, name, room, random) for name in CLASSES}
        possible = [name for name, after in found.items() if after is not None]
        if not possible or at + frames + REST > FRAMES:
            break
        least = min(counts[name] for name in possible)
        name = str(random.choice([each for each in possible if counts[each] == least]))
        counts[name] += 1
        state = found[name] or state
        moves.append(Move(name, at, at + frames, state))
        at += frames + int(random.integers(REST, 3 * REST))
    return first, moves


def path_of(first: State, moves: list[Move]) -> WindowPath:
    """The window's states frame by frame."""
    frames, states = [0], [first]
    for move in moves:
        frames += [move.first, move.last]
        states += [states[-1], move.after]
    frames, states = [*frames, FRAMES - 1], [*states, states[-1]]
    at = np.arange(FRAMES)
    parts = [np.interp(at, frames, values) for values in zip(*states, strict=True)]
    return WindowPath(*parts)


def write(item: tuple[str, str], films: Path, folder: Path, count: int) -> dict[str, Any]:
    """Films of one footage, as FOLDER/NAME-NUMBER.mp4; returns their entries."""
    torch.set_num_threads(1)
    part, name = item
    every = FILMS["train"] + FILMS["val"]
    random = np.random.default_rng((1, every.index(name)))
    film = footage(Film((films / name).read_bytes()))
    while len(film) < FRAMES:
        film = torch.cat([film, film.flip(0)])
    height, width = film.shape[2:]
    room = (height / min(height, width) / 2, width / min(height, width) / 2)
    subset = {"train": "training", "val": "validation"}[part]
    entries, counts = {}, Counter[str]()
    for number in range(count):
        start = int(random.integers(0, len(film) - FRAMES + 1))
        first, moves = drawn(room, random, counts)
        if number % 8 == 7:
            moves = []
        key = f"{Path(name).stem}-{number:05d}"
        shown = seen(film[start : start + FRAMES], path_of(first, moves))
        (folder / f"{key}.mp4").write_bytes(encoded(shown))
        found = [
            {"label": move.name, "segment": [move.first / RATE, move.last / RATE]} for move in moves
        ]
        entries[key] = {"subset": subset, "annotations": found}
    return entries


def main() -> None:
    """Fetches, cuts, writes shards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo/actions"))
    parser.add_argument("--films", type=int, default=120, help="of each footage; held out: 1/3")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        films, made = Path(place) / "films", Path(place) / "made"
        films.mkdir()
        made.mkdir()
        fetch(films)
        database: dict[str, Any] = {}
        for part, count in (("train", given.films), ("val", given.films // 3)):
            items = [(part, name) for name in FILMS[part]]
            with ProcessPoolExecutor(2) as pool:
                work = partial(write, films=films, folder=made, count=count)
                for entries in tqdm(pool.map(work, items), total=len(items), unit="film"):
                    database |= entries
        table = made / "actions.json"
        table.write_text(json.dumps({"database": database}))
        shutil.rmtree(given.output, ignore_errors=True)
        source = ("--from", "activitynet", "--source", str(table), "--output", str(given.output))
        try:
            dr2dist(["shards", "make", *source, "--split-by", "subset"])
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main()
