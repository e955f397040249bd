"""Configurations made up from the schema, and what becomes of them in the ranks of a pool."""

from __future__ import annotations

import math
import random
import shutil
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import torch.distributed as dist
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dr2dist.config import Config, load_config
from dr2dist.config.task import sections_of
from dr2dist.errors import UserError
from dr2dist.training.folder import find_start
from dr2dist.training.plan import make_plan
from dr2dist.training.run import run

LEFT = {
    # What a small run on a CPU cannot try, or what says where things are.
    *("model.name", "model.weights", "model.options", "model.freeze", "model.image_size"),
    *("output", "plugins", "data.train", "data.val", "data.fields", "task.name"),
    *("parallel.deepspeed", "train.steps", "train.epochs", "reversible.compile"),
    *("task.num_classes", "model.in_channels", "train.profile", "optim.groups"),
    *("train.step_limit", "train.grace", "task.class_weights"),
}
BASE: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "weights": "random",
        "image_size": 32,
        "options": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    },
    "task": {"num_classes": 2},
    "optim": {"lr": 1e-3},
    "train": {"steps": 2, "micro_batch": 4},
    "parallel": {"zero": 0},
}
MODELS: list[dict[str, Any]] = [
    {},
    {"options": {"depth": 1, "embed_dim": 24, "num_heads": 2, "init_values": 1.0}},
    {
        "name": "swin_tiny_patch4_window7_224",
        "image_size": 56,
        "options": {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 24},
    },
    {"name": "eva02_tiny_patch14_224", "image_size": 28},
]


def leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings of a schema by their whole names."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        elif prefix + name not in LEFT and name != "coefficients":
            yield prefix + name, field


def generate(seed: int, shards: str) -> dict[str, Any]:
    """A configuration: a model, a path of coefficients, and up to four settings at random. Any two
    may contradict each other."""
    rng = random.Random(seed)
    values = yaml.safe_load(yaml.safe_dump(BASE))
    values["model"] |= rng.choice(MODELS)
    values["data"] = {"train": f"{shards}/train"}
    if rng.random() < 0.7:
        values["data"]["val"] = f"{shards}/val"
    values["coefficients"] = _path(rng)
    options, data = sections_of("classification")
    known = [*leaves(Config), *leaves(options, "task."), *leaves(data, "data.")]
    known = [(key, field) for key, field in known if key not in LEFT]
    for key, field in rng.sample(known, rng.randint(0, 4)):
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = _value(rng, field.annotation, field.metadata)
    return typing.cast(dict[str, Any], values)


def _path(rng: random.Random) -> dict[str, Any]:
    beta = rng.choice([1 / 16, 0.1, 0.25, 0.5])
    kind = rng.choice(["conserve", "constant", "paper", "guarded", "conventional"])
    if kind == "conventional":
        return {"kind": "constant", "alpha": 1, "beta": 0}
    if kind == "constant":
        return {"kind": kind, "alpha": 1 - beta, "beta": beta}
    return {"kind": kind} if kind == "paper" else {"kind": kind, "beta": [beta, 0.5]}


