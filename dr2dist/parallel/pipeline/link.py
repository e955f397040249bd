"""What crosses the cuts between stages, forward and back."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.parallel.pipeline.carried import Carried, Key
from dr2dist.parallel.pipeline.layers import Layer
from dr2dist.parallel.pipeline.stage import Pass, Stage
from dr2dist.reversible.transfer import to_device

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float64,
)
"""Of what goes beside tokens, by the number that tells of it."""


class ForwardMessage(NamedTuple):
    """What crosses a cut forward: tokens or a stacked state (into the first stage come the
    network's inputs), and what goes beside."""

    value: Any
    carried: dict[Key, Tensor]


class BackwardMessage(NamedTuple):
    """What crosses a cut backward: the gradient, the state that was sent, if it comes back, and
    gradients of what goes beside."""

    gradient: Tensor
    state: Tensor | None
    carried: dict[Key, Tensor]


class Link:
    """What a stage exchanges with its neighbours. States travel as their bits, untouched.

    before, after: the layers at its cuts, None at the network's ends; neighbours: the ranks behind
    them. batch: samples of a micro-batch. held: dtype of tokens where no state crosses, and of
    gradients.
    """

    def __init__(
        self,
        stage: Stage,
        before: Layer | None,
        after: Layer | None,
        neighbours: tuple[int | None, int | None],
        batch: int,
        held: torch.dtype,
        device: torch.device,
    ) -> None:
        self.stage, self.before, self.after = stage, before, after
        self.previous, self.next = neighbours
        self.batch, self.held, self.device = batch, held, device
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._dtypes: list[torch.dtype] | None = None
        self._told = False

    def _form(
        self, layer: Layer | None, batch: int, inference: bool = False
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """(shape, dtype) of what crosses the cut behind a layer."""
        assert layer is not None
        shape = (batch * layer.rows, *layer.shape[1:])
        if not layer.hands_on_state:
            return shape, self.held
        return (2, *shape), self.stage.net.chains[0].state_held(inference)

    def receive_forward(self) -> ForwardMessage:
        """A micro-batch, all of it in memory of its own."""
        return self._receive_handed(self.batch)

    def send_forward(self, message: ForwardMessage, inference: bool = False) -> None:
        """See receive_forward."""
        self.finish()
        # Tokens may have autocast's dtype, where nothing of theirs is lost.
        _, dtype = self._form(self.after, self.batch, inference)
        self._send(message.value.to(dtype), self.next)
        self._send_carried(message.carried)

    def receive_any(self) -> ForwardMessage:
        """As receive_forward, for any number of samples, without gradients."""
        return self._receive_handed(int(self._receive((1,), torch.int64, self.previous)), True)

    def _receive_handed(self, batch: int, inference: bool = False) -> ForwardMessage:
        value = self._receive(*self._form(self.before, batch, inference), self.previous)
        return ForwardMessage(value, self._receive_carried(batch))

    def send_any(self, message: ForwardMessage) -> None:
        """As send_forward, for any number of samples, without gradients."""
        assert self.after is not None
        batch = message.value.shape[1 if self.stage.gives_state else 0] // self.after.rows
        self._send(to_device(torch.tensor([batch]), self.device), self.next)
        self.send_forward(message, inference=True)

    def _receive_carried(self, batch: int) -> dict[Key, Tensor]:
        """Each in the dtype that it was made in, which only the stage before knows: it is told
        once."""
        expected = _carried(self.before)
        if self._dtypes is None and expected:
            codes = self._receive((len(expected),), torch.int64, self.previous)
            self._dtypes = [DTYPES[code] for code in codes.tolist()]
        found = {}
        for each, dtype in zip(expected, self._dtypes or (), strict=True):
            value = self._receive(each.shape_of(batch), dtype, self.previous)
            found[each.key] = value.requires_grad_(each.trained)
        return found

    def _send_carried(self, carried: dict[Key, Tensor]) -> None:
        values = [carried[each.key].detach() for each in _carried(self.after)]
        if not self._told and values:
            codes = [DTYPES.index(value.dtype) for value in values]
            self._send(to_device(torch.tensor(codes), self.device), self.next)
            self._told = True
        for value in values:
            self._send(value, self.next)

    def receive_backward(self) -> BackwardMessage:
        """See BackwardMessage."""
        self.finish()
        gradient, state = self._receive_gradient(*self._form(self.after, self.batch))
        carried = {
            each.key: self._receive(each.shape_of(self.batch), torch.float32, self.next)
            for each in _carried(self.after)
            if each.trained
        }
        return BackwardMessage(gradient, state, carried)

    def _receive_gradient(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        if not (self.stage.gives_state and self.stage.returned):
            return self._receive(shape, self.held, self.next), None
        size = math.prod(shape)
        bytes_of_gradient = size * self.held.itemsize
        both = self._receive((bytes_of_gradient + size * dtype.itemsize,), torch.uint8, self.next)
        gradient, state = both[:bytes_of_gradient], both[bytes_of_gradient:]
        return gradient.view(self.held).view(shape), state.view(dtype).view(shape)

    def send_backward(self, run: Pass, gradient: Tensor | None) -> None:
        """The gradient of what was received, with the state that was reconstructed of it."""
        assert gradient is not None
        if self.stage.takes_state and self.stage.returned:
            assert run.state_taken is not None
            state = torch.stack(tuple(run.state_taken))
            gradient = torch.cat([part.view(torch.uint8).flatten() for part in (gradient, state)])
        self.finish()
        self._send(gradient, self.previous)
        for each in _carried(self.before):
            if each.trained:
                self._send(self._gradient_of(each, run), self.previous)

    def _gradient_of(self, carried: Carried, run: Pass) -> Tensor:
        """A stage may hand on what it does not use: nothing came of it then."""
        found = run.grads.get(carried.key)
        shape = carried.shape_of(self.batch)
        return torch.zeros(shape, device=self.device) if found is None else found

    def _receive(self, shape: tuple[int, ...], dtype: torch.dtype, rank: int | None) -> Tensor:
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(_wire(buffer), rank)
        return buffer

    def _send(self, message: Tensor, rank: int | None) -> None:
        message = message.contiguous()
        self._sent.append((dist.isend(_wire(message), rank), message))

    def finish(self) -> None:
        """Waits for all that was sent, and lets go of it.

        The schedule is one for blocking messages: by the next one, the last has been asked for.
        """
        while self._sent:
            self._sent.popleft()[0].wait()


def _wire(tensor: Tensor) -> Tensor:
    """A view that every backend can send: NCCL knows no int16."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.int16 else tensor


def _carried(layer: Layer | None) -> tuple[Carried, ...]:
    """What crosses the cut behind a layer beside tokens."""
    return () if layer is None else layer.carried
