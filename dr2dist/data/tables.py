"""CSV tables: UTF-8 with or without a byte order mark, a header, and every cell there."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dr2dist.data.listing import shown
from dr2dist.errors import UserError


class Row(NamedTuple):
    """number: the header is row 1. values: by column."""

    number: int
    values: dict[str, str]


def read_table(path: Path) -> tuple[list[Row], Sequence[str]]:
    """(rows, columns). Spaces around columns' names are left out, and so are empty rows.

    Raises UserError for a file that cannot be read, a cell that is missing, not of UTF-8 or has no
    column, by its row (the header is row 1).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        _check_cells(path, data)
        raise UserError(f"{path}: is not of UTF-8: save the table as UTF-8") from None
    lines = _lines(path, text)
    if not lines:
        raise UserError(f"{path}: is empty; allowed is a table with a header")
    (_, header), *rest = lines
    columns = [name.strip() for name in header]
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{path}: has the column '{name}' {columns.count(name)} times")
    return [_row(path, number, columns, cells) for number, cells in rest], columns


def _lines(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """(row, cells) of all in which anything stands."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = enumerate(reader, 1)
        return [(number, cells) for number, cells in rows if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(f"{path}: is no table of CSV: {error}") from None


def _row(path: Path, number: int, columns: Sequence[str], cells: list[str]) -> Row:
    if len(cells) < len(columns):
        missing = columns[len(cells)]
        raise UserError(f"{path}: row {number} has no value in the column '{missing}'")
    if len(cells) > len(columns):
        more = len(cells) - len(columns)
        raise UserError(
            f"{path}: row {number} has {more} more value(s) than there are columns, such as "
            f"'{cells[len(columns)]}'; a value with a comma is put in quotes"
        )
    return Row(number, dict(zip(columns, cells, strict=True)))


def _check_cells(path: Path, data: bytes) -> None:
    """Raises UserError for the first cell that is not of UTF-8."""
    lines = _lines(path, data.decode("latin-1"))
    header = lines[0][1]
    for number, cells in lines:
        for place, cell in enumerate(cells):
            try:
                cell.encode("latin-1").decode("utf-8")
            except UnicodeDecodeError:
                column = header[place].strip() if place < len(header) else f"column {place + 1}"
                raise UserError(
                    f"{path}: row {number}: {column}: '{shown(cell)}' (read as Latin-1) is not of "
                    "UTF-8: save the table as UTF-8"
                ) from None
