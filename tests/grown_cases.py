"""What the ranks of a pool run of states of sixteen bits that grow, jump, and are gone on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from dr2dist.checkpoints.folders import checkpoint_folder
from dr2dist.parallel.engine import UnprovenStepError
from dr2dist.training.checkpoint_manager import CheckpointManager, Progress
from tests import cases, stage_cases
from tests.deepspeed_cases import FACTS

STEPS = 50


def _engine(stages: int, zero: int, state_bits: int = 16) -> tuple[Any, Any]:
    """An engine and what takes its step of a number."""
    if stages == 1:
        engine: Any = cases.make_engine("vit", zero, state_bits=state_bits)
        return engine, lambda number: cases.take_step(engine, number)
    staged: Any = stage_cases.make_engine("vit", stages, zero, 2, state_bits=state_bits)
    return staged, lambda number: staged.step(stage_cases.work(staged, number, 2), 2, [1e-3])


def _grow(engine: Any, factor: float) -> None:
    """Makes the branches of all functions larger: fp32 masters of their last scales."""
    with torch.no_grad():
        for fragment in engine.masters.fragments:
            if ".ls" in fragment.name:
                fragment.values.mul_(factor)
    engine.masters.publish()


def _exponents(engine: Any) -> list[int]:
    return engine.net.scales.get("blocks", [])  # type: ignore[no-any-return]


def grown(stages: int, zero: int) -> Any:
    """(losses, those of 32 bits, exponents after the steps) of runs whose states grow tenfold."""
    found: list[Any] = []
    scales = []
    for bits in (16, 32):
        engine, step = _engine(stages, zero, bits)
        losses = []
        for number in range(STEPS):
            losses.append(step(number).loss)
            _grow(engine, 10 ** (1 / STEPS))
            if bits == 16:
                scales.append(_exponents(engine))
        assert engine.applied == STEPS
        found.append(losses)
    return *found, scales


def jump(stages: int, zero: int) -> dict[str, Any]:
    """Three steps, the states of the second eight times as large."""
    engine, step = _engine(stages, zero)
    attempts: list[int] = []
    attempt = engine._attempt

    def counted(*args: Any) -> Any:
        attempts.append(1)
        return attempt(*args)

    engine._attempt = counted
    logging.getLogger("dr2dist").setLevel(logging.ERROR)
    verdicts = [step(0)]
    before = _exponents(engine)
    _grow(engine, 30.0)
    verdicts += [step(1), step(2)]
    wider = sum(b > a for a, b in zip(before, _exponents(engine), strict=True))
    return {
        "applied": engine.applied,
        "attempts": len(attempts),
        "clean": all(verdict.ok for verdict in verdicts),
        "wider": wider,
    }


def outlier(stages: int, zero: int) -> dict[str, Any]:
    """Steps of which the second is far beyond the scales, and the third of usual size."""
    engine, step = _engine(stages, zero)
    logging.getLogger("dr2dist").setLevel(logging.ERROR)
    step(0)
    scales, stale = [_exponents(engine)], []
    for factor in (3e3, 1 / 3e3):  # a thousand times as large, and back
        _grow(engine, factor)
        step(1)
        scales.append(_exponents(engine))
        stale.append(engine.net.stale_scales)
    step(2)
    scales.append(_exponents(engine))
    before = engine.net.scales
    _grow(engine, 1e9)
    refused = False
    try:
        step(3)
    except UnprovenStepError as error:
        refused = "range" in error.verdict.kinds
    return {
        "scales": scales,
        "stale": stale,
        "refused": refused,
        "kept": engine.net.scales == before,
        "applied": engine.applied,
    }


def resumed(folder: str, before: tuple[int, int], after: tuple[int, int]) -> Any:
    """(losses of steps 2 and 3, the same from the checkpoint, scales, scales that were read)."""
    engine, step = _engine(*before)
    manager = CheckpointManager(Path(folder), 2, {**FACTS, "state_bits": 16})
    for number in range(2):
        step(number)
    scales = engine.net.scales
    manager.save(engine, Progress())
    wanted = [step(number).loss for number in (2, 3)]
    other, again = _engine(*after)
    manager.restore(checkpoint_folder(Path(folder), 2), other)
    read = other.net.scales
    return wanted, [again(number).loss for number in (2, 3)], scales, read
