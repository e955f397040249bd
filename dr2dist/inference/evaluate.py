"""An exported model on labelled shards: numbers as JSON, confusion and calibration as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchmetrics import MeanMetric
from tqdm import tqdm

from dr2dist.data.order import validation_batches
from dr2dist.data.stream import ShardDataset, loader
from dr2dist.errors import UserError
from dr2dist.inference.exported import ready
from dr2dist.reversible.transfer import to_device
from dr2dist.tasks.classification import Classification


def evaluate(
    path: str | Path,
    shards: str | Path,
    *,
    batch: int = 32,
    workers: int = 0,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """The report of an exported file on all samples of the shards, each counted once.

    Returns samples, skipped (images that cannot be read, if these may be left out), loss,
    accuracy, balanced_accuracy, class_accuracy by class name, confusion (counts, rows labels,
    columns predictions), calibration_error, classes. Raises UserError if the shards have other
    classes than the model.
    """
    net, transform, device = ready(path)
    cfg: Any = net.pretrained_cfg
    unreadable: Literal["fail", "blank"] = "blank" if skip_unreadable else "fail"
    dataset = ShardDataset(shards, transform, unreadable=unreadable)
    if dataset.index.classes != tuple(cfg["label_names"]):
        raise UserError(
            f"{shards}: has the classes {', '.join(dataset.index.classes[:10])}; "
            f"{path} knows {', '.join(cfg['label_names'][:10])}"
        )
    found = _measure(net, dataset, device, batch, workers, progress)
    classes = list(cfg["label_names"])
    by_class = dict(zip(classes, found.pop("class_accuracy"), strict=True))
    return {**found, "class_accuracy": by_class, "classes": classes}


def _measure(
    net: nn.Module,
    dataset: ShardDataset,
    device: torch.device,
    batch: int,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    task = Classification(len(dataset.index.classes))
    metrics, loss = task.report().to(device), MeanMetric().to(device)
    samples = skipped = 0
    batches = validation_batches(len(dataset), batch=batch, rank=0, ranks=1)
    items = [[(0, index) for index in part] for part in batches]
    bar = tqdm(loader(dataset, items, workers), total=len(items), disable=not progress)
    with torch.inference_mode():
        for found in bar:
            skipped += found["skipped"]
            if not found["count"]:
                continue
            samples += found["count"]
            labels = to_device(found["label"], device)
            output = net(to_device(found["image"], device))
            metrics.update(output.float(), labels)
            loss.update(task.loss(output, labels), weight=len(labels))
    if not samples:
        raise UserError(f"{dataset.folder}: no image can be read")
    values = {"loss": loss.compute(), **metrics.compute()}
    plain = {name: value.tolist() for name, value in values.items()}
    return {"samples": samples, "skipped": skipped, **plain}


def draw(report: dict[str, Any], path: str | Path) -> None:
    """The confusion matrix, as shares of each label, as a picture at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = torch.tensor(report["confusion"], dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    classes = report["classes"]
    size = max(4.0, 1 + len(classes) / 3)
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for row in range(len(classes)):
            for column in range(len(classes)):
                axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center")
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.set_title(
        f"accuracy {report['accuracy']:.3f}, balanced {report['balanced_accuracy']:.3f}, "
        f"calibration error {report['calibration_error']:.3f}",
        fontsize=9,
    )
    figure.savefig(path)
    plt.close(figure)
