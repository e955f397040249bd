"""What README and the benchmarks say can be run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence, stages
from dr2dist.config import load_config

ROOT = Path(__file__).parent.parent


def test_the_readmes_python_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip() == "0"


@pytest.mark.parametrize("way", evidence.WAYS)
@pytest.mark.parametrize("data", evidence.DATA)
def test_the_evidences_runs_are_valid_and_differ_in_their_way_alone(way: str, data: str) -> None:
    base, config = (
        load_config(evidence.CONFIG, evidence.overrides_of(data, name, 3e-5, 1, 60, "final"))
        for name in (evidence.CONVENTIONAL, way)
    )
    assert base.optim == config.optim and base.data == config.data and base.train == config.train
    assert (base.coefficients != config.coefficients) == (way != evidence.CONVENTIONAL)


def test_the_evidences_page_counts_pairs_by_seed() -> None:
    def runs(values: list[float]) -> list[dict[str, Any]]:
        rest = {"samples": 10.0, "worst_drift": None, "certificate_failures": 0}
        return [{"accuracy": v, "balanced_accuracy": v, **rest} for v in values]

    ways = {way: runs([0.5, 0.6, 0.7]) for way in evidence.WAYS}
    ways["paper, exact"] = runs([0.6, 0.7, 0.8])
    page = evidence.write_page(
        {
            **{"machine": "m", "date": "d", "steps": 1, "seeds": 3},
            "rates": {"elpv": dict.fromkeys(evidence.WAYS, 1e-5)},
            "final": {"elpv": ways},
            "costs": {way: {"seconds": 1.0, "peak_bytes": 2**20} for way in evidence.WAYS},
        }
    )
    assert "| paper, exact | 1e-05 | 0.700 | 0.700 | +0.100 ± 0.000 | +0.100 ± 0.000 |" in page
    assert evidence.interval([0.0, 1.0]) == "+0.500 ± 6.353"


@pytest.mark.parametrize("way", stages.MEMORY_WAYS)
def test_the_stages_benchmark_runs_every_way(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "MODEL": "vit_tiny_patch16_224",
        "SIZE": 32,
        "BATCH": 2,
        "BLOCKS": 1,
    }.items():
        monkeypatch.setattr(stages, name, value)
    found = stages.memory(way, 2, tmp_path)
    assert found["token_bytes"] == 2 * 5 * 192 * 4
    page = stages.page(
        {"machine": "m", "torch": "2", "date": "d", "time": {stages.PER_BLOCK: [2.0], way: [4.0]}}
    )
    assert f"| {way} | 4.00 | {1 if way == stages.PER_BLOCK else 2:.2f} |" in page
