"""The samples in files and folders that are to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dr2dist.data.fields import Field, split_name
from dr2dist.data.frames import FrameFolder, at_rate
from dr2dist.data.images import IMAGE_TYPES, is_image
from dr2dist.data.listing import list_files, shown
from dr2dist.data.records import Readable
from dr2dist.data.video_records import OF_FRAMES
from dr2dist.errors import UserError

Source = tuple[Readable, ...]
"""The files of one sample."""
BESIDE = "images beside films"


def find_sources(
    paths: Sequence[str | Path], fields: Sequence[Field], frame_rate: float | None = None
) -> list[Source]:
    """The samples in files, and in all files under folders that may carry an input, in the order of
    their names.

    fields: the inputs. Where a task has one, each file is a sample, and so is, where that is a
    film, each folder of images, which are its frames; otherwise files of one name, less its
    extensions, are. frame_rate: frames a second of such folders; None: 25. Raises UserError for a
    path that does not exist, a folder without samples, a sample that lacks an input, or a rate that
    says nothing.
    """
    found = [file for path in map(Path, paths) for file in _files(path, fields)]
    if frame_rate is not None:
        found = at_rate(found, frame_rate)
    if len(fields) == 1:
        return [(file,) for file in found]
    samples: dict[Path, list[Readable]] = {}
    for file in found:
        path = Path(file)
        samples.setdefault(path.with_name(split_name(path)[0]), []).append(file)
    for name, files in samples.items():
        for field in fields:
            if field.choose([split_name(Path(file))[1] for file in files]) is None:
                raise UserError(f"{name}: has no {field.name} ({field.text})")
    return [tuple(files) for files in samples.values()]


def extension_of(file: Readable, fields: Sequence[Field]) -> str:
    """The extension by which a field takes the file: `left.npy`, or `npy` of any name."""
    if isinstance(file, FrameFolder):
        return OF_FRAMES
    path = Path(file)
    whole = split_name(path)[1]
    return whole if _taken(whole, fields) else path.suffix.lower()[1:]


def _taken(extension: str, fields: Sequence[Field]) -> bool:
    return any(field.choose([extension]) for field in fields)


def _takes_frames(fields: Sequence[Field]) -> bool:
    """Whether an image is a frame: the one input is a film, and no image is one."""
    return len(fields) == 1 and _taken(OF_FRAMES, fields) and not _taken(IMAGE_TYPES[0], fields)


def _files(path: Path, fields: Sequence[Field]) -> Iterable[Readable]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{shown(path)}: does not exist")
    frames = _takes_frames(fields)

    def why(file: Path) -> str | None:
        if _taken(extension_of(file, fields), fields) or (frames and is_image(file.name)):
            return None
        return f"of the ending {file.suffix.lower()}" if file.suffix else "without an ending"

    found = list_files(path, why)
    films = _joined(found.files, found.left) if frames else list[Readable](found.files)
    found.tell()
    if not films:
        allowed = "; ".join(f"{field.name} ({', '.join(field.extensions)})" for field in fields)
        raise UserError(f"{shown(path)}: holds no {allowed}")
    return films


def _joined(files: Sequence[Path], left: dict[str, list[Path]]) -> list[Readable]:
    """Films, of which images in one folder are one; those beside films, such as posters, are left
    out."""
    films = [file for file in files if not is_image(file.name)]
    of_films, folders = {film.parent for film in films}, dict[Path, list[Path]]()
    for file in files:
        if is_image(file.name):
            folders.setdefault(file.parent, []).append(file)
    for folder in [folder for folder in folders if folder in of_films]:
        left.setdefault(BESIDE, []).extend(folders.pop(folder))
    own = [FrameFolder(folder, tuple(images)) for folder, images in folders.items()]
    return sorted([*films, *own], key=Path)
