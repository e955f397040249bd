"""An exported model on image files: a class and probabilities for each, as CSV or JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dr2dist.data.sources import IMAGE_TYPES, image_files, open_image
from dr2dist.data.transforms import Transform
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write
from dr2dist.inference.exported import ready
from dr2dist.reversible.transfer import to_device

Row = dict[str, Any]
"""path, class, probability, and p_NAME for each class; or path and error."""


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as they are, and all images under folders, in the order of their names.

    Raises UserError for a path that does not exist or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images = image_files(path)
            if not images:
                raise UserError(f"{path}: holds no image ({', '.join(IMAGE_TYPES)})")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: does not exist")
    return found


def predict(
    path: str | Path,
    images: Sequence[Path],
    *,
    batch: int = 32,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> list[Row]:
    """A row for each image, in order.

    Raises UserError naming the first image that cannot be read, unless they are to be skipped:
    then their rows hold the error.
    """
    net, transform, device = ready(path)
    cfg: Any = net.pretrained_cfg
    rows: list[Row] = []
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for part in _parts(images, batch):
            read = [_read(image, transform, skip_unreadable) for image in part]
            tensors = [value for value in read if isinstance(value, Tensor)]
            shares: Iterator[Any] = iter(())
            if tensors:
                with torch.inference_mode():
                    output = net(to_device(torch.stack(tensors), device))
                shares = iter(output.float().softmax(-1).tolist())
            for image, value in zip(part, read, strict=True):
                row = {"error": value} if isinstance(value, str) else _row(next(shares), cfg)
                rows.append({"path": str(image), **row})
            bar.update(len(part))
    return rows


def _parts(images: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    return (images[k : k + size] for k in range(0, len(images), size))


def _read(path: Path, transform: Transform, skip: bool) -> Tensor | str:
    try:
        return transform(open_image(path))
    except ValueError as error:
        if skip:
            return one_line(error)
        raise UserError(f"{path}: is not a readable image: {error}") from None


def _row(shares: list[float], cfg: Any) -> Row:
    names = cfg["label_names"]
    best = max(range(len(shares)), key=shares.__getitem__)
    each = {f"p_{name}": round(share, 6) for name, share in zip(names, shares, strict=True)}
    return {"class": names[best], "probability": round(shares[best], 6), **each}


def write_rows(rows: Sequence[Row], output: str | Path) -> None:
    """Writes .csv or .json, aside and renamed. Raises UserError for another ending."""
    output = Path(output)
    check_output(output)
    with atomic_write(output) as aside:
        if output.suffix == ".json":
            aside.write_text(json.dumps(list(rows), indent=1) + "\n")
            return
        columns = dict.fromkeys(name for row in rows for name in row)
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def check_output(output: str | Path) -> None:
    """Raises UserError if predictions cannot be written there."""
    if Path(output).suffix not in (".csv", ".json"):
        raise UserError(f"{output}: allowed endings are .csv and .json")
