"""What has to be the same on all ranks is compared with rank 0's, and told by host."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

import torch.distributed as dist

from dr2dist.parallel.agreement import AgreedError, from_all, from_first

SHOWN = 3
"""Hosts, and of each facts, that a message names."""
Facts = Mapping[str, str]


def compare(find: Callable[[], Facts], hint: str = "") -> None:
    """Raises AgreedError, on all ranks, unless all have the same facts; every rank must call it.

    find: this rank's, by name; not asked for where there is only one. hint: behind the message.
    """
    if dist.get_world_size() == 1:
        return
    facts, host = find(), socket.gethostname()
    first, first_host = from_first(lambda: (dict(facts), host))
    names = dict.fromkeys((*first, *facts))
    other = {name: facts.get(name) for name in names if facts.get(name) != first.get(name)}
    found = from_all((host, other) if other else None)
    differing = [(rank, *each) for rank, each in enumerate(found) if each is not None]
    if differing:
        raise AgreedError(_told(differing, first, first_host) + hint)


def _told(
    differing: list[tuple[int, str, dict[str, str | None]]], first: Facts, first_host: str
) -> str:
    """One line: each host once, with what its first differing rank found."""
    by_host: dict[str, tuple[int, dict[str, str | None]]] = {}
    for rank, host, other in differing:
        by_host.setdefault(host, (rank, other))
    parts = []
    for host, (rank, other) in list(by_host.items())[:SHOWN]:
        each = [
            f"{name} is {_shown(value)}, not {_shown(first.get(name))}"
            for name, value in list(other.items())[:SHOWN]
        ]
        more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
        parts.append(f"on {host} (rank {rank}) {', '.join(each)}{more}")
    more = f"; and {len(by_host) - SHOWN} more host(s)" if len(by_host) > SHOWN else ""
    return f"ranks differ: {'; '.join(parts)}{more}, as on {first_host} (rank 0)"


def _shown(value: str | None) -> str:
    if value is None:
        return "unset"
    return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
