"""An exported model: one safetensors file that says what it needs to be run rightly.

The tensors have timm's names. The metadata carry, as strings, every field of `ExportMetadata`.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dr2dist.backbones.build import build_model
from dr2dist.backbones.network import convert
from dr2dist.checkpoints.checkpoint import (
    EMA,
    Checkpoint,
    checkpoint_folder,
    checkpoints,
    is_finite,
    read_state,
)
from dr2dist.data.transforms import EVALUATION, Resize, Transform, eval_transform
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write

WARNING = (
    "alpha {alpha}, beta {beta}: plain timm loads these weights WITHOUT AN ERROR and computes "
    "OTHER OUTPUTS; use dr2dist.load"
)


Option = bool | int | float | str


class ExportMetadata(BaseModel):
    """What an exported file says of its model.

    model, image_size (height, width), options: how timm builds it. alpha, beta, arithmetic,
    fraction_bits: how its residual functions are joined. classes: names, by label. input_size:
    height, width. mean, std: of the three channels. resize: see eval_transform. step: applied
    optimiser steps, None where nobody counted. dr2dist: the version that trained it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    model: str
    image_size: tuple[int, int] | None
    options: dict[str, Option] = {}
    alpha: float
    beta: float
    arithmetic: Literal["exact", "float"]
    fraction_bits: int
    classes: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "floor"
    step: int | None
    dr2dist: str

    @property
    def conventional(self) -> bool:
        """Whether plain timm computes the same."""
        return self.beta == 0

    def metadata(self) -> dict[str, str]:
        """For the file."""
        values = {name: json.dumps(value) for name, value in self.model_dump(mode="json").items()}
        warning = WARNING.format(alpha=self.alpha, beta=self.beta)
        return values if self.conventional else {"WARNING": warning, **values}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises UserError if the file cannot be read or was not exported by dr2dist."""
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
            known = cls.model_fields.keys() & metadata.keys()
            return cls.model_validate({name: json.loads(metadata[name]) for name in known})
        except (ValueError, ValidationError) as error:
            raise UserError(f"{path}: its metadata are not dr2dist's: {one_line(error)}") from None


def export(
    run: str | Path, output: str | Path, which: Literal["best", "last"] = "best"
) -> ExportMetadata:
    """Writes the best or last checkpoint of a run's folder as one file, aside and renamed.

    Averaged weights take the place of trained ones in a run that has them (train.ema). The best
    is the one with the best validation; without validation there is only the last.
    Raises UserError if there is none, or the output exists.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"{output}: exists already; name another file")
    saved = Checkpoint(_chosen(Path(run), which))
    saved.verify()
    facts = ExportMetadata.model_validate(saved.state)
    averaged = set(saved.names(EMA))
    tensors: dict[str, Tensor] = {
        name: saved.tensor(EMA if name in averaged else "master", name)
        for name in saved.names("master")
    }
    tensors |= {name: saved.tensor("buffer", name) for name in saved.names("buffer")}
    with atomic_write(output) as aside:
        save_file(tensors, aside, facts.metadata())
    return facts


def _chosen(run: Path, which: Literal["best", "last"]) -> Path:
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run}: holds no checkpoint")
    if which == "last":
        return found[-1]
    best: Any = read_state(found[-1])["progress"]["best"]
    if not is_finite(best):
        raise UserError(
            f"{run}: has no validation with finite values, so there is no best; use --which last"
        )
    return checkpoint_folder(run, best["step"])


def timm_model(facts: ExportMetadata, on_meta: bool = False) -> nn.Module:
    """The timm model that a file's weights are of, with random ones, or with none on the meta
    device. Raises UserError if it cannot be built."""
    with torch.device("meta") if on_meta else nullcontext():
        return build_model(
            facts.model,
            weights=None,
            image_size=facts.image_size,
            num_classes=len(facts.classes),
            options=facts.options,
        )


def load(path: str | Path) -> nn.Module:
    """The model of an exported file, converted, in evaluation mode, fp32 on the CPU.

    `pretrained_cfg` holds input_size, mean, std, interpolation, crop_pct, crop_mode and
    label_names, as timm's own models do: timm's `create_transform` makes of them what `predict` and
    `evaluate` do with 8-bit RGB images.
    Needs no DeepSpeed. Raises UserError if the file is not one of `export` or `save`.
    """
    facts = ExportMetadata.read(path)
    model = timm_model(facts)
    try:
        model.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit {facts.model}: {one_line(error)}") from None
    net = convert(
        model,
        facts.alpha,
        facts.beta,
        facts.arithmetic,
        "store" if facts.conventional else "reverse",
        fraction_bits=facts.fraction_bits,
    )
    # What timm says of other sizes than the trained one is not true of these weights.
    kept = {k: v for k, v in net.pretrained_cfg.items() if not k.startswith("test_")}
    net.pretrained_cfg = {
        **kept,
        **EVALUATION,
        "input_size": (3, *facts.input_size),
        "mean": facts.mean,
        "std": facts.std,
        "num_classes": len(facts.classes),
        "label_names": facts.classes,
    }
    return net.eval()


def ready(path: str | Path) -> tuple[nn.Module, Transform, torch.device]:
    """An exported model on the device at hand, how its images are prepared, and the device."""
    facts, net = ExportMetadata.read(path), load(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = eval_transform(facts.input_size, facts.mean, facts.std, facts.resize)
    return net.to(device), transform, device
