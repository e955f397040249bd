"""Configuration: what is shipped loads, what is wrong is told in one line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig

from dr2dist.config import describe_config, dump_config, load_config
from dr2dist.config.coefficients import Conserve
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


def documented(path: Path) -> list[list[str]]:
    """The overrides of each `dr2dist train` line in a configuration's header."""
    header = path.read_text().partition("model:")[0].replace("\\\n#", " ")
    told = [line.split("dr2dist train")[1] for line in header.splitlines() if "train " in line]
    words = [shlex.split(line) for line in told]
    assert all(line[0] == f"configs/{path.name}" for line in words)
    return [[word for word in line if "=" in word] for line in words]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_headers_tell_what_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = documented(path)
    assert [bool(line) for line in lines] == [False, True]
    for line in lines:
        config = load_config(path, line)
        config.coefficients.schedule(100).check(config.setting(), [24])
        assert config.parallel.deepspeed is not None
        extra = read_deepspeed_json(config.parallel.deepspeed)
        deepspeed(extra, zero=config.parallel.zero, clip=config.optim.clip)


def paths(values: dict[str, Any], place: str = "") -> Iterator[str]:
    """The dotted name of every key, down to the last section; timm's options are not ours."""
    for key, value in values.items():
        yield place + key
        if isinstance(value, dict) and key != "options":
            yield from paths(value, f"{place}{key}.")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_misspelt_key_is_found_at_every_place(path: Path) -> None:
    keys = list(paths(yaml.safe_load(dump_config(load_config(path)))))
    assert len(keys) > 35
    for key in keys:
        with pytest.raises(UserError) as caught:
            load_config(path, [f"{key}x=1"])
        last = key.rpartition(".")[2]
        assert f"{path}: {key}x: unknown key; did you mean '{last}'? allowed: " in str(caught.value)


def test_numbers_may_be_written_as_yaml_1_1_reads_text(tmp_path: Path) -> None:
    assert yaml.safe_load("5e-5") == "5e-5"
    text, count = re.subn(r"\blr: [^,]+,", "lr: 5e-5,", MAIN.read_text())
    assert count == 1
    (tmp_path / "plain.yaml").write_text(text)
    assert load_config(tmp_path / "plain.yaml").optim.lr == 5.0e-5


def test_sections_may_share_values_by_merge_keys(tmp_path: Path) -> None:
    text = MAIN.read_text().replace(
        "data: {train", "data: {<<: {vflip: false, hflip: false}, train"
    )
    (tmp_path / "merged.yaml").write_text(text)
    data = load_config(tmp_path / "merged.yaml").data
    assert data.vflip and not data.hflip


@pytest.mark.parametrize(
    ("overrides", "bits"),
    [
        ([], 32),
        (["train.precision=bf16"], 16),
        (["train.precision=bf16", "reversible.state_bits=32"], 32),
        (["train.precision=bf16", "reversible.fraction_bits=20"], 32),
        (["train.precision=bf16", "reversible.arithmetic=float"], 32),
    ],
)
def test_states_are_of_16_bits_where_functions_are_in_bf16(
    overrides: list[str], bits: int, tmp_path: Path
) -> None:
    config = load_config(ROOT / "configs" / "finetune.yaml", overrides)
    assert config.setting().state_bits == bits
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml").setting() == config.setting()


