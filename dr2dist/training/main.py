"""What a launcher starts as every rank."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from dr2dist.errors import UserError
from dr2dist.status import Status
from dr2dist.training.stopping import StopRequest

OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
"""How launchers that do not set RANK tell the number of processes that they start."""


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
        _be_a_rank()
        summary = _run(given.config, given.overrides, stop)
    except UserError as error:
        _leave(str(error), Status.USER_ERROR)
    if summary["status"] == "interrupted":
        steps = summary["steps"]
        _leave(
            f"stopped by {summary['reason']} after step {steps}; the same command goes on",
            Status.STOPPED,
        )


def _run(config: str, overrides: Sequence[str], stop: StopRequest) -> dict[str, object]:
    # Not above: each data worker imports this module, and needs no engine.
    import torch.distributed as dist

    from dr2dist.config import load_config
    from dr2dist.parallel.engine import UnprovenStepError
    from dr2dist.training.ending import describe_end
    from dr2dist.training.run import run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("DeepSpeed", "torch", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING)
    settings = load_config(config, overrides)
    stop.grace, stop.speaks = settings.train.grace, os.environ["RANK"] == "0"
    try:
        summary = run(settings, lambda: stop.asked)
        if stop.speaks and summary["status"] == "finished":
            print(describe_end(summary, settings.output, settings.data.val))
        return summary
    except UnprovenStepError as error:
        _leave(f"the step was not applied: {error}", Status.UNPROVEN)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _be_a_rank() -> None:
    """Raises UserError if a launcher has started several processes and not said which this is."""
    if "RANK" in os.environ:
        return
    for name in OTHERS:
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"found {name} {os.environ[name]} and no RANK: start with 'dr2dist train', "
                "deepspeed or torchrun, which tell each process its rank"
            )
    from dr2dist.launching.launcher import free_port, ranks_here

    (only,) = ranks_here(1, free_port())
    os.environ.update(only)


def _leave(message: str, status: Status) -> None:
    """One line: from rank 0 for what all ranks found, from the rank itself for its own."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or message.startswith(f"rank {rank}: "):
        sys.stderr.write(f"dr2dist: {message}\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
