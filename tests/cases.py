"""What the ranks of a pool run; every function here is called in each of them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dr2dist
from dr2dist.backbones.build import build_deferred, build_model
from dr2dist.backbones.parameters import freeze as freeze_parameters
from dr2dist.config import load_config
from dr2dist.parallel.deepspeed_json import deepspeed_config
from dr2dist.parallel.engine import ReversibleEngine, StepBatches, UnprovenStepError
from dr2dist.parallel.gathered import GatheredRunner
from dr2dist.reversible import Chain
from dr2dist.training.checkpoint_manager import CheckpointManager
from dr2dist.training.run import run
from tests.models import build, shape_of

GLOBAL_BATCH = 8
LEARNING_RATE = 1e-3


def make_engine(
    kind: str,
    zero: int,
    bf16: bool = False,
    accumulate: int = 1,
    sgd: bool = False,
    hold_nothing: bool = False,
    freeze: Sequence[str] = (),
    clip: float = 1.0,
    offload: bool = False,
    extra: Mapping[str, Any] | None = None,
    seed: int = 0,
    **setting: Any,
) -> ReversibleEngine:
    """A tiny model of a kind, converted and put on an engine.

    hold_nothing: under ZeRO-3 a module's parameters are given back after each use, as those of
    a network are that is too large to be held. freeze: patterns of parameters. extra: a user's
    own settings of DeepSpeed. seed: of the weights.
    """
    torch.manual_seed(0)
    model = build(kind, seed, depth=3)
    freeze_parameters(model, freeze)
    net = dr2dist.convert(model, **setting)
    ranks = dist.get_world_size()
    config = deepspeed_config(
        zero=zero,
        precision="bf16" if bf16 else "fp32",
        micro_batch=GLOBAL_BATCH // ranks // accumulate,
        accumulate=accumulate,
        replicas=ranks,
        clip=clip,
        offload_optimizer=offload,
        extra=extra,
    )
    if hold_nothing:
        limits = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold")
        config["zero_optimization"] |= {f"stage3_{name}": 0 for name in limits}
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if sgd:
        optimizer: Any = torch.optim.SGD(trained, 1e-2, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE)
    return ReversibleEngine(net.train(), optimizer, config, "bf16" if bf16 else "fp32")


def micro_batches(
    step: int, accumulate: int, shape: Sequence[int] = (3, 32, 32)
) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of the step's global batch."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, *shape, generator=generator)
    labels = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)
    parts = zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return [(x.chunk(ranks)[rank], y.chunk(ranks)[rank]) for x, y in parts]


def take_step(engine: ReversibleEngine, step: int, accumulate: int = 1, between: Any = None) -> Any:
    """One step; `between` is called after each forward pass."""
    name = engine.net.family.input
    batches = micro_batches(step, accumulate, shape_of(engine.net.family.name))

    def loss(number: int, output: Any) -> Tensor:
        if between is not None:
            between()
        return nn.functional.cross_entropy(output.float(), batches[number][1])

    work = StepBatches(lambda: None, lambda number: {name: batches[number][0]}, loss)
    return engine.step(work, accumulate, [LEARNING_RATE] * engine.num_groups)


def curve(kind: str, steps: int = 20, accumulate: int = 1, **options: Any) -> Any:
    """(losses, weights on rank 0, worst drift) of a short run."""
    engine = make_engine(kind, accumulate=accumulate, **options)
    verdicts = [take_step(engine, step, accumulate) for step in range(steps)]
    drifts = [verdict.drift for verdict in verdicts if verdict.drift is not None]
    assert engine.applied == steps
    return [verdict.loss for verdict in verdicts], full_state(engine), max(drifts, default=None)


def full_state(engine: ReversibleEngine) -> dict[str, Tensor] | None:
    """All masters and buffers by name, on rank 0; every rank must call it."""
    # A copy each: a view would be sent with all that it is a view of.
    held = engine.masters.fragments
    parts = [(f.name, f.shape, f.start, f.values.float().clone()) for f in held]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, parts)
    state = {name: value.clone() for name, value in engine.buffers().items()}
    for name, shape, start, values in (part for parts in found for part in parts):
        whole = state.setdefault(name, torch.full(shape, torch.nan))
        whole.view(-1)[start : start + len(values)] = values
    return state if dist.get_rank() == 0 else None


class ChangesOnRecompute(nn.Module):
    """Wraps a function so that its chosen calls give something else."""

    def __init__(self, inner: nn.Module, wrong_calls: range) -> None:
        super().__init__()
        self.inner = inner
        self.wrong_calls = wrong_calls
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        output = self.inner(*args, **options)
        return output * 1.0001 if self.calls - 1 in self.wrong_calls else output


def _change_function(chain: Chain, wrong_calls: range) -> None:
    function: Any = chain.functions[3]
    branch = function.compute
    counter = ChangesOnRecompute(branch, wrong_calls)  # type: ignore[arg-type]
    function.compute = counter.__call__
    copies = getattr(chain.runner, "_copies", None)
    if copies is not None:
        copies[function].compute = counter.__call__


def fault(kind: str, zero: int, memory: str = "reverse") -> dict[str, Any]:
    """A step with a fault on rank 0: the error's text and kinds, and whether weights changed."""
    engine = make_engine("vit", zero, memory=memory)
    take_step(engine, 0)
    before = full_state(engine)
    chain = engine.chains[0]
    weight = next(p for n, p in engine.net.named_parameters() if n == "blocks.1.mlp.fc2.weight")

    def between() -> None:
        if dist.get_rank() != 0 and kind in ("remainder",):
            return
        if kind == "remainder":
            (tape,) = (tape for tape in chain._tapes if tape.open)
            tape.remainders.part(3, 0)[5] ^= 1
        if kind == "weight":
            with deepspeed.zero.GatheredParameters([weight], 0, enabled=zero == 3):
                weight.data[0, 0] *= 2.0**20

    if kind == "function" and dist.get_rank() == 0:
        _change_function(chain, range(1, 100, 2))
    if kind == "nan":
        with deepspeed.zero.GatheredParameters([weight], 0, enabled=zero == 3):
            weight.data[0, 0] = float("nan")
    if kind == "coefficients" and dist.get_rank() == 1:
        chain.set_coefficients(0.5, 0.5)
    text, kinds = "", set()
    try:
        take_step(engine, 1, between=between)
    except UnprovenStepError as error:
        text, kinds = str(error), set(error.verdict.kinds)
    after = full_state(engine)
    changed = before is not None and [
        name
        for name, value in before.items()
        if name != "blocks.1.mlp.fc2.weight" and not torch.equal(value, after[name])
    ]
    return {"text": text, "kinds": kinds, "applied": engine.applied, "changed": changed}


