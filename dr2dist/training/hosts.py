"""A run on several hosts: what they have is looked at, and their ranks are started."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dr2dist.config import Config, dump_config
from dr2dist.errors import UserError
from dr2dist.launching.hosts import Host
from dr2dist.launching.place import PORT, Place
from dr2dist.launching.remote import RemoteLauncher, forwarded
from dr2dist.launching.supervise import Signals, supervise, with_restarts
from dr2dist.launching.survey import describe_hosts
from dr2dist.status import say
from dr2dist.training.main import MODULE
from dr2dist.training.plan import Plan


def on_hosts(
    given: argparse.Namespace,
    config: Config,
    plan: Plan,
    hosts: Sequence[Host],
    signals: Signals,
) -> int:
    """Looks at all hosts at once, prints what they have, and starts their ranks unless it is a dry
    run, again where they are lost; the exit status of the whole. Raises UserError for hosts that
    cannot take part."""
    variables = forwarded(os.environ, config.launch.env)
    say(f"forwarded     {', '.join(sorted(variables)) or 'no variables'}", sys.stdout)
    folder = str(Path(given.config).resolve().parent)  # where plugins may lie
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))

    def start() -> int:
        launcher = RemoteLauncher(hosts, MODULE, config.train.grace)
        try:
            return _start(given, config, plan, launcher, variables, signals)
        finally:
            launcher.close()

    return with_restarts(start, given.max_restarts or 0, signals)


def _start(
    given: argparse.Namespace,
    config: Config,
    plan: Plan,
    launcher: RemoteLauncher,
    variables: dict[str, str],
    signals: Signals,
) -> int:
    with _token(Path(config.output)) as token:
        begin = time.time()
        paths = [*token, *_needed(config, plan)]
        limit, least = config.launch.join_limit, given.min_ranks
        found = launcher.greet(limit, variables, paths, least, lambda: signals.caught)
    say(describe_hosts(launcher.hosts, found, (begin + time.time()) / 2), sys.stdout)
    _refuse(launcher.hosts, found, token)
    places = launcher.places(given.master_addr, given.master_port)
    launcher.config = dump_config(fitted(config, plan.global_batch, len(places)))
    where = f"{places[0].address}:{places[0].port}"
    say(f"launch        {len(places)} ranks meet at {where}", sys.stdout)
    if given.dry_run:
        return 0
    environments = [place.variables() for place in places]
    return supervise(launcher, [], environments, signals, config.train.grace)


def fitted(config: Config, batch: int, ranks: int) -> Config:
    """A configuration with the same global batch on another number of ranks, by more or fewer
    micro-batches in a step.

    Raises UserError, naming the numbers of ranks that fit, where none gives it.
    """
    each, stages = config.train.micro_batch, config.parallel.stages
    accumulate, rest = divmod(batch * stages, each * ranks)
    if rest or ranks % stages or not accumulate:
        whole = batch // each
        fits = [stages * n for n in range(1, whole + 1) if whole % n == 0]
        raise UserError(
            f"{ranks} rank(s) cannot share a global batch of {batch} in micro-batches of {each}: "
            f"allowed are {', '.join(map(str, fits))} rank(s)"
        )
    train = config.train.model_copy(update={"accumulate": accumulate})
    return config.model_copy(update={"train": train})


def places_of_node(
    given: argparse.Namespace, config: Config, hosts: Sequence[Host]
) -> list[dict[str, str]]:
    """The variables of the ranks of one host of several, each of which gets the same command."""
    before = sum(host.slots for host in hosts[: given.node_rank])
    own, ranks = hosts[given.node_rank].slots, sum(host.slots for host in hosts)
    job = hashlib.sha256((dump_config(config) + repr(hosts)).encode()).hexdigest()[:16]
    address, port = given.master_addr or hosts[0].address, given.master_port or PORT
    places = [Place(before + local, ranks, local, own, address, port, job) for local in range(own)]
    return [place.variables() for place in places]


@contextlib.contextmanager
def _token(output: Path) -> Iterator[list[str]]:
    """A file where the output will be, which all hosts must see; none where nothing can be
    written."""
    there = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    path = there / f".dr2dist-{secrets.token_hex(8)}"
    try:
        path.touch()
    except OSError:
        yield []
        return
    try:
        yield [str(path)]
    finally:
        path.unlink(missing_ok=True)


def _needed(config: Config, plan: Plan) -> list[str]:
    """Files that each host must have, as far as they are not fetched."""
    indexes = [index for index in (plan.train, plan.val) if index is not None]
    sources = [source for index in indexes for source in index.sources]
    paths = [source.where(source.shards[0]) for source in sources]
    here = [path for path, source in zip(paths, sources, strict=True) if os.path.exists(path)]
    more = [config.parallel.deepspeed, config.model.weights]
    return [*here, *(str(path) for path in more if path and os.path.exists(path))]


def _refuse(hosts: Sequence[Host], found: Sequence[dict[str, Any]], token: Sequence[str]) -> None:
    faults = []
    for host, said in zip(hosts, found, strict=True):
        lacks = [path for path in said["missing"] if path not in token]
        if len(lacks) < len(said["missing"]):
            faults.append(
                f"host {host.name} does not see what is written for output here: it must be on "
                "storage that all hosts share"
            )
        if lacks:
            more = f" and {len(lacks) - 2} more" if len(lacks) > 2 else ""
            faults.append(f"host {host.name} lacks {', '.join(lacks[:2])}{more}")
    if faults:
        raise UserError("; ".join(faults))
