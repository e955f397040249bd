"""Pipeline stages: a stage's memory against micro-batches in flight, and the time of a step.

    python benchmarks/stages.py --output runs/stages [--measure memory time]

Memory: the middle stage of a ViT-S (6 blocks of it) in a process of its own, as 1F1B drives it;
what its neighbours would hold lies in files. Time: 12 blocks in two stages, two processes with
gloo, all ways by turns. Conventional stages hold and send the tokens of timm's blocks under
autograd, on the same engine and schedule.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from tqdm import tqdm

import dr2dist
from dr2dist.bench.worker import peak, return_at_once, start_peak
from dr2dist.launching.launcher import free_port
from dr2dist.parallel.deepspeed_json import deepspeed_config
from dr2dist.parallel.engine import StepBatches
from dr2dist.parallel.pipeline.engine import StagedEngine
from dr2dist.parallel.pipeline.grid import Grid
from dr2dist.parallel.pipeline.layers import Layer, keep_only, layers_of
from dr2dist.parallel.pipeline.stage import Stage
from dr2dist.parallel.processes import init_distributed
from dr2dist.reversible.tape import arithmetic_of

CONVENTIONAL, PER_BLOCK = "conventional", "checkpoint per block"
WHOLE_BLOCK = "checkpoint per block, no early stop"
RETURNED, KEPT = "exact, state returned", "exact, state kept"
WAYS = (CONVENTIONAL, PER_BLOCK, WHOLE_BLOCK, RETURNED, KEPT)
MEMORY_WAYS = (CONVENTIONAL, PER_BLOCK, RETURNED, KEPT)
FLIGHTS = (1, 2, 4, 8, 16)
MODEL, SIZE, BATCH, BLOCKS = "vit_small_patch16_224", 224, 8, 6
"""BATCH: samples of a micro-batch. BLOCKS: of a stage."""
ACCUMULATE = 8
"""Micro-batches of a timed step."""


class BlockPass:
    """A micro-batch between its forward and its backward pass, under autograd."""

    state_taken = None

    def __init__(self, given: Tensor, output: Tensor) -> None:
        self.carried: dict[Any, Tensor] = {}
        self.grads: dict[Any, Tensor] = {}
        self.input, self.edge = given, get_gradient_edge(output)
        self.given: Tensor | None = output

    def message(self) -> Tensor:
        """What crosses the cut."""
        return self.output.detach()

    @property
    def output(self) -> Tensor:
        """Not held here from then on."""
        output, self.given = self.given, None
        assert output is not None
        return output

    def end_with(self, loss: Tensor) -> None:
        """See Pass."""
        self.edge, self.given = get_gradient_edge(loss), None

    def backward(self, gradient: Tensor, *nothing: Any) -> Tensor | None:
        """See Pass."""
        torch.autograd.backward(self.edge, gradient)
        return self.input.grad


class BlockStage:
    """Whole blocks of a timm ViT, conventionally or checkpointed: the interface of Stage."""

    takes_state = gives_state = returned = False

    def __init__(self, net: Any, blocks: range, first: bool, last: bool, way: str) -> None:
        self.net, self.first, self.last, self.way = net, first, last, way
        self.blocks = [net.blocks[index] for index in blocks]

    def forward(self, value: Any, shared: Any = None) -> BlockPass:
        """See Stage."""
        given = value["image"] if self.first else value.detach().requires_grad_()
        with torch.enable_grad(), set_checkpoint_early_stop(self.way != WHOLE_BLOCK):
            x = self.net.family.stem(self.net, given).tokens if self.first else given
            for block in self.blocks:
                if self.way == CONVENTIONAL:
                    x = block(x)
                else:
                    x = checkpoint(block, x, use_reentrant=False)
            x = self.net.forward_head(self.net.norm(x)) if self.last else x
        return BlockPass(given, x)


def network(depth: int) -> Any:
    """The model converted, at the default's coefficients."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=10, img_size=SIZE, depth=depth)
    return dr2dist.convert(model).train()


def stages_of(way: str, count: int) -> tuple[Any, list[Layer], list[range]]:
    """(network, layers, the layers of each of `count` stages of BLOCKS blocks)."""
    net = network(count * BLOCKS)
    layers = layers_of(net)
    cuts = [0, *(1 + 2 * BLOCKS * stage for stage in range(1, count)), len(layers)]
    if not way.startswith("exact"):
        for cut in cuts[1:-1]:  # tokens alone cross it
            layer = layers[cut - 1]
            layers[cut - 1] = replace(layer, place=layer.place._replace(last=True))
    return net, layers, [range(a, b) for a, b in itertools.pairwise(cuts)]


