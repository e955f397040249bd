"""What befalls runs of faults.py, and what undoes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.nodes import Nodes
from benchmarks.signals import LIMIT


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
    moment: str = "checkpoints/step-*[0-9]/checkpoint.json"
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
    "killed, checkpoint cut": Fault(_damage, moment="checkpoints/step-*10/checkpoint.json"),
    "all killed in a checkpoint's write": Fault(_kill_all, moment="checkpoints/*.tmp"),
    "shards block": Fault(_block, _flow, moment="run.lock", overrides=("train.step_limit=20",)),
    "clock an hour forward": Fault(_set_clock("+1h"), survived=True, clock=True),
    "clock an hour back": Fault(_set_clock("-1h"), survived=True, clock=True),
    "another job beside": Fault(_other_job, survived=True, moment="run.lock", overrides=LONG),
    "the same job beside": Fault(_same_job, survived=True, moment="run.lock", overrides=LONG),
}


def begin(nodes: Nodes, path: Path, *overrides: str) -> subprocess.Popen[str]:
    """The command, on both nodes."""
    return nodes.begin(path, "--hostfile", str(nodes.folder / "hosts1"), *overrides)
