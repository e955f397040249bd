"""How a run stops: every signal, to everyone, at every moment, and whether it goes on rightly.

    python benchmarks/signals.py --output runs/signals [--cases all | pairwise]

A small run of two ranks is begun by `dr2dist train`, hit once, and begun again by the same command.
Looked at: the exit status, what still runs 60 s later, that a process beside it with a like command
line lives on, and that the run's end is in every bit that of one which nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from dr2dist.checkpoints.checkpoint import Checkpoint, checkpoints
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import image_folder

SIGNALS = ("TERM", "INT", "HUP", "USR1", "KILL")
RECEIVERS = ("command", "group", "rank 0", "rank 1", "everyone")
"""everyone: the command, its ranks and their data workers, as service managers send it."""
MOMENTS = ("start-up", "step", "validation", "checkpoint")
LAYOUTS = {"ZeRO-2": "{zero: 2}", "2 stages": "{zero: 0, stages: 2}"}
LIMIT = 60.0
"""Seconds until nothing may be left running."""
STEPS, VALIDATE, SAVE = 12, 6, 5
CONFIG = """
model: {{name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {{depth: 4}}}}
task: {{num_classes: 2}}
data: {{train: {shards}/train, val: {shards}/val, num_workers: 1}}
optim: {{lr: 1.0e-3}}
train: {{steps: {steps}, micro_batch: 4, accumulate: 2, log_every: 1, validate_every: {validate}}}
checkpoint: {{steps: {save}}}
parallel: {parallel}
output: {output}
"""


class Case(NamedTuple):
    """What befalls a run."""

    signal: str
    receiver: str
    moment: str
    layout: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(self).replace(" ", "_")


ALL = [Case(*each) for each in itertools.product(SIGNALS, RECEIVERS, MOMENTS, LAYOUTS)]


def pairwise(cases: Sequence[Case] = tuple(ALL)) -> list[Case]:
    """Few cases in which each two values of different kinds come together."""
    wanted = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while wanted:
        best = max(cases, key=lambda case: len(wanted & _pairs(case)))
        chosen.append(best)
        wanted -= _pairs(best)
    return chosen


def _pairs(case: Case) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return set(itertools.combinations(enumerate(case), 2))


class Bench:
    """Runs of one folder: its shards, and for each layout how a run ends that is left alone."""

    def __init__(
        self, folder: Path, run: Callable[[Sequence[str], Path], int] | None = None
    ) -> None:
        """run: runs a command that is left alone, what it says goes to a file; its exit status."""
        self.folder, self._run = folder, run or run_whole
        self.shards = folder / "shards"
        if not self.shards.exists():
            make_small_shards(folder)
        self._ends: dict[str, dict[str, Any]] = {}

    def end_of(self, layout: str) -> dict[str, Any]:
        """See Bench."""
        if layout not in self._ends:
            name = f"undisturbed-{layout}".replace(" ", "_")
            status = self._run(self._line(name, layout), self.folder / f"{name}.txt")
            assert status == 0, (self.folder / f"{name}.txt").read_text()
            self._ends[layout] = end_of_run(self.folder / name)
        return self._ends[layout]

    def run(self, case: Case) -> dict[str, Any]:
        """What came of a case: status, seconds, left (processes), decoy, same."""
        wanted, output = self.end_of(case.layout), self.folder / case.name
        shutil.rmtree(output, ignore_errors=True)
        line = self._line(case.name, case.layout)
        decoy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)", *line[1:]])
        with (self.folder / f"{case.name}.txt").open("a") as said:
            command = subprocess.Popen(line, start_new_session=True, **options(said))
        try:
            _wait(lambda: _reached(case.moment, output, command), command)
            ranks = _ranks(command)
            begin = time.monotonic()
            _hit(case, command, ranks)
            status = command.wait(LIMIT)
            _, left = psutil.wait_procs(ranks, max(0.0, LIMIT - (time.monotonic() - begin)))
            seconds = time.monotonic() - begin
            lives = decoy.poll() is None
        finally:
            for process in (command, decoy):
                process.kill()
                process.wait()
        again = self._run(line, self.folder / f"{case.name}.txt")
        alike = again == 0 and same(end_of_run(output), wanted)
        return {
            **case._asdict(),
            "status": status,
            "seconds": round(seconds, 1),
            "left": len(left),
            "decoy": lives,
            "same": alike,
        }

    def _line(self, name: str, layout: str) -> list[str]:
        config = self.folder / f"{name}.yaml"
        text = CONFIG.format(
            shards=self.shards, steps=STEPS, validate=VALIDATE, save=SAVE,
            parallel=LAYOUTS[layout], output=self.folder / name,
        )  # fmt: skip
        config.write_text(text)
        return [sys.executable, "-m", "dr2dist.cli", "train", str(config), "--ranks", "2"]


def run_whole(line: Sequence[str], output: Path) -> int:
    """See Bench."""
    with output.open("a") as said:
        return subprocess.run(line, **options(said)).returncode


def options(said: TextIO) -> dict[str, Any]:
    """Of a process with one thread that says everything to one file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return {"stdout": said, "stderr": subprocess.STDOUT, "env": environment}


