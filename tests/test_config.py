"""Configuration: what is shipped loads, what is wrong is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dr2dist.config import describe_config, dump_config, load_config
from dr2dist.errors import UserError
from dr2dist.parallel.deepspeed_json import deepspeed_config, read_deepspeed_json

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MAIN = ROOT / "configs" / "elpv_vit_small.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_are_written_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_replace_values() -> None:
    config = load_config(MAIN, ["optim.lr=3e-5", "coefficients.beta=[0.2, 0.4]", "train.seed=7"])
    assert config.optim.lr == 3e-5
    assert config.coefficients.beta == (0.2, 0.4)
    assert config.train.seed == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "optim.lrr: unknown key; did you mean 'lr'"),
        (["modle.name=x"], "modle: unknown key; did you mean 'model'"),
        (["coefficients.betta=1"], "coefficients.betta: unknown key; did you mean 'beta'"),
        (["coefficients.kind=conserv"], "found 'conserv', allowed is conserve, paper"),
        (["reversible.memory=revers"], "did you mean 'reverse'"),
        (["train.precision=fp16"], "precision fp16 is not supported"),
        (["train.steps=5"], "give exactly one of steps and epochs"),
        (["train.epochs=null"], "give exactly one of steps and epochs"),
        (["optim.momentum=0.9"], "momentum has no effect with adamw"),
        (["reversible.arithmetic=float", "reversible.fraction_bits=18"], "fraction_bits has no"),
        (["coefficients.beta=[0, 0.5]"], "coefficients.beta.0: found 0"),
        (["coefficients.beta=[0.1, 1.5]"], "coefficients.beta.1: found 1.5"),
        (["coefficients={kind: constant, alpha: 1, beta: 0}"], "nothing can reverse"),
        (["coefficients={kind: constant, alpha: 1}"], "coefficients.beta: is missing"),
        (["coefficients={kind: constant, alpha: 1, beta: 1, until: 1}"], "until: unknown key"),
        (["model.image_size=big"], "model.image_size: found 'big'"),
        (["parallel.zero=4"], "parallel.zero: found 4; allowed is 0, 1, 2, 3"),
        (["train.micro_batch=0"], "train.micro_batch: found 0"),
        (["data.val=null", "train.validate_every=5"], "validate_every has no effect"),
        (["data.scale=[0.9, 0.2]"], "scale is [0.9, 0.2]"),
        (["noequals"], "allowed is section.key=value"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(MAIN, overrides)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert str(MAIN) in text or "override" in text


def test_bad_files_are_named(tmp_path: Path) -> None:
    for text, message in (
        ("a: [1", "not valid YAML"),
        ("- 1", "holds no settings"),
        ("model: {name: x, name: y}", "'name' is given twice"),
        ("model: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=r"bad\.yaml: .*") as caught:
            load_config(tmp_path / "bad.yaml")
        assert message in str(caught.value)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_every_setting_is_described() -> None:
    text = describe_config()
    for key in ("model.name: ", "optim.warmup: ", "coefficients.knots: ", "parallel.zero: "):
        assert key in text


def deepspeed(extra: dict[str, Any], **options: Any) -> dict[str, Any]:
    run: dict[str, Any] = {"zero": 2, "bf16": False, "micro_batch": 4, "accumulate": 2}
    return deepspeed_config(
        **{**run, "replicas": 3, "clip": 1.0, **options}, extra=extra, source="my.json"
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_deepspeed_files_fit(stage: int) -> None:
    extra = read_deepspeed_json(ROOT / "ds_configs" / f"zero{stage}.json")
    found = deepspeed(extra, zero=stage)
    assert found["zero_optimization"]["stage"] == stage
    assert found["train_batch_size"] == 24
    json.dumps(found)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping: unknown .*'gradient_clipping'"),
        ({"zero_optimisation": {}}, "zero_optimisation: unknown .*'zero_optimization'"),
        ({"zero_optimization": {"stge": 1}}, r"zero_optimization\.stge: unknown key.*'stage'"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1, but parallel.zero says 2"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero_optimization": {"offload_optimizer": {}}}, "offload_optimizer is refused"),
        ({"comms_logger": {"enable": True}}, r"comms_logger\.enable: unknown key.*'enabled'"),
        ({"train_batch_size": 8}, "train_batch_size is 8, but .* say 24"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but optim.clip say 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but train.precision is fp32"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but train.precision is fp32"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is refused"),
        ({"pipeline": {}}, "pipeline is refused"),
        ({"bf16": 1}, "bf16 is 1, allowed is an object"),
    ],
)
def test_deepspeed_files_are_checked_whole(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"my\.json: .*{message}|my\.json: {message}"):
        deepspeed(extra)


def test_equal_values_are_allowed_on_both_sides() -> None:
    found = deepspeed({"train_batch_size": 24, "bf16": {"enabled": False}, "timers": {}})
    assert found["gradient_accumulation_steps"] == 2
