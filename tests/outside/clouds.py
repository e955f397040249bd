"""Points in a dict, with a padding mask and a learned bias as sides, two features for a head that
gives a dict, a loss over points, and a metric that merges parts of a cloud by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import dr2dist
from dr2dist.config.task import TaskOptions
from dr2dist.tasks.metrics import KeyedMetrics

POINTS = 12
"""Points of a sample after padding."""


class Attention(nn.Module):
    """Attention over points that are there, with a bias that all functions share."""

    def __init__(self, width: int, level: str) -> None:
        super().__init__()
        self.sides = (f"{level}bias", f"{level}mask")
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, **sides: Any) -> Tensor:
        bias, mask = (sides[name] for name in self.sides)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        there = mask["there"][:, None]
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + bias).masked_fill(~there, -1e4)
        return self.out(scores.softmax(-1) @ v)


class Mlp(nn.Module):
    sides = ()

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.drop, self.leave = nn.Dropout(drop), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.drop(functional.gelu(self.enter(self.norm(x)))))


class Halved(nn.Module):
    """Every two points become one; the mask and the bias follow, under other names."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.grow = nn.Linear(width, wider)

    def forward(self, x: Tensor, sides: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        there = sides["mask"]["there"].unflatten(1, (-1, 2)).any(-1)
        bias = sides["bias"][::2, ::2] * 0.5
        pooled = self.grow(x).unflatten(1, (-1, 2)).mean(2)
        return pooled, {"coarse_mask": {"there": there}, "coarse_bias": bias}


class Clouds(nn.Module):
    def __init__(self, width: int = 16, depth: int = 2, drop: float = 0.1) -> None:
        super().__init__()

        def blocks(width: int, level: str = "") -> nn.ModuleList:
            pairs = ((Attention(width, level), Mlp(width, drop)) for _ in range(depth))
            return nn.ModuleList(function for pair in pairs for function in pair)

        self.enter = nn.Linear(3, width)
        self.bias = nn.Parameter(torch.randn(POINTS, POINTS) * 0.1)
        self.fine = blocks(width)
        self.halve = Halved(width, 2 * width)
        self.coarse = blocks(2 * width, "coarse_")
        self.norm = nn.LayerNorm(2 * width)


class CloudsBackbone(dr2dist.Backbone):
    name = "clouds"
    patterns = ("little_clouds",)
    input = None
    tail = ("norm",)

    def build(self, name: str, **options: Any) -> nn.Module | None:
        return Clouds(**options) if name == "little_clouds" else None

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Clouds)

    def layers(self, model: Any) -> list[dr2dist.ChainOf | dr2dist.Transition]:
        return [
            dr2dist.ChainOf("fine", list(model.fine)),
            dr2dist.Transition("halve", model.halve, sides=True),
            dr2dist.ChainOf("coarse", list(model.coarse)),
        ]

    def stem(self, model: Any, inputs: Mapping[str, Tensor], /, **options: Any) -> dr2dist.Stem:
        tokens = model.enter(inputs["points"])
        sides = {"mask": {"there": inputs["there"]}, "bias": model.bias}
        return dr2dist.Stem(tokens, sides, batched=("mask", "coarse_mask"))

    def preprocessing(self, model: Any) -> dict[str, Any]:
        return {"points": POINTS}

    def example(self, model: Any) -> dict[str, Tensor]:
        like = model.enter.weight
        return {
            "points": torch.zeros(1, POINTS, 3, dtype=like.dtype, device=like.device),
            "there": torch.ones(1, POINTS, dtype=torch.bool, device=like.device),
        }

    def features(self, model: Any) -> list[dr2dist.FeatureInfo]:
        width = model.enter.out_features
        last = len(model.coarse) - 1
        return [
            dr2dist.FeatureInfo("fine.1", 0, 1, width, 1, "BNC"),
            dr2dist.FeatureInfo("coarse", 1, last, 2 * width, 2, "BNC"),
            dr2dist.FeatureInfo("output", 1, last, 2 * width, 2, "BNC"),
        ]


