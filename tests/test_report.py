"""`dr2dist report`: runs side by side, from what their folders hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from dr2dist.cli import main
from dr2dist.pictures import save_picture
from dr2dist.training import report


def made(folder: Path, losses: list[float], accuracy: float | None, **summary: Any) -> Path:
    """A run's folder as a run writes it: a line a step, a validation at the end."""
    folder.mkdir(parents=True)
    steps = [
        {"step": step, "loss": loss, "alpha": 0.9, "beta": 0.1}
        for step, loss in enumerate(losses, 1)
    ]
    last = None
    if accuracy is not None:
        last = {"step": len(losses), "loss": 0.5, "samples": 40.0, "accuracy": accuracy}
        steps.append({"step": len(losses), "val_loss": 0.5, "val_accuracy": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    values = {"status": "finished", "stopped_early": False, "model": "vit", "steps": len(losses)}
    values |= {"alpha": 0.9, "beta": 0.1, "arithmetic": "exact", "memory": "reverse", "ranks": 2}
    values |= {"stages": 1, "loss": losses[-1], "best": last, "last": last, "samples": 80}
    values |= {"certificate_failures": 0, "peak_memory_bytes": 3 * 2**20, "seconds": 4.0, **summary}
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


def asked(*arguments: str) -> int:
    """The command's exit status."""
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    return int(end.value.code or 0)


def test_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = made(tmp_path / "a" / "photos", [9.0, 1.0, 0.5], 0.75)
    other = made(tmp_path / "b" / "photos", [8.0, 2.0], 0.5, certificate_failures=3)
    assert asked(str(one), str(other)) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells[""] == ["a/photos", "b/photos"]
    assert cells["held-out accuracy"] == ["0.75", "0.5"]
    assert cells["certificate failures"] == ["0", "3"]
    assert cells["peak memory of a rank"] == ["3 MiB", "3 MiB"]
    assert cells["samples a second"] == ["20", "20"]
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000


def test_a_run_that_goes_on_and_one_without_validations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = made(tmp_path / "going", [3.0, 2.0], None), made(tmp_path / "bare", [1.0], None)
    (one / "summary.json").unlink()
    with (one / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "lo')  # being written
    picture = tmp_path / "猫 and 狗.png"
    assert asked(str(one), str(other), "--picture", str(picture)) == 0
    out = capsys.readouterr().out
    assert "| status | not ended | finished |" in out and "| steps | 2 | 1 |" in out
    assert "held-out" not in out and "best" not in out
    assert picture.exists()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("missing", "is not a folder of a run"),
        ("empty", "holds no metrics.jsonl with a step in it"),
        ("damaged", "line 2 is damaged: found 'step 2'"),
        ("summary", "summary.json: is damaged"),
        ("twice", "is named twice"),
    ],
)
def test_what_is_no_run_is_refused(
    kind: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = made(tmp_path / "good", [1.0], None)
    bad = tmp_path / "bad"
    if kind == "empty":
        bad.mkdir()
    elif kind in ("damaged", "summary"):
        made(bad, [1.0, 2.0], None)
        name = {"damaged": "metrics.jsonl", "summary": "summary.json"}[kind]
        (bad / name).write_text('{"step": 1}\nstep 2\n{"step": 3}\n')
    elif kind == "twice":
        bad = good
    assert asked(str(good), str(bad)) == 2
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1 and line in found[0]
    assert not (tmp_path / "curves.png").exists()


def test_axes_show_the_change_and_not_a_first_jump() -> None:
    axis = Figure().subplots()
    losses = [1000.0, *(1 + math.exp(-step / 20) for step in range(200))]
    axis.plot(losses)
    report.show_change(axis, losses, [])
    assert axis.get_ylim()[1] < 10


def test_axes_keep_a_rising_validation_and_all_of_a_short_run() -> None:
    for training, held_out in (([0.7, 0.1, 0.02] * 40, [0.6, 1.5]), ([2.0, 0.5], [])):
        axis = Figure().subplots()
        axis.plot(training)
        axis.plot(held_out)
        report.show_change(axis, training, held_out)
        assert axis.get_ylim()[1] >= max(*training, *held_out)


def test_letters_that_no_font_has_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    figure = Figure()
    figure.subplots().set_title("\ue000\ue001 of private use")
    save_picture(figure, tmp_path / "picture.PNG")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'picture.PNG'}: 2 letter(s) are drawn as boxes, for no font here has them: "
        "install one, such as fonts-noto-cjk"
    ]
