"""Runs that are told to stop go on to the same bits; nothing is left running, nobody else ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.signals import Bench, Case, is_right, pairwise
from dr2dist.errors import UserError
from dr2dist.launching import supervise
from dr2dist.launching.launcher import LocalLauncher
from dr2dist.launching.supervise import Signals, combined, with_restarts
from dr2dist.status import APART, Status
from tests.pool import wait_for

ROOT = Path(__file__).parent.parent

DEFAULT = [
    Case("TERM", "command", "step", "ZeRO-2"),
    Case("KILL", "rank 1", "validation", "ZeRO-2"),
    Case("INT", "rank 1", "validation", "2 stages"),
    Case("USR1", "everyone", "step", "2 stages"),
]
MORE = [Case("KILL", "command", "checkpoint", "ZeRO-2")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("signals"))


@pytest.mark.parametrize(
    "case",
    [*DEFAULT, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda case: case.name,
)
def test_a_run_that_is_hit_goes_on_to_the_same_bits(case: Case, bench: Bench) -> None:
    found = bench.run(case)
    text = (bench.folder / f"{case.name}.txt").read_text()
    assert is_right(case, found), (found, text)
    assert "Traceback" not in text
    told = [line for line in text.splitlines() if line.startswith("dr2dist: ")]
    assert len(told) == 1 or case.signal == "KILL", text  # each rank says of a lost one who it was


def test_a_run_is_started_again_until_it_has_ended_or_cannot_begin(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(supervise, "FIRST_WAIT", 0.01)

    def ends(*outcomes: int | str, most: int = 9) -> int:
        rest = iter(outcomes)

        def start() -> int:
            outcome = next(rest)
            if isinstance(outcome, str):
                raise UserError(outcome)
            return outcome

        with Signals() as signals:
            return with_restarts(start, most, signals)

    lost, wrong = Status.LOST, Status.USER_ERROR
    assert ends(lost, "no route to b", wrong, lost, 0) == 0
    waits = [
        line.split(", in ")[1] for line in capfd.readouterr().err.splitlines() if "start" in line
    ]
    assert waits == ["0.01 s", "0.02 s", "0.04 s", "0.08 s"]
    assert ends(wrong) == wrong and ends(Status.STOPPED) == Status.STOPPED
    assert ends(lost, lost, most=1) == lost and ends(lost, most=0) == lost
    with pytest.raises(UserError, match="no such file"):
        ends("no such file")
    monkeypatch.setattr(supervise, "STEADY", 0.0)
    assert ends(lost, lost, 0) == 0
    assert capfd.readouterr().err.count("in 0.01 s") == 3


def test_a_signal_while_hosts_are_asked_again_is_heard(
    monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(supervise, "FIRST_WAIT", 0.01)
    starts = []
    with Signals() as signals:

        def start() -> int:
            starts.append(1)
            signals.started = True
            if len(starts) == 1:
                return Status.LOST
            signal.raise_signal(signal.SIGTERM)
            raise UserError("host b: no answer")

        assert with_restarts(start, 9, signals) == Status.STOPPED
    assert capfd.readouterr().err.endswith(
        "dr2dist: stopped before it was started again; the same command goes on\n"
    )


def test_a_rank_that_a_signal_has_ended_is_named(capfd: Any) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with Signals() as signals:
        line = [sys.executable, "-c", code]
        place = {"RANK": "2"}  # the first of the second host
        assert supervise.supervise(LocalLauncher(), line, [place], signals, 1.0) == Status.LOST
    said = capfd.readouterr().err
    assert said == "dr2dist: rank 2 was ended by a signal: Killed, as where memory is full\n"


CLOSED = """
import subprocess, sys
from dr2dist.status import Status, end_after
def main():
    with open(sys.argv[1], "w") as file:
        print("said"), print("said", file=sys.stderr), file.write("kept"), sys.stdin.read()
    if len(sys.argv) == 2:
        raise SystemExit(Status.STOPPED)
    line = ["-c", open("/proc/self/cmdline").read().split(chr(0))[2], sys.argv[2]]
    raise SystemExit(subprocess.run([sys.executable, *line]).returncode)
