"""What the deepspeed launcher starts in every rank."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch.distributed as dist

from dr2dist.config import load_config
from dr2dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a configuration; exits 2 for a user's error, 3 for a step that was not proven."""
    parser = argparse.ArgumentParser(
        description="One rank of a run.",
        epilog="example: deepspeed --num_accelerators 2 launch/train.py --config "
        "configs/elpv_vit_small.yaml train.epochs=1",
    )
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--local_rank", help="given by the launcher")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="other values")
    given = parser.parse_args(arguments)
    # Not above: each data worker imports this module, and needs no engine.
    from dr2dist.parallel.engine import UnprovenStepError
    from dr2dist.training.run import run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("DeepSpeed", "torch", "timm"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        run(load_config(given.config, given.overrides))
    except UserError as error:
        _stop(str(error), 2)
    except UnprovenStepError as error:
        _stop(f"the step was not applied: {error}", 3)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _stop(message: str, status: int) -> None:
    """One line: from rank 0 for what all ranks found, from the rank itself for its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 or message.startswith(f"rank {rank}: "):
        sys.stderr.write(f"dr2dist: {message}\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
