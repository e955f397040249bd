"""The examples do what they show."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "plain_loop.ipynb"
DOCKERFILE = ROOT / "examples" / "Dockerfile"

RUN_CELLS = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), "cell", "exec"), names)
assert names["accuracy"] > 0.9, names["accuracy"]
assert [row["class"] for row in names["rows"]] == ["warm", "cool"], names["rows"]
"""


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_CELLS, str(NOTEBOOK)],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shapes.safetensors").exists()


def test_the_notebook_shows_what_it_has_computed() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "held-out accuracy" in text and "p_warm" in text


def steps() -> list[tuple[str, str]]:
    """(instruction, its argument), lines that go on joined."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = [line.partition(" ") for line in lines]
    return [(name, argument.strip()) for name, _, argument in found]


def copied_to(folder: Path) -> None:
    """Does what the COPY lines say, with `folder` for the image's root."""
    for name, argument in steps():
        if name == "COPY":
            *sources, goal = argument.split()
            for source in sources:
                place = folder / goal.lstrip("/")
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, place, ignore=ignored)
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / source, place)


def test_the_image_gets_all_that_its_steps_need(tmp_path: Path) -> None:
    first, *_ = steps()
    assert first[0] == "FROM" and re.fullmatch(r"nvidia/cuda:[\w.-]+-ubuntu24.04", first[1])
    copied_to(tmp_path)
    root = tmp_path / "opt" / "dr2dist"
    runs = [argument for name, argument in steps() if name == "RUN"]
    assert runs[-1] == "/opt/dr2dist/launch/install.sh demo"
    assert (tmp_path / runs[-1].split()[0].lstrip("/")).exists()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert kept == {path.name for path in root.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "dr2dist.cli", "configs"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "finetune" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_image_installs_and_answers(tmp_path: Path) -> None:
    """All of its steps but those of apt-get, which need root and another system."""
    copied_to(tmp_path)
    for name, argument in steps():
        if name == "RUN" and "apt-get" not in argument:
            line = argument.replace("/opt/dr2dist", str(tmp_path / "opt" / "dr2dist"))
            subprocess.run(["bash", "-c", line], check=True, timeout=1000)
    command = tmp_path / "opt" / "dr2dist" / ".venv" / "bin" / "dr2dist"
    (argument,) = (argument for name, argument in steps() if name == "CMD")
    line = [str(command), *json.loads(argument)[1:]]
    assert "usage: dr2dist" in subprocess.check_output(line, cwd=tmp_path, text=True, timeout=120)
