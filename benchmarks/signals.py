"""How a run stops: every signal, to everyone, at every moment, and whether it goes on rightly.

    python -m benchmarks.signals [--cases all | pairwise] [--write docs/signals.md]

A small run of two ranks is begun by `dr2dist train`, hit once, and begun again by the same command
(what is hit are programs of their own; what is not is forked from a process with all imports).
Looked at: the exit status, what still runs 60 s later, that a process beside it with a like command
line lives on, and that the run's end is in every bit that of one which nobody disturbed. Each case
is a line of benchmarks/results/signals.jsonl and is not run again.
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
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks import kept
from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import image_folder
from dr2dist.status import Status
from tests.commands import dr2dist

RECORDS = kept.RESULTS / "signals.jsonl"
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


def case_of(record: dict[str, Any]) -> Case:
    """The case that a line of RECORDS is of."""
    return Case(*(record[field] for field in Case._fields))


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

    def __init__(self, folder: Path) -> None:
        self.folder, self.shards = folder, folder / "shards"
        make_small_shards(folder)
        self._ends: dict[str, dict[str, Any]] = {}

    def end_of(self, layout: str) -> dict[str, Any]:
        """See Bench."""
        if layout not in self._ends:
            name = f"undisturbed-{layout}".replace(" ", "_")
            status = run_whole(self._line(name, layout), self.folder / f"{name}.txt")
            assert status == 0, (self.folder / f"{name}.txt").read_text()
            self._ends[layout] = end_of_run(self.folder / name)
        return self._ends[layout]

    def run(self, case: Case) -> dict[str, Any]:
        """What came of a case: status, saved (whether there is a checkpoint), seconds, left
        (processes), decoy, same."""
        wanted, output = self.end_of(case.layout), self.folder / case.name
        shutil.rmtree(output, ignore_errors=True)  # of a try that was given up
        line = [sys.executable, "-m", "dr2dist.cli", *self._line(case.name, case.layout)]
        decoy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)", *line[1:]])
        with (self.folder / f"{case.name}.txt").open("a") as said:
            command = subprocess.Popen(
                line,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        try:
            _wait(lambda: _reached(case.moment, output, command), command)
            ranks = _ranks(command)
            started = psutil.Process(command.pid).children(recursive=True)
            begin = time.monotonic()
            _hit(case, command, ranks, started)
            status = command.wait(LIMIT)
            _, left = psutil.wait_procs(started, max(0.0, LIMIT - (time.monotonic() - begin)))
            seconds = time.monotonic() - begin
            lives = decoy.poll() is None
        finally:
            for process in (command, decoy):
                process.kill()
                process.wait()
        saved = bool(checkpoints(output))
        again = run_whole(self._line(case.name, case.layout), self.folder / f"{case.name}.txt")
        alike = again == 0 and same(end_of_run(output), wanted)
        return {
            **case._asdict(),
            "status": status,
            "saved": saved,
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
        return ["train", str(config), "--ranks", "2"]


def run_whole(line: Sequence[str], output: Path) -> int:
    """The exit status of a command that is left alone; what it says is added to a file."""
    done = dr2dist(*line)
    with output.open("a") as said:
        said.write(done.stdout + done.stderr)
    return done.returncode


def expected(case: Case, saved: bool | None) -> int:
    """The exit status that is right. saved: whether there is a checkpoint."""
    if case.signal != "KILL":
        return Status.STOPPED
    if not case.receiver.startswith("rank"):
        return -signal.SIGKILL
    return Status.STOPPED if saved else Status.LOST


def is_right(case: Case, found: dict[str, Any]) -> bool:
    """Whether a case has come out as it must."""
    sound = found["decoy"] and found["same"] and not found["left"]
    return bool(sound and found["status"] == expected(case, found.get("saved")))


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
        return len(_ranks(command)) >= 2
    if moment == "checkpoint":
        return any((output / "checkpoints").glob("*.tmp"))
    step = VALIDATE if moment == "validation" else 2
    path = output / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def _ranks(command: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that a command has started, by number."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process(command.pid).children():
        with contextlib.suppress(psutil.Error, KeyError):  # it has ended since, or is no rank
            found[int(process.environ()["RANK"])] = process
    return [found[number] for number in sorted(found)]


def _hit(
    case: Case,
    command: subprocess.Popen[bytes],
    ranks: Sequence[psutil.Process],
    started: Sequence[psutil.Process],
) -> None:
    """started: all that the command has."""
    number = signal.Signals[f"SIG{case.signal}"]
    if case.receiver == "command":
        command.send_signal(number)
    elif case.receiver == "group":
        os.killpg(command.pid, number)
    elif case.receiver == "everyone":
        command.send_signal(number)
        for process in started:
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


def page(records: Sequence[dict[str, Any]]) -> str:
    """The table: a line for each signal and receiver, a column for each moment and layout."""
    found = {case_of(record): record for record in records}
    columns = [(moment, layout) for moment in MOMENTS for layout in LAYOUTS]
    right = sum(is_right(case, record) for case, record in found.items())
    lines = [
        "# Signals",
        "",
        f"`python -m benchmarks.signals` on {platform.machine()}, {os.cpu_count()} cores, "
        f"{datetime.date.today().isoformat()}: a run of two ranks is hit once, and begun again by "
        "the same command. Each cell: the command's exit status, and seconds until nothing of it "
        f"was left. Of {len(found)} cases {right} are right: the status is the one that the table "
        "of exit statuses in [training.md](training.md) says, nothing was left running, a process "
        "with a like command line lived on, and the run's end had every bit of one that nobody "
        "disturbed. What is not right says so. -9 is the shell's 137: the command itself was "
        "killed.",
        "",
        f"| signal | to | {' | '.join(f'{moment}, {layout}' for moment, layout in columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for number, receiver in itertools.product(SIGNALS, RECEIVERS):
        cases = [Case(number, receiver, moment, layout) for moment, layout in columns]
        cells = [_cell(case, found.get(case)) for case in cases]
        lines.append(f"| {number} | {receiver} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(case: Case, found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    cell = f"{found['status']}, {found['seconds']:.1f} s"
    return cell if is_right(case, found) else f"{cell}: **wrong**"


def main() -> None:
    """Runs the cases that have no line yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", choices=("all", "pairwise"), default="all")
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    given = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup runs would rightly ignore it
    records = kept.read(RECORDS)
    done = set(map(case_of, records))
    wanted = ALL if given.cases == "all" else pairwise()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for case in tqdm([case for case in wanted if case not in done]):
            try:
                records.append(bench.run(case))
            except AssertionError as error:  # a case without a line is run again the next time
                tqdm.write(f"{case.name}: {error}")
                continue
            kept.add(RECORDS, records[-1])
    text = page(records)
    if given.write is not None:
        given.write.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
