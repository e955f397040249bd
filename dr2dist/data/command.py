"""The shards command: makes shards of files, an index of shards, and compares the two."""

from __future__ import annotations

import argparse
import os

from dr2dist.arguments import Commands, path, positive
from dr2dist.status import say


def add_shards_arguments(shards: argparse.ArgumentParser) -> None:
    """What `dr2dist shards` takes."""
    from dr2dist.data.sources import SOURCES

    actions = Commands(shards, "ACTION")
    make = actions.add(
        "make",
        "Write webdataset shards and their index from files.",
        "dr2dist shards make --from imagefolder --source photos --output shards/photos "
        "--val-fraction 0.1",
    )
    make.add_argument("--from", dest="kind", required=True, choices=tuple(SOURCES))
    make.add_argument("--source", type=path, required=True, help="folder, or table")
    make.add_argument("--output", type=path, required=True, help="folder to make")
    make.add_argument("--samples-per-shard", type=positive, default=256)
    make.add_argument("--val-fraction", type=float, default=0.0, help="held out as OUTPUT/val")
    make.add_argument("--test-fraction", type=float, default=0.0, help="held out as OUTPUT/test")
    make.add_argument(
        "--group-by",
        metavar="COLUMN|REGEX",
        help="what is never in two parts: a column of the table, or what is found in files' paths",
    )
    make.add_argument("--split-by", metavar="COLUMN", help="a column with train, val or test")
    make.add_argument(
        "--frame-rate", type=float, help="frames a second of folders of frames; default: 25"
    )
    make.add_argument("--seed", type=int, default=0, help="of the mixing and the split")
    make.add_argument("--workers", type=positive, help="files at a time; default: all cores")
    make.add_argument(
        "--skip-unreadable", action="store_true", help="leave such samples out, and name them"
    )
    make.set_defaults(command=_shards_make)
    verify = actions.add(
        "verify",
        "Compare shards with their index: sizes, checksums, members, classes.",
        "dr2dist shards verify 'demo/elpv/train/shard-{000000..000003}.tar'",
    )
    verify.add_argument("shards", type=os.path.expanduser, help="a folder, or a brace pattern")
    verify.set_defaults(command=_shards_verify)
    _add_shards_index(actions)


def _add_shards_index(actions: Commands) -> None:
    index = actions.add(
        "index",
        "Write an index of shards that are there already; each is read once.",
        "dr2dist shards index 'shards/train-{000000..000099}.tar' --output shards/train.json",
    )
    index.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="folders, brace patterns, globs, or files"
    )
    index.add_argument("--output", type=path, required=True, help="the index, such as index.json")
    index.add_argument("--label", help="cls, txt, json#KEY, or none; default: what is there")
    index.add_argument("--classes", type=path, help="a file with each number's name, a line each")
    index.add_argument("--part", metavar="I/N", help="a share of the shards, for many machines")
    index.add_argument(
        "--take-counts",
        action="store_true",
        help="shards that img2dataset, wids, DALI or energon have counted are read by the run",
    )
    index.add_argument("--workers", type=positive, help="processes; default: all cores")
    index.add_argument("--overwrite", action="store_true", help="an index that is there")
    index.set_defaults(command=_shards_index)


def _shards_index(given: argparse.Namespace) -> int:
    from dr2dist.data.indexing import Part, index_shards

    found = index_shards(
        given.shards,
        given.output,
        label=given.label,
        classes=given.classes,
        part=None if given.part is None else Part.parse(given.part),
        workers=given.workers,
        overwrite=given.overwrite,
        take_counts=given.take_counts,
    )
    for line in found.describe():
        say(line)
    if found.index is None:
        print(f"{found.left} shard(s) are left to other parts")
        return 0
    index = found.index
    kinds = f" of {len(index.classes)} classes" if index.classes else ""
    print(f"{given.output}: {index.num_samples} samples{kinds} in {len(index.shards)} shard(s)")
    return 0


def _shards_make(given: argparse.Namespace) -> int:
    from dr2dist.data.shards import make_shards
    from dr2dist.data.sources import SOURCES
    from dr2dist.data.unfinished import check_output
    from dr2dist.data.video_records import with_frame_rate

    check_output(given.output)
    records, classes = SOURCES[given.kind](given.source)
    if given.frame_rate is not None:
        records = with_frame_rate(records, given.frame_rate)
    made = make_shards(
        records,
        classes,
        given.output,
        samples_per_shard=given.samples_per_shard,
        val_fraction=given.val_fraction,
        test_fraction=given.test_fraction,
        group_by=given.group_by,
        split_by=given.split_by,
        seed=given.seed,
        workers=given.workers,
        skip_unreadable=given.skip_unreadable,
    )
    for line in made.left:
        say(f"left out: {line}")
    for line in made.parts:
        print(line)
    kinds = f" of {len(classes)} classes" if classes else ""
    more = f", {len(made.left)} left out as unreadable" if made.left else ""
    print(f"{given.output}: {made.samples} samples{kinds}{more}")
    return 0


def _shards_verify(given: argparse.Namespace) -> int:
    from dr2dist.data.shards import verify_shards

    index = verify_shards(given.shards)
    print(f"{given.shards}: {index.num_samples} samples in {len(index.shards)} shards are sound")
    return 0
