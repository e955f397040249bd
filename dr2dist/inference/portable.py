"""The inference network without dr2dist: as ONNX, or as a program of torch.export.

Chains become plain formulas on whole tensors, the same arithmetic without slices or tiles, and
what is written is run once and compared with the module before it gets its name.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dr2dist.assembly import ExportMetadata
from dr2dist.backbones.slicing import replaced_modules
from dr2dist.errors import UserError
from dr2dist.files import atomic_write, check_new
from dr2dist.inference.exported import load_with_task, random_inputs
from dr2dist.reversible import Chain, PlainRunner
from dr2dist.reversible.tape import Sides
from dr2dist.reversible.trees import tree_leaves, tree_map
from dr2dist.tasks.task import Task

TOLERANCE = 1e-3
"""Largest difference from the module's outputs, relative to the largest of them: other runtimes
round functions in another order, and exact states round to their grid after that."""


class PlainChain(nn.Module):
    """A chain's forward pass in evaluation: tokens [B, ...] to x_L, in the chain's setting."""

    runner = PlainRunner()

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.functions, self.setting, self.name = chain.functions, chain.setting, chain.name
        self.scales = chain.scales

    def forward(
        self,
        x: Tensor,
        taps: Collection[int] = (),
        batched: Collection[str] = (),
        until: int | None = None,
        rows: int = 1,
        **sides: Any,
    ) -> Any:
        """As Chain's."""
        shared = Sides(sides, batched)
        states = self._floating if self.setting.arithmetic == "float" else self._exact
        functions, tapped = list(self.functions)[:until], []
        averaged = len(self.functions) - 1 if self.setting.hand_on == "mean" else None
        for index, (before, tokens) in enumerate(pairwise(states(x, functions, shared))):
            if index == averaged:
                tokens = tokens * 0.5 + before * 0.5
            if index in taps:
                tapped.append(tokens)
        return (tokens, tapped) if taps else tokens

    def _floating(self, x: Tensor, functions: Sequence[Any], sides: Sides) -> Iterator[Tensor]:
        """x_0, x_1, ..."""
        alpha, beta = self.setting.alpha, self.setting.beta
        previous, factor = beta * x, 1.0
        yield x
        for function in functions:
            f = factor * function(x, **sides.of(function))
            x, previous, factor = f + alpha * x + previous, beta * x, self.setting.factor
            yield x

    def _exact(self, x: Tensor, functions: Sequence[Any], sides: Sides) -> Iterator[Tensor]:
        """The same on the grid."""
        setting, scale = self.setting, self._steps_of_one(x.dim())
        now = (x.double() * scale).round()
        before, factor = now, 1.0
        yield (now / scale).to(x.dtype)
        for function in functions:
            f = function((now / scale).to(x.dtype), **sides.of(function))
            quotient = (before * setting.beta + 0.5).floor()
            total = (f.double() * (factor * scale) + setting.alpha * now).round()
            now, before, factor = total + quotient, now, setting.factor
            yield (now / scale).to(x.dtype)

    def _steps_of_one(self, dims: int) -> Any:
        """Grid steps that are 1: a number, or fp64 and of the channels' place in tokens."""
        if self.scales is None:
            return 2.0**self.setting.fraction_bits
        shape = [1] * dims
        shape[self.scales.dim] = len(self.scales.exponents)
        return self.scales.values(torch.device("cpu"), onto_grid=True).double().view(shape)


def plain(net: Any) -> Any:
    """A copy of a converted network in evaluation mode, with plain chains; weights are shared."""
    copied: Any = replaced_modules(net, {})
    copied.eval()  # cuts its chains first
    copied.take_items([PlainChain(i) if isinstance(i, Chain) else i for i in copied.items])
    return copied


def export_portable(source: str | Path, output: str | Path, overwrite: bool = False) -> float:
    """Writes an exported file's network as .onnx or .pt2, for batches of any size.

    source: a file of `export` or `save`. Outputs are the network's, in the units of what its task
    predicts. Returns the largest difference from the module on random inputs, relative to the
    largest output, both before units; at most TOLERANCE, 1e-3. The metadata say what an exported
    file's do. A state that leaves its grid's range is NaN in dr2dist and not noticed here.
    Raises UserError if the output exists and may not be overwritten, would compute something else,
    or if packages for ONNX are missing.
    """
    source, output = Path(source), Path(output)
    check_new(output, overwrite)
    net, task, facts = load_with_task(source)
    program = _program(_InUnits(plain(net), task), random_inputs(net, 2))
    inputs = random_inputs(net, 3)
    with torch.inference_mode():
        outputs = net(inputs)
        each = [outputs, tree_map(torch.zeros_like, outputs), tree_map(torch.ones_like, outputs)]
        wanted = [tree_leaves(task.in_units(values)) for values in each]
    with atomic_write(output) as aside:
        found = ENDINGS[output.suffix](program, facts, aside, _Inputs(net.family.input, inputs))
        difference = max(map(_difference, found, *wanted))
        if not difference <= TOLERANCE:
            raise UserError(f"{output}: computes other outputs than the module: {difference:.2g}")
    return difference


def _difference(found: Tensor, wanted: Tensor, zero: Tensor, one: Tensor) -> float:
    """The largest, beyond the rounding of units, relative to the largest output.

    zero, one: what outputs of 0 and 1 are in units. Years of about 2000, beside parts of a
    millimetre, are all alike before units, and so they are compared.
    """
    step = (one - zero).abs()
    step = step.where(step > 0, torch.ones_like(step))
    apart = (found - wanted).abs() - torch.finfo(torch.float32).eps * zero.abs()
    return float((apart.clamp(min=0) / step).max() / ((wanted - zero).abs() / step).max())


class _InUnits(nn.Module):
    """A network whose outputs mean what its task predicts: `predict` does this part by itself."""

    def __init__(self, net: nn.Module, task: Task) -> None:
        super().__init__()
        self.net, self.task = net, task

    def forward(self, inputs: Any) -> Any:
        """As the network's, in the task's units."""
        return self.task.in_units(self.net(inputs))


class _Inputs(NamedTuple):
    """name: of the network's one input, None for several by name. values: a batch of them."""

    name: str | None
    values: Any


def _program(net: nn.Module, inputs: Any) -> Any:
    batch = torch.export.Dim("batch")
    shapes = tree_map(lambda value: {0: batch}, inputs)
    with torch.no_grad():
        return torch.export.export(net, (inputs,), dynamic_shapes=(shapes,), strict=False)


def _write_program(program: Any, facts: ExportMetadata, path: Path, inputs: _Inputs) -> list[Any]:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"dr2dist.json": facts.model_dump_json()})
    with path.open("rb") as file, torch.inference_mode():
        return tree_leaves(torch.export.load(file).module()(inputs.values))


def _write_onnx(program: Any, facts: ExportMetadata, path: Path, inputs: _Inputs) -> list[Any]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install dr2dist[onnx]") from None
    # The one input is a batch: its name is the plural.
    names = list(inputs.values) if inputs.name is None else [f"{inputs.name}s"]
    with redirect_stdout(io.StringIO()):
        converted: Any = torch.onnx.export(program, input_names=names, dynamo=True)
    model = converted.model_proto
    for key, value in facts.metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = [value.numpy() for value in tree_leaves(inputs.values)]
    given = {each.name: value for each, value in zip(session.get_inputs(), values, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


ENDINGS: dict[str, Callable[[Any, ExportMetadata, Path, _Inputs], list[Any]]] = {
    ".onnx": _write_onnx,
    ".pt2": _write_program,
}
"""What writes each kind of file, and gives what the file then computes."""
