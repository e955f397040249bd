"""How much memory does a longer clip take, and how long may it be? One process a case.

    python -m benchmarks.clip_memory --write docs/clip_memory.md      # some twenty minutes

Growth is what a training step of one clip adds to the process's peak beside weights, gradients and
the clip itself (fp32, on the CPU, as `dr2dist bench` measures it). The longest clip is foretold
from two lengths and then run.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dr2dist.bench.cases import Spec
from dr2dist.bench.process import ask_once

SIDE, FRAMES, LIMIT = 112, (8, 32), 512 * 2**20
CASES = {
    "conventional": "conventional",
    "checkpoint per block": "checkpoint per block",
    "exact sliced": "exact, in slices",
}
MIB = 2**20


class Model(NamedTuple):
    """of_frames: options for a clip of so many. step: frames that clips are multiples of."""

    name: str
    title: str
    of_frames: Callable[[int], dict[str, Any]]
    step: int
    chunk_tokens: int


MODELS = (
    Model("swin3d_t", "Video Swin-T", lambda n: {"frames": n}, 8, 98),
    Model(
        "videomae_small_patch16",
        "VideoMAE-S, in chunks of 8 frames",
        lambda n: {"frames": 8, "chunks": n // 8},
        8,
        98,
    ),
)


def growth(model: Model, case: str, frames: int, steps: int = 1) -> int:
    """Bytes."""
    slices = {"chunk_size": 1, "chunk_tokens": model.chunk_tokens}
    options = model.of_frames(frames)
    spec = Spec(case, model.name, SIDE, alpha=0.9, beta=0.1, slices=slices, options=options)
    return int(ask_once(spec, "growth", batch=1, steps=steps)["growth"])


def longest(model: Model, case: str, ends: tuple[int, int]) -> tuple[int, int]:
    """(frames, growth) of the longest clip that keeps within LIMIT, which was run."""
    slope = (ends[1] - ends[0]) / (FRAMES[1] - FRAMES[0])
    frames = int((LIMIT - ends[0]) / slope) + FRAMES[0]
    while True:
        frames = frames // model.step * model.step
        found = growth(model, case, frames)
        if found <= LIMIT or frames <= model.step:
            return frames, found
        frames = min(frames - model.step, int(frames * 0.98 * LIMIT / found))


def main() -> None:
    """All cases, then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    parser.add_argument("--models", nargs="+", default=[model.name for model in MODELS])
    given = parser.parse_args()
    text = [
        "# Memory of clips",
        "",
        f"Written by `python -m benchmarks.clip_memory --write docs/clip_memory.md` on "
        f"{platform.machine()}, {datetime.date.today()}.",
        "",
        f"{SIDE} pixels, fp32, one clip a step, coefficients (0.9, 0.1), the default. Growth is "
        "what a training step adds to the process's peak beside weights, gradients and the clip. "
        f"The longest clip that grows it by at most {LIMIT // MIB} MiB was run.",
        "",
    ]
    models = [model for model in MODELS if model.name in given.models]
    for model in tqdm(models, unit="model"):
        text += _part(model)
    page = "\n".join(text)
    if given.write is not None:
        given.write.write_text(page)
    sys.stdout.write(page)


def _part(model: Model) -> list[str]:
    low, high = FRAMES
    rows, base = [], 0
    for case, shown in CASES.items():
        ends = growth(model, case, low), growth(model, case, high)
        frames, found = longest(model, case, ends)
        base = base or frames
        slope = (ends[1] - ends[0]) / (high - low) / MIB
        each = [f"{value / MIB:.1f}" for value in ends]
        numbers = [*each, f"{slope:.3f}", str(frames), f"{found / MIB:.0f}", f"{frames / base:.1f}"]
        rows.append(f"| {shown} | {' | '.join(numbers)} |")
    return [
        f"## {model.title}",
        "",
        f"| | MiB of {low} frames | of {high} | MiB a frame | longest clip, frames | its MiB | "
        "to conventional |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]


if __name__ == "__main__":
    main()
