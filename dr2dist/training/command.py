"""The train command: checks a configuration, shows its plan, and starts its ranks."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dr2dist.arguments import not_negative, path, positive
from dr2dist.checkpoints.folders import checkpoints
from dr2dist.config.text import read_settings
from dr2dist.errors import UserError
from dr2dist.launching.hosts import Host, read_hostfile
from dr2dist.launching.launcher import LocalLauncher, ranks_here, watched
from dr2dist.launching.place import several
from dr2dist.launching.supervise import Signals, supervise, with_restarts
from dr2dist.lazily import left_out
from dr2dist.status import Status, say
from dr2dist.training.main import MODULE

if TYPE_CHECKING:
    from dr2dist.config import Config


def add_train_arguments(train: argparse.ArgumentParser) -> None:
    """What `dr2dist train` takes."""
    train.add_argument("config", help="a YAML file; 'dr2dist train --settings' lists its keys")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="values to put instead")
    where = train.add_mutually_exclusive_group()
    where.add_argument("--ranks", type=positive, help="processes on this machine (default: 1)")
    where.add_argument(
        "--hostfile", type=path, help="lines of 'HOST slots=N': their ranks are started by ssh"
    )
    train.add_argument(
        "--node-rank",
        type=not_negative,
        help="start the ranks of this host of the hostfile alone, counted from 0, without ssh",
    )
    train.add_argument(
        "--max-restarts", type=not_negative, help="start again so often if a rank is lost"
    )
    train.add_argument(
        "--min-ranks", type=positive, help="do without hosts that do not answer, down to so many"
    )
    train.add_argument("--master-addr", help="where rank 0 listens; default: its host's address")
    train.add_argument("--master-port", type=positive, help="default: one that is free there")
    train.add_argument("--dry-run", action="store_true", help="check and show, start nothing")
    train.add_argument("--settings", action=_Settings, nargs=0, help="list all settings and exit")
    train.set_defaults(command=run)


class _Settings(argparse.Action):
    """Prints what every key of a configuration means."""

    def __call__(self, *_: object, **__: object) -> None:
        from dr2dist.config import describe_config

        print(describe_config())
        raise SystemExit(0)


def run(given: argparse.Namespace) -> int:
    """Its exit status is one of `dr2dist.status.Status`.

    Where srun, mpirun or torchrun has started the command several times each is a rank.
    """
    place = None if given.ranks or given.hostfile else several()
    if place is not None and not given.dry_run:
        from dr2dist.training.main import main

        main(["--config", given.config, *given.overrides])
        return 0
    if place is not None and place.rank:
        return 0  # the first shows the plan
    with Signals() as signals:
        return _run(given, signals, 1 if place is None else place.ranks)


def _run(given: argparse.Namespace, signals: Signals, ranks: int) -> int:
    read_settings(given.config, given.overrides)  # before what takes seconds to import
    from dr2dist.config import load_config

    with left_out("wandb"):  # timm imports it
        from dr2dist.training.datasets import check_cache
        from dr2dist.training.described_plan import describe, describe_longer
        from dr2dist.training.folder import find_start
        from dr2dist.training.hosts import on_hosts
        from dr2dist.training.plan import make_plan

    config = load_config(given.config, given.overrides)
    hosts = _hosts(given)
    ranks = sum(host.slots for host in hosts) if hosts else given.ranks or ranks
    plan = make_plan(config, ranks)
    say(describe(plan), sys.stdout)
    start = find_start(config, plan.global_batch, plan.steps, plan.train.digest())
    if start.finished is not None:
        say(f"output        {config.output} is finished: nothing is left to do", sys.stdout)
        return 0
    if not hosts and plan.order is not None:
        check_cache(config.data, plan.train, plan.order, nodes=1)
    plan.try_out(config, fetch=not (given.dry_run or start.checkpoints))
    say(f"starts from   {start.describe(config.model.weights)}", sys.stdout)
    if start.longer is not None:
        say(f"longer        {describe_longer(plan, config, start.longer)}", sys.stdout)
    if hosts and given.node_rank is None:
        status = on_hosts(given, config, plan, hosts, signals)
    else:
        status = _here(given, config, hosts, ranks, signals)
    return _after_a_loss(Path(config.output)) if status == Status.LOST else status


def _after_a_loss(output: Path) -> Status:
    """What starts a command again by its status asks for nothing but whether it can go on."""
    with contextlib.suppress(OSError):  # storage may be what was lost
        if checkpoints(output):
            return Status.STOPPED
    return Status.LOST


def _here(
    given: argparse.Namespace, config: Config, hosts: Sequence[Host], ranks: int, signals: Signals
) -> int:
    """Starts the ranks of this machine. hosts: of all, where it is one of several."""
    from dr2dist.training.hosts import places_of_node

    own = hosts[given.node_rank].slots if hosts else ranks
    own_part = f"{own} of " if hosts else ""
    say(f"launch        {own_part}{ranks} rank(s) on this machine", sys.stdout)
    if given.dry_run:
        return 0
    command = [sys.executable, "-m", MODULE, "--config", given.config, *given.overrides]

    def begin() -> int:
        places = places_of_node(given, config, hosts) if hosts else ranks_here(ranks)
        return supervise(LocalLauncher(), command, watched(places), signals, config.train.grace)

    return with_restarts(begin, given.max_restarts or 0, signals)


def _hosts(given: argparse.Namespace) -> list[Host]:
    """Those of the hostfile, none without one. Raises UserError for what has no effect."""
    if given.hostfile is None:
        for name in ("node_rank", "min_ranks", "master_addr", "master_port"):
            if getattr(given, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect without --hostfile")
        return []
    if given.node_rank is not None:
        for name in ("min_ranks", "max_restarts"):
            if getattr(given, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect with --node-rank")
    hosts = read_hostfile(given.hostfile)
    if given.node_rank is not None and given.node_rank >= len(hosts):
        raise UserError(f"--node-rank {given.node_rank}: {given.hostfile} has {len(hosts)} host(s)")
    return hosts
