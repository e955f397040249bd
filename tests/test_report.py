"""The report of finished runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch import report


def test_the_report_shows_runs_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, accuracy in (("one", 0.75), ("two", 0.5)):
        folder = tmp_path / name
        folder.mkdir()
        last = {"samples": 604.0, "accuracy": accuracy, "balanced_accuracy": 0.7, "step": 2}
        summary = {
            **{"alpha": 0.5, "beta": 0.5, "arithmetic": "exact", "memory": "reverse", "steps": 2},
            **{"certificate_failures": 0, "peak_memory_bytes": 2**30, "seconds": 9.0},
            "last": last,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        lines = [{"step": 1, "loss": 1.0, "beta": 0.1}, {"step": 2, "val_accuracy": accuracy}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    picture = tmp_path / "curves.png"
    arguments = ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    text = capsys.readouterr().out
    assert "| accuracy | 0.750 | 0.500 |" in text and "1024 MiB" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