def _value(rng: random.Random, kind: Any, rules: list[Any]) -> Any:
    """One of a type, within its bounds: small ones, since the run is."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _value(rng, inner[0], [*rules, *inner[1:]])
    if origin is typing.Literal:
        return rng.choice(inner)
    if origin in (types.UnionType, typing.Union):
        return _value(rng, rng.choice(inner), rules)
    if origin is tuple:
        count = rng.randint(0, 3) if inner[-1] is Ellipsis else len(inner)
        of = [inner[0]] * count if inner[-1] is Ellipsis else inner
        return [_value(rng, each, []) for each in of]
    if kind is type(None):
        return None
    if kind is bool:
        return rng.random() < 0.5
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {
            name: _value(rng, field.annotation, field.metadata)
            for name, field in kind.model_fields.items()
            if rng.random() < 0.5
        }
    low, high = _bounds(rules)
    if kind is float:
        return round(rng.uniform(max(low, -1e-3), min(high, 1.0)), 4)
    if isinstance(kind, type) and issubclass(kind, int):
        least = max(low, 0.0)
        return rng.randint(math.ceil(least), int(min(high, least + 6)))
    return None


def _bounds(rules: list[Any]) -> tuple[float, float]:
    low, high = -math.inf, math.inf
    for rule in rules:
        if isinstance(rule, FieldInfo):
            inner = _bounds(rule.metadata)
            low, high = max(low, inner[0]), min(high, inner[1])
        if isinstance(rule, annotated_types.Ge):
            low = max(low, float(rule.ge))  # type: ignore[arg-type]
        if isinstance(rule, annotated_types.Gt):
            low = max(low, float(rule.gt) + 1e-3)  # type: ignore[arg-type]
        if isinstance(rule, annotated_types.Le):
            high = min(high, float(rule.le))  # type: ignore[arg-type]
        if isinstance(rule, annotated_types.Lt):
            high = min(high, float(rule.lt) - 1e-3)  # type: ignore[arg-type]
    return low, high


FAULTS: dict[str, Any] = {
    "optim.lr": [-1, "fast", None, float("nan"), [1e-3]],
    "optim.clip": [0, -2.0, "no"],
    "optim.betas": [[0.9], 0.9, [0.9, 1.5]],
    "optim.learning_rate": [1e-3],
    "model.name": ["vit_tinny", "", 3, None],
    "model.weights": [None, "nowhere.safetensors", 7],
    "model.image_size": [33, [32], 0, "large", [32, 40]],
    "model.in_channels": [5, 0],
    "model.options": [{"depth": 0}, {"embed_dim": 25}, {"nothing": 1}, [1], {"depth": -1}],
    "model.freeze": [["no.such.*"], "blocks"],
    "train.micro_batch": [0, 2.5, 10**9, "four"],
    "train.steps": [0, -3, None],
    "train.epochs": [1],
    "train.ema": [1.0, 0, "x"],
    "train.precision": ["fp61", "fp16", 16],
    "train.validate_every": [0],
    "parallel.zero": [4, "two", True],
    "parallel.stages": [3, 0, 7],
    "parallel.deepspeed": ["nowhere.json", 4],
    "reversible.chunk_size": [0, -1, "big"],
    "reversible.memory": ["none", "budget"],
    "reversible.state_bits": [8, 64],
    "reversible.fraction_bits": [99, -1],
    "coefficients": [{"kind": "none"}, {"beta": [0, 0.5]}, 3, {"kind": "constant"}],
    "task.num_classes": [3, 0, "two"],
    "task.name": ["classify", None],
    "data.train": ["nowhere", None, 3],
    "data.num_workers": [-1, 0.5],
    "checkpoint.keep": [0],
    "checkpoint.minutes": [-1, "often"],
    "output": ["", None, "/proc/x/y"],
    "extra": [1],
}
"""Values that are wrong wherever they stand."""


def with_fault(seed: int, shards: str) -> tuple[dict[str, Any], str]:
    """A configuration with one fault, and where it is."""
    rng = random.Random(seed)
    values = yaml.safe_load(yaml.safe_dump(BASE))
    values["data"] = {"train": f"{shards}/train", "val": f"{shards}/val"}
    key = sorted(FAULTS)[seed % len(FAULTS)]
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = rng.choice(FAULTS[key])
    return values, key


def outcome(path: str, output: str) -> str:
    """In every rank: "ran", or the line by which the plan refuses it. All else is raised."""
    shutil.rmtree(output, ignore_errors=True)
    dist.barrier()
    try:
        config = load_config(
            path, [] if "output" in Path(path).read_text() else [f"output={output}"]
        )
        plan = make_plan(config, dist.get_world_size())
        find_start(config, plan.global_batch, plan.steps, plan.train.digest())
        plan.try_out(config, fetch=False)
    except UserError as error:
        return str(error)
    dist.barrier()
    assert run(config)["status"] == "finished"
    return "ran"
