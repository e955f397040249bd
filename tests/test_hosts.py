"""Several hosts, reached by an ssh that hands its command to a shell here, as sshd does there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dr2dist.checkpoints.folders import checkpoints
from dr2dist.errors import UserError
from dr2dist.launching.hosts import Host, is_here, read_hostfile
from dr2dist.launching.remote import forwarded
from tests.commands import call, dr2dist
from tests.images import make_small_shards
from tests.pool import wait_for
from tests.runs import losses, masters

ROOT = Path(__file__).parent.parent
SSH = """#!/bin/bash
while [ "$1" != -- ]; do shift; done
host=$2; shift 2
echo "$host $*" >> "$(dirname "$0")/../ssh.txt"
case $host in
    gone) echo "a banner" >&2; echo "ssh: connect to host gone port 22: refused" >&2; exit 255;;
    late) exec sleep 60;;
    bare) exec bash -c "cd /; ${*/python/no-such-python}";;
esac
[ -e "$(dirname "$0")/../down-$host" ] && { echo "no route to $host" >&2; exit 255; }
echo "Welcome to $host"
exec bash -c "$*"
"""
HOSTFILES = {
    "two": "a slots=1\nb slots=1",
    "one": "far slots=2",
    "bad": "gone slots=1\nlate slots=1\nbare slots=1",
}
CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: shards/train, num_workers: 0}
optim: {lr: 1e-3}
train: {steps: 3, micro_batch: 4, log_every: 1}
parallel: {zero: 1}
launch: {join_limit: 20}
output: run
"""


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a slots=2", [Host("a", 2)]),
        ("a\tslots=2\n\n# b slots=1\nme@c   slots=1  # last", [Host("a", 2), Host("me@c", 1)]),
        ("a slots=4 max_slots=8\r\n", [Host("a", 4)]),
        ("[fe80::1%e] slots=1\n10.0.0.7 slots=1", [Host("[fe80::1%e]", 1), Host("10.0.0.7", 1)]),
    ],
)
def test_hostfiles_are_read(text: str, hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    assert read_hostfile(tmp_path / "hosts") == hosts
    assert Host("me@[::1]", 1).address == "::1" and is_here(Host("me@[::1]", 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a", "hosts:1: a has no slots, allowed is HOST slots=N"),
        ("a slots=0", "hosts:1: a has slots=0"),
        ("a slots=two", "hosts:1: a has slots=two"),
        ("a slots=1\nb slots 1", "hosts:2: found 'slots'"),
        ("a slots=1\nb gpus=1", "hosts:2: found 'gpus=1'"),
        ("-oProxyCommand=x slots=1", "hosts:1: found '-oProxyCommand=x slots=1'"),
        ("a;b slots=1", "hosts:1: found 'a;b slots=1'"),
        ("a slots=1\na slots=1", "hosts:2: a is there already, on line 1"),
        ("a slots=1\nme@a slots=1", "hosts:2: me@a is there already, on line 1"),
        (
            "localhost slots=1\n127.0.0.1 slots=1",
            "127.0.0.1 is there already as localhost",
        ),
    ],
)
def test_wrong_hostfiles_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError) as error:
        read_hostfile(tmp_path / "hosts")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_variables_that_matter_are_forwarded() -> None:
    here = {"NCCL_DEBUG": "1", "https_proxy": "p", "HOME": "h", "MINE": "m", "OMP_NUM_THREADS": "2"}
    assert forwarded(here).keys() == {"NCCL_DEBUG", "https_proxy", "OMP_NUM_THREADS"}
    assert forwarded(here, ["MINE"])["MINE"] == "m"
    with pytest.raises(UserError, match=r"launch\.env: OTHER is not set here"):
        forwarded(here, ["OTHER"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a blank and an apostrophe in its name: data, configuration, hostfiles, ssh."""
    folder = tmp_path_factory.mktemp("hosts") / "it's here"
    folder.mkdir()
    make_small_shards(folder)
    (folder / "run.yaml").write_text(CONFIG)
    for name, text in HOSTFILES.items():
        (folder / name).write_text(text)
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(SSH)
    (folder / "bin" / "ssh").chmod(0o755)
    return folder


def begin(place: Path, *arguments: str) -> subprocess.Popen[str]:
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "dr2dist.cli", "train", "run.yaml", *arguments],
        cwd=place,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def here(place: Path, *arguments: str) -> None:
    """A run of two ranks on this machine alone."""
    done = dr2dist("train", "run.yaml", "--ranks", "2", *arguments, folder=place)
    assert "every step proved its reversal" in done.stdout, done.stdout + done.stderr


def whole(place: Path, *arguments: str) -> str:
    out, err = begin(place, *arguments).communicate(timeout=400)
    assert "every step proved its reversal" in out, out + err
    return out


def test_two_hosts_give_the_bits_of_one_and_no_shell_sees_a_word(place: Path) -> None:
    awkward = "output=it's $HOME; `id`"
    braces = "data.train=shards/train/shard-{000000..000001}.tar"
    out = whole(place, "--hostfile", "two", braces, awkward)
    assert "host          a (" in out and "2 ranks meet at " in out
    lines = (place / "ssh.txt").read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == ["a", "b"]  # asked side by side
    assert not any(word in line for line in lines for word in ("HOME", "shard-", "it's", "output"))
    here(place, braces, "output=here")
    one, other = masters(place / "here"), masters(place / "it's $HOME; `id`")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_one_far_host_alone_runs_there(place: Path) -> None:
    (place / "ssh.txt").unlink(missing_ok=True)
    whole(place, "--hostfile", "one", "output=far")
    assert (place / "ssh.txt").read_text().startswith("far ")
    assert json.loads((place / "far" / "summary.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_hosts_without_ssh_are_started_one_by_one(place: Path) -> None:
    same = (
        "--hostfile",
        "two",
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        "29733",
        "output=by",
    )
    second = begin(place, *same, "--node-rank", "1")
    out = whole(place, *same, "--node-rank", "0")
    assert "1 of 2 rank(s) on this machine" in out
    assert second.wait(60) == 0


def test_hosts_that_do_not_come_are_named_in_one_line(place: Path) -> None:
    command = begin(place, "--hostfile", "bad", "output=never", "launch.join_limit=5", "--dry-run")
    _, err = command.communicate(timeout=200)
    assert command.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("dr2dist: ")]
    assert "host gone: ssh: connect to host gone port 22: refused" in line
    assert "host late: no answer within 5 s (launch.join_limit)" in line
    assert "host bare: " in line and "no-such-python" in line
    assert "banner" not in line and not (place / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-rank", "0"], "--node-rank has no effect without --hostfile"),
        (["--master-port", "1"], "--master-port has no effect without --hostfile"),
        (["--hostfile", "two", "--node-rank", "2"], "--node-rank 2: two has 2 host(s)"),
        (["--hostfile", "none"], "none: the hostfile does not exist"),
        (["--hostfile", "two", "--ranks", "7"], "--ranks: not allowed with argument --hostfile"),
        (["--hostfile", "two", "launch.allow=[speed]"], "launch.allow"),
        (["--hostfile", "two", "launch.env=[NOT_SET]", "--dry-run"], "NOT_SET is not set here"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], message: str, place: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    status, _, err = call(capfd, "train", "run.yaml", *arguments, "output=refused")
    assert status == 2 and message in err.splitlines()[-1]
    assert not (place / "refused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["node", "TERM", "KILL", "frozen"])
def test_what_ends_the_command_or_a_host_ends_all_hosts(fault: str, place: Path) -> None:
    output = place / f"ended-{fault}"
    steps = ("train.steps=100000", "checkpoint.steps=100000")
    command = begin(place, "--hostfile", "two", f"output={output.name}", *steps)
    metrics = output / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 5,' in metrics.read_text(), "a few steps")
    all_ = psutil.Process(command.pid).children(recursive=True)
    nodes = [each for each in all_ if each.ppid() == command.pid]
    assert len(nodes) == 2
    stopped = [nodes[1], *nodes[1].children(recursive=True)] if fault == "frozen" else []
    for process in stopped:
        process.suspend()
    if fault == "node":
        nodes[1].kill()
    elif fault != "frozen":
        command.send_signal(signal.Signals[f"SIG{fault}"])
    _, err = command.communicate(timeout=60)
    assert not psutil.wait_procs([each for each in all_ if each not in stopped], 60)[1]
    for process in stopped[1:]:
        process.kill()  # the node itself is ended
    assert command.returncode == {"KILL": -signal.SIGKILL, "frozen": 4}.get(fault, 75), err
    told = [line for line in err.splitlines() if line.startswith("dr2dist: ")]
    assert len(told) == 1 or fault == "KILL", err
    # Every rank could end its step and write, but where one was frozen.
    assert bool(checkpoints(output)) == (fault != "frozen")


LONG = ("train.steps=12", "checkpoint.steps=3", "train.accumulate=2")


@pytest.mark.slow
def test_a_lost_rank_is_started_again_to_the_same_bits(place: Path) -> None:
    here(place, *LONG, "output=quiet")
    command = begin(place, "--ranks", "2", "--max-restarts", "1", *LONG, "output=restarted")
    wait_for(lambda: bool(checkpoints(place / "restarted")), "a checkpoint")
    ranks = psutil.Process(command.pid).children()
    ranks[1].kill()
    _, err = command.communicate(timeout=300)
    assert command.returncode == 0, err
    assert "dr2dist: start 1 of at most 1 more, in 5 s" in err.splitlines()
    one, other = masters(place / "quiet"), masters(place / "restarted")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert losses(place / "quiet") == losses(place / "restarted")
    starts = (place / "restarted" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] > 0 for line in starts] == [False, True]


@pytest.mark.slow
def test_a_run_goes_on_without_a_host_that_is_gone_with_the_same_batch(place: Path) -> None:
    here(place, *LONG, "output=all")
    options = ("--max-restarts", "1", "--min-ranks", "1", *LONG, "output=fewer")
    command = begin(place, "--hostfile", "two", *options)
    wait_for(lambda: bool(checkpoints(place / "fewer")), "a checkpoint")
    (place / "down-b").touch()
    try:
        nodes = psutil.Process(command.pid).children()
        for process in nodes[1].children(recursive=True):  # the rank first: it would stop in order
            process.kill()
        nodes[1].kill()
        out, err = command.communicate(timeout=300)
    finally:
        (place / "down-b").unlink()
    assert command.returncode == 0, out + err
    assert "dr2dist: left out: host b: no route to b" in err.splitlines()
    assert json.loads((place / "fewer" / "summary.json").read_text())["ranks"] == 1
    found, wanted = losses(place / "fewer"), losses(place / "all")
    assert found.keys() == wanted.keys()
    assert all(found[step] == pytest.approx(wanted[step], rel=1e-5) for step in wanted)
