"""Where a process stands among the ranks of a run, as whatever has started it tells."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple

from dr2dist.errors import UserError

JOB = "DR2DIST_JOB"
"""The variable with a word that only the ranks of one start know."""
FIRST_PORT, PORTS = 20000, 12000
"""Ports of jobs that have none yet; below those that systems give away."""
PORT = 29500
"""What torch and DeepSpeed take where nobody says a port."""
Environment = Mapping[str, str]


class Place(NamedTuple):
    """A rank's. local_rank: its number among the local_ranks of its node. address, port: where
    rank 0 listens. job: a word that the ranks of one start share, and no others know. served:
    whether another process listens there for them all, as torchrun does."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    address: str
    port: int
    job: str
    served: bool = False

    def variables(self) -> dict[str, str]:
        """As torch and DeepSpeed read them."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            JOB: self.job,
        }


def own_place(environment: Environment = os.environ) -> Place | None:
    """This process's, as torchrun, DeepSpeed, `dr2dist train`, srun or mpirun tell it; None for one
    that nobody has started as a rank. A number in parentheses is a variable of:

    torch (RANK), SLURM (SLURM_PROCID, of srun's steps, not of a batch script), OpenMPI
    (OMPI_COMM_WORLD_RANK), MPICH's and Intel's process manager (PMI_RANK).

    Raises UserError for places that say too little, and within a job of several tasks for a process
    that is none of them.
    """
    for variable, read in _STARTERS.items():
        if variable in environment:
            try:
                return read(environment)
            except KeyError as missing:
                raise UserError(f"found {variable} and no {missing.args[0]}") from None
            except ValueError as wrong:
                raise UserError(f"found {variable} and a variable beside it: {wrong}") from None
    for variable, how in _FORGOTTEN.items():
        if environment.get(variable, "1") != "1":
            raise UserError(f"found {variable} {environment[variable]}, and no rank: {how}")
    return None


def several(environment: Environment = os.environ) -> Place | None:
    """`own_place`, if it is one of several: a step of a single task starts its ranks itself."""
    place = own_place(environment)
    return place if place is not None and place.ranks > 1 else None


def take_place(place: Place, environment: MutableMapping[str, str] = os.environ) -> None:
    """Says a place in the variables that torch and DeepSpeed read."""
    environment.update(place.variables())


def _of_torch(found: Environment) -> Place:
    rank, ranks = int(found["RANK"]), int(found["WORLD_SIZE"])
    again = found.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        rank,
        ranks,
        int(found["LOCAL_RANK"]),
        int(found.get("LOCAL_WORLD_SIZE") or found.get("LOCAL_SIZE") or 1),
        found["MASTER_ADDR"],
        int(found.get("MASTER_PORT", PORT)),
        found.get(JOB) or f"{found.get('TORCHELASTIC_RUN_ID', 'none')}/{again}",
        found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _of_slurm(found: Environment) -> Place:
    job, step = found["SLURM_JOB_ID"], found["SLURM_STEP_ID"]
    node = int(found["SLURM_NODEID"])
    name = f"{job}.{step}/{found.get('SLURM_RESTART_COUNT', '0')}"
    return Place(
        int(found["SLURM_PROCID"]),
        int(found["SLURM_STEP_NUM_TASKS"]),
        int(found["SLURM_LOCALID"]),
        tasks_by_node(found["SLURM_STEP_TASKS_PER_NODE"])[node],
        found.get("MASTER_ADDR") or first_host(found["SLURM_STEP_NODELIST"]),
        _port(found, name),
        f"slurm/{name}",
    )


def _of_openmpi(found: Environment) -> Place:
    ranks, here = int(found["OMPI_COMM_WORLD_SIZE"]), int(found["OMPI_COMM_WORLD_LOCAL_SIZE"])
    names = ("PMIX_NAMESPACE", "OMPI_MCA_orte_ess_jobid", "OMPI_MCA_ess_base_jobid")
    job = next((found[name] for name in names if name in found), "none")
    rank, local = int(found["OMPI_COMM_WORLD_RANK"]), int(found["OMPI_COMM_WORLD_LOCAL_RANK"])
    address = _address(found, ranks, here, "mpirun -x MASTER_ADDR=HOST")
    return Place(rank, ranks, local, here, address, _port(found, job), f"openmpi/{job}")


def _of_mpich(found: Environment) -> Place:
    ranks = int(found["PMI_SIZE"])
    here = int(found.get("MPI_LOCALNRANKS", ranks))
    rank, local = int(found["PMI_RANK"]), int(found.get("MPI_LOCALRANKID", found["PMI_RANK"]))
    address = _address(found, ranks, here, "mpirun -genv MASTER_ADDR HOST")
    job = f"{os.getppid()}" if here == ranks else "none"  # the manager of a node's ranks
    return Place(rank, ranks, local, here, address, _port(found, job), f"mpich/{job}")


_STARTERS: dict[str, Callable[[Environment], Place]] = {
    "RANK": _of_torch,
    "SLURM_STEP_NUM_TASKS": _of_slurm,
    "OMPI_COMM_WORLD_RANK": _of_openmpi,
    "PMI_RANK": _of_mpich,
}


_FORGOTTEN = {
    "OMPI_COMM_WORLD_SIZE": "start with mpirun, torchrun or 'dr2dist train'",
    "PMI_SIZE": "start with mpirun, torchrun or 'dr2dist train'",
    "SLURM_NTASKS": "start with 'srun dr2dist train ...', or say how many here by --ranks",
}
"""Numbers of processes that come to nothing where none is told which it is."""


def _address(found: Environment, ranks: int, here: int, how: str) -> str:
    if "MASTER_ADDR" in found or here == ranks:
        return found.get("MASTER_ADDR", "127.0.0.1")
    raise UserError(
        f"{ranks} ranks, {here} of them here, and no MASTER_ADDR: MPI does not tell where rank 0 "
        f"is; say it by '{how}'"
    )


def _port(found: Environment, job: str) -> int:
    """As said, or one that follows from the job: no two jobs of a host meet by accident."""
    if "MASTER_PORT" in found or job == "none":
        return int(found.get("MASTER_PORT", PORT))
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def first_host(names: str) -> str:
    """The first of a list of hosts as SLURM writes it: `a[003-010,12]-x,b` begins with a003-x."""
    first = re.match(r"(?P<before>[^,\[]+)(\[(?P<number>\w+)[^\]]*\](?P<after>[^,\[]*))?", names)
    if first is None:
        raise ValueError(f"'{names}' is no list of hosts")
    return "".join(first[part] or "" for part in ("before", "number", "after"))


def tasks_by_node(text: str) -> list[int]:
    """SLURM's numbers of tasks: `2(x3),1` are 2, 2, 2 and 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"'{text}' are no numbers of tasks")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts
