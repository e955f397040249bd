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
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tqdm import tqdm

from benchmarks import kept
from benchmarks.nodes import Nodes, lacking, two_nodes
from benchmarks.signals import CONFIG, LAYOUTS, LIMIT, SAVE, STEPS, VALIDATE, end_of_run, same
from benchmarks.signals import make_small_shards as make_shards

RECORDS = kept.RESULTS / "faults.jsonl"
RANK = "dr2dist.training.main"


class Run(NamedTuple):
    """A run that goes on, of a configuration at `path`. ranks: by number. nodes: what starts them,
    by host."""

    path: Path
    command: subprocess.Popen[str]
    ranks: list[psutil.Process]
    nodes: list[psutil.Process]
    output: Path
    link: Nodes


class Fault(NamedTuple):
    """hit: does it. over: undoes it before the run is begun again. survived: whether the run is to
    go on by itself. room: bytes of a file system of its own for the output. moment: what is in the
    run's folder when it happens. overrides: of the run's configuration. clock: whether the second
    node's can be set."""

    hit: Callable[[Run], None]
    over: Callable[[Run], None] = lambda run: None
    survived: bool = False
    room: str | None = None
    moment: str = "checkpoints/step-*/checkpoint.json"
    overrides: tuple[str, ...] = ()
    clock: bool = False


def _signal(number: int, of: str, *which: int) -> Callable[[Run], None]:
    def hit(run: Run) -> None:
        for each in which:
            getattr(run, of)[each].send_signal(number)

    return hit


def _node(number: int, which: int) -> Callable[[Run], None]:
    """All of a node at once, as where it loses its power or is frozen."""

    def hit(run: Run) -> None:
        for process in (run.nodes[which], run.ranks[which]):
            process.send_signal(number)

    return hit


def _cut(seconds: float | None) -> Callable[[Run], None]:
    def hit(run: Run) -> None:
        run.link.link("down")
        if seconds is not None:
            time.sleep(seconds)
            run.link.link("up")

    return hit


def _vanish(run: Run) -> None:
    run.output.rename(run.output.with_name("elsewhere"))


def _come_back(run: Run) -> None:
    shutil.rmtree(run.output, ignore_errors=True)
    run.output.with_name("elsewhere").rename(run.output)


def _fill(run: Run) -> None:
    """The output's file system has no room for another checkpoint."""
    rest = shutil.disk_usage(run.output).free - 2**16
    with (run.output.parent / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, rest))


