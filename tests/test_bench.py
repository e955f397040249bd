"""The bench command: measures in processes of their own, adds to its folder, refuses mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from dr2dist.bench import report
from dr2dist.bench.cases import Spec, build
from dr2dist.bench.measure import largest
from dr2dist.bench.names import CASES, FAR, LIBRARIES, ON_GPU, PER_BLOCK, USUAL
from dr2dist.cli import main

TINY = ["--model", "vit_tiny_patch16_224", "--size", "32", "--depths", "2"]
SMALL = ["--batches", "1", "3", "--time-batch", "2", "--rounds", "2", "--chunk-size", "1"]


def bench(output: Path, *arguments: str) -> object:
    """Runs the command; its exit status."""
    with pytest.raises(SystemExit) as end:
        main(["bench", *TINY, *SMALL, "--output", str(output), *arguments])
    return end.value.code


def test_measurements_of_several_commands_are_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path, "--cases", "exact", "--measure", "memory") == 0
    assert bench(tmp_path, "--cases", "conventional", "exact", "--measure", "time") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    line = results["memory"]["2"]["exact"]
    assert line["slope"] == (line["growth"][1] - line["growth"][0]) / 2
    times = results["time"]
    assert len(times["exact"]["rounds"]) == 2 and times["conventional"]["to conventional"] == 1
    assert 0 < results["arithmetic"]["exact"]["share"] < 1
    table = capsys.readouterr().out
    assert "| exact |" in table and "| conventional |" in table
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert bench(tmp_path, "--cases", "exact", "--beta", "0.25") == 2  # other settings
    assert "holds results with beta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("swin3d_t", "{frames: 4, embed_dim: 24, depths: [2, 2], num_heads: [2, 2]}"),
        ("videomae_small_patch16", "{frames: 4, embed_dim: 24, num_heads: 2}"),
    ],
)
def test_models_of_clips_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, options: str
) -> None:
    depth = [] if model.startswith("swin") else ["--depths", "2"]
    line = ["bench", "--model", model, "--size", "32", *depth, *SMALL, "--options", options]
    cases = ["--cases", PER_BLOCK, "exact sliced", "--measure", "memory", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main([*line, *cases])
    assert end.value.code == 0
    assert "'frames': 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["elements"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "exactt"], "did you mean 'exact'"),
        (["--batches", "3", "1"], "--batches: found 3 1"),
        (["--limit", "much"], "--limit: found 'much'"),
        (["--model", "vit_tiny"], "is not a model of timm"),
        (["--options", "frames"], "--options: found 'frames', allowed is such as {frames: 32}"),
        (["--options", "{pretrained: true}"], "pretrained is not one of a model's shape"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench(tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "bf16"),
    [
        (case, bf16)
        for case in (*USUAL, *ON_GPU)
        for bf16 in (False, True)
        # A budget is measured first; momentumnet makes fp32 of its own.
        if case != "budget" and not (bf16 and case == "momentumnet")
    ],
)
def test_every_case_trains_the_same_model(case: str, bf16: bool) -> None:
    spec = Spec(case, "vit_tiny_patch16_224", 32, 1, slices={"chunk_size": 1}, bf16=bf16)
    net = build(spec)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = net(images.bfloat16() if bf16 else images)
    output.square().mean().backward()
    assert output.shape == (2, 10)
    assert sum(p.grad is not None for p in net.parameters()) == 12 + 3 + 5


def test_remainders_are_offloaded_where_the_case_says_so() -> None:
    net = build(Spec(FAR, "vit_tiny_patch16_224", 32, 1, slices={"chunk_size": 1}))
    (chain,) = net.chains
    assert chain.setting.remainders == "host" and chain.setting.state_bits == 16


def test_the_largest_amount_is_where_the_line_meets_the_limit() -> None:
    assert largest({"peak_at_0": 100, "peak_slope": 10.0, "error": 1.0}, 205) == 10
    assert largest({"peak_at_0": 100, "peak_slope": -3.0, "error": 1.0}, 205) == 105


def test_a_slope_below_its_error_is_said_so() -> None:
    line = {"at": [1, 3], "growth": [2**20, 2**20 + 64], "slope": 32.0, "error": 640.0}
    other = line | {"slope": 6400.0}
    results = {
        "model": "vit", "bf16": False, "alpha": 0.9, "beta": 0.1, "size": 32, "chunk_size": 1,
        "chunk_tokens": 1, "elements": 64, "machine": "", "threads": 1, "torch": "",
        "commands": [], "batches": [1, 3], "cases": ["float", "exact"],
        "memory": {"own": {"float": line, "exact": other}},
    }  # fmt: skip
    rows = [row.split(" | ") for row in report.table(results).splitlines()]
    texts = {row[0].strip("| "): row[2].strip("| ") for row in rows if len(row) == 3}
    assert texts["float"] == "under 10.0" and texts["exact"] == "100.0"


def test_help_lists_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(case in text for case in CASES)


def test_libraries_that_are_not_installed_are_left_out_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    measured = list(LIBRARIES)
    monkeypatch.setattr(
        "dr2dist.bench.measure.times",
        lambda specs, *_: measured.extend(spec.case for spec in specs) or {},
    )
    monkeypatch.setattr("dr2dist.bench.measure.share_of_arithmetic", lambda *_: ())
    monkeypatch.setattr("dr2dist.bench.measure.budget_spec", lambda first, _: first)
    assert bench(tmp_path / "some", "--measure", "time") == 0
    assert "left out: revlib, which is not installed" in capsys.readouterr().err
    assert measured.count("revlib") == 1 and "exact" in measured
    assert bench(tmp_path / "none", "--cases", "revlib") == 2
    assert "revlib is not installed" in capsys.readouterr().err


def gpu_benchmark(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The rows of its table, on the CPU."""
    gpu.main(["--smoke", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| vit")]


def test_the_gpus_benchmark_prints_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = gpu_benchmark(capsys, "--cases", PER_BLOCK, "exact 16 bits sliced")
    assert first[:3] == ["vit_tiny_patch16_224", PER_BLOCK, "4"] and first[5] == "1.00"
    assert second[1] == "exact 16 bits sliced" and float(second[3]) > 0 and float(second[7]) > 0


def test_the_gpus_benchmark_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = gpu_benchmark(capsys, "--cases", "exact", "--minutes", "0.1")  # a second and SPARE
    assert row[1] == "exact" and "no time was left" in row[3]
    found = gpu_benchmark(capsys, "--minutes", "0")
    assert [row[3] for row in found] == ["not run: no time was left"] * len(gpu.CASES)


def test_the_gpus_benchmark_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
