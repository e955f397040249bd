"""The inference network without dr2dist: as ONNX, or as a program of torch.export.

Chains become plain formulas on whole tensors, the same arithmetic without slices or tiles, and
what is written is run once and compared with the module before it gets its name.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.backbones.slicing import replaced_modules
from dr2dist.errors import UserError
from dr2dist.files import atomic_write
from dr2dist.inference.exported import ExportMetadata, load
from dr2dist.reversible import Chain, PlainRunner
from dr2dist.reversible.tape import Sides

TOLERANCE = 1e-3
"""Largest difference from the module's outputs, relative to the largest of them: other runtimes
round functions in another order, and exact states round to their grid after that."""


class PlainChain(nn.Module):
    """A chain's forward pass in evaluation: tokens [B, ...] to x_L, in the chain's setting."""

    runner = PlainRunner()

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.functions, self.setting, self.name = chain.functions, chain.setting, chain.name

    def forward(self, x: Tensor, batched: Collection[str] = (), **sides: Any) -> Tensor:
        """As Chain's, without taps."""
        setting, shared = self.setting, Sides(sides, batched)
        if setting.arithmetic == "float":
            previous = setting.beta * x
            for function in self.functions:
                f = function(x, **shared.of(function))
                x, previous = f + setting.alpha * x + previous, setting.beta * x
            return x
        scale = 2.0**setting.fraction_bits
        now = (x.double() * scale).round()
        before = now
        for function in self.functions:
            f = function((now / scale).to(x.dtype), **shared.of(function))
            image = (before * setting.beta + 0.5).floor()
            now, before = (f.double() * scale + setting.alpha * now).round() + image, now
        return (now / scale).to(x.dtype)


def plain(net: Any) -> Any:
    """A copy of a converted network in evaluation mode, with plain chains; weights are shared."""
    copied: Any = replaced_modules(net, {})
    copied.eval()  # cuts its chains first
    copied.chains = tuple(PlainChain(chain) for chain in copied.chains)
    return copied


def export_portable(source: str | Path, output: str | Path) -> float:
    """Writes an exported file's network as .onnx or .pt2, for images [B, 3, H, W] of any B.

    Returns the largest difference from the module on random images, relative to the largest
    output. The metadata say what an exported file's do. A state that leaves the fixed-point range
    is NaN in dr2dist and not noticed here. Raises UserError if the output exists or would compute
    something else.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise UserError(f"{output}: exists already; name another file")
    facts, net = ExportMetadata.read(source), load(source)
    program = _program(plain(net), facts.input_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, *facts.input_size, generator=generator)
    with torch.inference_mode():
        wanted = net(images)
    with atomic_write(output) as aside:
        found = ENDINGS[output.suffix](program, facts, aside, images)
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        if not difference <= TOLERANCE:
            raise UserError(f"{output}: computes other outputs than the module: {difference:.2g}")
    return difference


def _program(net: nn.Module, size: tuple[int, int]) -> Any:
    images = torch.zeros(2, 3, *size)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.export.export(net, (images,), dynamic_shapes=({0: batch},), strict=False)


def _write_program(program: Any, facts: ExportMetadata, path: Path, images: Tensor) -> Tensor:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={"dr2dist.json": facts.model_dump_json()})
    with path.open("rb") as file, torch.inference_mode():
        result: Tensor = torch.export.load(file).module()(images)
        return result


def _write_onnx(program: Any, facts: ExportMetadata, path: Path, images: Tensor) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install dr2dist[onnx]") from None
    with redirect_stdout(io.StringIO()):
        converted: Any = torch.onnx.export(program, input_names=["images"], dynamo=True)
    model = converted.model_proto
    for key, value in facts.metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(found)


ENDINGS: dict[str, Callable[[Any, ExportMetadata, Path, Tensor], Tensor]] = {
    ".onnx": _write_onnx,
    ".pt2": _write_program,
}
"""What writes each kind of file, and gives what the file then computes."""