def expected(case: Case) -> set[int]:
    """The exit statuses that are right."""
    if case.signal != "KILL":
        return {75}
    return {4} if case.receiver.startswith("rank") else {-signal.SIGKILL}


def is_right(case: Case, found: dict[str, Any]) -> bool:
    """Whether a case has come out as it must."""
    sound = found["decoy"] and found["same"] and not found["left"]
    return bool(sound and found["status"] in expected(case))


def make_small_shards(folder: Path) -> None:
    """folder/shards/{train,val}: 300 noisy images of two classes."""
    random = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(150):
            pixels = random.integers(0, 120, (32, 32, 3)) + 100 * number
            path = folder / "images" / name / f"{name}{image}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    make_shards(*image_folder(folder / "images"), folder / "shards", val_fraction=0.5)


def _reached(moment: str, output: Path, command: subprocess.Popen[bytes]) -> bool:
    if moment == "start-up":
        return len(_ranks(command)) > 1
    if moment == "checkpoint":
        return any((output / "checkpoints").glob("*.tmp"))
    step = VALIDATE if moment == "validation" else 2
    path = output / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def _ranks(command: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that a command has started, by number, and what they have started."""
    found = psutil.Process(command.pid).children(recursive=True)
    direct = [process for process in found if process.ppid() == command.pid]
    return [*sorted(direct, key=_number), *(each for each in found if each not in direct)]


def _number(process: psutil.Process) -> int:
    return int(process.environ().get("RANK", 99))


def _hit(case: Case, command: subprocess.Popen[bytes], ranks: Sequence[psutil.Process]) -> None:
    number = signal.Signals[f"SIG{case.signal}"]
    if case.receiver == "command":
        command.send_signal(number)
    elif case.receiver == "group":
        os.killpg(command.pid, number)
    elif case.receiver == "everyone":
        command.send_signal(number)
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    else:
        ranks[int(case.receiver[-1])].send_signal(number)


def _wait(what: Callable[[], bool], command: subprocess.Popen[bytes], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert command.poll() is None and time.monotonic() < end, "the moment never came"
        time.sleep(0.002)


def end_of_run(output: Path) -> dict[str, Any]:
    """The last checkpoint's tensors, and the losses by step."""
    saved = Checkpoint(checkpoints(output)[-1])
    kinds = [(kind, name) for name in saved.shapes for kind in saved.kinds(name)]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "tensors": {key: saved.read(*key) for key in kinds},
        "losses": {line["step"]: line["loss"] for line in lines if "loss" in line},
        "validations": {line["step"]: line["val_loss"] for line in lines if "val_loss" in line},
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have ended alike in every bit."""
    alike = all(one[key] == other[key] for key in ("losses", "validations"))
    tensors = one["tensors"], other["tensors"]
    return (
        alike
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    )


def page(results: Iterable[dict[str, Any]]) -> str:
    """The table."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    lines = [
        f"`python benchmarks/signals.py`, {machine}, {datetime.date.today().isoformat()}.",
        "",
        "| signal | to | at | layout | status | seconds | left | beside | same bits | right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for found in results:
        case = Case(*(found[field] for field in Case._fields))
        cells = [*case, *(found[key] for key in ("status", "seconds", "left", "decoy", "same"))]
        lines.append(f"| {' | '.join(map(str, [*cells, is_right(case, found)]))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the cases that have no result yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("runs/signals"), help="folder")
    parser.add_argument("--cases", choices=("all", "pairwise"), default="all")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup runs would rightly ignore it
    path, bench = given.output / "results.json", Bench(given.output.resolve())
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for case in tqdm(ALL if given.cases == "all" else pairwise()):
        if case.name not in results:
            try:
                results[case.name] = bench.run(case)
            except AssertionError as error:  # a case without a result is run again the next time
                tqdm.write(f"{case.name}: {error}")
                continue
            path.write_text(json.dumps(results, indent=1) + "\n")
    table = page(results.values())
    (given.output / "results.md").write_text(table)
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