class Collectives:
    """What is gathered: bytes, and in which order gathers start and are waited for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        self.log: list[str] = []
        backend = deepspeed.comm.comm.cdb
        self._inner = backend.all_gather_function
        patch.setattr(backend, "all_gather_function", self._gather)

    def _gather(self, output_tensor: Tensor, **options: Any) -> Any:
        self.bytes += output_tensor.nbytes
        self.log.append("start")
        work = self._inner(output_tensor=output_tensor, **options)
        return work if work is None else _Waited(work, self.log)


class _Waited:
    def __init__(self, work: Any, log: list[str]) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        self.log.append("wait")
        self.work.wait()


def gathers(zero: int = 3, accumulate: int = 1, **setting: Any) -> Any:
    """(bytes gathered in a step, order of gathers and runs inside the chain)."""
    engine = make_engine("vit", zero, accumulate=accumulate, hold_nothing=True, **setting)
    take_step(engine, 0, accumulate)
    with pytest.MonkeyPatch.context() as patch:
        found = Collectives(patch)
        (chain,) = engine.chains
        for function in chain.functions:
            twin = cast(GatheredRunner, chain.runner)._copies[function]
            twin.register_forward_hook(lambda *_: found.log.append("run"))
        take_step(engine, 1, accumulate)
    return found.bytes, found.log


def passing_fault(zero: int, accumulate: int) -> Any:
    """(losses, weights) of two steps, with a function that deviates once if `zero` is given."""
    results = []
    for wrong_calls in (range(0), range(1, 2)):
        engine = make_engine("vit", zero, accumulate=accumulate)
        _change_function(engine.chains[0], wrong_calls)
        losses = [take_step(engine, step, accumulate).loss for step in range(2)]
        results.append((losses, full_state(engine)))
    return results


def ddp_gradients(kind: str, passes: int = 1, **options: bool) -> dict[str, Tensor]:
    """Gradients of a network inside DistributedDataParallel on this rank's half of a batch.

    passes: forward passes, each on a part, before one backward pass. options: of the wrapper.
    """
    net = dr2dist.convert(build(kind, depth=3), chunk_size=2).train()
    wrapped = nn.parallel.DistributedDataParallel(net, **options)
    ((images, labels),) = micro_batches(0, 1)
    for _ in range(2):
        wrapped.zero_grad(set_to_none=True)
        parts = zip(images.chunk(passes), labels.chunk(passes), strict=True)
        losses = [nn.functional.cross_entropy(wrapped(x), y) for x, y in parts]
        (sum(losses) / passes).backward()  # type: ignore[union-attr]
    assert net.certificate().failures == 0
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def run_config(path: str, overrides: list[str]) -> dict[str, Any]:
    """A whole run in this group."""
    return run(load_config(path, overrides))


def run_config_from(path: str, overrides: list[str], folder: str) -> dict[str, Any]:
    """run_config where plugins lie in a folder."""
    sys.path.insert(0, folder)
    try:
        return run_config(path, overrides)
    finally:
        sys.path.remove(folder)


def sharded_build(bf16: bool) -> tuple[int, int, int, bool]:
    """(most values held while sharding, those of the largest parameter, of the model, equal)."""
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    whole = dict(
        build_model(name, weights=None, image_size=(32, 32), num_classes=3).named_parameters()
    )
    torch.manual_seed(0)
    model, read = build_deferred(name, weights=None, image_size=(32, 32), num_classes=3)
    freeze_parameters(model, ["blocks.1.*"])
    net = dr2dist.convert(model)
    held = []

    def watched(key: str) -> Tensor:
        real = [p for p in net.parameters() if not p.is_meta]
        held.append(sum(p.numel() + p.ds_tensor.numel() for p in real))
        return read(key)

    config = deepspeed_config(
        zero=3,
        precision="bf16" if bf16 else "fp32",
        micro_batch=1,
        accumulate=1,
        replicas=dist.get_world_size(),
        clip=None,
    )
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-2)
    precision: Any = "bf16" if bf16 else "fp32"
    engine = ReversibleEngine(net, optimizer, config, precision, weights=watched)
    state = full_state(engine)
    equal = state is None or all(torch.equal(state[key], value) for key, value in whole.items())
    sizes = [value.numel() for value in whole.values()]
    work = StepBatches(
        lambda: None,
        lambda number: {"image": torch.randn(1, 3, 32, 32)},
        lambda number, output: output.float().sum(),
    )
    engine.step(work, 1, [1e-2])
    return max(held), max(sizes), sum(sizes), equal


class BrokenOffError(Exception):
    """Stands for whatever ends a process."""


def run_until(path: str, overrides: list[str], step: int) -> None:
    """A run that ends in the middle of the optimiser step after `step` applied ones, all that was
    due before it written."""
    original, save = ReversibleEngine.step, CheckpointManager.save

    def at_once(self: CheckpointManager, *given: Any, **_: Any) -> None:
        save(self, *given[:2])

    def broken(self: ReversibleEngine, work: StepBatches, *rest: Any) -> Any:
        if self.applied != step:
            return original(self, work, *rest)

        def loss(number: int, output: Any) -> Tensor:
            work.loss(number, output)
            raise BrokenOffError

        if not (self.first and self.last):  # its neighbours would wait for it
            raise BrokenOffError
        return original(self, work._replace(loss=loss), *rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(BrokenOffError):
        patch.setattr(ReversibleEngine, "step", broken)
        patch.setattr(CheckpointManager, "save", at_once)
        run(load_config(path, overrides))
