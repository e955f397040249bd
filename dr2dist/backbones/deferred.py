"""A model built without memory, whose tensors are made one at a time afterwards.

While the model is built on the meta device, every operation on its tensors is noted, and random
ones draw what they would have drawn. A tensor's notes, played again on real memory, give the
very bits that it would have had in a model built whole: from the same random stream, whatever is
made, and in whatever order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dr2dist.reversible.trees import tree_iter, tree_map

META = torch.device("meta")


class _Note(NamedTuple):
    """One operation: reads and writes are storages, state is of the random stream before it."""

    function: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    result: Any
    reads: frozenset[int]
    writes: frozenset[int]
    state: Tensor | None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storages(values: Any) -> frozenset[int]:
    return frozenset(_storage(v) for v in tree_iter(values) if _is_meta(v))


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == META


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[_Note] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        state = None
        reads = _storages((args, options))
        result = function(*args, **options)
        touched = _storages(result)
        if torch.Tag.nondeterministic_seeded in function.tags and touched:
            state = torch.get_rng_state()
            function(*_blank(args), **_real_options(_blank(options)))
        mutates = function._schema.is_mutable
        if touched and (mutates or not touched <= reads):  # not only a view
            written = touched if mutates else touched - reads
            self.notes.append(_Note(function, args, options, result, reads, written, state))
        return result

    def truncated(self, draw: Any, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        """torch's own truncated normal values, which it does not draw on the meta device."""
        if not _is_meta(tensor):
            return draw(tensor, *args, **options)
        state, own = torch.get_rng_state(), _storages(tensor)
        draw(_blank(tensor), *args, **options)
        self.notes.append(_Note(draw, (tensor, *args), options, tensor, own, own, state))
        return tensor


def _blank(values: Any) -> Any:
    """Real tensors with any values in place of the meta ones."""
    return tree_map(
        lambda v: (
            torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device="cpu")
            if _is_meta(v)
            else v
        ),
        values,
    )


def _real_options(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("device") == META:
        return {**options, "device": torch.device("cpu")}
    return options


class Deferred:
    """Makes the tensors of a model that was built under `deferred`, on the CPU."""

    def __init__(self) -> None:
        self._recorder = _Recorder()

    def make(self, tensor: Tensor) -> Tensor:
        """The tensor that the meta tensor stands for, as it was when building ended."""
        bases: dict[int, Tensor] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for note in self._needed(_storage(tensor)):
                if note.state is not None:
                    torch.set_rng_state(note.state)
                args, options = _played((note.args, note.options), bases)
                result = note.function(*args, **_real_options(options))
                _keep(result, note, bases)
        return _view(bases[_storage(tensor)], tensor)

    def _needed(self, storage: int) -> list[_Note]:
        """The notes that a storage's values depend on, in order."""
        needed, found = {storage}, []
        for note in reversed(self._recorder.notes):
            if note.writes & needed:
                needed |= note.reads
                found.append(note)
        return found[::-1]


def _played(values: Any, bases: dict[int, Tensor]) -> Any:
    return tree_map(lambda v: _view(bases[_storage(v)], v) if _is_meta(v) else v, values)


def _view(base: Tensor, like: Tensor) -> Tensor:
    return base.as_strided(like.size(), like.stride(), like.storage_offset())


def _keep(result: Any, note: _Note, bases: dict[int, Tensor]) -> None:
    """Puts results on new storages into bases of the storages' full sizes."""
    for meta, real in zip(tree_iter(note.result), tree_iter(result), strict=True):
        if _is_meta(meta) and _storage(meta) not in bases:
            size = meta.untyped_storage().nbytes() // meta.element_size()
            base = torch.empty(size, dtype=meta.dtype)
            _view(base, meta).copy_(real)
            bases[_storage(meta)] = base


@contextmanager
def deferred() -> Iterator[Deferred]:
    """Inside, modules are built on the meta device, with the random stream moving on as usual."""
    maker, init = Deferred(), "_no_grad_trunc_normal_"
    draw = getattr(nn.init, init)
    with META, maker._recorder:
        setattr(nn.init, init, partial(maker._recorder.truncated, draw))
        try:
            yield maker
        finally:
            setattr(nn.init, init, draw)


def make_buffers(model: nn.Module, maker: Deferred) -> None:
    """Gives a deferred model its buffers."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_meta(buffer):
                module._buffers[name] = maker.make(buffer)