end_after(main)
"""


def test_closed_streams_are_nobodys_also_of_what_a_process_starts(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("command.txt", "rank.txt")]
    script = 'exec "$0" -c "$@" <&- >&- 2>&-'
    line = ["sh", "-c", script, sys.executable, CLOSED, *map(str, paths)]
    assert subprocess.run(line, cwd=ROOT).returncode == Status.STOPPED
    assert [path.read_text() for path in paths] == ["kept"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("case", pairwise(), ids=lambda case: case.name)
def test_any_two_of_signal_receiver_moment_and_layout(case: Case, bench: Bench) -> None:
    found = bench.run(case)
    assert is_right(case, found), (found, (bench.folder / f"{case.name}.txt").read_text())


def test_every_pair_is_in_few_cases() -> None:
    cases = pairwise()
    assert len(cases) <= 30
    for one, other in (("USR1", "2 stages"), ("rank 0", "checkpoint"), ("KILL", "group")):
        assert any({one, other} <= set(case) for case in cases)


WRITE = "import os, pathlib, signal, subprocess, sys, time; p = pathlib.Path(os.environ['FILE'])\n"
CHILD = WRITE + (
    "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)'])\n"
    "q = p.with_suffix('.new'); q.write_text(str(c.pid)); q.rename(p)\n"
    "time.sleep(999 if p.name == '0.txt' else 0)\n"
)


def test_what_a_rank_has_started_ends_with_it_and_nothing_else(tmp_path: Path) -> None:
    files = [tmp_path / f"{rank}.txt" for rank in range(2)]
    launcher = LocalLauncher()
    launcher.start([sys.executable, "-c", CHILD], [{"FILE": str(file)} for file in files])
    wait_for(files[0].exists, "the start of the first")
    wait_for(lambda: launcher.statuses()[1] == 0, "the end of the second")
    wait_for(lambda: _gone(files[1]), "the end of what it has started")
    assert launcher.statuses()[0] is None and not _gone(files[0])
    launcher.kill()
    wait_for(lambda: launcher.statuses()[0] == -signal.SIGKILL, "the end of the first")
    wait_for(lambda: _gone(files[0]), "the end of what it has started")


ANSWER = """
import signal, sys
from dr2dist.status import take_signals
signal.signal(int(sys.argv[1]), lambda *_: sys.exit(75))
take_signals()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_waits_until_a_rank_can_answer_it(name: str) -> None:
    """Python's own start would end by it, by SIGINT even with a status of a mistake."""
    launcher, number = LocalLauncher(), signal.Signals[name]
    launcher.start([sys.executable, "-c", ANSWER, str(int(number))], [{"PYTHONPATH": str(ROOT)}])
    launcher.send(number)  # long before it has read its first line
    wait_for(lambda: launcher.statuses() != [None], "its end")
    assert launcher.statuses() == [75]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _gone(file: Path) -> bool:
    """Whether the process that a file names has ended."""
    status = Path(f"/proc/{file.read_text()}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


DEAF = WRITE + (
    "[signal.signal(n, signal.SIG_IGN) for n in (15, 2, 1, 10)]; p.write_text(''); time.sleep(999)"
)
SUPERVISE = """
import sys
from dr2dist.launching.launcher import LocalLauncher
from dr2dist.launching.supervise import Signals, supervise
with Signals() as signals:
    places = [{"FILE": file} for file in sys.argv[2:]]
    sys.exit(supervise(LocalLauncher(), [sys.executable, "-c", sys.argv[1]], places, signals, 999))
"""


def test_a_second_signal_ends_what_does_not_hear_the_first(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two")]
    command = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, DEAF, *map(str, files)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    wait_for(lambda: all(file.exists() for file in files), "what both write")
    ranks = psutil.Process(command.pid).children()
    command.send_signal(signal.SIGUSR1)
    command.send_signal(signal.SIGUSR1)  # both at once are one
    time.sleep(2 * APART)
    assert command.poll() is None
    command.send_signal(signal.SIGINT)
    assert command.wait(20) == Status.STOPPED
    assert not psutil.wait_procs(ranks, 10)[1]
    assert command.stderr is not None
    (line,) = command.stderr.read().splitlines()
    assert line.startswith("dr2dist: stopped before a checkpoint could be written; the same")


@pytest.mark.parametrize(
    ("statuses", "asked", "status"),
    [
        ([0, 0], False, 0),
        ([0, 0], True, 0),
        ([4, 2], False, 2),
        ([3, 3], False, 3),
        ([75, 75], False, 75),
        ([75, 4], True, 75),
        ([-signal.SIGTERM, 4], False, 75),
        ([-signal.SIGKILL, 4], False, 4),
        ([-signal.SIGSEGV, -signal.SIGKILL], False, 4),
        ([1, -signal.SIGKILL], False, 4),
        ([1, 1], False, 1),
        ([-signal.SIGKILL, -signal.SIGKILL], True, 75),
    ],
)
def test_one_status_for_all_ranks(statuses: list[int | None], asked: bool, status: int) -> None:
    assert combined(statuses, asked) == status


def test_nohup_leaves_a_closing_terminal_ignored() -> None:
    text = "from dr2dist.status import handled; print([n.name for n in handled()])"
    line = ["sh", "-c", f'trap "" HUP; exec "{sys.executable}" -c "{text}"']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['SIGTERM', 'SIGINT', 'SIGUSR1']"
