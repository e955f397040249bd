"""What ranks run in test_compared."""

from __future__ import annotations

import os

import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.parallel.compared import compare
from dr2dist.training.facts import facts_of_program
from tests import cases


def compared(facts: list[dict[str, str]]) -> str | None:
    """What is said of each rank's facts."""
    try:
        compare(lambda: facts[dist.get_rank()])
    except UserError as error:
        return str(error)
    return None


def program() -> dict[str, str]:
    """A rank's own."""
    return facts_of_program(())


def run_apart(path: str, folders: list[str], overrides: list[list[str]]) -> str | None:
    """A run of which each rank is in a folder of its own, with overrides of its own; what is wrong
    with it."""
    rank, before = dist.get_rank(), os.getcwd()
    os.chdir(folders[rank])
    try:
        cases.run_config(path, overrides[rank])
    except UserError as error:
        return str(error)
    finally:
        os.chdir(before)
    return None
