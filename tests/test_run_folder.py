"""The folder of a run: one run at a time, damaged checkpoints, what was cut."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import image_folder
from dr2dist.errors import UserError
from dr2dist.launching.launcher import LAUNCHER
from dr2dist.training import lock
from dr2dist.training.lock import LOCK, RunLock, check_free
from tests.commands import ROOT, call
from tests.forked import errors_of, start
from tests.images import make_folder, make_small_shards
from tests.pool import Pool, wait_for
from tests.runs import masters

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 2}}
task: {num_classes: 2}
data: {train: SHARDS/train, num_workers: 0}
optim: {name: sgd, lr: 1.0e-2}
train: {steps: 4, micro_batch: 6}
checkpoint: {steps: 1, keep: 3}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, two_ranks: Pool) -> Path:
    """A folder with a configuration, and a run of it with checkpoints after steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("cut")
    text = CONFIG.replace("SHARDS", str(make_small_shards(folder)))
    (folder / "config.yaml").write_text(text.replace("OUTPUT", str(folder / "run")))
    two_ranks.run("tests.cases:run_until", path=str(folder / "config.yaml"), overrides=[], step=3)
    assert len(checkpoints(folder / "run")) == 3
    return folder


def _flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a weight flipped": lambda folder: _flip(folder / "rank-00001.safetensors", -3),
    "a header flipped": lambda folder: _flip(folder / "rank-00000.safetensors", 20),
    "a file cut": lambda folder: _cut(folder / "rank-00000.safetensors"),
    "a file empty": lambda folder: (folder / "rank-00001.safetensors").write_text(""),
    "a file gone": lambda folder: (folder / "rank-00001.safetensors").unlink(),
    "the manifest gone": lambda folder: (folder / "checkpoint.json").unlink(),
    "the manifest empty": lambda folder: (folder / "checkpoint.json").write_text(""),
    "the manifest cut": lambda folder: _cut(folder / "checkpoint.json"),
    "the manifest flipped": lambda folder: _digit(folder / "checkpoint.json"),
    "no file at all": lambda folder: [file.unlink() for file in folder.iterdir()],
}


def _digit(file: Path) -> None:
    text = file.read_text()
    assert '"step": 3,' in text
    file.write_text(text.replace('"step": 3,', '"step": 2,'))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    damage: str, cut: Path, tmp_path: Path, two_ranks: Pool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    newest = checkpoints(run)[-1]
    DAMAGES[damage](newest)
    overrides = [f"output={run}"]
    results = two_ranks.run(
        "tests.cases:run_config", path=str(cut / "config.yaml"), overrides=overrides
    )
    assert results[0]["steps"] == 4
    text = (run / "logs" / "rank-0.log").read_text()
    (line,) = [line for line in text.splitlines() if "it is kept as" in line]
    assert f"{newest}" in line and line.endswith(
        "it is kept as step-00000003.damaged, and 1 steps are run again"
    )
    assert (newest.parent / "step-00000003.damaged").is_dir()
    assert [path.name for path in checkpoints(run)] == [f"step-{n:08d}" for n in (2, 3, 4)]
    Checkpoint(newest).verify()


def _damage(draw: random.Random, file: Path) -> str:
    """One of the things that disks, people and broken copies do to a file."""
    kind = draw.choice(["flip", "cut", "empty", "gone", "more", "zeros", "folder", "noise"])
    data = file.read_bytes()
    if kind == "flip" and data:
        _flip(file, draw.randrange(len(data)))
    elif kind == "cut":
        os.truncate(file, draw.randrange(len(data) + 1))
    elif kind == "more":
        file.write_bytes(data + draw.randbytes(draw.randrange(1, 50)))
    elif kind == "zeros":
        file.write_bytes(bytes(len(data)))
    elif kind == "noise":
        file.write_bytes(draw.randbytes(draw.randrange(200)))
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if kind == "folder":
            file.mkdir()
    return f"{kind} {file.relative_to(file.parents[1])}"


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 100), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_folder_that_is_damaged_anywhere_goes_on_rightly_or_is_refused(
    seeds: range, cut: Path, tmp_path: Path, two_ranks: Pool
) -> None:
    """To the weights of the run that nothing has happened to; a refusal is one line, on all ranks
    alike, and names what is there."""
    config, sound = str(cut / "config.yaml"), tmp_path / "sound"
    shutil.copytree(cut / "run", sound)
    two_ranks.run("tests.folder_cases:goes_on", path=config, output=str(sound))
    wanted = masters(sound)
    for seed in seeds:
        draw, run = random.Random(seed), tmp_path / "run"
        shutil.copytree(cut / "run", run)
        files = sorted(file for file in run.rglob("*") if file.is_file())
        done = [_damage(draw, file) for file in draw.sample(files, draw.choice([1, 1, 2, 3]))]
        found = two_ranks.run("tests.folder_cases:goes_on", path=config, output=str(run))
        assert found[0] == found[1], (seed, done, found)
        if found[0] == "finished":
            ours = masters(run)
            assert all(torch.equal(value, ours[key]) for key, value in wanted.items()), (seed, done)
        else:
            assert "\n" not in found[0] and str(run) in found[0], (seed, done, found)
        shutil.rmtree(run)


