"""What is installed is all that a person needs: no checkout beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("dr2dist", "configs", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def test_a_wheel_has_the_configurations_and_runs_without_a_checkout(tmp_path: Path) -> None:
    source, site, work = (tmp_path / name for name in ("source", "site", "work"))
    for folder in (source, site, work):
        folder.mkdir()
    for name in SOURCES:  # setuptools leaves a build folder beside what it packs
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    line = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, *line, str(source)], check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(site)
    wanted = {f"dr2dist/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    wanted |= {f"dr2dist/configs/deepspeed/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "dr2dist").rglob("*.py")}
    assert wanted <= names and not any(name.startswith("tests") for name in names)
    done = subprocess.run(
        [sys.executable, "-m", "dr2dist.cli", "configs", "elpv_vit_small"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (work / "elpv_vit_small.yaml").exists() and (work / "ds_configs/zero2.json").exists()
