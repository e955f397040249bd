"""An exported model on files: what it says of each sample, as CSV or JSON."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dr2dist.data.batch import Batch
from dr2dist.data.fields import Field, Fields
from dr2dist.data.listing import shown
from dr2dist.data.unlabelled import Source, extension_of, find_sources
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write, check_file_output
from dr2dist.inference.exported import ready
from dr2dist.inference.ranks import gathered, own_part, together
from dr2dist.pictures import save_picture
from dr2dist.reversible.trees import tree_leaves
from dr2dist.tasks.task import Row, Task

NOT_FINITE = "the outputs are not finite"
"""Error of a sample."""


def predict(
    path: str | Path,
    paths: Sequence[str | Path],
    *,
    batch: int = 32,
    skip_unreadable: bool = False,
    picture: str | Path | None = None,
    frame_rate: float | None = None,
    progress: bool = True,
) -> list[Row]:
    """A row for each sample in files and folders, in the order given, and of names in a folder; in
    a process group every rank must call it, predicts a part, and returns all.

    path: a file of `export` or `save`; it runs in fp32, on a GPU if there is one. paths: files of
    samples, and folders of them, see `find_sources`. batch: samples at a time. picture: a file for
    what the task draws of the rows, if it draws them. frame_rate: frames a second of films that are
    folders of frames; None: 25. progress: a bar on stderr.

    A row has path, of the sample's first file, and what the task says of it, plain values by
    column. Raises UserError for a path that does not exist, a folder without samples, a sample that
    lacks an input, and one that cannot be read; with skip_unreadable the last one's row holds the
    error. So does that of a sample whose outputs are not finite.
    """
    with together():
        (net, task, facts), device = ready(path)
        fields = Fields(task.fields, facts.fields).only(task.inputs)
        sources = find_sources(paths, fields, frame_rate)
    rank, ranks = own_part()
    own = range(rank * batch, len(sources), ranks * batch)
    transform, found = task.transform(), dict[int, list[Row]]()
    with (
        tqdm(total=len(sources), unit="sample", disable=not progress or rank > 0) as bar,
        together(),
    ):
        for start in own:
            part = sources[start : start + batch]
            read = [_read(source, fields, transform, skip_unreadable) for source in part]
            fine = [values for values in read if isinstance(values, dict)]
            said = iter(_said(net, task, fine, device) if fine else ())
            found[start] = [
                {"path": os.fspath(source[0])}
                | ({"error": value} if isinstance(value, str) else next(said))
                for source, value in zip(part, read, strict=True)
            ]
            bar.update(min(ranks * batch, len(sources) - start))
    parts = {k: each for own_parts in gathered(found) for k, each in own_parts.items()}
    rows = [row for start in sorted(parts) for row in parts[start]]
    figure = None if picture is None or rank else task.draw_rows(rows)
    if picture is not None and figure is not None:
        save_picture(figure, picture)
    return rows


@torch.inference_mode()
def _said(net: Any, task: Task, samples: list[dict[str, Any]], device: torch.device) -> list[Row]:
    inputs, targets = task.collate(samples)
    keys = [str(number) for number in range(len(samples))]
    batch = Batch(inputs, targets, keys, len(samples)).to(device)
    outputs = net(batch.inputs)
    if _has_nan(outputs):
        if len(samples) == 1:
            return [{"error": NOT_FINITE}]
        # Only a task knows which outputs are whose, so each sample is tried by itself.
        return [row for one in samples for row in _said(net, task, [one], device)]
    rows = task.rows(task.predictions(outputs, batch))
    return [row if _is_finite(row) else {"error": NOT_FINITE} for row in rows]


def _has_nan(outputs: Any) -> bool:
    tensors = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return any(bool(tensor.isnan().any()) for tensor in tensors)


def _is_finite(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return all(map(_is_finite, parts))
    return not isinstance(value, float) or math.isfinite(value)


def _read(
    source: Source, fields: Sequence[Field], transform: Any, skip: bool
) -> dict[str, Any] | str:
    try:
        members = {extension_of(file, fields): file.read_bytes() for file in source}
        result: dict[str, Any] = transform({field.name: field.decode(members) for field in fields})
        return result
    except (OSError, ValueError) as error:
        if skip:
            return one_line(error)
        raise UserError(f"{shown(source[0])}: cannot be read: {one_line(error)}") from None


def write_rows(rows: Sequence[Row], output: str | Path) -> None:
    """Writes .csv or .json, aside and renamed. Raises UserError for another ending.

    A column is empty in rows that lack it.
    """
    output = Path(output)
    check_output(output)
    with atomic_write(output) as aside:
        if output.suffix == ".json":
            aside.write_text(json.dumps(list(rows), indent=1) + "\n", "utf-8")
            return
        columns = dict.fromkeys(name for row in rows for name in row)
        cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
        # A name that is not of UTF-8 stays the bytes that it is.
        with aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(cells)


def _cell(value: Any) -> Any:
    """Lists and objects as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def check_output(output: str | Path) -> None:
    """Raises UserError if predictions cannot be written there."""
    if Path(output).suffix not in (".csv", ".json"):
        raise UserError(f"{output}: allowed endings are .csv and .json")
    check_file_output(Path(output))
