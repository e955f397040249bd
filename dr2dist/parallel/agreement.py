"""What ranks find is the same on all of them, mistakes too: none waits for one that has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from dr2dist.errors import UserError

Value = TypeVar("Value")


class AgreedError(UserError):
    """What a user did, raised on all ranks together."""


@contextmanager
def agree() -> Iterator[None]:
    """A UserError on any rank is raised on all, once every rank has come here.

    What all have found is raised as it is, otherwise the first of it, with its rank.
    """
    failure: str | None = None
    try:
        yield
    except UserError as error:
        failure = str(error)
    found = from_all(failure)
    for rank, message in enumerate(found):
        if message is not None:
            alike = all(other == message for other in found)
            raise AgreedError(message if alike else f"{message} (rank {rank})") from None


def from_all(value: Value) -> list[Value]:
    """What each rank has, by rank, on all ranks; every rank must call it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(find: Callable[[], Value]) -> Value:
    """What rank 0 finds, on all ranks; a UserError of it is raised on all. All must call it."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise AgreedError(found[1])
    value: Value = found[0]
    return value
