"""What a GPU needs of the code, shown without one: devices by name only, and what would wait."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dr2dist.config.optim import Optim
from dr2dist.config.schema import Parallel
from dr2dist.data.stream import ShardDataset
from dr2dist.errors import UserError
from dr2dist.launching.place import Place
from dr2dist.parallel import processes
from dr2dist.parallel.fragment import Fragment
from dr2dist.parallel.master_weights import MasterWeights
from dr2dist.parallel.sharded_ema import ShardedEMA
from dr2dist.parallel.verdict import Report
from dr2dist.reversible import Chain, State
from dr2dist.reversible.arithmetic import triton_kernels
from dr2dist.reversible.certificate import Flags, Probe
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.transforms import ImageData, train_transform
from dr2dist.training.groups import ParameterGroup
from dr2dist.training.run import _optimizer
from tests.functions import make_chain, tokens
from tests.images import FIELDS, batches, classification, labelled, make_small_shards
from tests.waits import Waits

GPU = torch.device("cuda", 0)


class Still:
    """Stands for the random streams, which are states of the host's, and read there."""

    def __init__(self, device: torch.device, item: int = 0) -> None:
        pass

    def at(self, function: int, key: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def close(self) -> None:
        pass


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Tensors on a GPU that is not there: shapes, dtypes and devices, and no kernels."""
    monkeypatch.setattr(triton_kernels, "launch", lambda *_, **__: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr("dr2dist.reversible.segment.Randomness", Still)
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits


def test_the_detector_finds_what_waits(fake_gpu: Waits) -> None:
    there = torch.zeros(3, device=GPU)
    for number, wait in enumerate(
        (
            lambda: torch.tensor([1, 2], device=GPU),
            lambda: torch.ones(2).to(GPU),
            lambda: there.cpu(),
            lambda: there.__setitem__(1, 5.0),
            lambda: there[torch.zeros(3, dtype=torch.bool, device=GPU).nonzero()],
        )
    ):
        fake_gpu.found.clear()
        with contextlib.suppress(Exception):  # a fake tensor has no values to count
            wait()
        assert fake_gpu.found, number
    fake_gpu.found.clear()
    there.add_(torch.tensor(0.5)).mul_(2.0)
    torch.ones(2).to(GPU, non_blocking=True)
    assert not fake_gpu.found


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("slices", [{}, {"chunk_size": 2}])
def test_a_chain_forth_and_back_makes_the_host_wait_for_nothing(
    fake_gpu: Waits, arithmetic: str, slices: dict[str, int]
) -> None:
    with GPU:
        chain: Chain = make_chain(
            4, dropout=0.1, arithmetic=arithmetic, on_failure="record", **slices
        )
    x = torch.empty(5, 7, 32, device=GPU)
    fake_gpu.found.clear()
    recorded = chain.record(x)
    assert recorded.output.device == GPU
    assert chain.reverse(recorded).device == GPU
    assert not fake_gpu.found


def test_what_is_made_for_a_step_is_queued(fake_gpu: Waits) -> None:
    chain = make_chain(2)
    task = classification(3, class_weights=[1.0, 2.0, 3.0], label_smoothing=0.1)
    output, labels = torch.zeros(4, 3, device=GPU), torch.zeros(4, dtype=torch.int64)
    zero = torch.zeros((), device=GPU)
    fake_gpu.found.clear()
    for _ in range(2):
        flags = Flags(GPU)
        flags.note_start(zero > 1)
        flags.note_done()
        chain.ledger.record(flags.tensor, zero, 0)
        assert task.loss(output, labelled(labels), 4.0).total.device == GPU
        assert Report(zero, zero, [chain]).pack((0.5, 0.5), 3).device == GPU
    probe = Probe(State(output, output))
    assert probe.drift(State(output, output)).device == GPU
    assert not fake_gpu.found


def test_a_rank_takes_its_gpu_before_the_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: log.append(device))
    monkeypatch.setattr("deepspeed.init_distributed", lambda backend: log.append(backend))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    take_place(Place(3, 4, 3, 4, "127.0.0.1", 1, "job"), monkeypatch)
    assert processes.init_distributed() == torch.device("cuda", 3)
    assert log == [torch.device("cuda", 3), "nccl"]


def take_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.variables().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("rank", "variable", "ranks"), [(0, "LOCAL_SIZE", 3), (2, "", 3)])
def test_more_ranks_than_gpus_are_refused_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, rank: int, variable: str, ranks: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    take_place(Place(rank, 9, rank, 1, "127.0.0.1", 1, "job"), monkeypatch)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    if variable:
        monkeypatch.setenv(variable, str(ranks))
    with pytest.raises(UserError, match=f"this node has {ranks} ranks and 2 GPU") as error:
        processes.init_distributed()
    assert "\n" not in str(error.value)


def test_workers_start_from_a_clean_process_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = make_small_shards(tmp_path, 8) / "train"
    data = ImageData(train="", scale=(1, 1))
    dataset = ShardDataset(shards, FIELDS, train_transform((8, 8), [0.5] * 3, [0.5] * 3, data))
    items = [[(0, 0), (0, 1)], [(0, 2)]]
    plain: Any = batches(dataset, items, 0).batches
    here = list(plain)
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        there: Any = batches(dataset, items, 1).batches
    assert there.pin_memory and not plain.pin_memory
    assert there.multiprocessing_context.get_start_method() == "forkserver"
    with pytest.warns(UserWarning, match="pin_memory"):  # there is no GPU to pin it for
        found = list(there)
    for one, other in zip(here, found, strict=True):
        assert torch.equal(one.inputs["image"], other.inputs["image"])
        assert torch.equal(one.targets["label"], other.targets["label"])
        assert one.keys == other.keys


@pytest.mark.parametrize("entry", ["launch/train.py", "dr2dist/training/main.py"])
def test_a_workers_import_of_the_launchers_entry_starts_no_run(entry: str) -> None:
    root = Path(__file__).parents[1]
    code = f"import runpy, sys; runpy.run_path({str(root / entry)!r}, run_name='__mp_main__'); "
    code += "sys.exit('deepspeed' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_gpus_tests_need_a_gpu() -> None:
    root = Path(__file__).parents[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(root / "launch/test.sh"), "--gpu"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("test.sh: --gpu needs a GPU") and done.stderr.count("\n") == 1


def test_what_is_on_the_device_already_is_not_copied() -> None:
    x = tokens()
    assert to_device(x, x.device) is x
    assert to_device(x, x.device, torch.bfloat16).dtype == torch.bfloat16


def test_averages_are_taken_in_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    values = [torch.arange(5.0), torch.ones(4), torch.ones(1)]
    owner = torch.zeros(())
    masters: Any = SimpleNamespace(
        fragments=[Fragment(f"p{n}", (len(v),), 0, v, n != 1, owner) for n, v in enumerate(values)]
    )
    average = ShardedEMA(masters, 0.75)
    for value in values:
        value += 4
    with Operations() as done:
        average.update()
    assert done.names == ["aten::_foreach_lerp_"]
    # The second rank's halves, the last of which is empty, and the whole of what it holds alone.
    shares = {key: found.tolist() for key, found in average.shares()}
    assert shares == {("p0", 3): [4.0, 5.0], ("p1", 0): [2.0] * 4}


class Operations(TorchDispatchMode):
    """Notes the names of operations that write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function._schema.is_mutable:
            self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize(("gpu", "offload"), [(False, False), (False, True), (True, False)])
def test_optimisers_are_fused_on_gpus_and_for_what_is_offloaded(
    monkeypatch: pytest.MonkeyPatch, optim: str, gpu: bool, offload: bool
) -> None:
    config: Any = SimpleNamespace(
        optim=Optim(name=optim, lr=0.1), parallel=Parallel(offload_optimizer=offload)
    )
    weight = nn.Parameter(torch.ones(3))
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: gpu)
        optimizer = _optimizer(config, [ParameterGroup((weight,), 1.0, 0.0)])
    assert bool(optimizer.defaults["fused"]) == (gpu or offload)
    weight.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.full((3,), 0.9 if optim == "adamw" else 0.8))


@pytest.mark.parametrize("fused_step", [True, None])
def test_a_restored_count_of_steps_lies_where_the_optimiser_wants_it(
    fused_step: bool | None,
) -> None:
    owner = nn.Parameter(torch.ones(3, device="meta"))
    optimizer = torch.optim.AdamW([owner], fused=fused_step)
    engine = SimpleNamespace(basic_optimizer=optimizer)
    fragment = Fragment("p", (3,), 0, owner.detach(), False, owner)
    for step in (2.0, 1.0):
        MasterWeights(engine, 1).add_moment(fragment, "step", torch.tensor(step))
    found = optimizer.state[owner]["step"]
    assert found.device.type == ("meta" if fused_step else "cpu")
