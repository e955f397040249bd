"""Who may import whom, who may reach into what is private, and how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "dr2dist").rglob("*.py"))
ADAPTER = "dr2dist/parallel/adapter.py"
MOST_LINES = 400


class Allowed(NamedTuple):
    """Private names that a room, or a file, may use. names: all, where there are none."""

    room: str
    names: frozenset[str]
    reason: str


def _allow(room: str, names: str, reason: str) -> Allowed:
    return Allowed(room, frozenset(names.split()), reason)


ALLOWED = [
    _allow(ADAPTER, "", "it is the one place that knows DeepSpeed from inside"),
    _allow("dr2dist/backbones/", "_modules _buffers", "modules are copied without their weights"),
    _allow("dr2dist/backbones/", "_pos_embed _attn _process_input", "models are cut so"),
    _allow("dr2dist/backbones/", "_features", "timm's one rule for indices of features"),
    _allow("dr2dist/backbones/", "_python_dispatch _schema", "torch's documented dispatch modes"),
    _allow("dr2dist/backbones/", "_cdata", "whether two tensors share memory, on any device"),
    _allow("dr2dist/backbones/", "_version", "whether a tensor was written to"),
    _allow("dr2dist/reversible/", "_parameters _buffers", "others stand in for a second run"),
    _allow("dr2dist/reversible/", "_NormBase _BatchNorm", "what all norms with statistics are"),
    _allow("dr2dist/reversible/", "_python_dispatch", "torch's documented dispatch modes"),
    _allow(
        "dr2dist/reversible/trees.py",
        "_pytree _modules",
        "structures of tensors as torch takes them apart; modules() is slow",
    ),
    _allow("dr2dist/reversible/", "_cdata", "whether two tensors share memory, on any device"),
    _allow("dr2dist/reversible/", "_version", "whether a tensor was written to"),
    _allow("dr2dist/reversible/", "_cache_enabled", "parametrizations are computed once a run"),
    _allow("dr2dist/reversible/", "_C", "autograd's running pass and attention's kernels"),
]

DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit", "_current_frames"}
"""Public ones of Python's named tuples, os and sys, whatever they look like."""

DEEPSPEED = {"initialize", "init_distributed", "zero"}
"""What dr2dist uses of DeepSpeed's documented interface outside of the adapter."""


def test_imports_keep_to_their_layers() -> None:
    # In a process of its own: it switches off all loggers that are there.
    code = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = _graph()
    edges = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    # Raises CycleError, with the circle.
    assert graph.modules <= set(TopologicalSorter(edges).static_order())


def test_the_mathematics_knows_torch_alone() -> None:
    graph = _graph()
    found = {
        other
        for name in graph.modules
        if name.startswith("dr2dist.reversible")
        for other in graph.find_modules_directly_imported_by(name)
        if not other.startswith("dr2dist.reversible")
    }
    assert found - sys.stdlib_module_names <= {
        "torch",
        "triton",
        "dr2dist.errors",
        "dr2dist.lazily",
    }


def _graph() -> grimp.ImportGraph:
    return grimp.build_graph("dr2dist", include_external_packages=True, cache_dir=None)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_private_of_others_is_used(path: Path) -> None:
    name, allowed = str(path.relative_to(ROOT)), set()
    for each in ALLOWED:
        if name.startswith(each.room):
            allowed |= each.names or set(_private_uses(path))
    assert set(_private_uses(path)) <= allowed


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda allowed: allowed.room)
def test_what_is_allowed_is_needed(allowed: Allowed) -> None:
    paths = [path for path in MODULES if str(path.relative_to(ROOT)).startswith(allowed.room)]
    found = {name for path in paths for name in _private_uses(path)}
    assert found and allowed.names <= found


def test_deepspeed_is_used_as_documented_outside_of_the_adapter() -> None:
    for path in MODULES:
        if str(path.relative_to(ROOT)) != ADAPTER:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and _is_name(node.value, "deepspeed"):
                    assert node.attr in DEEPSPEED, (path, node.lineno)
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
                    assert node.module == "deepspeed.runtime.pipe", (path, node.lineno)


def test_no_file_is_too_long() -> None:
    paths = [
        path
        for room in ("dr2dist", "tests", "benchmarks", "launch")
        for path in (ROOT / room).rglob("*.py")
    ]
    found = {path.name: len(path.read_text().splitlines()) for path in paths}
    assert {name: lines for name, lines in found.items() if lines > MOST_LINES} == {}


def _private_uses(path: Path) -> Iterator[str]:
    """Private names of anything but the module's own classes, with the first of each chain."""
    tree = ast.parse(path.read_text())
    own = DOCUMENTED | set(_own_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            outer = isinstance(node.value, ast.Attribute) and _is_private(node.value.attr)
            if not outer and not _is_self(node.value):
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and _is_private(name) and not _is_self(node.args[0]):
                yield name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            whole = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from filter(_is_private, ".".join(whole).split("."))


def _own_names(tree: ast.Module) -> Iterator[str]:
    """What the module's own classes define, in their bodies and of themselves."""
    kinds = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in (node for kind in kinds for node in ast.walk(kind)):
        stored = isinstance(getattr(node, "ctx", None), ast.Store)
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and stored:
            yield node.id
        elif isinstance(node, ast.Attribute) and stored and _is_self(node.value):
            yield node.attr


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _is_self(node: ast.expr) -> bool:
    is_super = isinstance(node, ast.Call) and _is_name(node.func, "super")
    return _is_name(node, "self") or _is_name(node, "cls") or is_super


def _is_name(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


WORDS = ["image", "pixel", "label", "accuracy", "classification", "video", "box", "point"]
BLIND = ("training", "parallel", "inference", "cli.py")
"""What knows no task, no modality and no metric's name."""


def _words(text: str) -> set[str]:
    """The words of code and prose, in lower case; what torch calls floating is no point."""
    plain = text.replace("is_floating_point", "")
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", plain)}


@pytest.mark.parametrize("room", BLIND)
def test_training_and_inference_know_no_task(room: str) -> None:
    listed = {form for word in WORDS for form in (word, f"{word}s", f"{word}es")}
    for path in MODULES:
        if str(path.relative_to(ROOT / "dr2dist")).startswith(room):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not _words(line) & listed, (path, number)
    assert _words("see is_image_size in Boxes") & listed == {"image", "boxes"}
