"""What mkdocs.yml needs beside docs/: pages of the texts above it, and settings' descriptions."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from griffe import Attribute, Docstring, ExprCall, ExprKeyword, Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
TEXTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the texts as pages; their links into docs/ then lead to pages beside them."""
    for name in TEXTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


class Descriptions(Extension):
    """Shows what `Field(description=...)` says of a setting as its docstring."""

    def on_attribute(self, *, attr: Attribute, **_: Any) -> None:
        """Moves the description; default and bounds stay where they are."""
        if not isinstance(attr.value, ExprCall):
            return
        for argument in list(attr.value.arguments):
            if isinstance(argument, ExprKeyword) and argument.name == "description":
                attr.docstring = Docstring(ast.literal_eval(str(argument.value)), parent=attr)
                attr.value.arguments.remove(argument)
