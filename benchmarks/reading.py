"""How fast samples are read, beside bare webdataset on the same shards.

    python -m benchmarks.reading --output build/reading.json

Photographs of some 100 KB, 256 a shard, decoded and resized to 224 pixels by the same transform, by
1, 2 and 4 workers in batches of 32: webdataset's WebLoader in the order of the shards, dr2dist's
loader in its own. Rounds are paired and alternate; the ratio's interval is that of its median.
--latency serves the shards by HTTP from this machine with so many milliseconds before each answer,
into a cache that is warm.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from dr2dist.data.cache import Cache
from dr2dist.data.fields import Fields
from dr2dist.data.indexing import index_shards
from dr2dist.data.order import Order
from dr2dist.data.positions import batches
from dr2dist.data.stream import ShardDataset, loader

SIZE, BATCH = 224, 32
TRANSFORM = v2.Compose([v2.PILToTensor(), v2.Resize((SIZE, SIZE), antialias=True)])


def main() -> None:
    """Measures, and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--latency", type=float, help="milliseconds of a server of HTTP")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "shards", arguments.samples)
        ways = {"webdataset": theirs, "dr2dist": ours}
        if arguments.latency is not None:
            url = served(folder / "shards", arguments.latency)
            ways = {"dr2dist": ours, "dr2dist by http": lambda f, n: remote(url, folder, n)}
        results = {
            workers: compare(ways, folder / "shards", workers, arguments.rounds)
            for workers in arguments.workers
        }
    said = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "workers": results}
    text = json.dumps(said, indent=1)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def make(folder: Path, samples: int) -> None:
    """Shards of photographs: smooth noise with a little grain, as cameras give it."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    pattern = str(folder / "train-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=256, verbose=0, encoder=False) as writer:
        for number in range(samples):
            coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3)).astype(np.uint8))
            pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
            grain = generator.normal(0, 6, pixels.shape)
            path = folder / "photo.jpg"
            Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=88)
            key = f"{number:06d}"
            writer.write({"__key__": key, "jpg": path.read_bytes(), "cls": b"0"})
    path.unlink()
    index_shards([str(folder)], folder / "index.json", progress=False)


def theirs(folder: Path, workers: int) -> Iterable[Any]:
    """Bare webdataset: an epoch of batches."""
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(paths, shardshuffle=False, workersplitter=webdataset.split_by_worker)
        .decode("pilrgb")
        .to_tuple("jpg", "cls")
        .map_tuple(TRANSFORM, int)
        .batched(BATCH)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def _prepared(values: dict[str, Any]) -> dict[str, Any]:
    return {"image": TRANSFORM(values["image"].convert("RGB")), "label": values["label"]}


def _collated(samples: Any) -> Any:
    images = torch.stack([values["image"] for values in samples])
    return {"image": images}, torch.tensor([values["label"] for values in samples])


def ours(source: Path | str, workers: int, cache: Cache | None = None) -> Iterable[Any]:
    """dr2dist's loader: an epoch of batches in its own order."""
    fields = Fields({"image": "jpg", "label": "cls"})
    dataset = ShardDataset(source, fields, _prepared, cache=cache)
    counts = [shard.samples for shard in dataset.index.shards]
    order = Order(counts, dataset.index.digest())
    endless = batches(order, micro_batch=BATCH, accumulate=1, replica=0, replicas=1)
    epoch = [next(endless) for _ in range(math.ceil(len(dataset) / BATCH))]
    return loader(dataset, epoch, workers, _collated)


def served(folder: Path, latency: float) -> str:
    """A server of the folder on this machine."""
    from tests.servers import serve

    server = serve(folder)
    server.faults.latency = latency / 1000
    return server.url


def remote(url: str, folder: Path, workers: int) -> Iterable[Any]:
    """The same from a server, with what it has sent before in the cache."""
    return ours(url, workers, Cache(folder / "cache", 10**11))


def compare(ways: dict[str, Any], folder: Path, workers: int, rounds: int) -> dict[str, Any]:
    """Samples a second of each way, and the second's ratio to the first over paired rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), desc=f"{workers} workers"):
        for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
            speed = measured(way(folder, workers))
            if number:  # the first warms the caches
                speeds[name].append(speed)
    first, second = speeds.values()
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    medians = {name: round(statistics.median(each), 1) for name, each in speeds.items()}
    low, high = interval(len(ratios))
    return {
        "samples_per_second": medians,
        "ratio": round(statistics.median(ratios), 3),
        "interval_of_95": [round(ratios[low], 3), round(ratios[high], 3)],
    }


def measured(batches_of: Iterable[Any]) -> float:
    """Samples a second from the second batch on: workers have started by then."""
    count, start = 0, 0.0
    for number, batch in enumerate(batches_of):
        if number == 0:
            start = time.perf_counter()
        else:
            count += len(batch[1] if isinstance(batch, (list, tuple)) else batch.targets)
    return count / (time.perf_counter() - start)


def interval(count: int) -> tuple[int, int]:
    """The order statistics that hold the median with 95 % (binomial)."""
    tail, low = 0.0, 0
    while tail + math.comb(count, low) / 2**count <= 0.025:
        tail += math.comb(count, low) / 2**count
        low += 1
    low = max(0, low - 1)
    return low, count - 1 - low


if __name__ == "__main__":
    main()
