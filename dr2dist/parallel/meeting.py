"""How ranks find each other before they form a group: all come, or who does not is named."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import time

import psutil
import torch.distributed as dist

from dr2dist.errors import UserError
from dr2dist.launching.place import Place

LIMIT = 120.0
"""Seconds that ranks wait for each other."""
SHOWN = 4
"""Ranks that a message names."""
_PERIOD = 0.05


def meet(place: Place, limit: float) -> dist.Store:
    """Waits until every rank of the job is there; the store in which they form their group.

    Raises UserError, on all ranks that came, with those that did not, and if what listens at
    rank 0's address belongs to another job.
    """
    where = f"{place.address}:{place.port}"
    end = time.monotonic() + limit
    span = datetime.timedelta(seconds=limit)
    try:
        listens = place.rank == 0 and not place.served
        store = dist.TCPStore(
            place.address, place.port, is_master=listens, timeout=span, wait_for_workers=False
        )
        if not place.served:  # otherwise it outlives attempts, each a job of its own
            _same_job(store, place, where)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(_unreachable(place, where, limit, error)) from None
    own = dist.PrefixStore(place.job, store)
    host = socket.gethostname()
    own.set(f"host/{place.rank}", host)
    own.add("came", 1)
    _wait_for_all(own, place, end, limit)
    store.set_timeout(datetime.timedelta(seconds=1800))
    return dist.PrefixStore("group", own)


def take_interface(place: Place) -> None:
    """Lets gloo use the interface that leads to rank 0, unless somebody has named one: by itself it
    takes what this host's name stands for, which often is a loopback address."""
    try:
        family, *_, where = socket.getaddrinfo(place.address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return  # what cannot be reached is told by those who try
    if not ipaddress.ip_address(own).is_loopback:
        for name, found in psutil.net_if_addrs().items():
            if any(each.address.partition("%")[0] == own for each in found):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _same_job(store: dist.Store, place: Place, where: str) -> None:
    """Raises UserError unless rank 0 of this job is behind the store."""
    if place.rank == 0:
        store.set("job", place.job)
        return
    found = store.get("job").decode()
    if found != place.job:
        raise UserError(
            f"{where} is rank 0's of another job ({found}, this one is {place.job}): give this "
            "one a port of its own (--master-port, or MASTER_PORT)"
        )


def _wait_for_all(store: dist.Store, place: Place, end: float, limit: float) -> None:
    """Rank 0 counts, and says what it found to the others."""
    if place.rank:
        try:
            # Rank 0 may have begun to wait after this one.
            store.wait(["met"], datetime.timedelta(seconds=2 * limit))
        except (dist.DistError, RuntimeError):
            raise UserError(f"rank 0 at {place.address} has ended before all had come") from None
        found = store.get("met").decode()
    else:
        while store.add("came", 0) < place.ranks and time.monotonic() < end:
            time.sleep(_PERIOD)
        found = "" if store.add("came", 0) >= place.ranks else _missing(store, place, limit)
        store.set("met", found)
    if found:
        if place.rank == 0:
            time.sleep(1.0)  # the store goes with this process: others have to read it
        raise UserError(found)


def _missing(store: dist.Store, place: Place, limit: float) -> str:
    here: dict[str, int] = {}
    lost = []
    for rank in range(place.ranks):
        if store.check([f"host/{rank}"]):
            host = store.get(f"host/{rank}").decode()
            here[host] = here.get(host, 0) + 1
        else:
            lost.append(rank)
    names = ", ".join(map(str, lost[:SHOWN]))
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    came = ", ".join(f"{count} of {host}" for host, count in list(here.items())[:SHOWN])
    return (
        f"{len(lost)} of {place.ranks} rank(s) did not come within {limit:g} s "
        f"(launch.join_limit): {names}{more}; there are {came}"
    )


def _unreachable(place: Place, where: str, limit: float, error: Exception) -> str:
    if place.rank == 0:
        reason = str(error).splitlines()[0]
        hint = "--master-port, or MASTER_PORT, says another"
        return f"{where}: this rank 0 cannot listen there ({reason}): {hint}"
    return (
        f"rank {place.rank} on {socket.gethostname()} has not found rank 0 at {where} within "
        f"{limit:g} s (launch.join_limit)"
    )
