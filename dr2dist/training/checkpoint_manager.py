"""When a run keeps what: its state to a checkpoint, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.checkpoints.checkpoint import EMA, Checkpoint, DamagedError, is_finite
from dr2dist.checkpoints.folders import (
    MANIFEST,
    OLD,
    checkpoint_folder,
    checkpoints,
    delete_old,
    set_aside,
)
from dr2dist.checkpoints.tensors import Source
from dr2dist.checkpoints.writing import Writing
from dr2dist.coefficients import Memory
from dr2dist.errors import UserError
from dr2dist.parallel.agreement import AgreedError, agree, from_all, from_first
from dr2dist.parallel.engine import ReversibleEngine

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a run has reached, beside its weights.

    loss: of the last step. best, last: validations, each with its step; stale: how many there
    were since the metric has improved. worst_drift: of float arithmetic, over all steps. skipped:
    unreadable training samples that were left out, on all ranks. bad_batches: steps' batches that
    were skipped. consumed: training samples that steps and skipped batches have used, of all ranks,
    since the start: the position in the order.
    """

    loss: float | None = None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    worst_drift: float | None = None
    stale: int = 0
    skipped: int = 0
    bad_batches: int = 0
    consumed: int = 0
    guard: Memory = field(default_factory=Memory)

    def note_validation(self, found: dict[str, Any], metric: str, wanted: str) -> bool:
        """Takes note of a validation; whether it is the best one, by the metric's largest ("max")
        or least ("min") value, and among equal ones by the least loss.

        One with a value that is not finite, such as the loss of outputs that are NaN, never is.
        """
        best = self.best if is_finite(self.best) else None
        sign = 1 if wanted == "max" else -1

        def rank(values: dict[str, Any]) -> tuple[float, float]:
            return sign * values[metric], -values["loss"]

        better = is_finite(found) and (best is None or rank(found) > rank(best))
        self.last, self.best = found, found if better else best
        improved = better and (best is None or rank(found)[0] > rank(best)[0])
        self.stale = 0 if improved else self.stale + 1
        return better


