"""The process of one case: builds it, then answers requests for measurements."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.backbones.convert import convert
from dr2dist.backbones.forward import AutogradDriver
from dr2dist.backbones.network import ReversibleNetwork
from dr2dist.backbones.walk import Flow, Place, walk
from dr2dist.bench.cases import Spec, build, example_shape
from dr2dist.bench.names import COMPILED
from dr2dist.errors import UserError
from dr2dist.reversible import Chain, State
from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.tape import arithmetic_of, state_dtype


class Worker:
    """A case's network and the images that it trains on."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.device:  # where a large model is made in a fraction of the time
            self.net: nn.Module = build(spec).to(self.device)
        self.shape = example_shape(spec)
        self.images = self._images(0)

    def growth(self, batch: int, steps: int = 1) -> dict[str, Any]:
        """Bytes by which a step grows the peak, images, weights and gradients excluded, the peak of
        the whole process (on a GPU: of its tensors), and by how much more steps' growth differs.
        """
        # What a budget holds is measured in the first step, on the batch that it is for; a
        # compiler makes kernels for it.
        first = self.spec.memory_budget is not None or self.spec.case == COMPILED
        self._step(self._images(batch if first else 1))
        images = self._images(batch)
        growths, peaks = [], []
        for _ in range(steps):
            before = start_peak(self.device)
            self._step(images)
            peaks.append(peak(self.device))
            growths.append(peaks[-1] - before)
        return {
            "growth": growths[0],
            "peak": max(peaks),
            "spread": max(growths) - min(growths),
        }

    def seconds(self, batch: int) -> dict[str, Any]:
        """Of one step; images are the same in every call."""
        if len(self.images) != batch:
            self.images = self._images(batch)
            self._step(self.images)
        start = self._now()
        self._step(self.images)
        return {"seconds": self._now() - start}

    def elementwise(self, batch: int) -> dict[str, Any]:
        """Seconds that a step's exact arithmetic takes: tokens, coupling and packing, of all
        functions, forth and back, apart from the functions themselves."""
        net = self._reversible()
        total = 0.0
        with torch.no_grad():
            for chain, tokens in _chain_inputs(net, self._images(batch)):
                dtype = state_dtype(tokens)
                arithmetic: Any = arithmetic_of(chain.setting, dtype, self.device, chain.scales)
                one = _coupling_seconds(arithmetic, tokens, self._now)
                total += one * len(chain.functions)
        return {"seconds": total}

    def facts(self) -> dict[str, Any]:
        """Elements of one sample's tokens (the first chain's), pixels of a patch, functions,
        device."""
        net = self._reversible()
        with torch.no_grad():
            tokens = _chain_inputs(net, self._images(1))[0][1]
        functions = sum(len(chain.functions) for chain in net.chains)
        features = net.family.features(net)
        patch = features[0].stride if features else 1
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {
            "elements": tokens.numel(),
            "patch": patch,
            "functions": functions,
            "device": name,
        }

    def _reversible(self) -> ReversibleNetwork:
        net = self.net
        return net if isinstance(net, ReversibleNetwork) else convert(net, 0.5, 0.5)

    def _images(self, batch: int) -> Tensor:
        dtype = torch.bfloat16 if self.spec.bf16 else torch.float32
        return torch.randn(batch, *self.shape, device=self.device).to(dtype)

    def _step(self, images: Tensor) -> None:
        self.net(images).float().square().mean().backward()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _chain_inputs(net: ReversibleNetwork, images: Tensor) -> list[tuple[Chain, Tensor]]:
    """(chain, its tokens) for each chain."""
    driver = _Passing(net, {}, ())
    walk(net.places[:-1], images, driver)
    return driver.inputs


class _Passing(AutogradDriver):
    """Goes past functions, which leave tokens in their shape, and notes what chains begin with."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inputs: list[tuple[Chain, Tensor]] = []

    def functions(self, run: Sequence[Place], flow: Flow) -> Flow:
        """See Driver."""
        self.inputs.append((self.net.items[run[0].item], flow.value))
        return flow


def _coupling_seconds(arithmetic: Any, tokens: Tensor, now: Any) -> float:
    """The median of five: one function's arithmetic, forth and back."""
    # States as a chain has them: none is near its limit.
    state = arithmetic.start(tokens).copy()
    f, seen, times = 0.01 * tokens.contiguous(), OutputChecksum.on(tokens.device), []
    for _ in range(6):
        start = now()
        arithmetic.tokens(state.current, tokens.dtype)
        remainders = arithmetic.advance(state, f, arithmetic.target(state, True), True, seen)
        arithmetic.tokens(state.current, tokens.dtype)
        arithmetic.retreat(State(state.previous, state.current), f, remainders, seen)
        times.append(now() - start)
    return statistics.median(times[1:])


def start_peak(device: torch.device) -> int:
    """Gives back what is free, starts the peak anew; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes held since then."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (text,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(text.split()[1]) * 1024


def serve(requests: Connection, spec: dict[str, Any], exact_memory: bool, errors: str) -> None:
    """What a case's process does: answers requests until it is ended. errors: a file for what it
    says, and libraries say, meanwhile."""
    said = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, sys.stdout.fileno())
    os.dup2(said, sys.stderr.fileno())
    if exact_memory:
        return_at_once()
    try:
        worker = Worker(Spec(**spec))
        while True:
            request = requests.recv()
            requests.send(getattr(worker, request.pop("measure"))(**request))
    except UserError as error:
        requests.send({"error": str(error)})


def return_at_once() -> None:
    """Makes glibc give back what is freed, so that resident memory is what is in use."""
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    for which in (trim, mmap):
        ctypes.CDLL(None).mallopt(which, 65536)
