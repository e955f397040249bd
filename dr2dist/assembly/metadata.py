"""What an exported file says of itself: all that is needed to run it rightly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from dr2dist.assembly.blueprint import Blueprint
from dr2dist.backbones.backbone import built_size
from dr2dist.backbones.channels import input_channels
from dr2dist.config.schema import Lora, Option
from dr2dist.config.task import DEFAULT_TASK
from dr2dist.errors import UserError, one_line
from dr2dist.reversible.arithmetic.setting import COMPUTED
from dr2dist.tasks.registry import options_from
from dr2dist.version import __version__

WARNING = (
    "alpha {alpha}, beta {beta}{joined}: plain timm loads these weights WITHOUT AN ERROR and "
    "computes OTHER OUTPUTS; use dr2dist.load"
)


PRESENT = {"resize": "timm", "orientation": "exif"}
"""How images are prepared where nothing else is said; files of versions before do not have all."""


class ExportMetadata(BaseModel):
    """What an exported file says of its model.

    model, image_size (height, width in pixels), in_channels, options, lora: how it is built.
    alpha, beta, arithmetic, fraction_bits, state_bits, scales, hand_on, gain: how its residual
    functions are joined. task: the section `task`. classes: names by label. preprocessing: how
    samples become inputs, as plain values. fields: members of samples that were read instead of
    the task's. plugins: modules that know the task or the backbone. step: applied optimiser steps,
    None where nobody counted. dr2dist: the version that trained it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    model: str
    image_size: tuple[int, int] | None
    in_channels: int = 3
    options: dict[str, Option] = {}
    lora: Lora | None = None
    alpha: float
    beta: float
    arithmetic: Literal["exact", "float"]
    fraction_bits: int
    state_bits: Literal[16, 32] = 32
    scales: dict[str, tuple[int, ...]] = {}
    hand_on: Literal["last", "mean"] = "last"
    gain: Literal["none", "consistent"] = "none"
    task: dict[str, Any]
    classes: tuple[str, ...] = ()
    preprocessing: dict[str, Any]
    fields: dict[str, str] = {}
    plugins: tuple[str, ...] = ()
    step: int | None
    dr2dist: str

    @model_validator(mode="before")
    @classmethod
    def _of_versions_before(cls, values: Any) -> Any:
        """Up to 0.1 files had one task, and said of images what is in preprocessing now."""
        if not isinstance(values, dict) or "task" in values or "input_size" not in values:
            return values
        said = {"size": list(values["input_size"]), "channels": 3, "mean": values.get("mean")}
        said |= {"std": values.get("std"), "resize": values.get("resize", "floor")}
        task = {"name": "classification", "num_classes": len(values.get("classes", ()))}
        return {**values, "task": task, "preprocessing": said}

    @property
    def conventional(self) -> bool:
        """Whether plain timm computes the same."""
        return self.beta == 0

    def blueprint(self) -> Blueprint:
        """How the network is built. Raises UserError for a task that is not known."""
        return Blueprint(
            model=self.model,
            task=options_from(self.task, self.plugins),
            classes=self.classes,
            image_size=self.image_size,
            in_channels=self.in_channels,
            options=self.options,
            lora=self.lora,
            preprocessing=self.preprocessing,
        )

    def metadata(self) -> dict[str, str]:
        """For the file."""
        values = {name: json.dumps(value) for name, value in self.model_dump(mode="json").items()}
        joined = "" if self.gain == "none" else f", gain {self.gain}"
        joined += "" if self.hand_on == "last" else f", hand_on {self.hand_on}"
        warning = WARNING.format(alpha=self.alpha, beta=self.beta, joined=joined)
        return values if self.conventional else {"WARNING": warning, **values}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """What a file says, one of an earlier version too.

        Raises UserError if the file cannot be read or was not exported by dr2dist.
        """
        if Path(path).is_dir():
            raise UserError(f"{path}: is a folder; 'dr2dist export' makes a file of a run's")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
        if "alpha" not in metadata:
            raise UserError(
                f"{path}: does not say under which alpha and beta it was trained, so its outputs "
                "would be a guess; make it with 'dr2dist export' or dr2dist.save, or load it with "
                "timm"
            )
        try:
            known = {name: json.loads(v) for name, v in metadata.items() if name != "WARNING"}
            return cls.model_validate(known)
        except (ValueError, TypeError, ValidationError) as error:
            raise UserError(f"{path}: its metadata are not dr2dist's: {one_line(error)}") from None


def class_names(net: Any, count: int) -> tuple[str, ...]:
    """Those that a model's pretrained_cfg has for so many outputs, otherwise "0", "1", ..."""
    said = tuple(net.pretrained_cfg.get("label_names") or ())
    return said if len(said) == count else tuple(map(str, range(count)))


def metadata_of(
    net: Any,
    task: Mapping[str, Any] | None,
    classes: tuple[str, ...],
    preprocessing: Mapping[str, Any],
    options: Mapping[str, Any],
) -> ExportMetadata:
    """What is said of a converted timm model that was trained in a loop of one's own.

    task: a section `task`, None for classification. preprocessing: instead of what the model says.
    Raises UserError for what is not of its kind.
    """
    alpha, beta = net.coefficients
    setting, family = net.chains[0].setting, net.family
    try:
        return ExportMetadata(
            model=net.pretrained_cfg["architecture"],
            image_size=built_size(net),
            in_channels=input_channels(net),
            options=dict(options),
            alpha=alpha,
            beta=beta,
            **{name: getattr(setting, name) for name in COMPUTED},
            scales=net.scales,
            task=dict(task or {"name": DEFAULT_TASK, "num_classes": len(classes)}),
            classes=classes,
            preprocessing={**family.preprocessing(net), **PRESENT, **preprocessing},
            step=None,
            dr2dist=__version__,
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"save: {field} is {first['input']!r}; {first['msg']}") from None