def _damage(run: Run) -> None:
    """All is killed, and the newest checkpoint has lost its end."""
    for process in (*run.nodes, *run.ranks):
        process.kill()
    newest = sorted((run.output / "checkpoints").glob("step-*/rank-*.safetensors"))[-1]
    os.truncate(newest, newest.stat().st_size // 2)


def _kill_all(run: Run) -> None:
    for process in (run.command, *run.nodes, *run.ranks):
        process.kill()


def _forbid_writing(run: Run) -> None:
    """The output's folder is mounted over itself, read-only: the first mount is in use."""
    folder = str(run.output)
    for words in (["--bind", folder], ["-o", "remount,ro,bind"]):
        subprocess.run(["mount", *words, folder], check=True)


def _allow_writing(run: Run) -> None:
    subprocess.run(["umount", "-l", str(run.output)], check=True)


def _block(run: Run) -> None:
    """Shards are pipes now that nobody writes to: whoever opens one waits for ever."""
    for shard in (run.path.parent / "shards" / "train").glob("*.tar"):
        shard.rename(shard.with_suffix(".aside"))
        os.mkfifo(shard)


def _flow(run: Run) -> None:
    for aside in (run.path.parent / "shards" / "train").glob("*.aside"):
        aside.replace(aside.with_suffix(".tar"))


def _set_clock(offset: str) -> Callable[[Run], None]:
    return lambda run: run.link.set_clock(offset)


def _other_job(run: Run) -> None:
    """Another run on the same nodes at the same time, from start to end."""
    output = f"output={run.output.with_name('other')}"
    other = begin(run.link, run.path, *LONG, output)
    said = other.communicate(timeout=600)
    assert other.returncode == 0, said


def _same_job(run: Run) -> None:
    """The same command once more: its folder is taken."""
    second = begin(run.link, run.path, *LONG)
    said = second.communicate(timeout=LIMIT)
    assert second.returncode == 2 and "is in use by" in said[1], said


LONG = ("train.steps=60",)
"""Of a run that is still there when a second command has begun."""
FAULTS: dict[str, Fault] = {
    "rank 0 killed": Fault(_signal(signal.SIGKILL, "ranks", 0)),
    "rank 1 killed": Fault(_signal(signal.SIGKILL, "ranks", 1)),
    "both ranks killed": Fault(_signal(signal.SIGKILL, "ranks", 0, 1)),
    "rank 0 frozen": Fault(_signal(signal.SIGSTOP, "ranks", 0)),
    "rank 1 frozen": Fault(_signal(signal.SIGSTOP, "ranks", 1)),
    "rank 1 aborted": Fault(_signal(signal.SIGABRT, "ranks", 1)),
    "rank 1 terminated": Fault(_signal(signal.SIGTERM, "ranks", 1)),
    "node 0 lost": Fault(_node(signal.SIGKILL, 0)),
    "node 1 lost": Fault(_node(signal.SIGKILL, 1)),
    "node 0 frozen": Fault(_node(signal.SIGSTOP, 0)),
    "node 1 frozen": Fault(_node(signal.SIGSTOP, 1)),
    "node 1's starter killed": Fault(_signal(signal.SIGKILL, "nodes", 1)),
    "command terminated": Fault(lambda run: run.command.terminate()),
    "command interrupted": Fault(lambda run: run.command.send_signal(signal.SIGINT)),
    "command killed": Fault(lambda run: run.command.kill()),
    "link cut": Fault(_cut(None), lambda run: run.link.link("up")),
    "link away for 3 s": Fault(_cut(3), survived=True),
    "link away for 8 s": Fault(_cut(8), survived=True),
    "rank 1 frozen for 3 s": Fault(
        lambda run: (run.ranks[1].suspend(), time.sleep(3), run.ranks[1].resume())[0], survived=True
    ),
    "command frozen for 5 s": Fault(
        lambda run: (
            run.command.send_signal(signal.SIGSTOP),
            time.sleep(5),
            run.command.send_signal(signal.SIGCONT),
        )[0],
        survived=True,
    ),
    "output vanished": Fault(_vanish, _come_back),
    "disk full": Fault(_fill, lambda run: (run.output.parent / "filler").unlink(), room="200m"),
    "output read-only": Fault(_forbid_writing, _allow_writing),
    "killed, checkpoint cut": Fault(_damage),
    "all killed in a checkpoint's write": Fault(_kill_all, moment="checkpoints/*.tmp"),
    "shards block": Fault(_block, _flow, moment="run.lock", overrides=("train.step_limit=20",)),
    "clock an hour forward": Fault(_set_clock("+1h"), survived=True, clock=True),
    "clock an hour back": Fault(_set_clock("-1h"), survived=True, clock=True),
    "another job beside": Fault(_other_job, survived=True, moment="run.lock", overrides=LONG),
    "the same job beside": Fault(_same_job, survived=True, moment="run.lock", overrides=LONG),
}


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
        ranks = ranks_of()
        nodes = [each.parent() for each in ranks]
        return Run(path, command, ranks, nodes, output, self.nodes)  # type: ignore[arg-type]


def begin(nodes: Nodes, path: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command, on both nodes."""
    return nodes.begin(path, "--hostfile", str(nodes.folder / "hosts1"), *overrides)


def _ended(command: subprocess.Popen[str], seconds: float) -> int | None:
    """Its status; None if it goes on still."""
    try:
        command.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return command.returncode


def ranks_of() -> list[psutil.Process]:
    """The ranks of the run that there is, by number."""
    found = [each for each in _processes() if str(each.environ().get("RANK", "")).isdecimal()]
    leaders = [each for each in found if _is_leader(each)]
    return sorted(leaders, key=lambda each: int(each.environ()["RANK"]))


def _processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if RANK in process.cmdline() and "RANK" in process.environ():
                yield process
        except psutil.Error:
            continue


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
    """The table."""
    lines = [
        "# Faults",
        "",
        f"`python -m benchmarks.faults` on {platform.machine()}, {os.cpu_count()} cores, "
        f"{datetime.date.today().isoformat()}: two nodes in namespaces of one machine. Seconds "
        "until all had ended, or, of what a run survives, until its end.",
        "",
        "| fault | layout | status | seconds | left | beside | same bits | right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        cells = [record[key] for key in ("fault", "layout", "status", "seconds", "left")]
        cells += [record["decoy"], record["same"], is_right(record["fault"], record)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


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
