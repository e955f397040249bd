"""Counts of samples that others have left beside their shards."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dr2dist.data.remote import is_remote, read_all
from dr2dist.errors import UserError

REQUESTS = 16
"""Files that are asked for at a time."""


def known_counts(shards: Sequence[str]) -> dict[str, int]:
    """Samples by shard, of those that there is a count of.

    From img2dataset's SHARD_stats.json, DALI's SHARD.idx (wds2idx), a JSON file of wids beside
    them, and energon's .nv-meta/.info.json.
    """
    folders = dict.fromkeys(os.path.dirname(shard) for shard in shards)
    by_name = {folder: _of_folder(folder) for folder in folders}
    found = {
        shard: by_name[os.path.dirname(shard)][os.path.basename(shard)]
        for shard in shards
        if os.path.basename(shard) in by_name[os.path.dirname(shard)]
    }
    rest = [shard for shard in shards if shard not in found]
    with ThreadPoolExecutor(REQUESTS) as pool:
        counts = zip(rest, pool.map(_of_shard, rest), strict=True)
        return {**found, **{shard: count for shard, count in counts if count is not None}}


def _of_folder(folder: str) -> dict[str, int]:
    """By the shards' names, from files that speak of several."""
    files = [_json(os.path.join(folder, ".nv-meta", ".info.json"))]
    if not is_remote(folder):
        files += [_json(str(path)) for path in sorted(Path(folder or ".").glob("*.json"))]
    counts: dict[str, int] = {}
    for file in files:
        with contextlib.suppress(TypeError, KeyError, ValueError, AttributeError):  # another file
            for name, count in file.get("shard_counts", {}).items():
                counts[os.path.basename(name)] = int(count)
            for each in file.get("shardlist", ()):
                counts[os.path.basename(each["url"])] = int(each["nsamples"])
    return counts


def _of_shard(shard: str) -> int | None:
    stem = os.path.splitext(shard)[0]
    successes = _json(f"{stem}_stats.json").get("successes")
    if isinstance(successes, int):
        return successes
    version, _, count = _text(f"{stem}.idx").partition("\n")[0].partition(" ")
    return int(count) if version.startswith("v1") and count.isdecimal() else None


def _json(where: str) -> dict[str, Any]:
    try:
        found = json.loads(_text(where) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(where: str) -> str:
    """Empty where there is no such file."""
    try:
        data = read_all(where, patience=0) if is_remote(where) else Path(where).read_bytes()
        return data.decode("utf-8", "replace")
    except (OSError, UserError):
        return ""
