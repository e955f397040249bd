"""The train command: checks a configuration, shows its plan, and starts its ranks."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from dr2dist.arguments import path, positive
from dr2dist.config.text import read_settings
from dr2dist.errors import UserError
from dr2dist.launching.launcher import LocalLauncher, watched_ranks
from dr2dist.launching.supervise import Signals, supervise
from dr2dist.lazily import left_out

MODULE = "dr2dist.training.main"


def add_train_arguments(train: argparse.ArgumentParser) -> None:
    """What `dr2dist train` takes."""
    train.add_argument("config", help="a YAML file; 'dr2dist train --settings' lists its keys")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="values to put instead")
    train.add_argument("--ranks", type=positive, default=1, help="processes on this machine")
    train.add_argument(
        "--hostfile", type=path, help="nodes and their slots: started by the deepspeed launcher"
    )
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
    """Its exit status is one of `dr2dist.status.Status`."""
    with Signals() as signals:
        return _run(given, signals)


def _run(given: argparse.Namespace, signals: Signals) -> int:
    read_settings(given.config, given.overrides)  # before what takes seconds to import
    from dr2dist.config import load_config

    with left_out("wandb"):  # timm imports it
        from dr2dist.training.datasets import check_cache
        from dr2dist.training.folder import find_start
        from dr2dist.training.plan import make_plan

    config = load_config(given.config, given.overrides)
    ranks = given.ranks if given.hostfile is None else _slots(given.hostfile)
    plan = make_plan(config, ranks)
    print(plan.describe())
    start = find_start(config, plan.global_batch, plan.steps, plan.train.digest())
    if start.finished is not None:
        print(f"output        {config.output} is finished: nothing is left to do")
        return 0
    if given.hostfile is None and plan.order is not None:
        check_cache(config.data, plan.train, plan.order, nodes=1)
    plan.try_out(config, fetch=not (given.dry_run or start.checkpoints))
    print(f"starts from   {start.describe(config.model.weights)}")
    if start.longer is not None:
        print(f"longer        {plan.describe_longer(config, start.longer)}")
    what = ["--config", given.config, *given.overrides]
    if given.hostfile is not None:
        line = ["--hostfile", str(given.hostfile), "--module", MODULE, *what]
        print(f"launch        {shlex.join(['deepspeed', *line])}", flush=True)
        module, places = ["deepspeed.launcher.runner", *line], [dict[str, str]()]
    else:
        print(f"launch        {ranks} rank(s) on this machine", flush=True)
        module, places = [MODULE, *what], watched_ranks(ranks)
    if given.dry_run:
        return 0
    command = [sys.executable, "-m", *module]
    return supervise(LocalLauncher(), command, places, signals, config.train.grace)


def _slots(hostfile: Path) -> int:
    """All slots of a hostfile. The launcher itself would take a missing file for one node."""
    if not hostfile.is_file():
        raise UserError(f"{hostfile}: the hostfile does not exist")
    total = 0
    for line in hostfile.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        name, _, slots = text.partition(" ")
        if not text:
            continue
        key, _, count = slots.strip().partition("=")
        if not name or key != "slots" or not count.isdecimal():
            raise UserError(f"{hostfile}: found '{text}', allowed is 'HOST slots=N'")
        total += int(count)
    if not total:
        raise UserError(f"{hostfile}: names no host")
    return total