def test_overrides_replace_values() -> None:
    config = load_config(MAIN, ["optim.lr=3e-5", "coefficients.beta=[0.2, 0.4]", "train.seed=7"])
    assert config.optim.lr == 3e-5
    assert isinstance(config.coefficients, Conserve)
    assert config.coefficients.beta == (0.2, 0.4)
    assert config.train.seed == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "optim.lrr: unknown key; did you mean 'lr'"),
        (["modle.name=x"], "modle: unknown key; did you mean 'model'"),
        (["coefficients.betta=1"], "coefficients.betta: unknown key; did you mean 'beta'"),
        (["coefficients.kind=conserv"], "found 'conserv'; allowed is conserve, paper"),
        (["reversible.memory=revers"], "did you mean 'reverse'"),
        (["train.precision=fp61"], "found 'fp61'; allowed is fp32, bf16, fp16"),
        (["train.precision=fp16", "parallel.zero=0"], "precision fp16 needs parallel.zero 1, 2"),
        (["train.steps=5"], "the other is undone by train.epochs=null or train.steps=null"),
        (["train.epochs=null"], "give one of steps and epochs"),
        (["optim.learning_rate=1"], "learning_rate: unknown key; did you mean 'optim.lr'?"),
        (["batch_size=8"], "batch_size: unknown key; did you mean 'train.micro_batch'?"),
        (["coefficients.beta=0.5"], "beta: found 0.5; allowed is a list: beta at the start and"),
        (["coefficients.beta=[0.5]"], "found [0.5]; allowed is a list: beta at the start and at"),
        (["optim={}"], "optim.lr: is missing: peak learning rate"),
        (["model={name: x}"], "model.weights: is missing: random, hub (timm's own), or a .safe"),
        (["model.weights=null"], "found null, allowed is random, hub (timm's own), or a .safet"),
        (["optim=3"], "optim: found 3; allowed is a section, with a key of its own on each line"),
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
        (["model.name=[1"], "override 'model.name=[1': not valid YAML"),
        (["optim={lr: 1, lr: 2}"], "key 'lr' is given twice"),
        (["model.name.x=1"], "name is not a section"),
        (["coefficients.conserve=1"], "coefficients.conserve: unknown key"),
        (
            ["coefficients={kind: piecewise, knots: [[0, 1]]}"],
            "knots.0: found [0, 1]; allowed is a list: [share",
        ),
        (["coefficients={kind: piecewise, knots: [[0, 1, 0.1]]}"], "at least 2 items"),
        (["coefficients.beta=[1e-9, 0.5]"], "coefficients.beta.0: found 1.0e-09"),
        (["coefficients.until=0"], "coefficients.until: found 0"),
        (["coefficients.every=0"], "coefficients.every: found 0"),
        (["coefficients.shape=linaer"], "did you mean 'linear'"),
        (["reversible.chunk_size=0"], "chunk_size is 0, allowed is None or 1 and more"),
        (["reversible.chunk_size=two"], "reversible.chunk_size"),
        (["reversible.chunk_tokens=64"], "chunk_tokens cuts single samples"),
        (["reversible.chunk_size=auto"], "chunk_size 'auto' needs chunk_budget"),
        (["reversible.memory=budget"], "memory 'budget' needs memory_budget"),
        (["reversible.memory_budget=1GiB"], "has an effect only with memory 'budget'"),
        (["optim.name=adam"], "did you mean 'adamw'"),
        (["optim.name=sgd", "optim.betas=[0.9, 0.99]"], "betas has no effect with sgd"),
        (["optim.lr=.inf"], "optim.lr: found .inf; Input should be a finite number"),
        (["optim.min_lr=1"], "min_lr is 1.0, allowed is up to lr"),
        (["train.epochs=.nan"], "train.epochs: found .nan"),
        (["train.seed=yes"], "seed is true: true and false are not allowed here"),
        (["parallel.zero=off"], "zero is false: true and false are not allowed here"),
        (["data.std=[0, 1, 1]"], "data.std.0: found 0"),
        (["checkpoint.step=5"], "did you mean 'steps'"),
        (["train.checkpoint_every=5"], "train.checkpoint_every: is checkpoint.steps now"),
        (["train.bad_batches=5"], "bad_batches has no effect with on_bad_batch stop"),
        (["optim.layer_decay=1.5"], "optim.layer_decay: found 1.5"),
        (["optim.power=2"], "power has no effect with cosine"),
        (["optim.schedule=poly", "optim.decay_at=[0.5]"], "decay_at has no effect with poly"),
        (["optim.schedule=multistep"], "decay_at is empty, multistep needs shares such as"),
        (["optim.groups=[{match: head.*}]"], "groups: the last, head.*, has no effect"),
        (["task.name=regression", "task.num_classes=2"], "num_classes: unknown key; allowed: "),
        (
            ["optim.schedule=multistep", "optim.decay_at=[0.5]", "optim.min_lr=1e-6"],
            "min_lr has no effect with multistep",
        ),
        (["optim.schedule=multistep", "optim.decay_at=[0.5, 0.2]"], "allowed is a rising order"),
        (["optim.groups=[{mtch: x}]"], "groups.0.mtch: unknown key; did you mean 'match'"),
        (["data.rand_augment={magntude: 1}"], "magntude: unknown key; did you mean 'magnitude'"),
        (["task.class_weights=[1, 2, 3]"], "class_weights has 3 values, allowed is one for each"),
        (["task.class_weights=[1, 2]", "task.balance_classes=true"], "class_weights has no effect"),
        (["task.mixup=0.8", "train.micro_batch=3"], "train.micro_batch is 3: task.mixup and"),
        (["data.val=null", "train.patience=2"], "train.patience has no effect without data.val"),
        (["train.profile=[3, 3]"], "profile is [3, 3], allowed is 0 <= first < last"),
        (["train.ema=1"], "train.ema: found 1"),
        (["parallel.offload_optimizer=true", "parallel.zero=0"], "offload_optimizer needs zero 1"),
        (["data.unreadable=ignore"], "found 'ignore'; allowed is fail, skip"),
        (["model.image_size=[0, 8]"], "model.image_size.0: found 0"),
        (["output=null"], "output: found null"),
        (["model.options={img_size: 32}"], "img_size has a setting of its own, model.image_size"),
        (["coefficients={kind: guarded, loss: [0.3, 0.1]}"], "loss is [0.3, 0.1], allowed is a"),
        (["coefficients={kind: guarded, beta: [0.5, 0.1], drift: [0.1, 0.3]}"], "with revers"),
        (["coefficients={kind: guarded, drift: [0.1, 0.3]}"], "with a beta that rises"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(MAIN, overrides)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert str(MAIN) in text or "override" in text


def test_several_errors_are_told_at_once() -> None:
    with pytest.raises(UserError, match=r"optim\.lrr: unknown .*; train\.sed: unknown"):
        load_config(MAIN, ["optim.lrr=1", "train.sed=3"])


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
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: is not a text file in UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"gradient_clipping": NaN}', "NaN is not a number of JSON"),
        (b'{"timers": {}, "timers": {}}', "key 'timers' is given twice"),
    ],
)
def test_bad_deepspeed_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.json: .*{message}"):
        read_deepspeed_json(tmp_path / "bad.json")


