"""What befalls a run on two nodes, and whether it ends everywhere and goes on to the same bits.

    python -m benchmarks.faults [--faults NAME ...] [--write docs/faults.md]

Needs root, namespaces and sshd; see benchmarks/nodes.py. A small run of two ranks, one a node, is
begun, hit once, and begun again by the same command when the fault is over. Looked at: that every
rank, node and the command have ended within a minute, that a process beside them with a like
command line lives on, and that the run's end is in every bit that of one which nobody disturbed.
Faults that a run is to survive must leave it running. Each case is a line of
benchmarks/results/faults.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks import kept
from benchmarks.hits import FAULTS, Fault, Run, begin
from benchmarks.nodes import Nodes, lacking, two_nodes
from benchmarks.signals import CONFIG, LAYOUTS, LIMIT, SAVE, STEPS, VALIDATE, end_of_run, same
from benchmarks.signals import make_small_shards as make_shards

RECORDS = kept.RESULTS / "faults.jsonl"
RANK = "dr2dist.training.main"


class Bench:
    """Runs of one folder, on two nodes."""

    def __init__(self, folder: Path, nodes: Nodes) -> None:
        self.folder, self.nodes = folder, nodes
        self._ends: dict[tuple[str, ...], dict[str, Any]] = {}
        make_shards(folder)

    def undisturbed(self, layout: str, overrides: tuple[str, ...]) -> dict[str, Any]:
        """How a run ends that is left alone."""
        key = layout, *overrides
        if key not in self._ends:
            path = self._config(f"quiet {key}", layout)
            command = begin(self.nodes, path, *overrides)
            out, err = command.communicate(timeout=600)
            assert command.returncode == 0, out + err
            self._ends[key] = end_of_run(self.folder / "runs" / path.stem / "run")
        return self._ends[key]

    def run(self, name: str, layout: str) -> dict[str, Any]:
        """What came of a fault: status, seconds, left, decoy, same."""
        fault = FAULTS[name]
        wanted = self.undisturbed(layout, fault.overrides)
        path = self._config(f"{name} {layout}", layout)
        output = self.folder / "runs" / path.stem / "run"
        shutil.rmtree(output, ignore_errors=True)
        if fault.room is not None:
            size = ["-o", f"size={fault.room}", "tmpfs", str(output.parent)]
            subprocess.run(["mount", "-t", "tmpfs", *size], check=True)
        self.nodes.serve(1, clock=fault.clock)
        try:
            return self._hit(fault, path, output, wanted)
        finally:
            if fault.room is not None:
                subprocess.run(["umount", "-l", str(output.parent)], check=True)

    def _hit(
        self, fault: Fault, path: Path, output: Path, wanted: dict[str, Any]
    ) -> dict[str, Any]:
        decoy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)", RANK])
        command = begin(self.nodes, path, *fault.overrides)
        run = self._reached(fault.moment, path, command, output)
        try:
            start = time.monotonic()
            fault.hit(run)
            status = _ended(command, 600 if fault.survived else LIMIT)
            frozen = [each for each in run.ranks + run.nodes if _status(each) == "stopped"]
            rest = [each for each in run.ranks + run.nodes if each not in frozen]
            left = psutil.wait_procs(rest, max(0.0, LIMIT - (time.monotonic() - start)))[1]
            seconds, lives = time.monotonic() - start, decoy.poll() is None
        finally:
            for process in (command, decoy, *run.ranks, *run.nodes):
                _kill(process)
        fault.over(run)
        again = 0
        if not fault.survived:
            second = begin(self.nodes, path, *fault.overrides)
            second.communicate(timeout=600)
            again = second.returncode
        alike = again == 0 and same(end_of_run(output), wanted)
        found = {"status": status, "seconds": round(seconds, 1), "left": len(left)}
        return {**found, "decoy": lives, "same": alike}

    def _config(self, name: str, layout: str) -> Path:
        short = "".join(c if c.isalnum() else "-" for c in name)
        (self.folder / "runs" / short).mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{short}.yaml"
        path.write_text(
            CONFIG.format(
                shards=self.folder / "shards", steps=STEPS, validate=VALIDATE, save=SAVE,
                parallel=LAYOUTS[layout], output=self.folder / "runs" / short / "run",
            )
        )  # fmt: skip
        return path

    def _reached(
        self, moment: str, path: Path, command: subprocess.Popen[str], output: Path
    ) -> Run:
        """When the run is at the moment, and goes on."""
        end = time.monotonic() + 300
        while not any(output.glob(moment)):
            assert command.poll() is None and time.monotonic() < end, f"no {moment} came"
            time.sleep(0.002)
        ranks = ranks_of(self.nodes)
        nodes = [each.parent() for each in ranks]
        return Run(path, command, ranks, nodes, output, self.nodes)  # type: ignore[arg-type]


def _ended(command: subprocess.Popen[str], seconds: float) -> int | None:
    """Its status; None if it goes on still."""
    try:
        command.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return command.returncode


def ranks_of(nodes: Nodes) -> list[psutil.Process]:
    """The ranks of the run that there is on these nodes, by number."""
    found = []
    for process in psutil.process_iter():
        # It has ended since, or is no rank.
        with contextlib.suppress(psutil.Error, OSError, KeyError, ValueError):
            if RANK in process.cmdline() and _is_leader(process) and nodes.holds(process.pid):
                found.append((int(process.environ()["RANK"]), process))
    return [process for _, process in sorted(found, key=lambda pair: pair[0])]


def _is_leader(process: psutil.Process) -> bool:
    """A rank, and none of its data workers."""
    return os.getsid(process.pid) == process.pid


def _status(process: psutil.Process) -> str:
    return process.status() if process.is_running() else "gone"


def _kill(process: Any) -> None:
    try:
        process.kill()
    except (psutil.Error, ProcessLookupError):
        return


def is_right(name: str, found: dict[str, Any]) -> bool:
    """Whether a case has come out as it must."""
    ended = found["status"] == 0 if FAULTS[name].survived else found["status"] not in (None, 0)
    return bool(ended and found["decoy"] and found["same"] and not found["left"])


def page(records: list[dict[str, Any]]) -> str:
    """The table: a line for each fault, a column for each layout."""
    found = {(record["fault"], record["layout"]): record for record in records}
    right = sum(is_right(record["fault"], record) for record in records)
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults` on {platform.machine()}, {os.cpu_count()} cores, "
        f"{datetime.date.today().isoformat()}: a run of two ranks on two nodes, in namespaces of "
        "one machine, is hit once, and begun again by the same command when the fault is over. "
        "Each cell: the command's exit status, and seconds until nothing of it was left on a node "
        f"or, of what a run is to survive, until its end. Of {len(found)} cases {right} are right: "
        f"what ends has ended within {LIMIT:.0f} s, a process with a like command line lived on, "
        "and the run's end had every bit of one that nobody disturbed. What is not right says so. "
        "-9: the command itself was killed.",
        "",
        f"| fault | the run | {' | '.join(LAYOUTS)} |",
        f"|---|---|{'---|' * len(LAYOUTS)}",
    ]
    for name, fault in FAULTS.items():
        cells = [_cell(name, found.get((name, layout))) for layout in LAYOUTS]
        end = "survives" if fault.survived else "ends"
        lines.append(f"| {name} | {end} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    cell = f"{found['status']}, {found['seconds']:.1f} s"
    return cell if is_right(name, found) else f"{cell}: **wrong**"


def main() -> None:
    """Runs the cases that have no line yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--write", type=Path, help="the page, in Markdown")
    given = parser.parse_args()
    if given.faults and (reason := lacking()) is not None:
        raise SystemExit(f"two nodes cannot be made: {reason}")
    records = kept.read(RECORDS)
    done = {(record["fault"], record["layout"]) for record in records}
    missing = [(f, y) for f in given.faults for y in given.layouts if (f, y) not in done]
    if missing:
        with tempfile.TemporaryDirectory() as folder, two_nodes(Path(folder)) as nodes:
            bench = Bench(Path(folder), nodes)
            for name, layout in tqdm(missing):
                found = {"fault": name, "layout": layout, **bench.run(name, layout)}
                records.append(found)
                kept.add(RECORDS, found)
    text = page(records)
    if given.write is not None:
        given.write.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