class CheckpointManager:
    """The checkpoints of a run's folder, which is there: the last `keep`, and the best one.

    One at a time is being written.

    facts: what every checkpoint says of the run (model, classes, preprocessing, ...). The
    order of samples is a function of the run's seed and of how many were consumed, and all other
    randomness of the seed and the applied step, so these are their whole state.
    """

    def __init__(self, run: Path, keep: int, facts: Mapping[str, Any]) -> None:
        self.run, self.keep, self.facts = run, keep, facts
        self._place = _place(run)
        self._writing: Writing | None = None
        self._best: int | None = None
        self._copies: dict[str, Tensor] = {}
        self._behind = ThreadPoolExecutor(1, "checkpoint")
        self._deletion: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes its part of a checkpoint."""
        return self._writing is not None and self._writing.busy

    def save(self, engine: ReversibleEngine, progress: Progress, behind: bool = False) -> None:
        """Writes a checkpoint after the applied step; every rank must call it.

        behind: it is written from a copy in host memory while the run goes on, and there once
        `finish` was called, by all ranks.
        """
        self.finish()
        self._check_place()
        alpha, beta = engine.coefficients
        state = {
            **self.facts,
            "step": engine.applied,
            "alpha": alpha,
            "beta": beta,
            "scales": engine.net.scales,
            "stale_scales": engine.net.stale_scales,
            "progress": asdict(progress),
            "layouts": engine.layouts(),
        }
        folder = checkpoint_folder(self.run, engine.applied)
        tensors = self._copied(_tensors(engine)) if behind else _tensors(engine)
        self._best = None if progress.best is None else progress.best["step"]
        writer = self._behind if behind else None
        self._writing = Writing(folder, tensors, _shapes(engine), state, writer)
        if not behind:
            self.finish()
            if self._deletion is not None:
                self._deletion.result()

    def finish(self) -> None:
        """Ends what was begun to be written, if anything was, and forgets older ones."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._check_place()
            writing.finish()
            if not torch.cuda.is_available():
                self._copies.clear()  # pinned memory alone takes long to get
            if dist.get_rank() == 0:
                self._forget()

    def _check_place(self) -> None:
        """Raises UserError, on all ranks, where another folder, or none, has taken the run's place:
        storage that is not mounted any more leaves an empty one, on this node's own disk."""
        with agree():
            if dist.get_rank() == 0 and _place(self.run) != self._place:
                raise UserError(
                    f"output: {self.run} is not the folder any more that this run has begun in; "
                    "the same command goes on when it is back"
                )

    def _copied(self, tensors: Mapping[str, Source]) -> dict[str, Source]:
        """In host memory, pinned for a GPU's copies, which all run at the same time."""
        for name, (values, dtype) in tensors.items():
            if name not in self._copies:
                pinned = values.is_cuda
                self._copies[name] = torch.empty(values.shape, dtype=dtype, pin_memory=pinned)
            self._copies[name].copy_(values.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {name: Source(self._copies[name], dtype) for name, (_, dtype) in tensors.items()}

    def _forget(self) -> None:
        """Deletes older ones, which takes seconds, behind the steps."""
        for folder in checkpoints(self.run)[: -self.keep]:
            if self._best is None or folder != checkpoint_folder(self.run, self._best):
                folder.rename(folder.with_name(f"{folder.name}{OLD}"))
        self._deletion = self._behind.submit(delete_old, self.run)

    def restore_newest(self, folders: Sequence[Path], engine: ReversibleEngine) -> Progress:
        """Brings an engine to the first of these checkpoints that is sound; every rank must call
        it. Those before it that are damaged are set aside, with a warning.

        Raises UserError, on all ranks, if none is, or for what `restore` says.
        """
        faults: list[tuple[Path, str]] = []
        for folder in folders:
            fault = _damage(folder)
            if fault is None:
                progress = self.restore(folder, engine)
                if dist.get_rank() == 0:
                    _tell(faults, engine.applied)
                return progress
            faults.append((folder, fault))
        raise AgreedError(f"{faults[0][1]}; no sound checkpoint is left in {self.run}")

    def restore(self, folder: Path, engine: ReversibleEngine) -> Progress:
        """Brings an engine, on any layout, to a sound checkpoint; every rank must call it.

        Raises UserError, on all ranks, if the model is another one, or a rank does not see what
        rank 0 does.
        """
        wanted = _shapes(engine).keys()
        with agree():
            saved = Checkpoint(folder)
            if wanted != saved.shapes.keys():
                strange = sorted(wanted ^ saved.shapes.keys())
                raise UserError(f"{folder}: is of another model: {', '.join(strange[:3])}")
        first = from_first(lambda: saved.manifest)
        with agree():
            if saved.manifest != first:
                raise UserError(f"{folder / MANIFEST}: is not what rank 0 sees there")
        _read_into(engine, saved)
        engine.go_on_from(saved.state["step"])
        engine.net.set_coefficients(saved.state["alpha"], saved.state["beta"])
        if engine.chains[0].setting.by_channel:
            # Without any they are found in the next step.
            found, stale = (saved.state.get(key, {}) for key in ("scales", "stale_scales"))
            engine.net.set_scales(found, stale)
        engine.take_layouts(saved.state["layouts"])
        values = saved.state["progress"]
        # Runs of earlier versions have neither guard nor position.
        batches = saved.state["step"] + values.get("bad_batches", 0)
        before = {"consumed": batches * saved.state.get("global_batch", 0)}
        return Progress(**{**before, **values, "guard": Memory(**values.get("guard", {}))})


def _place(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if rank 0 sees it too; every rank must call it.

    Ranks look at a part of the files each. What only another rank sees is no damage but another
    file system: it is raised.
    """
    own: str | None = None
    try:
        Checkpoint(folder).verify(dist.get_rank(), dist.get_world_size())
    except UserError as error:
        own = str(error)
    found = from_all(own)
    if not any(found):
        return None

    def seen_by_first() -> str | None:
        try:
            Checkpoint(folder).verify()
        except DamagedError as error:
            return str(error)
        return None

    fault = from_first(seen_by_first)
    if fault is None:
        rank, message = next((rank, text) for rank, text in enumerate(found) if text)
        raise AgreedError(f"{message} (rank {rank})")
    return fault


def _tell(faults: Sequence[tuple[Path, str]], step: int) -> None:
    for folder, fault in faults:
        lost = int(folder.name.removeprefix("step-")) - step
        aside = set_aside(folder)
        log.warning("%s; it is kept as %s, and %d steps are run again", fault, aside.name, lost)


def _shapes(engine: ReversibleEngine) -> dict[str, tuple[int, ...]]:
    """Of the whole network's parameters and buffers, by name; every rank must call it."""
    own = {name: tuple(value.shape) for name, value in engine.buffers().items()} | engine.shapes()
    return {name: shape for shapes in from_all(own) for name, shape in shapes.items()}


def _tensors(engine: ReversibleEngine) -> dict[str, Source]:
    """This rank's part, none of it copied yet. Masters and averages are written in fp32."""
    rank, ranks = engine.replica, engine.replicas
    tensors = {}
    for fragment in engine.masters.fragments:
        share = fragment.share(rank, ranks)
        start = fragment.start + share.start
        if share.start == share.stop:
            continue
        key = f"master/{fragment.name}/{start}"
        tensors[key] = Source(fragment.values[share], torch.float32)
        for kind, value in engine.masters.moments(fragment).items():
            if value.dim():
                tensors[f"{kind}/{fragment.name}/{start}"] = Source(value[share], value.dtype)
            elif start == 0:
                tensors[f"{kind}/{fragment.name}/0"] = Source(value, value.dtype)
    if engine.average is not None:
        for (name, start), values in engine.average.shares():
            tensors[f"{EMA}/{name}/{start}"] = Source(values, torch.float32)
    if dist.get_rank() == 0:
        for name, buffer in engine.buffers().items():
            tensors[f"buffer/{name}/0"] = Source(buffer.reshape(-1), buffer.dtype)
    return tensors


def _read_into(engine: ReversibleEngine, saved: Checkpoint) -> None:
    for fragment in engine.masters.fragments:
        place = fragment.name, fragment.start, len(fragment.values)
        fragment.values.copy_(saved.read("master", *place))
        for kind in saved.kinds(fragment.name):
            if kind not in ("master", EMA):
                engine.masters.add_moment(fragment, kind, saved.read(kind, *place))
    for name, buffer in engine.buffers().items():
        buffer.copy_(saved.tensor("buffer", name))
    engine.masters.publish(frozen=True)
    if engine.average is not None:
        for (name, start), values in engine.average.shares():
            values.copy_(saved.read(EMA, name, start, len(values)))