def test_every_setting_is_described() -> None:
    text = describe_config()
    for path in CONFIGS:
        for key in paths(yaml.safe_load(dump_config(load_config(path)))):
            assert key == "coefficients.kind" or any(
                line.startswith((f"{key}: ", f"{key} {{kind: ", f"{key} {{of "))
                for line in text.splitlines()
            ), key
    assert (
        "reversible.memory: " in text
        and "(reverse | store | checkpoint | budget; default reverse)" in text
    )


def deepspeed(extra: dict[str, Any], **options: Any) -> dict[str, Any]:
    run: dict[str, Any] = {"zero": 2, "precision": "fp32", "micro_batch": 4, "accumulate": 2}
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
        ({"train_batch_size": 8}, "train_batch_size is 8, but .* says 24"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but .* says 1.0 .optim.clip"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but train.precision is fp32"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but train.precision is fp32"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is refused"),
        ({"pipeline": {}}, "pipeline is refused"),
        ({"bf16": 1}, "bf16 is 1, allowed is an object"),
        ({"zero_optimization": None}, "zero_optimization is None, allowed is an object"),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is refused"),
        (
            {"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}},
            "save is refused: checkpoints are dr2dist's own",
        ),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "weights is refused"),
        (
            {"zero_optimization": {"stage3_max_live_parameters": 5}},
            "stage3_max_live_parameters has no effect with ZeRO-2",
        ),
        ({"zero_optimization": {"overlap_comm": "perhaps"}}, "overlap_comm: found 'perhaps'"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer is False"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps: found True"),
        ({"gradient_clipping": "auto"}, "gradient_clipping: found 'auto'"),
        ({"steps_per_print": "often"}, "steps_per_print: found 'often'"),
        ({"communication_data_type": "fp17"}, "communication_data_type: found 'fp17'"),
        ({"comms_logger": {"enabled": "maybe"}}, "comms_logger.enabled: found 'maybe'"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is refused"),
        *(
            ({key: {}}, f"{key} is refused")
            for key in (
                "activation_checkpointing",
                "autotuning",
                "compression_training",
                "data_efficiency",
                "elasticity",
                "hybrid_engine",
                "sparse_attention",
            )
        ),
    ],
)
def test_deepspeed_files_are_checked_whole(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"my\.json: .*{message}|my\.json: {message}"):
        deepspeed(extra)


WHOLE = {
    "steps_per_print": 10,
    "wall_clock_breakdown": True,
    "communication_data_type": "fp32",
    "bf16": {"enabled": False},
    "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    "timers": {"throughput": {"enabled": False, "synchronized": False}},
    "zero_optimization": {
        "overlap_comm": False,
        "stage3_prefetch_bucket_size": 1000,
    },
}
"""A file with every kind of section, to whose last one the check must reach."""


def test_a_misspelt_key_is_found_at_every_place_of_a_deepspeed_file() -> None:
    deepspeed(WHOLE, zero=3)
    for key in paths(WHOLE):
        *sections, last = key.split(".")
        wrong = json.loads(json.dumps(WHOLE))
        place = wrong
        for section in sections:
            place = place[section]
        place[f"{last}x"] = place.pop(last)
        with pytest.raises(UserError) as caught:
            deepspeed(wrong, zero=3)
        assert str(caught.value) == f"my.json: {key}x: unknown key; did you mean '{last}'?"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_deepspeed_itself_reads_the_result_so(stage: int, bf16: bool) -> None:
    extra = read_deepspeed_json(ROOT / "ds_configs" / f"zero{stage}.json")
    found = DeepSpeedConfig(
        deepspeed(extra, zero=stage, precision="bf16" if bf16 else "fp32", replicas=1)
    )
    assert found.zero_optimization_stage == stage
    assert (found.train_batch_size, found.gradient_accumulation_steps) == (8, 2)
    assert found.gradient_clipping == 1.0 and found.zero_allow_untested_optimizer
    # ZeRO-0 would train bf16 weights without fp32 masters.
    assert found.bfloat16_config.enabled == (bf16 and stage > 0)
    if stage == 3:
        assert found.zero_config.param_persistence_threshold == 10000


def test_equal_values_are_allowed_on_both_sides() -> None:
    found = deepspeed({"train_batch_size": 24, "bf16": {"enabled": False}, "timers": {}})
    assert found["gradient_accumulation_steps"] == 2
