"""An exported model: one safetensors file that says what it needs to be run rightly.

The tensors have timm's names. The metadata carry, as strings, every field of `ExportMetadata`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dr2dist.assembly import ExportMetadata, assemble
from dr2dist.backbones.convert import convert
from dr2dist.backbones.lora import merged
from dr2dist.checkpoints.checkpoint import EMA, Checkpoint, is_finite, read_state
from dr2dist.checkpoints.folders import checkpoint_folder, checkpoints
from dr2dist.errors import UserError, one_line
from dr2dist.files import atomic_write, check_new
from dr2dist.reversible.arithmetic.setting import COMPUTED
from dr2dist.reversible.trees import tree_map
from dr2dist.tasks.task import Task


def export(
    run: str | Path,
    output: str | Path,
    which: Literal["best", "last"] = "best",
    overwrite: bool = False,
    lora: Literal["merged", "apart"] | None = None,
) -> ExportMetadata:
    """Writes the best or last checkpoint of a run's folder as one safetensors file.

    Weights are fp32; the file is written aside and renamed. Returns what the file says of itself.

    lora: what becomes of a run's adapters: added to the weights (None too), so that the file is
    like that of any model, or tensors of their own beside the weights that the run began with.

    Averaged weights take the place of trained ones in a run that has them (train.ema). The best
    is the one with the best validation; without validation there is only the last.
    Raises UserError if there is none, the output exists and may not be overwritten, or lora is
    given for a run without adapters.
    """
    output = Path(output)
    check_new(output, overwrite)
    saved = Checkpoint(_chosen(Path(run), which))
    saved.verify()
    facts = ExportMetadata.model_validate(saved.state)
    if lora is not None and facts.lora is None:
        raise UserError(f"--lora: has no effect, for {run} has no adapters (model.lora)")
    averaged = set(saved.names(EMA))
    tensors: dict[str, Tensor] = {
        name: saved.tensor(EMA if name in averaged else "master", name)
        for name in saved.names("master")
    }
    tensors |= {name: saved.tensor("buffer", name) for name in saved.names("buffer")}
    if facts.lora is not None and lora != "apart":
        tensors = merged(tensors, facts.lora.alpha / facts.lora.rank)
        facts = facts.model_copy(update={"lora": None})
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
            f"{run}: no validation with finite values is in {found[-1].name}, so there is no best; "
            "use --which last"
        )
    return checkpoint_folder(run, best["step"])


class Loaded(NamedTuple):
    """net: an exported file's network, converted, in evaluation mode, fp32 on the CPU. task: what
    it has learnt. facts: what the file says of itself."""

    net: Any
    task: Task
    facts: ExportMetadata


def load(path: str | Path) -> nn.Module:
    """The model of an exported file, converted, in evaluation mode, fp32 on the CPU.

    `pretrained_cfg` holds what the task says of how samples are prepared, see its `pretrained_cfg`.
    Needs no DeepSpeed. Raises UserError if the file is not one of `export` or `save`.
    """
    net: nn.Module = load_with_task(path).net
    return net


def load_with_task(path: str | Path) -> Loaded:
    """What `load` gives, with its task. Raises UserError as `load` does."""
    facts = ExportMetadata.read(path)
    model, task, _ = assemble(facts.blueprint())
    try:
        model.load_state_dict(load_file(path), strict=True)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit {facts.model}: {one_line(error)}") from None
    net = convert(
        model,
        facts.alpha,
        facts.beta,
        memory="store" if facts.conventional else "reverse",
        **{name: getattr(facts, name) for name in COMPUTED},
    )
    net.set_scales(facts.scales)
    # What timm says of other sizes than the trained one is not true of these weights.
    own = getattr(net, "pretrained_cfg", {})
    kept = {k: v for k, v in own.items() if not k.startswith("test_")}
    net.pretrained_cfg = {**kept, **task.pretrained_cfg()}
    return Loaded(net.eval(), task, facts)


def ready(path: str | Path) -> tuple[Loaded, torch.device]:
    """An exported model on the device at hand, and the device."""
    loaded = load_with_task(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.net.to(device)
    return loaded, device


def random_inputs(net: Any, count: int) -> Any:
    """Inputs of some samples as a network takes them, the same in every call; those that are not
    floating are the example's."""
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Tensor) -> Tensor:
        shape = (count * len(value), *value.shape[1:])
        if value.is_floating_point():
            return torch.randn(shape, generator=generator).to(value)
        return value.expand(shape) if len(value) == 1 else torch.cat([value] * count)

    return tree_map(drawn, net.family.example(net))
