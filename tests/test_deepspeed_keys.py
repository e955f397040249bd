"""Every key of DeepSpeed's JSON that is accepted: what it moves or writes changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from safetensors.torch import load_file
from torch import Tensor

from dr2dist.errors import UserError
from dr2dist.parallel.deepspeed_json import ACCEPTED, deepspeed_config
from tests.cases import LEARNING_RATE
from tests.deepspeed_keys import LOGS, RESTATED, ROUNDING, VALUES, nested, settings
from tests.pool import Pool

PRECISIONS = {False: "fp32", True: "bf16"}
SHORT = {(zero, "zero_optimization.round_robin_gradients") for zero in (1, 2)}
SHORT |= {(3, "zero_optimization.sub_group_size")}
"""What is not slow."""

CASES = [
    pytest.param(
        zero,
        key,
        value,
        id=f"{zero}-{key}-{value}",
        marks=() if (zero, key) in SHORT else pytest.mark.slow,
    )
    for key, values in VALUES.items()
    for value in values
    for zero in ACCEPTED[key]
]


def configured(zero: int, extra: dict[str, Any], precision: Any = "fp32") -> dict[str, Any]:
    """DeepSpeed's configuration of the runs below."""
    return deepspeed_config(
        zero=zero,
        precision=precision,
        micro_batch=4,
        accumulate=1,
        replicas=2,
        clip=1e6,
        extra=extra,
        source="my.json",
    )


def test_the_table_is_the_list_of_accepted_keys() -> None:
    assert ACCEPTED.keys() == RESTATED.keys() | VALUES.keys()
    for zero in range(4):
        own = {"bf16.enabled": False, "zero_optimization.stage": zero}
        configured(zero, nested({**RESTATED, **own}))


@pytest.mark.parametrize("zero", range(4))
def test_every_other_key_of_deepspeed_is_refused_with_a_reason(zero: int) -> None:
    keys = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for key in (f"zero_optimization.{name}" for name in keys):
        if zero in ACCEPTED.get(key, ()):
            continue
        with pytest.raises(UserError) as caught:
            configured(zero, nested({key: False}))
        reasons = "refused: ", f"has no effect with ZeRO-{zero}"
        assert str(caught.value).startswith(f"my.json: {key} ")
        assert any(reason in str(caught.value) for reason in reasons), caught.value


class Runs:
    """Outcomes of runs on two ranks; those without any key are run once."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder, self.count = pool, folder, 0
        self.plain: dict[tuple[int, bool], Any] = {}

    def run(self, zero: int, bf16: bool, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        """What every rank found, and the exported weights."""
        self.count += 1
        folder = self.folder / str(self.count)
        results = self.pool.run(
            "tests.deepspeed_cases:outcome",
            folder=str(folder),
            zero=zero,
            bf16=bf16,
            clip=1e6,
            **options,
        )
        return results, load_file(folder / "model.safetensors")

    def without(self, zero: int, bf16: bool) -> tuple[Any, dict[str, Tensor]]:
        """The run without the key."""
        if (zero, bf16) not in self.plain:
            self.plain[zero, bf16] = self.run(zero, bf16)
        return self.plain[zero, bf16]


@pytest.fixture(scope="module")
def runs(two_ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(two_ranks, tmp_path_factory.mktemp("runs"))


def assert_agrees_with_itself(results: Any) -> None:
    """Going on from a checkpoint, and the exported weights, give the run's own bits."""
    for result in results:
        assert result["again"] == result["steps"][2:]
        for outputs in result["outputs"]:
            assert torch.equal(outputs, results[0]["outputs"][0])


def assert_same(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    """The same losses, outputs and exported weights in every bit."""
    assert_agrees_with_itself(found[0])
    for one, other in zip(found[0], wanted[0], strict=True):
        assert [loss for loss, _ in one["steps"]] == [loss for loss, _ in other["steps"]]
        # A norm is a sum of squares in an order that depends on the layout.
        norms = [norm for _, norm in other["steps"]]
        assert [norm for _, norm in one["steps"]] == pytest.approx(norms, rel=1e-5)
        assert torch.equal(one["outputs"][0], other["outputs"][0])
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize(("zero", "key", "value"), CASES)
def test_a_key_changes_no_number(zero: int, key: str, value: Any, runs: Runs) -> None:
    for bf16 in (True,) if key in LOGS else (False, True):
        found = runs.run(zero, bf16, extra=settings(key, value))
        # Gradients travel in the type of the weights: in that one the key changes nothing.
        held = PRECISIONS[bf16 and zero > 0]
        if key == "communication_data_type" and value != held:
            assert_agrees_with_itself(found[0])
            assert found[0][0]["steps"][0][0] == runs.without(zero, bf16)[0][0]["steps"][0][0]
        else:
            assert_same(found, runs.without(zero, bf16))


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"zero_optimization.reduce_bucket_size": 1000},
        {"zero_optimization.overlap_comm": True},
        {"zero_optimization.round_robin_gradients": True},
        {
            "zero_optimization.round_robin_gradients": True,
            "zero_optimization.parameter_alignment": True,
        },
        {"zero_optimization.sub_group_size": 1000},
    ],
    ids=lambda extra: "-".join(key.partition(".")[2] for key in extra) or "alone",
)
def test_offloading_changes_no_number(zero: int, extra: dict[str, Any], runs: Runs) -> None:
    if not all(zero in ACCEPTED[key] for key in extra):
        with pytest.raises(UserError, match="has no effect"):
            configured(zero, nested(extra))
        return
    for bf16 in (False, True):
        found = runs.run(zero, bf16, offload=True, extra=nested(extra))
        assert_same(found, runs.without(zero, bf16))


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("value", ["fp32", "bf16", "fp16"])
def test_gradients_lose_what_their_type_loses_on_the_way(
    zero: int, value: str, two_ranks: Pool
) -> None:
    """One step of SGD moves a weight by lr times the mean of two ranks' gradients.

    Each of the two is rounded before it travels, and their sum after; of a number below a type's
    least normal one at most its least subnormal one is lost.
    """
    results = two_ranks.run("tests.deepspeed_cases:one_step", zero=zero, value=value)
    part, least, moved = ROUNDING[value], 2.0**-24 if value == "fp16" else 0.0, 0
    for name, (before, after) in results[0]["weights"].items():
        before, after = before.double(), after.double()
        one, other = (result["gradients"][name].double() for result in results)
        lost = LEARNING_RATE * (part * (one.abs() + other.abs()) + 3 * least)
        # The step itself is in fp32: a product and a sum.
        lost += 2.0**-23 * (before.abs() + LEARNING_RATE * (one.abs() + other.abs()))
        wanted = before - LEARNING_RATE * (one + other) / 2
        assert ((after - wanted).abs() <= lost).all(), name
        moved += int(((after - before).abs() > 10 * lost).sum())
    assert moved > 1000
