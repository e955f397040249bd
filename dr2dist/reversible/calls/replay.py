"""What makes a second run of F equal the first in every bit: randomness, kernels, statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dr2dist.reversible.calls.kernels import Kernels
from dr2dist.reversible.trees import modules_of


def stable_seed(*key: int) -> int:
    """A seed, 0 .. 2^63 - 1, that the key gives in every process and on every machine."""
    words = b"".join(part.to_bytes(16, "little", signed=True) for part in key)
    digest = hashlib.blake2b(words, digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


class Randomness:
    """One seed for all the functions of a forward pass, so that none keeps a state of its own.

    The seed is one draw from the global CPU stream. The draw is given back at the end if no
    function used any randomness; otherwise the stream moves alike in every memory mode.

    item: the number in its network of the chain, or the module, that is run. In stages those of
    different ranks may get the same draw, and must not drop the same.
    """

    def __init__(self, device: torch.device, item: int = 0) -> None:
        self._generators = _generators(device)
        self._before: Tensor | None = torch.default_generator.get_state()
        # Read as host memory: it never was on a device, so nothing has to wait for one.
        drawn = int(torch.randint(2**62, (1,), device="cpu").numpy()[0])
        self._seed = stable_seed(drawn, item) if item else drawn

    @contextmanager
    def at(self, function: int, key: tuple[int, ...]) -> Iterator[None]:
        """Runs a slice of a function on its own stream and puts the global ones back."""
        states = [generator.get_state() for generator in self._generators]
        seed = stable_seed(self._seed, function, *key)
        seeded = [generator.manual_seed(seed).get_state() for generator in self._generators]
        try:
            yield
        finally:
            if self._before is not None and any(map(_moved, self._generators, seeded)):
                self._before = None
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def close(self) -> None:
        """Ends the forward pass: an unused draw goes back to the global stream."""
        if self._before is not None:
            torch.default_generator.set_state(self._before)
        self._before = None


def ungraphed(functions: Iterable[nn.Module], device: torch.device, item: int) -> Randomness | None:
    """That of a pass without gradients: where anything is in training it draws as one with them,
    which may follow from the same random state (cached gradients, re-entrant checkpointing).

    None where nothing is, and in a program that is traced, which draws whenever it runs.
    """
    if torch.compiler.is_compiling():
        return None
    training = any(part.training for function in functions for part in modules_of(function))
    return Randomness(device, item) if training else None


def stream_of(
    randomness: Randomness | None, function: int
) -> Callable[[tuple[int, ...]], AbstractContextManager[None]]:
    """The context of a function's calls without gradients, by the key of a slice."""
    return (lambda key: nullcontext()) if randomness is None else partial(randomness.at, function)


def _moved(generator: torch.Generator, state: Tensor) -> bool:
    return bool((generator.get_state().numpy() != state.numpy()).any())


class Snapshot:
    """What a forward pass moves beside its tape, in case that it is to be repeated: random streams
    and running statistics."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._streams = [(stream, stream.get_state()) for stream in _generators(device)]
        buffers = (b for norm in _norms(module) for b in norm._buffers.values() if b is not None)
        self._statistics = [(buffer, buffer.clone()) for buffer in buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts it back."""
        for stream, state in self._streams:
            stream.set_state(state)
        for buffer, value in self._statistics:
            buffer.copy_(value)


def _generators(device: torch.device) -> list[torch.Generator]:
    """The global streams that a pass on a device may draw from."""
    found = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    return found


def _norms(module: nn.Module) -> list[_NormBase]:
    """Those whose running statistics a pass moves."""
    return [m for m in modules_of(module) if isinstance(m, _NormBase) and m.training]


def kept_streams(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside leaves the global streams as they were."""
    devices = [] if device.type == "cpu" else [device]
    context: AbstractContextManager[None] = torch.random.fork_rng(devices)
    return context


@contextmanager
def kept_statistics(function: nn.Module) -> Iterator[None]:
    """Lends copies of running statistics to a recompute: the first run has updated them already."""
    norms = _norms(function)
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        lent = {k: None if v is None else v.clone() for k, v in norm._buffers.items()}
        norm._buffers.update(lent)
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


@contextmanager
def function_context(
    kernels: Kernels, randomness: Randomness, function: int, key: tuple[int, ...]
) -> Iterator[None]:
    """All that a run of F with gradients needs, the same in both directions."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(kernels.autocasting())
        stack.enter_context(randomness.at(function, key))
        yield
