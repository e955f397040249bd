"""Does a clip of 512 frames train end to end in 2 GiB? Reversible, and conventional beside it.

    python -m benchmarks.long_clip --write docs/long_clip.md

VideoMAE-S in 32 chunks of 16 frames at 96 pixels, with the head of temporal action detection,
AdamW, fp32: two steps of one clip. Each way is a process of its own, which the system gives no more
memory than --limit (RLIMIT_DATA: all private memory that can be written to, Python's and torch's
own included).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any]] = {
    "conventional": {"arithmetic": "float", "memory": "store", "alpha": 1.0, "beta": 0.0},
    "exact, beta 0.1": {"chunk_size": 1, "alpha": 0.9, "beta": 0.1},
}
CHUNKS, FRAMES, SIDE = 32, 16, 96
CLASSES, LEVELS = 20, 6
GIB = 2**30


def train(way: str, limit: float, steps: int) -> None:
    """Two steps within the limit; prints a line of JSON after each."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GIB),) * 2)
    import torch

    import dr2dist
    from dr2dist.backbones.build import build_model
    from dr2dist.backbones.heads import attach_head
    from dr2dist.backbones.videomae import VideoMaeBackbone
    from dr2dist.data.batch import Batch
    from dr2dist.tasks.temporal_action_detection import (
        TemporalActionDetection,
        TemporalActionDetectionOptions,
    )

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model(
        "videomae_small_patch16",
        weights=None,
        image_size=(SIDE, SIDE),
        num_classes=0,
        options={"frames": FRAMES, "chunks": CHUNKS},
    )
    family = VideoMaeBackbone()
    options = TemporalActionDetectionOptions(num_classes=CLASSES, levels=LEVELS, width=256)
    task = TemporalActionDetection(options, (), family.preprocessing(model))
    head = task.head(family.features(model))
    attach_head(model, head.module, head.taps)
    net = dr2dist.convert(model.train(), **WAYS[way])
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    clip = torch.randn(1, 3, CHUNKS * FRAMES, SIDE, SIDE)
    targets = task.points.targets(_actions(), CLASSES, float(CHUNKS * FRAMES))
    points = [each[None] for each in targets]
    batch = Batch({"video": clip}, {"points": points, "counts": [1]}, ["clip"], 1)
    for step in range(steps):
        start = time.perf_counter()
        loss = task.loss(net({"video": clip}), batch, task.counts(batch)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"step": step, "loss": loss.item(), "seconds": seconds, "peak": peak}))
    if way != "conventional":
        assert net.certificate().failures == 0


def _actions() -> Any:
    import numpy as np

    return np.array([(10.0, 22.0, 3.0), (60.0, 140.0, 0.0), (200.0, 203.0, 7.0)])


def run(way: str, limit: float, steps: int) -> dict[str, Any]:
    """What a process of its own says: its steps, or how it ended."""
    line = [sys.executable, "-m", "benchmarks.long_clip", "--way", way, "--limit", str(limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [*line, "--steps", str(steps)], capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    ended = done.stderr.strip().splitlines()[-1] if done.returncode else ""
    return {"way": way, "steps": len(lines), "ended": ended, **(lines[-1] if lines else {})}


def main() -> None:
    """Both ways, then the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of a process; 0: none")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="run it in this process")
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    given = parser.parse_args()
    if given.way is not None:
        train(given.way, given.limit, given.steps)
        return
    found = [run(way, given.limit, given.steps) for way in WAYS]
    page = write_page(found, given.limit)
    if given.write is not None:
        given.write.write_text(page)
    sys.stdout.write(page)


def write_page(found: list[dict[str, Any]], limit: float) -> str:
    """The table."""
    rows = []
    for each in found:
        ended = f"`{each['ended'][:70]}`" if each["ended"] else "all its steps"
        numbers = ["", "", ""]
        if each["steps"]:
            numbers = [f"{each['seconds']:.0f}", f"{each['peak']:.2f}", f"{each['loss']:.3f}"]
        rows.append(" | ".join([each["way"], str(each["steps"]), *numbers, ended]))
    text = [
        "# A long clip in little memory",
        "",
        f"Written by `python -m benchmarks.long_clip --write docs/long_clip.md` on "
        f"{platform.machine()}, {datetime.date.today()}, one thread.",
        "",
        f"{CHUNKS * FRAMES} frames at {SIDE} pixels through VideoMAE-S in {CHUNKS} chunks (random "
        "weights) and the head of temporal action detection, fp32 and AdamW, one clip a step; the "
        f"process may have {limit:g} GiB of memory of its own, Python and torch included.",
        "",
        "| | steps done | seconds a step | peak, GiB | loss | ended by |",
        "|---|---|---|---|---|---|",
        *(f"| {row} |" for row in rows),
        "",
    ]
    return "\n".join(text)


if __name__ == "__main__":
    main()