def memory(way: str, flight: int, folder: Path) -> dict[str, int]:
    """Bytes by which the middle of three stages grows, with so many micro-batches in flight."""
    net, layers, parts = stages_of(way, 3)
    keep_only(net, layers, parts[1])
    exact, dtype = way.startswith("exact"), np.float32
    stage: Any = BlockStage(net, range(BLOCKS, 2 * BLOCKS), False, False, way)
    if exact:
        stage, dtype = Stage(net, layers, parts[1], way == RETURNED), np.int32
    tokens = torch.randn(BATCH, *layers[1].shape[1:])
    arithmetic: Any = arithmetic_of(net.chains[0].setting, torch.float32, torch.device("cpu"))
    values = torch.stack(tuple(arithmetic.start(tokens))) if exact else tokens
    shape = tuple(values.shape)
    files = [folder / name for name in ("given", "gradient")]
    values.numpy().tofile(files[0])
    (torch.randn(shape) * 1e-3).numpy().tofile(files[1])
    del tokens, values

    def there(path: Path, kind: Any) -> Tensor:
        return torch.from_numpy(np.fromfile(path, kind).reshape(shape))

    def forth(number: int) -> Any:
        run = stage.forward(there(files[0], dtype))
        run.message().numpy().tofile(folder / str(number))
        return run

    def back(run: Any, number: int) -> None:
        sent = folder / str(number)
        gradient = run.backward(
            there(files[1], np.float32), there(sent, np.int32) if stage.returned else None
        )
        if stage.returned:
            gradient = torch.cat(
                [gradient, torch.stack(tuple(run.state_taken)).view(torch.float32)]
            )
        sent.unlink()

    fly(1, forth, back)  # gradients of parameters are there from now on
    before = start_peak(torch.device("cpu"))
    fly(flight, forth, back)
    growth = peak(torch.device("cpu")) - before
    assert not exact or net.certificate().failures == 0
    return {"growth": growth, "elements": BATCH * int(np.prod(layers[1].shape))}


def fly(flight: int, forth: Callable[[int], Any], back: Callable[[Any, int], None]) -> None:
    """So many micro-batches forward, then one back and one forward by turns, then the rest back."""
    passes: deque[tuple[Any, int]] = deque()
    for number in range(flight + 2):
        if len(passes) == flight:
            back(*passes.popleft())
        passes.append((forth(number), number))
    while passes:
        back(*passes.popleft())


def engine_of(way: str) -> StagedEngine:
    """This rank's stage of two, trained by SGD."""
    net, layers, parts = stages_of(way, 2)
    rank = dist.get_rank()
    keep_only(net, layers, parts[rank])
    config = deepspeed_config(
        zero=0, precision="fp32", micro_batch=BATCH, accumulate=ACCUMULATE, replicas=1, clip=None,
        extra={"steps_per_print": 10**6},
    )  # fmt: skip
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    engine = StagedEngine(
        net, optimizer, config, Grid(2, 1), layers, parts[rank], returned=way == RETURNED
    )
    if not way.startswith("exact"):
        blocks = range(rank * BLOCKS, (rank + 1) * BLOCKS)
        engine.stage = BlockStage(net, blocks, rank == 0, rank == 1, way)  # type: ignore[assignment]
    return engine


def times(rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each way, by turns in an order that changes; on every rank."""
    torch.set_num_threads(1)
    init_distributed()
    engines = {way: engine_of(way) for way in WAYS}
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    labels = torch.randint(0, 10, (BATCH,))

    def loss(number: int, output: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels)

    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in tqdm(range(rounds + 1), disable=dist.get_rank() > 0):
        for way in random.Random(number).sample(WAYS, len(WAYS)):
            dist.barrier()
            start = time.monotonic()
            batches = StepBatches(lambda: None, lambda _: {"image": images}, loss)
            engines[way].step(batches, ACCUMULATE, [1e-3])
            dist.barrier()
            if number:
                found[way].append(time.monotonic() - start)
    return found


def child(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """This script again, in a process of its own, with its result as its last line."""
    line = [sys.executable, __file__, *command]
    return subprocess.Popen(
        line, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> Any:
    """The result of a child. Raises RuntimeError if it has failed."""
    text = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")
    return json.loads(text.strip().rpartition("\n")[2])


def measure_memory() -> dict[str, dict[str, Any]]:
    """By way and number in flight."""
    found: dict[str, dict[str, Any]] = {}
    for way in tqdm(MEMORY_WAYS):
        found[way] = {
            str(flight): answer(child(["--memory-of", way, str(flight)])) for flight in FLIGHTS
        }
    return found


def measure_times(rounds: int) -> dict[str, list[float]]:
    """On two ranks."""
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        child(["--times", str(rounds)], RANK=str(rank), LOCAL_RANK=str(rank), **places)
        for rank in range(2)
    ]
    found, _ = map(answer, ranks)
    return dict(found)


def page(results: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"`python benchmarks/stages.py`, {results['machine']}, torch {results['torch']}, "
        f"{results['date']}.",
        "",
    ]
    if known := results.get("memory"):
        lines += [
            f"| micro-batches in flight | {' | '.join(known)} |",
            "|---|" + "---|" * len(known),
        ]
        for flight in map(str, FLIGHTS):
            cells = (f"{x[flight]['growth'] / x[flight]['elements']:.1f}" for x in known.values())
            lines.append(f"| {flight} | {' | '.join(cells)} |")
        lines.append("")
    if found := results.get("time"):
        lines += [f"| a step | seconds | {PER_BLOCK} = 1 |", "|---|---|---|"]
        for way, seconds in found.items():
            pairs = zip(seconds, found[PER_BLOCK], strict=True)
            ratio = statistics.median(one / other for one, other in pairs)
            lines.append(f"| {way} | {statistics.median(seconds):.2f} | {ratio:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("runs/stages"), help="folder")
    parser.add_argument(
        "--measure", nargs="+", choices=("memory", "time"), default=["memory", "time"]
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        return_at_once()
        with tempfile.TemporaryDirectory() as folder:
            found = memory(given.memory_of[0], int(given.memory_of[1]), Path(folder))
        return print(json.dumps(found))
    if given.times:
        return print(json.dumps(times(given.times)))
    path = given.output / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.measure:
        results[name] = measure_memory() if name == "memory" else measure_times(given.rounds)
        path.write_text(json.dumps(results, indent=1) + "\n")
        (given.output / "results.md").write_text(page(results))
    print(page(results))
    return None


if __name__ == "__main__":
    main()
