"""Runs some of whose samples give losses that are not finite; called in the ranks of a pool."""

from __future__ import annotations

from typing import Any

import pytest

from dr2dist.parallel.engine import UnprovenStepError
from dr2dist.tasks.classification import Classification
from tests import cases

Loss = Any


def run(path: str, overrides: list[str], bad: list[str], until: int | None = None) -> str:
    """How a run ends in which the loss of a batch with one of these samples is not finite.

    until: the run is broken off after so many steps.
    """
    original = Classification.loss

    def loss(self: Any, output: Any, batch: Any, normaliser: float) -> Loss:
        found = original(self, output, batch, normaliser)
        if not set(bad) & set(batch.keys):
            return found
        return found._replace(total=found.total * float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "loss", loss)
        try:
            if until is not None:
                cases.run_until(path, overrides, until)
                return "broken off"
            return str(cases.run_config(path, overrides)["bad_batches"])
        except UnprovenStepError as error:
            return str(error)
