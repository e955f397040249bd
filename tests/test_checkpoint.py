"""Checkpoints and going on: whatever ends a run, and whatever layout goes on with it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from dr2dist.checkpoints.checkpoint import Checkpoint
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.errors import UserError
from tests.commands import ROOT, dr2dist
from tests.forked import start
from tests.images import make_small_shards
from tests.manifests import change
from tests.pool import Pool, wait_for
from tests.runs import assert_same_run, metrics

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 4},
  drop_path: 0.1, dropout: 0.1}
coefficients: {kind: conserve, beta: [0.1, 0.5], every: 2}
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, val: SHARDS/val, num_workers: 0}
optim: {name: adamw, lr: 1.0e-4}
train: {steps: 8, micro_batch: 6, log_every: 1, validate_every: 4}
checkpoint: {steps: 3}
output: OUTPUT
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_shards(tmp_path_factory.mktemp("data"))


def write_config(tmp_path: Path, shards: Path, name: str = "run", text: str = CONFIG) -> Path:
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace("SHARDS", str(shards)).replace("OUTPUT", str(tmp_path / name)))
    return path


@pytest.mark.parametrize("zero", [1, 3, *(pytest.param(z, marks=pytest.mark.slow) for z in (0, 2))])
def test_a_run_that_breaks_off_anywhere_goes_on_to_the_same_bits(
    zero: int, tmp_path: Path, shards: Path, two_ranks: Pool
) -> None:
    quiet, broken = (write_config(tmp_path, shards, name) for name in ("quiet", "broken"))
    stage = [f"parallel.zero={zero}"]
    two_ranks.run("tests.cases:run_config", path=str(quiet), overrides=stage)
    for step in (2, 5, 7):  # before the first checkpoint, and after others
        two_ranks.run("tests.cases:run_until", path=str(broken), overrides=stage, step=step)
        assert not (tmp_path / "broken" / "summary.json").exists()
    results = two_ranks.run("tests.cases:run_config", path=str(broken), overrides=stage)
    assert results[0]["steps"] == 8
    assert_same_run(tmp_path / "quiet", tmp_path / "broken")
    kept = [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path / "broken")]
    assert kept == sorted({6, 8, results[0]["best"]["step"]})


@pytest.mark.parametrize(
    ("zero", "kills"),
    [(2, (4,)), *(pytest.param(zero, (2, 6), marks=pytest.mark.slow) for zero in range(4))],
)
def test_a_killed_run_goes_on_by_the_same_command(
    zero: int, kills: tuple[int, ...], tmp_path: Path, shards: Path, two_ranks: Pool
) -> None:
    """SIGKILL to the whole tree of processes, at times that nobody chose."""
    quiet, broken = (write_config(tmp_path, shards, name) for name in ("quiet", "broken"))
    more = [f"parallel.zero={zero}", "checkpoint.steps=1", "data.num_workers=1"]
    two_ranks.run("tests.cases:run_config", path=str(quiet), overrides=more)
    for lines in kills:
        process = _command(broken, more)
        _wait_for_lines(tmp_path / "broken" / "metrics.jsonl", lines)
        os.killpg(process.pid, signal.SIGKILL)
        process.join(30)
    done = dr2dist("train", str(broken), "--ranks", "2", *more)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "quiet", tmp_path / "broken")
    assert not list((tmp_path / "broken" / "checkpoints").glob("*.tmp"))


def test_steps_go_on_while_a_checkpoint_is_written(
    tmp_path: Path, shards: Path, two_ranks: Pool
) -> None:
    quiet, slow, full = (write_config(tmp_path, shards, name) for name in ("one", "two", "full"))
    two_ranks.run("tests.cases:run_config", path=str(quiet), overrides=[])
    case = "tests.folder_cases:run_writing"
    for how, spans in two_ranks.run(case, path=str(slow), fails=False):
        assert how == "finished"
        assert [after - before for before, after in spans] == [1] * (len(spans) - 1) + [0]
        assert [before for before, _ in spans[-2:]] == [6, 8]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert os.listdir(tmp_path / "two" / "checkpoints").count("step-00000006") == 1
    ends = [how for how, _ in two_ranks.run(case, path=str(full), fails=True)]
    assert len(set(ends)) == 1 and "cannot be written: No space left on device" in ends[0]
    assert metrics(tmp_path / "full")[-1]["step"] in (4, 5)


def _command(config: Path, more: list[str]) -> ForkServerProcess:
    line = ["train", str(config), "--ranks", "2", *more]
    return start(line, ROOT, config.with_suffix(".log"))


def _wait_for_lines(path: Path, count: int) -> None:
    def there() -> bool:
        return path.exists() and len(path.read_text().splitlines()) >= count

    wait_for(there, f"{path} with {count} lines")


def _sum(state: dict[str, Any]) -> str:
    """As the manifest's format has it: SHA-256 of its JSON with sorted keys."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


