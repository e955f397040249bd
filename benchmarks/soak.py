"""Half an hour of small steps on two nodes while ranks are killed and the link is cut.

    python -m benchmarks.soak [--minutes 30] [--seed 0]

Needs root, namespaces and sshd; see benchmarks/nodes.py. One command with --max-restarts goes on
by itself; some samples are damaged and skipped. What it ends with is compared, bit by bit, with a
run on the same shards and ranks that nobody disturbed. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults import ranks_of
from benchmarks.nodes import Nodes, lacking, two_nodes
from benchmarks.signals import CONFIG, LAYOUTS, end_of_run, make_small_shards, same
from dr2dist.data.index import read_index

PAUSE = (15.0, 75.0)
"""Seconds of peace between two faults, at least and at most."""
AWAY = (3.0, 40.0)
"""Seconds of a cut link: some are survived, others lose a rank."""
DAMAGED = 5
"""Samples of the training shards."""
STEPS_A_MINUTE = 200


def main() -> None:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--minutes", type=float, default=30.0, help="of work, as foreseen")
    parser.add_argument("--seed", type=int, default=0, help="of faults")
    given = parser.parse_args()
    if (reason := lacking()) is not None:
        raise SystemExit(f"two nodes cannot be made: {reason}")
    with tempfile.TemporaryDirectory() as place, two_nodes(Path(place)) as nodes:
        folder, steps = Path(place), round(STEPS_A_MINUTE * given.minutes)
        make_small_shards(folder)
        damage(folder / "shards" / "train")
        begin = time.monotonic()
        quiet = start(nodes, folder, "quiet", steps)
        finish(quiet)
        between = time.monotonic()
        command = start(nodes, folder, "soaked", steps)
        faults = disturb(nodes, command, random.Random(given.seed))
        finish(command)
        found, wanted = (folder / "runs" / name / "run" for name in ("soaked", "quiet"))
        summary = json.loads((found / "summary.json").read_text())
        told: dict[str, Any] = {
            "steps": summary["steps"],
            "skipped": summary["skipped"],
            "quiet_seconds": round(between - begin),
            "seconds": round(time.monotonic() - between),
            "starts": len((found / "starts.jsonl").read_text().splitlines()),
            "faults": faults,
            "same": same(end_of_run(found), end_of_run(wanted)),
        }
    sys.stdout.write(json.dumps(told) + "\n")


def damage(shards: Path) -> None:
    """Overwrites the beginning of some images."""
    index = read_index(shards)
    for shard in index.shards[:DAMAGED]:
        members = index.members(shard)[0].members
        place = next(place for kind, (place, _) in members.items() if kind != "cls")
        with (shards / shard.name).open("r+b") as file:
            file.seek(place)
            file.write(b"x" * 50)


def start(nodes: Nodes, folder: Path, name: str, steps: int) -> subprocess.Popen[str]:
    """The command of a run, on both nodes."""
    (folder / "runs" / name).mkdir(parents=True)
    path, output = folder / f"{name}.yaml", folder / "runs" / name / "run"
    text = CONFIG.format(
        shards=folder / "shards", steps=steps, validate=500, save=50,
        parallel=LAYOUTS["ZeRO-2"], output=output,
    )  # fmt: skip
    path.write_text(text)
    hosts = ("--hostfile", str(folder / "hosts1"), "--max-restarts", "1000")
    return nodes.begin(path, *hosts, "data.unreadable=skip", "train.log_every=50")


def finish(command: subprocess.Popen[str]) -> None:
    """Waits for a command that has to end well."""
    out, err = command.communicate()
    assert command.returncode == 0, out + err


def disturb(nodes: Nodes, command: subprocess.Popen[str], chance: random.Random) -> dict[str, int]:
    """Faults at random times until the command has ended; how many of each."""
    count = {"killed": 0, "cut": 0}
    while True:
        try:
            command.communicate(timeout=chance.uniform(*PAUSE))  # reads what it says
        except subprocess.TimeoutExpired:
            pass
        else:
            return count
        ranks = ranks_of(nodes)
        if ranks and chance.random() < 0.5:
            chance.choice(ranks).kill()
            count["killed"] += 1
        else:
            nodes.link("down")
            time.sleep(chance.uniform(*AWAY))
            nodes.link("up")
            count["cut"] += 1


if __name__ == "__main__":
    main()
