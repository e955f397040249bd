"""The hosts of a run and how many ranks each has, as a hostfile says."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import NamedTuple

from dr2dist.errors import UserError

ALLOWED = "HOST slots=N, with N from 1 on"
_NAME = re.compile(r"[\w.:%@\[\]-]+")


class Host(NamedTuple):
    """name: as ssh takes it, with a user where the file says one."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2].strip("[]")


def read_hostfile(path: Path) -> list[Host]:
    """Lines of `HOST slots=N`, as DeepSpeed and MPI write them: blanks and tabs between, comments
    after #, `max_slots` and the like left aside.

    Raises UserError with the line for what is none, a host without slots or that comes twice, under
    whatever name, and for a file without any.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: the hostfile does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the hostfile cannot be read: {error}") from None
    hosts: dict[int, Host] = {}
    for number, line in enumerate(lines, 1):
        if text := line.partition("#")[0].strip():
            hosts[number] = _host(f"{path}:{number}", text)
    if not hosts:
        raise UserError(f"{path}: names no host")
    _refuse_twice(path, hosts)
    return list(hosts.values())


def _host(where: str, text: str) -> Host:
    name, *rest = text.split()
    if not _NAME.fullmatch(name) or name.startswith("-"):
        raise UserError(f"{where}: found '{text}', allowed is {ALLOWED}")
    found = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or key not in ("slots", "max_slots", "max-slots"):
            raise UserError(f"{where}: found '{word}', allowed is {ALLOWED}")
        found[key] = value
    slots = found.get("slots")
    if slots is None or not slots.isdecimal() or int(slots) < 1:
        said = "no slots" if slots is None else f"slots={slots}"
        raise UserError(f"{where}: {name} has {said}, allowed is {ALLOWED}")
    return Host(name, int(slots))


def _refuse_twice(path: Path, hosts: dict[int, Host]) -> None:
    seen: dict[str, tuple[int, Host]] = {}
    for number, host in hosts.items():
        for identity in (host.address, "this machine" if is_here(host) else host.address):
            if identity in seen and seen[identity][0] != number:
                line, other = seen[identity]
                same = "" if other.address == host.address else f" as {other.name}"
                raise UserError(
                    f"{path}:{number}: {host.name} is there already{same}, on line {line}: add up "
                    "its slots in one line"
                )
            seen[identity] = number, host


def is_here(host: Host) -> bool:
    """Whether a host is this machine, under whatever name."""
    own = {socket.gethostname(), "localhost"}
    return host.address in own or any(map(_is_own, _addresses(host.address)))


def _addresses(name: str) -> set[str]:
    """What a name stands for; nothing where it is not known here: ssh may know it."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    except OSError:
        return set()


def _is_own(address: str) -> bool:
    """Only a machine's own addresses can be listened on."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