PLAIN = CONFIG.replace(",\n  drop_path: 0.1, dropout: 0.1", "").replace("steps: 8", "steps: 9")


def test_another_layout_goes_on_along_the_same_curve(
    tmp_path: Path, shards: Path, one_rank: Pool, two_ranks: Pool, three_ranks: Pool
) -> None:
    def go(pool: Pool, name: str, ranks: int, zero: int, step: int | None = None) -> None:
        overrides = [f"parallel.zero={zero}", f"train.micro_batch={12 // ranks}"]
        path = write_config(tmp_path, shards, name, PLAIN)
        case = "run_config" if step is None else "run_until"
        more = {} if step is None else {"step": step}
        pool.run(f"tests.cases:{case}", path=str(path), overrides=overrides, **more)

    go(two_ranks, "quiet", 2, 3)
    for name, pool, ranks, zero in (("one", one_rank, 1, 0), ("three", three_ranks, 3, 1)):
        go(two_ranks, name, 2, 3, step=5)
        go(pool, name, ranks, zero)
        for line, wanted in zip(metrics(tmp_path / name), metrics(tmp_path / "quiet"), strict=True):
            for key in ("loss", "val_loss", "lr", "alpha"):
                if key in wanted:
                    assert line[key] == pytest.approx(wanted[key], rel=1e-4), (name, line)


@pytest.mark.slow
def test_one_run_goes_through_ranks_zero_and_stages_along_the_same_curve(
    tmp_path: Path, shards: Path, two_ranks: Pool, three_ranks: Pool, four_ranks: Pool
) -> None:
    text = PLAIN.replace("name: adamw, lr: 1.0e-4", "name: sgd, lr: 1.0e-2")
    life = [
        (four_ranks, "{zero: 2}", 3),
        (two_ranks, "{zero: 3}", 6),
        (three_ranks, "{zero: 1}", 4),
        (four_ranks, "{zero: 0, stages: 2}", 6),
        (two_ranks, "{zero: 2}", 6),
    ]
    quiet, moved = (write_config(tmp_path, shards, name, text) for name in ("quiet", "moved"))
    lasts = ["train.micro_batch=6", "parallel={zero: 2}"]
    two_ranks.run("tests.cases:run_config", path=str(quiet), overrides=lasts)
    for number, (pool, parallel, batch) in enumerate(life):
        more = [f"train.micro_batch={batch}", f"parallel={parallel}", "checkpoint.steps=1"]
        last = number == len(life) - 1
        steps = {} if last else {"step": 2 * number + 2}
        case = "tests.cases:run_config" if last else "tests.cases:run_until"
        pool.run(case, path=str(moved), overrides=more, **steps)
    found, wanted = (
        {line["step"]: line["loss"] for line in metrics(tmp_path / name) if "loss" in line}
        for name in ("moved", "quiet")
    )
    assert found.keys() == wanted.keys() and len(wanted) == 9
    for step, loss in wanted.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), step


def test_what_cannot_be_gone_on_with_is_refused(
    tmp_path: Path, shards: Path, one_rank: Pool
) -> None:
    path = write_config(tmp_path, shards)
    one_rank.run("tests.cases:run_until", path=str(path), overrides=[], step=4)

    def refusal(*overrides: str) -> str:
        with pytest.raises(AssertionError) as caught:
            one_rank.run("tests.cases:run_config", path=str(path), overrides=list(overrides))
        return str(caught.value)

    assert "holds a run with optim.lr: 0.0001, now it is 0.01" in refusal("optim.lr=0.01")
    assert "was written with 6" in refusal("train.micro_batch=4")
    newest = checkpoints(tmp_path / "run")[-1]
    change(newest, lambda state: state.update(format=0))
    with pytest.raises(UserError, match="its checksum differs"):
        Checkpoint(newest)
    change(newest, lambda state: state.update(format=3, checksum=_sum({**state, "format": 3})))
    with pytest.raises(UserError, match="format 3, allowed is 1 or 2"):
        Checkpoint(newest)
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    assert "is not empty and holds no run" in refusal(f"output={other}")
