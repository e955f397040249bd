"""Files that commands write: where they may be, and who may read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.commands import call


def make(capfd: Any, source: Path, output: Path) -> tuple[int, str, str]:
    given = ("--from", "imagefolder", "--source", str(source), "--output", str(output))
    return call(capfd, "shards", "make", *given)


def picture(path: Path) -> Path:
    Image.new("RGB", (16, 16)).save(path)
    return path


OUTPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a link": (lambda root: link(root / "link", root / "real"), "is a link"),
    "the present folder": (lambda root: Path("."), "is the present folder or above it"),
    "above it": (lambda root: Path(".."), "is the present folder or above it"),
    "a mount": (lambda root: Path("/proc"), "is where a file system is mounted"),
    "below a file": (lambda root: picture(root / "f.png") / "out", "cannot be made"),
    "a file": (lambda root: picture(root / "g.png"), "exists already and is not empty"),
}


def link(path: Path, to: Path) -> Path:
    to.mkdir()
    path.symlink_to(to)
    return path


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be_are_refused_before_the_work(
    name: str,
    tmp_path: Path,
    capfd: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir((tmp_path / "here").mkdir() or tmp_path / "here")
    at, message = OUTPUTS[name]
    status, _, error = make(capfd, tmp_path / "no such source", at(tmp_path))
    assert status == 2
    assert message in error and len(error.splitlines()) == 1


def test_predictions_and_reports_are_refused_before_the_work(
    tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "f.png")
    (tmp_path / "folder.json").mkdir()
    for line, message in (
        (("predict", "no model", "no file", "--output", "f.png/out.csv"), "cannot be made"),
        (("evaluate", "no model", "shards", "--output", "folder.json"), "is a folder; name a file"),
        (("evaluate", "a.pt2", "shards", "--output", "a.pt2"), "a.pt2: allowed is FILE.json"),
        (("evaluate", "no model", "shards", "--output", "f.json"), "f.png is there, and no report"),
    ):
        status, _, error = call(capfd, *line)
        assert status == 2 and message in error and len(error.splitlines()) == 1


def test_files_may_be_read_by_whom_the_umask_says(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    picture(tmp_path / "photos" / "cat" / "a.png")
    before = os.umask(0o027)
    try:
        assert make(capfd, tmp_path / "photos", tmp_path / "shards")[0] == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o640}