def test_no_checkpoint_that_is_sound_is_an_error(
    cut: Path, tmp_path: Path, two_ranks: Pool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    for folder in checkpoints(run):
        _flip(folder / "rank-00001.safetensors", -3)
    with pytest.raises(AssertionError) as caught:
        two_ranks.run(
            "tests.cases:run_config", path=str(cut / "config.yaml"), overrides=[f"output={run}"]
        )
    assert f"checksum differs; no sound checkpoint is left in {run}" in str(caught.value)
    assert len(checkpoints(run)) == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "", "config.yaml: is damaged: it holds no settings"),
        ("config.yaml", "a: [", "config.yaml: cannot be read: while parsing"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 2}\n', "metrics.jsonl: line 2 is damaged"),
        ("metrics.jsonl", '{"step": null}\n', "metrics.jsonl: line 1 is damaged"),
    ],
)
def test_other_damage_is_named(
    name: str, text: str, message: str, cut: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    (run / name).write_text(text)
    status, *told = call(capfd, "train", str(cut / "config.yaml"), f"output={run}", "--dry-run")
    assert status == 2 and message in told[1].splitlines()[-1], told


def test_a_run_that_left_no_checkpoint_says_that_it_starts_anew(
    cut: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    shutil.rmtree(run / "checkpoints")
    status, *told = call(
        capfd, "train", str(cut / "config.yaml"), "--ranks", "2", f"output={run}", "--dry-run"
    )
    assert status == 0 and "the run before was cut before its first checkpoint" in told[0], told


def test_a_run_whose_checkpoints_were_taken_away_is_not_begun_anew(
    cut: Path, tmp_path: Path, two_ranks: Pool, capfd: Any
) -> None:
    run, path = tmp_path / "run", str(cut / "config.yaml")
    shutil.copytree(cut / "run", run)
    two_ranks.run("tests.cases:run_config", path=path, overrides=[f"output={run}"])
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    records = {name: (run / name).read_text() for name in ("summary.json", "metrics.jsonl")}
    line = ("train", path, "--ranks", "2", f"output={run}")
    assert call(capfd, *line, "--dry-run")[0] == 0  # it is finished
    status, _, told = call(capfd, *line, "train.steps=9")
    assert status == 2 and "has done 4 steps, but no checkpoint of it" in told, told
    assert all((run / name).read_text() == text for name, text in records.items())


def test_a_checkpoint_that_was_about_to_be_replaced_is_gone_on_from(
    cut: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    newest = checkpoints(run)[-1]
    newest.rename(newest.with_name(f"{newest.name}.before.tmp"))
    line = ("train", str(cut / "config.yaml"), "--ranks", "2", f"output={run}", "--dry-run")
    status, told, _ = call(capfd, *line)
    assert status == 0 and f"starts from   {newest}\n" in told, told


def test_a_run_that_could_not_prove_a_step_before_its_first_checkpoint_starts_anew(
    cut: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").write_text(json.dumps({"status": "stopped", "steps": 2}))
    line = ("train", str(cut / "config.yaml"), "--ranks", "2", f"output={run}", "--dry-run")
    status, *told = call(capfd, *line)
    assert status == 0 and "the run before was cut before its first checkpoint" in told[0], told


def test_only_what_a_run_has_named_is_its_checkpoint(
    cut: Path, tmp_path: Path, two_ranks: Pool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    newest = checkpoints(run)[-1]
    own = [
        shutil.copytree(newest, newest.with_name(name))
        for name in ("step-before-change", "mine.old.tmp", "step-00000003-mine.tmp")
    ]
    (link := newest.with_name("step-99999999")).symlink_to(newest)
    left = [
        shutil.copytree(newest, newest.with_name(f"step-0000000{name}"))
        for name in ("1.tmp", "3.before.tmp", "1.old.tmp")
    ]
    overrides = [f"output={run}", "checkpoint.keep=1"]
    results = two_ranks.run(
        "tests.cases:run_config", path=str(cut / "config.yaml"), overrides=overrides
    )
    assert results[0]["steps"] == 4
    assert all(path.exists() for path in own) and link.is_symlink()
    assert not any(path.exists() for path in left)
    assert [path.name for path in checkpoints(run)][-1] == "step-00000004"


HOLD = """
import sys, time, pathlib
from dr2dist.training.lock import RunLock
with RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(999)
"""


def test_one_folder_one_run_and_a_dead_owners_lock_is_free(
    cut: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(cut / "run", run)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} of "):
            check_free(run, 999.0)  # nobody watches over it: it does not end by itself
        with pytest.raises(UserError, match="in use by"), RunLock(run):
            raise AssertionError
        line = ("train", str(cut / "config.yaml"), "--ranks", "2", f"output={run}", "--dry-run")
        status, *told = call(capfd, *line)
        assert status == 2 and f"in use by process {holder.pid} of" in told[1].splitlines()[-1]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (run / LOCK).exists()
    with RunLock(run):
        assert json.loads((run / LOCK).read_text())["process"] == os.getpid()
    assert not (run / LOCK).exists()


def test_ranks_of_a_command_that_was_killed_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(lock, "ENDING", 0.0)
    with subprocess.Popen(["true"]) as command:
        command.wait()
    variables = {**os.environ, LAUNCHER: str(command.pid)}
    line = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, env=variables) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by"):
            check_free(tmp_path, 0.5)
        threading.Timer(0.5, holder.kill).start()
        check_free(tmp_path, 60.0)
    told = f"dr2dist: {tmp_path}: waits for process {holder.pid} of "
    assert [text.startswith(told) for text in capfd.readouterr().err.splitlines()] == [True] * 2


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with RunLock(tmp_path / "run"):
        assert "this file system has no locks (Operation not supported)" in caplog.text


HANG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 1}}
task: {num_classes: 2}
data: {train: SHARDS/train, num_workers: 0}
optim: {lr: 1.0e-3}
train: {steps: 400, micro_batch: 2, step_limit: 30}
checkpoint: {steps: 1}
parallel: {zero: 0}
output: OUTPUT
"""


def test_storage_that_hangs_is_named_and_ends_all_ranks(tmp_path: Path, capfd: Any) -> None:
    """Until then nobody else can have the run's folder, and afterwards everybody."""
    shards, config, run = (tmp_path / name for name in ("shards", "config.yaml", "run"))
    records, classes = image_folder(make_folder(tmp_path / "images", 60))
    # Of two samples each: most are not open yet after a step.
    make_shards(records, classes, shards, samples_per_shard=2, val_fraction=0.3, progress=False)
    config.write_text(HANG.replace("SHARDS", str(shards)).replace("OUTPUT", str(run)))
    output = tmp_path / "said"
    process = start(["train", str(config), "--ranks", "2"], ROOT, output)
    try:
        wait_for(lambda: bool(checkpoints(run)), "a checkpoint")
        for path in (shards / "train").glob("*.tar"):
            # Nobody writes to it: opening it never returns. Renamed, so that none is missing.
            os.mkfifo(pipe := path.with_suffix(".pipe"))
            pipe.replace(path)
        status, _, told = call(capfd, "train", str(config), "--ranks", "2")
        assert status == 2 and f"output: {run} is in use by process " in told, told
        assert '"state": "running"' in call(capfd, "status", str(run), "--json")[1]
        process.join(120)
    finally:
        process.kill()
    told = errors_of(output).read_text()
    assert process.exitcode == 75, told
    assert "did not end within 30 s: it waits for 'file = self.index.path(shard).open(" in told
    assert "data/opened.py" in told and "the same command goes on from the last" in told
    assert "stack of the main thread" in (run / "logs" / "rank-0.log").read_text()
    assert '"state": "cut"' in call(capfd, "status", str(run), "--json")[1]  # nobody has the lock
