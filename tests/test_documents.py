"""What README and the benchmarks say can be run, and what may be called says what it is."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dr2dist
from benchmarks import evidence, frontier, stages
from dr2dist.cli import main
from dr2dist.config import Config, load_config
from dr2dist.config.section import Section
from tests.pool import Pool

ROOT = Path(__file__).parent.parent
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


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


@pytest.mark.parametrize("way", frontier.WAYS)
@pytest.mark.parametrize("data", evidence.DATA)
def test_the_frontiers_runs_are_valid(way: str, data: str) -> None:
    job = frontier.Job(data, way, "final", 3e-5, 1, 200)
    config = load_config(evidence.CONFIG, frontier.overrides_of(job))
    assert config.train.steps == 200 and config.optim.lr == 3e-5


def test_the_frontiers_kept_runs_make_a_page() -> None:
    results = frontier.read_results()
    assert results and all(job.way in frontier.WAYS for job in results)
    given = argparse.Namespace(steps=200, data=["elpv"], ways=[frontier.CONVENTIONAL, "beta 0.1"])
    made = {
        frontier.Job("elpv", way, "final", frontier.RATES[0], seed, 200): {
            **dict.fromkeys(
                ("accuracy", "balanced_accuracy"), 0.5 + 0.1 * seed * (way != "conventional")
            ),
            **{"samples": 8, "worst_drift": None, "certificate_failures": 0},
        }
        for way in given.ways
        for seed in range(2)
    }
    page = frontier.write_page(made, given)
    assert "| beta 0.1 | 1e-05 | 2 | 0.550 | 0.550 | +0.050 ± 0.635 |" in page
    assert frontier.missing(made, argparse.Namespace(**vars(given)))


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
    assert found["elements"] == 2 * 5 * 192
    page = stages.page(
        {"machine": "m", "torch": "2", "date": "d", "time": {stages.PER_BLOCK: [2.0], way: [4.0]}}
    )
    assert f"| {way} | 4.00 | {1 if way == stages.PER_BLOCK else 2:.2f} |" in page


def test_the_task_and_the_backbone_of_the_documents_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: Pool
) -> None:
    """docs/tasks.md's task as it stands, from shards to predictions."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if block.startswith("# counting.py"))
    (tmp_path / "counting.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = tmp_path / "files"
    files.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(files / f"{number}.png")
        (files / f"{number}.cls").write_text(str(number % 4))
    shards = tmp_path / "shards"
    run("shards", "make", "--from", "files", "--source", files, "--output", shards)
    path = tmp_path / "counting.yaml"
    path.write_text(
        f"plugins: [counting]\n"
        "model: {name: vit_tiny_patch16_224, image_size: 32,\n"
        "  weights: random, options: {depth: 1}}\n"
        f"task: {{name: counting, largest: 9}}\n"
        f"data: {{train: {shards}, val: {shards}}}\noptim: {{lr: 1.0e-3}}\n"
        f"train: {{steps: 2, micro_batch: 4}}\noutput: {tmp_path / 'run'}\n"
    )
    case = {"path": str(path), "overrides": [], "folder": str(tmp_path)}
    summary = one_rank.run("tests.cases:run_config_from", **case)[0]
    assert summary["best"]["mae"] >= 0
    file, rows = tmp_path / "counting.safetensors", tmp_path / "rows.csv"
    run("export", tmp_path / "run", "--output", file)
    run("evaluate", file, shards, "--plugin", "counting")
    run("predict", file, files, "--output", rows, "--plugin", "counting")
    assert rows.read_text().splitlines()[0] == "path,count"


def run(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert not ended.value.code


def test_the_api_page_has_every_name_that_is_exported() -> None:
    page = (ROOT / "docs/api.md").read_text().splitlines()
    assert [name for name in dr2dist.__all__ if f"::: dr2dist.{name}" not in page] == []


def test_all_that_is_public_has_a_docstring() -> None:
    files = sorted((ROOT / "dr2dist").rglob("*.py"))
    lacking = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name, node in _public(ast.parse(path.read_text()), "the module")
        if node.body and not ast.get_docstring(node)
    ]
    assert lacking == []


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _public(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """A module or class with the functions, classes and methods in it, by name."""
    yield name, node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for inner in node.body:
        if isinstance(inner, Documented) and not inner.name.startswith("_"):
            yield from _public(inner, inner.name)


def test_every_setting_has_a_description() -> None:
    lacking = [
        f"{section.__name__}.{name}"
        for section in _sections(Section)
        for name, field in section.model_fields.items()
        # What is in a Config is a section, which says itself what it is; a kind is its path's name.
        if not field.description and section is not Config and name != "kind"
    ]
    assert lacking == []


def _sections(kind: type[Section]) -> Iterator[type[Section]]:
    """The sections that dr2dist's modules define."""
    for section in kind.__subclasses__():
        home = sys.modules[section.__module__]
        if home.__name__.startswith("dr2dist.") and vars(home).get(section.__name__) is section:
            yield section
        yield from _sections(section)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_between_texts_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).is_file()] == []
