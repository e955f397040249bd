"""Which rank a process is, as environments recorded under srun, mpirun and others say."""

from __future__ import annotations

import pytest

from dr2dist.errors import UserError
from dr2dist.launching.launcher import free_port
from dr2dist.launching.place import Place, first_host, own_place, several, take_place, tasks_by_node

SRUN = """
SLURM_JOB_ID=4711 SLURM_STEP_ID=2 SLURM_NTASKS=6 SLURM_STEP_NUM_TASKS=6 SLURM_PROCID=5
SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_STEP_NODELIST=gpu[007-008] SLURM_STEP_TASKS_PER_NODE=4,2
"""
BATCH = "SLURM_JOB_ID=4711 SLURM_NTASKS=6 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0"
OPENMPI_4 = """
OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=1
OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_MCA_ess_base_jobid=1874526209 PMIX_RANK=3
"""
OPENMPI_5 = """
OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_RANK=1
OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=prterun-vm-312@1 PMIX_RANK=1
"""
MPICH = "PMI_SIZE=2 PMI_RANK=1 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2 PMI_FD=7"
TORCHRUN = """
RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29400
TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=1 TORCHELASTIC_USE_AGENT_STORE=True
"""
DEEPSPEED = "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"


def said(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (SRUN, Place(5, 6, 1, 2, "gpu007", 0, "slurm/4711.2/0")),
        (OPENMPI_4 + "MASTER_ADDR=a", Place(3, 4, 1, 2, "a", 0, "openmpi/1874526209")),
        (OPENMPI_5, Place(1, 2, 1, 2, "127.0.0.1", 0, "openmpi/prterun-vm-312@1")),
        (MPICH, Place(1, 2, 1, 2, "127.0.0.1", 0, "mpich/")),
        (TORCHRUN, Place(3, 4, 1, 2, "a", 29400, "none/1", served=True)),
        (DEEPSPEED, Place(0, 2, 0, 2, "127.0.0.1", 29500, "none/0")),
    ],
    ids=["srun", "openmpi 4", "openmpi 5", "mpich", "torchrun", "deepspeed"],
)
def test_a_rank_knows_its_place(text: str, place: Place) -> None:
    found = own_place(said(text))
    assert found is not None and found.job.startswith(place.job)
    assert place.port == 0 or found.port == place.port
    assert 1024 < found.port < 32768 or found.port == place.port
    assert found._replace(port=0, job="") == place._replace(port=0, job="")
    # As torch and DeepSpeed read it, and a rank's own children.
    environment: dict[str, str] = {}
    take_place(found, environment)
    assert own_place(environment) == found._replace(served=False)


def test_ranks_of_a_job_agree_on_a_port_and_jobs_do_not() -> None:
    other = SRUN.replace("PROCID=5", "PROCID=0").replace("NODEID=1", "NODEID=0")
    next_step, requeued = SRUN.replace("STEP_ID=2", "STEP_ID=3"), SRUN + "SLURM_RESTART_COUNT=1"
    places = [own_place(said(text)) for text in (SRUN, other, next_step, requeued)]
    ports = [place.port for place in places if place is not None]
    assert ports[0] == ports[1] and len(set(ports)) == 3
    told = own_place(said(SRUN + "MASTER_PORT=12345 MASTER_ADDR=10.0.0.1"))
    assert told is not None and (told.address, told.port) == ("10.0.0.1", 12345)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BATCH, "found SLURM_NTASKS 6, and no rank: start with 'srun dr2dist train"),
        ("OMPI_COMM_WORLD_SIZE=2", "found OMPI_COMM_WORLD_SIZE 2, and no rank"),
        ("PMI_SIZE=2", "found PMI_SIZE 2, and no rank"),
        (OPENMPI_4, "4 ranks, 2 of them here, and no MASTER_ADDR"),
        ("RANK=0 WORLD_SIZE=2", "found RANK and no LOCAL_RANK"),
        ("RANK=x WORLD_SIZE=2", "found RANK and a variable beside it: .*'x'"),
        (SRUN.replace("=4,2", "=4-2"), "found SLURM_STEP_NUM_TASKS and a variable .*'4-2'"),
    ],
)
def test_places_that_say_too_little_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        own_place(said(text))


def test_a_process_alone_is_no_rank_of_several() -> None:
    assert own_place({}) is None
    step = SRUN.replace("NUM_TASKS=6", "NUM_TASKS=1").replace("PROCID=5", "PROCID=0")
    assert several(said(step.replace("NODEID=1", "NODEID=0"))) is None


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[01-04,9]", "node01"),
        ("node[7]", "node7"),
        ("rack1-n[003-010]-ib,x", "rack1-n003-ib"),
        ("n1,n[2-3]", "n1"),
    ],
)
def test_lists_of_hosts_as_slurm_writes_them(names: str, first: str) -> None:
    assert first_host(names) == first


def test_numbers_of_tasks_as_slurm_writes_them() -> None:
    assert tasks_by_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_by_node("8") == [8]


def test_a_port_that_is_free_stays_so() -> None:
    """Until rank 0 listens, which takes seconds: connections get none of these."""
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="utf-8") as limits:
        first, last = map(int, limits.read().split())
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40 and not any(first <= port <= last for port in ports)
