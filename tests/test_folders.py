"""Checkpoints of ranks that do not see the same files, and how checkpoints are written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import dr2dist
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.checkpoints.tensors import Source, write_tensors
from dr2dist.inference.exported import export
from dr2dist.launching.launcher import free_port
from dr2dist.training.checkpoint_manager import Progress
from dr2dist.training.lock import LOCK
from tests.images import make_small_shards
from tests.manifests import change
from tests.pool import Pool

CONFIG = """
model: {name: vit_tiny_patch16_224, weights: random, image_size: 32, options: {depth: 2}}
coefficients: {kind: constant, alpha: 0.9, beta: 0.1}
task: {name: classification, num_classes: 2}
data: {train: SHARDS/train, num_workers: 0}
optim: {name: sgd, lr: 1.0e-2}
train: {steps: 4, micro_batch: 6}
checkpoint: {steps: 2}
output: run
"""


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory, two_ranks: Pool) -> tuple[Path, Path]:
    """A configuration, and a folder with a run of it that ended after two steps."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("SHARDS", str(make_small_shards(folder))))
    output = [f"output={folder / 'run'}"]
    two_ranks.run("tests.cases:run_until", path=str(path), overrides=output, step=3)
    assert len(checkpoints(folder / "run")) == 1
    return path, folder


def share_lock(tmp_path: Path) -> None:
    """The lock of rank 0's run is there for rank 1 too, as if they shared the folder."""
    (tmp_path / "1" / "run").mkdir(parents=True, exist_ok=True)
    (tmp_path / "1" / "run" / LOCK).symlink_to(tmp_path / "0" / "run" / LOCK)


def apart(broken_off: tuple[Path, Path], tmp_path: Path, pool: Pool) -> tuple[str, Path]:
    """How the run ends when rank 1 is in `tmp_path / "1"`; the checkpoint that rank 0 sees."""
    path, _ = broken_off
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    ends = pool.run("tests.folder_cases:run_apart", path=str(path), folders=folders)
    assert ends[0] == ends[1] and "\n" not in ends[0]
    (checkpoint,) = checkpoints(tmp_path / "0" / "run")
    return ends[0], checkpoint.relative_to(tmp_path / "0")


@pytest.mark.parametrize("fault", ["checkpoint", "file", "other"])
def test_what_another_rank_does_not_see_is_named(
    fault: str, broken_off: tuple[Path, Path], tmp_path: Path, two_ranks: Pool
) -> None:
    for rank in ("0", "1"):
        shutil.copytree(broken_off[1] / "run", tmp_path / rank / "run")
    theirs = tmp_path / "1" / "run"
    (seen,) = checkpoints(theirs)
    share_lock(tmp_path)
    if fault == "checkpoint":
        seen.rename(seen.with_name("step-00000001"))
    if fault == "file":
        (seen / "rank-00001.safetensors").unlink()
    if fault == "other":
        change(seen, lambda state: state.update(beta=0.2))
    end, checkpoint = apart(broken_off, tmp_path, two_ranks)
    named = checkpoint / ("rank-00001.safetensors" if fault == "file" else "checkpoint.json")
    found = "is not what rank 0 sees there" if fault == "other" else "cannot be read: No such file"
    assert end.startswith(f"{named}: {found}") and end.endswith(" (rank 1)")


def test_a_rank_that_cannot_write_is_named(
    broken_off: tuple[Path, Path], tmp_path: Path, two_ranks: Pool
) -> None:
    path, _ = broken_off
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    Path(folders[0]).mkdir()
    share_lock(tmp_path)
    ends = two_ranks.run("tests.folder_cases:run_apart", path=str(path), folders=folders)
    file = Path("run/checkpoints/step-00000002.tmp/rank-00001.safetensors")
    assert set(ends) == {f"{file}: cannot be written: No such file or directory (rank 1)"}
    assert sorted(os.listdir(tmp_path / "1" / "run")) == ["logs", LOCK]


def test_what_only_another_rank_sees_does_not_count(
    broken_off: tuple[Path, Path], tmp_path: Path, two_ranks: Pool
) -> None:
    for rank in ("0", "1"):
        shutil.copytree(broken_off[1] / "run", tmp_path / rank / "run")
    share_lock(tmp_path)
    (tmp_path / "1" / "run" / "summary.json").write_text('{"status": "finished"}')
    (seen,) = checkpoints(tmp_path / "1" / "run")
    shutil.copytree(seen, seen.with_name("step-00000003"))
    end, _ = apart(broken_off, tmp_path, two_ranks)
    # It has gone on from rank 0's, and ends where both would have to write.
    assert "step-00000004.tmp/rank-00001.safetensors: cannot be written" in end


def test_all_ranks_end_with_status_2_and_one_says_why(
    broken_off: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(broken_off[1] / "run", tmp_path / "0" / "run")
    share_lock(tmp_path)
    port, processes = str(free_port()), []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "dr2dist.training.main", "--config", str(broken_off[0])],
                cwd=tmp_path / rank,
                env={
                    **os.environ,
                    **place,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(Path(__file__).parent.parent),
                },
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    lines = [[line for line in text.splitlines() if "dr2dist: " in line] for text in told]
    assert [len(found) for found in lines] == [1, 0]
    assert lines[0][0].startswith("dr2dist: run/checkpoints/") and "(rank 1)" in lines[0][0]


def test_an_exported_file_has_timms_names_alone(
    broken_off: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(broken_off[1] / "run", tmp_path / "run")
    (checkpoint,) = checkpoints(tmp_path / "run")
    facts = export(tmp_path / "run", tmp_path / "file.safetensors", "last")
    names = set(load_file(tmp_path / "file.safetensors"))
    model = timm.create_model(facts.model, num_classes=len(facts.classes), **facts.options)
    assert names == set(model.state_dict())
    dr2dist.load(tmp_path / "file.safetensors")
    best = {"step": 2, "loss": float("nan"), "accuracy": 1.0}  # of an earlier version
    change(checkpoint, lambda state: state["progress"].update(best=best))
    with pytest.raises(dr2dist.UserError, match="no validation with finite values"):
        export(tmp_path / "run", tmp_path / "best.safetensors")


@pytest.mark.parametrize(("zero", "bf16"), [(0, False), (1, True), (2, False), (3, True)])
def test_a_checkpoint_is_written_range_by_range(
    zero: int, bf16: bool, tmp_path: Path, two_ranks: Pool
) -> None:
    for peak, largest in two_ranks.run(
        "tests.folder_cases:save", folder=str(tmp_path), zero=zero, bf16=bf16
    ):
        assert peak <= largest + 4096, "a range of the largest size, and what ranks exchange"


def test_a_file_is_one_of_safetensors(tmp_path: Path) -> None:
    some = torch.randn(7, 5)
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": some.bfloat16()[1:, ::2],
        "view": some.T,
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "whole": torch.tensor([[2**40]]),
        "none": torch.empty(0, 4),
        "truth": some > 0,
    }
    sources = {name: Source(value, value.dtype) for name, value in tensors.items()}
    sources["wider"] = Source(some.bfloat16(), torch.float32)
    write_tensors(tmp_path / "file.safetensors", sources)
    found = load_file(tmp_path / "file.safetensors")
    assert torch.equal(found.pop("wider"), some.bfloat16().float())
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]), name
        assert value.data_ptr() % value.element_size() == 0, name


def test_a_validation_that_is_no_number_is_never_the_best() -> None:
    progress, nan = Progress(), float("nan")

    def note(step: int, loss: float, accuracy: float) -> bool:
        found = {"step": step, "loss": loss, "accuracy": accuracy}
        return progress.note_validation(found, "accuracy", "max")

    assert not note(1, nan, 0.9) and progress.best is None and progress.stale == 1
    assert not note(2, 1.0, nan) and progress.stale == 2
    assert note(3, 1.0, 0.2) and progress.stale == 0
    assert not note(4, nan, 0.9) and not note(5, float("inf"), 0.9) and progress.stale == 2
    assert note(6, 1.0, 0.3)
    assert progress.best == progress.last == {"step": 6, "loss": 1.0, "accuracy": 0.3}
    assert note(7, 0.5, 0.3) and progress.stale == 1  # the same metric at a lower loss
    assert not note(8, 0.6, 0.3) and progress.stale == 2
    for saved in ({"loss": nan, "accuracy": 0.9}, {"loss": 1.0, "accuracy": nan}):
        progress = Progress(best={"step": 1, **saved}, stale=4)  # of an earlier version
        assert note(2, 2.0, 0.1) and progress.best == progress.last and progress.stale == 0
