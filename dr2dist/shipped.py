"""The configurations that come with dr2dist: named, and copied."""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path

from dr2dist.arguments import path
from dr2dist.config.text import read_settings
from dr2dist.errors import UserError, nearest
from dr2dist.files import atomic_write

PACKAGE = Path(__file__).parent


def add_configs_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dr2dist configs` takes."""
    parser.add_argument("name", nargs="?", help="which one to copy; without it all are listed")
    parser.add_argument("--output", type=path, help="where to; default: ./NAME.yaml")
    parser.set_defaults(command=run)


def run(given: argparse.Namespace) -> int:
    """`dr2dist configs`."""
    known = {path.stem: path for path in sorted(_folder().glob("*.yaml"))}
    if given.name is None:
        if given.output is not None:
            raise UserError("--output has no effect without the name of a configuration")
        for name, path in known.items():
            print(f"{name:32} {_about(path)}")
        return 0
    name = given.name.removesuffix(".yaml")
    if name not in known:
        hint = nearest(name, known)
        raise UserError(f"configs: found '{given.name}', allowed is {', '.join(known)}{hint}")
    for path in copy(known[name], given.output or Path(f"{name}.yaml")):
        print(f"wrote {path}")
    return 0


def copy(config: Path, output: Path) -> list[Path]:
    """Copies a configuration, and the DeepSpeed file that it names to where it is looked for: from
    the present folder. Raises UserError if the output is there already."""
    if output.exists():
        raise UserError(f"{output}: exists already; name another --output")
    named = read_settings(config).get("parallel", {}).get("deepspeed")
    files = [(config, output)]
    if named is not None and not Path(named).exists():
        files.append((_deepspeed_folder() / Path(named).name, Path(named)))
    for source, goal in files:
        with atomic_write(goal) as aside:
            shutil.copyfile(source, aside)
    return [goal for _, goal in files]


def _about(path: Path) -> str:
    """The first sentence of its head."""
    lines = itertools.takewhile(
        lambda line: line.startswith("# "), path.read_text("utf-8").splitlines()
    )
    return " ".join(line.removeprefix("# ") for line in lines).partition(". ")[0].rstrip(".")


def _folder() -> Path:
    """Inside of an installed package, beside it in a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def _deepspeed_folder() -> Path:
    inside = PACKAGE / "configs" / "deepspeed"
    return inside if inside.is_dir() else PACKAGE.parent / "ds_configs"
