"""How fast a run is: samples, waiting for data, and arithmetic against what the device can do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dr2dist.backbones.channels import input_channels

PEAK_FLOPS: dict[str, dict[str, float]] = {
    "A100": {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12},
    "H100": {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
    "H200": {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
}
"""Dense FLOP/s by a part of the device's name, from NVIDIA's data sheets of the SXM boards."""


def model_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """FLOPs of a forward and backward pass for one image, without any recomputation.

    model: on the meta device. The backward pass counts as two forward passes.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, input_channels(model), *size, device="meta"))
    return 3 * int(counter.get_total_flops())


def device_peak(precision: str) -> float | None:
    """The device's peak FLOP/s in a precision; None where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peaks[precision] for part, peaks in PEAK_FLOPS.items() if part in name), None)


class Speed:
    """Counts samples and waiting between two readings.

    flops: of one sample. peak: of this rank's device, FLOP/s. replicas: data-parallel ranks.
    """

    def __init__(self, flops: int, peak: float | None, replicas: int) -> None:
        self._flops, self._peak, self._replicas = flops, peak, replicas
        self.restart()

    def restart(self) -> None:
        """Starts counting anew, as after what is not training."""
        self._samples, self._waited, self._since = 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def count(self, samples: int) -> None:
        """Adds samples of this rank."""
        self._samples += samples

    def read(self) -> dict[str, Any]:
        """samples_per_second of all ranks, data_wait (a share of the time), model FLOP/s of this
        rank, and mfu, their share of the device's peak, where that is known; then starts anew."""
        seconds = time.monotonic() - self._since
        speed, waited = self._samples / seconds, self._waited / seconds
        self.restart()
        found = {
            "samples_per_second": speed * self._replicas,
            "data_wait": waited,
            "model_flops_per_second": speed * self._flops,
        }
        return found if self._peak is None else {**found, "mfu": speed * self._flops / self._peak}
