"""What a launcher starts as every rank."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

from dr2dist.errors import UserError, one_line
from dr2dist.launching.launcher import ranks_here
from dr2dist.launching.place import own_place, take_place
from dr2dist.lazily import left_out
from dr2dist.status import Status, end_after, say
from dr2dist.training.stopping import StopRequest

log = logging.getLogger(__name__)

MODULE = "dr2dist.training.main"
"""This one, by which a rank is started."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a configuration as one rank; without a launcher, as the only one.

    Exits with a status of `dr2dist.status.Status`, and says why in one line.
    """
    stop = StopRequest()  # before all that takes long
    parser = argparse.ArgumentParser(
        description="One rank of a run.",
        epilog="example: deepspeed --num_accelerators 2 launch/train.py --config "
        "configs/elpv_vit_small.yaml train.epochs=1",
    )
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--local_rank", help="given by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="other values")
    given = parser.parse_args(arguments)
    try:
        stop.speaks = _own_rank() == 0
        summary = _run(given.config, given.overrides, stop)
    except UserError as error:
        _leave(str(error), Status.USER_ERROR, stop)
    if summary["status"] == "interrupted":
        steps = summary["steps"]
        _leave(
            f"stopped by {summary['reason']} after step {steps}; the same command goes on",
            Status.STOPPED,
            stop,
        )


def _run(config: str, overrides: Sequence[str], stop: StopRequest) -> dict[str, object]:
    # A store whose rank 0 has gone is told in one line; torch's own has a stack of C++ frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Not above: each data worker imports this module, and needs no engine.
    import torch.distributed as dist

    from dr2dist.config import load_config
    from dr2dist.training.ending import describe_end

    with left_out("mlflow", "wandb"):  # DeepSpeed's tuner and timm's summaries import them
        from dr2dist.parallel.engine import UnprovenStepError
        from dr2dist.training.run import run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.raiseExceptions = False  # a log that cannot be written is no reason for a traceback
    threading.excepthook = _say_of_thread
    for name in ("DeepSpeed", "torch", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch is giving up.
    warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)
    settings = load_config(config, overrides)
    stop.grace = settings.train.grace
    try:
        summary = run(settings, lambda: stop.asked)
        if stop.speaks and summary["status"] == "finished":
            say(describe_end(summary, settings.output, settings.data.val), sys.stdout)
        return summary
    except UnprovenStepError as error:
        _leave(f"the step was not applied: {error}", Status.UNPROVEN, stop)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _say_of_thread(ended: threading.ExceptHookArgs) -> None:
    """One line for a thread, such as TensorBoard's, that an exception has ended."""
    name = ended.thread.name if ended.thread else "a thread"
    log.error("%s ended: %s: %s", name, ended.exc_type.__name__, one_line(ended.exc_value))


def _own_rank() -> int:
    """As what has started this process says; otherwise it is the only rank.

    Raises UserError where that is not said whole.
    """
    place = own_place()
    if place is None:
        (only,) = ranks_here(1)
        os.environ.update(only)
        return 0
    take_place(place)
    return place.rank


def _leave(message: str, status: Status, stop: StopRequest) -> NoReturn:
    """One line: from rank 0 for what all ranks found, from the rank itself for its own."""
    if stop.speaks or message.startswith("rank "):
        say(f"dr2dist: {message}")
    raise SystemExit(status)


if __name__ == "__main__":
    end_after(main)