class CloudHead(nn.Module):
    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.points, self.size = nn.Linear(sum(widths), classes), nn.Linear(widths[1], 1)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        fine, coarse = features
        both = torch.cat([fine, coarse.repeat_interleave(2, 1)], -1)
        return {"points": self.points(both), "size": self.size(coarse.mean(1))}


class CloudOptions(TaskOptions):
    """A class for each point."""

    num_classes: int = 2


class PointMetrics(KeyedMetrics):
    def entries(self, predictions: Any, batch: Any) -> list[tuple[str, Any]]:
        found = predictions.cpu()
        labels, there = (batch.targets[name].cpu() for name in ("labels", "there"))
        return [
            (key.partition("_part")[0], (found[k][there[k]], labels[k][there[k]]))
            for k, key in enumerate(batch.keys)
        ]

    def merge(self, parts: list[Any]) -> Any:
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def score(self, samples: list[tuple[str, Any]]) -> dict[str, Any]:
        shares = [
            float((found == true).float().mean()) for _, (found, true) in samples if len(true)
        ]
        return {"cloud_accuracy": sum(shares) / max(len(shares), 1), "clouds": float(len(samples))}


class Segment:
    """Points to a fixed number, and which of them are there."""

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        points = torch.as_tensor(values["points"]).float()[:POINTS]
        result = {"there": torch.arange(POINTS) < len(points)}
        result["points"] = functional.pad(points, (0, 0, 0, POINTS - len(points)))
        if "labels" in values:
            labels = torch.as_tensor(values["labels"]).long()[:POINTS]
            result["labels"] = functional.pad(labels, (0, POINTS - len(labels)))
        return result


class CloudTask(dr2dist.Task):
    name = "clouds"
    Options = CloudOptions
    fields: ClassVar[Mapping[str, str]] = {"points": "points.npy;npy", "labels": "labels.npy"}
    inputs = ("points",)
    best = ("cloud_accuracy", "max")

    def transform(self, data: Any = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return Segment()

    def collate(self, samples: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], Any]:
        stacked = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        inputs = {name: stacked[name] for name in ("points", "there")}
        return inputs, {name: stacked[name] for name in ("labels", "there") if name in stacked}

    def head(self, features: Sequence[dr2dist.FeatureInfo]) -> dr2dist.Head:
        widths = {info.name: info.channels for info in features}
        chosen = ("fine.1", "output")
        head = CloudHead([widths[name] for name in chosen], self.options.num_classes)
        return dr2dist.Head(head, chosen)

    def counts(self, batch: dr2dist.Batch) -> float:
        return float(batch.targets["there"].sum())

    def loss(
        self, outputs: Any, batch: dr2dist.Batch, normaliser: float, training: bool = True
    ) -> dr2dist.Loss:
        logits = outputs["points"].float()
        here = batch.to(logits.device).targets
        each = functional.cross_entropy(
            logits.flatten(0, 1), here["labels"].flatten(), reduction="none"
        )
        points = (each * here["there"].flatten()).sum() / normaliser
        size = (outputs["size"].float()[:, 0] - here["there"].float().sum(1) / POINTS).square()
        size = (size * here["there"].any(1)).sum() / normaliser
        fine = logits.detach().isfinite().flatten(1).all(1)
        return dr2dist.Loss(points + size, fine, {"points": points, "size": size})

    def predictions(self, outputs: Any, batch: dr2dist.Batch) -> Tensor:
        return outputs["points"].argmax(-1)

    def metrics(self, device: torch.device) -> PointMetrics:
        return PointMetrics()

    def rows(self, predictions: Tensor) -> list[dict[str, Any]]:
        return [{"labels": " ".join(map(str, row))} for row in predictions.tolist()]


dr2dist.register_backbone(CloudsBackbone())
dr2dist.register_task(CloudTask)
