"""Whether a family says rightly what its models compute: tried on an example."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dr2dist.backbones.branch import Branch
from dr2dist.backbones.convert import convert
from dr2dist.backbones.in_force import COEFFICIENTS_NAME
from dr2dist.backbones.network import CUT, ReversibleNetwork
from dr2dist.errors import UserError, one_line
from dr2dist.reversible import Sides
from dr2dist.reversible.trees import tree_flatten, tree_leaves, tree_map_only

SAME = 1e-6
"""Largest difference, relative to the largest value, where the same kernels run."""

SLICED = 1e-4
"""The same where other batch sizes may run other kernels, whose roundings a network amplifies."""


@dataclass(frozen=True)
class CheckReport:
    """What `check` has found; as a text, a table.

    ok: whether all is right. lines: for each thing that was tried, ok or WRONG, what, and what was
    found.
    """

    ok: bool
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def check(model: nn.Module, example: Any) -> CheckReport:
    """Tries whether a model's family is right: a registered one of one's own, or one of dr2dist's.

    model: one that `convert` takes, or what it gave; it is copied, and stays as it is. example:
    what the model takes, a tensor or a dict of some on the model's device, at least two samples
    that differ.

    Outputs at alpha 1, beta 0 are compared with the model's own, x + F(x) with each block, slices
    of one sample with the whole, sides with what they are for samples alone, and reversed passes
    with stored ones, bit for bit in training mode. Raises UserError for a model that is not
    supported and for fewer than two samples.
    """
    plain = copy.deepcopy(_plain(model))
    convert(plain)  # raises for what is not supported
    batch = _batch_of(example)
    if batch < 2:
        raise UserError(f"check: the example has {batch} sample(s), two or more are needed")
    devices = {p.device.index or 0 for p in plain.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        trial = _Trial(plain, example)
        rows = [_row(what, tried) for what, tried in trial.rows()]
    return CheckReport(all(good for good, _ in rows), tuple(line for _, line in rows))


class _Wrong(Exception):  # noqa: N818 - a finding, not an error
    """What was tried and found to be wrong."""


def _row(what: str, tried: Callable[[], str]) -> tuple[bool, str]:
    try:
        good, found = True, tried()
    except _Wrong as wrong:
        good, found = False, str(wrong)
    except Exception as error:  # a wrong family may raise anything
        good, found = False, f"raises {type(error).__name__}: {one_line(error)[:200]}"
    return good, f"{'ok' if good else 'WRONG':7}{what:16}{found}"


@dataclass
class _Seen:
    """What a chain was called with."""

    chain: Any
    tokens: Tensor
    batched: tuple[str, ...]
    sides: dict[str, Any]


@dataclass
class _Pass:
    """A training pass: outputs, and gradients of parameters and of sides by name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    of_sides: dict[str, Tensor | None]
    failures: tuple[str, ...]


class _Trial:
    """A model and an example, and what is tried with them."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.names = {id(module): name for name, module in model.named_modules()}

    def rows(self) -> list[tuple[str, Callable[[], str]]]:
        """What is tried, by what it is called."""
        return [
            ("sides", self.sides),
            ("outputs", self.outputs),
            ("functions", self.functions),
            ("slices", self.slices),
            ("reversal", self.reversal),
            ("side gradients", self.side_gradients),
        ]

    def outputs(self) -> str:
        """The network at alpha 1, beta 0 against the model."""
        torch.manual_seed(0)
        with torch.no_grad():
            wanted = self.model.eval()(self.example)
        found, _ = self._infer(self.example)
        return f"those of the model at alpha 1, beta 0, {_close(found, wanted, SAME)}"

    def functions(self) -> str:
        """x + F(x) against the blocks that functions are cut from."""
        _, seen = self._infer(self.example)
        compared, largest = 0, 0.0
        with torch.no_grad():
            for each in seen:
                for found, wanted, name in self._blocks(each):
                    difference = _difference(found, wanted)
                    if not difference <= SAME:
                        raise _Wrong(
                            f"{name}: x + F(x) is not what the block gives ({difference:.1g} of "
                            "the largest value away)"
                        )
                    compared, largest = compared + 1, max(largest, difference)
        if not compared:
            return "are not cut from blocks that x + F(x) could be compared with"
        return f"x + F(x) is what the block gives, {compared} block(s), within {largest:.1g}"

    def _blocks(self, seen: _Seen) -> Iterator[tuple[Tensor, Tensor, str]]:
        """(x + F(x), what the block gives, its name) for each block of a chain."""
        x, sides = seen.tokens, Sides(seen.sides, seen.batched)
        for block, group in itertools.groupby(seen.chain.functions, key=_block_of):
            y = x
            given: dict[str, Any] = {}
            for function in group:
                branch = function(y, **sides.of(function))
                if branch.shape != y.shape:
                    shapes = f"{list(y.shape)} to {list(branch.shape)}"
                    raise _Wrong(f"{type(function).__name__}: gives {shapes}, allowed is the same")
                y = y + branch
                if isinstance(function, Branch):
                    given |= function.keywords_of(sides.of(function))
            if block is not None:
                yield y, block(x, **given), self.names.get(id(block), type(block).__name__)
            x = y

    def sides(self) -> str:
        """Whether sides named in `batched` have the batch in dim 0, and others are all samples'."""
        whole, batch = self._seen(self.example), _batch_of(self.example)
        for sample in range(2):
            alone = self._seen(_sample(self.example, sample, batch))
            for one, other in zip(whole, alone, strict=False):
                for name, value in one.sides.items():
                    own = name in one.batched
                    _check_side(name, value, other.sides[name], sample if own else None, batch)
        named = {name: name in each.batched for each in whole for name in each.sides}
        kinds = [f"{name} ({'by sample' if own else 'shared'})" for name, own in named.items()]
        return ", ".join(kinds) or "none"

    def slices(self) -> str:
        """Slices of one sample against the whole batch."""
        wanted, _ = self._infer(self.example)
        found, _ = self._infer(self.example, chunk_size=1)
        return f"of one sample give what the batch gives, {_close(found, wanted, SLICED)}"

    def reversal(self) -> str:
        """A reversed training pass against a stored one, in every bit."""
        stored, reversed_ = self.passes
        if reversed_.failures:
            raise _Wrong(
                f"{reversed_.failures[0]} ({len(reversed_.failures)} in all); random numbers must "
                "be torch's, and a function must keep nothing from its first run"
            )
        for one, other in zip(stored.outputs, reversed_.outputs, strict=True):
            if not torch.equal(one, other):
                raise _Wrong("outputs differ from those of a pass that stores its activations")
        _check_equal(stored.gradients, reversed_.gradients)
        return f"bit for bit, {len(stored.gradients)} parameters, in training at (0.9, 0.1)"

    def side_gradients(self) -> str:
        """Gradients of sides by reversal against stored ones."""
        stored, reversed_ = self.passes
        _check_equal(stored.of_sides, reversed_.of_sides)
        return ", ".join(stored.of_sides) or "no side requires any"

    @functools.cached_property
    def passes(self) -> tuple[_Pass, _Pass]:
        """The same training pass, stored and reversed."""
        return self._train("store"), self._train("reverse")

    def _infer(self, example: Any, chunk_size: int | None = None) -> tuple[Any, list[_Seen]]:
        """The conventional network's output in evaluation mode, and what its chains saw."""
        self.model.eval()
        net = convert(self.model, 1.0, 0.0, "float", "store", chunk_size=chunk_size)
        torch.manual_seed(0)
        with torch.no_grad(), _watched(net) as seen:
            return net(example), seen

    def _seen(self, example: Any) -> list[_Seen]:
        """What chains saw, as far as a wrong family let the network come."""
        net = convert(self.model.eval(), 1.0, 0.0, "float", "store")
        with torch.no_grad(), _watched(net) as seen:
            try:
                net(example)
            except Exception:
                if not seen:
                    raise
        return seen

    def _train(self, memory: Any) -> _Pass:
        self.model.train()
        net = convert(self.model, memory=memory, on_failure="record")
        net.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with _watched(net) as seen:
            outputs = [o for o in tree_leaves(net(self.example)) if isinstance(o, Tensor)]
        trained = [output for output in outputs if output.requires_grad]
        torch.manual_seed(1)
        torch.autograd.backward(trained, [torch.randn_like(output) for output in trained])
        of_sides = {
            f"{name} of {each.chain.name}": leaf.grad
            for each in seen
            for name, value in each.sides.items()
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        }
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        failures = net.certificate().messages
        return _Pass([o.detach() for o in outputs], gradients, of_sides, failures)


@contextmanager
def _watched(net: ReversibleNetwork) -> Iterator[list[_Seen]]:
    """Notes what chains are called with; gradients of sides are kept."""
    seen: list[_Seen] = []

    def note(chain: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        sides = {k: v for k, v in given.items() if k not in ("taps", "batched", "until", "rows")}
        for leaf in tree_leaves(sides):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.retain_grad()
        seen.append(_Seen(chain, args[0], tuple(given.get("batched", ())), sides))

    hooks = [chain.register_forward_pre_hook(note, with_kwargs=True) for chain in net.chains]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _block_of(function: nn.Module) -> nn.Module | None:
    """The block that a function is cut from, where it is known and takes tokens alone."""
    return function.__dict__.get("block") if getattr(function, "alone", True) else None


def _batch_of(example: Any) -> int:
    """Samples of an example: dim 0 of its first tensor."""
    tensors = (leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.ndim)
    return next((len(tensor) for tensor in tensors), 0)


def _sample(example: Any, index: int, batch: int) -> Any:
    """One sample of an example, as a batch of one."""
    part = slice(index, index + 1)
    return tree_map_only(Tensor, lambda t: t[part] if t.ndim and len(t) == batch else t, example)


def _check_side(name: str, whole: Any, alone: Any, sample: int | None, batch: int) -> None:
    """sample: the one that a side is alone for; None if it is named to be the same for all."""
    for one, other in zip(tree_leaves(whole), tree_leaves(alone), strict=True):
        if not isinstance(one, Tensor):
            continue
        if sample is None:
            if one.shape != other.shape or not _difference(one, other) <= SLICED:
                raise _Wrong(f"{name} differs from sample to sample, and is not named in batched")
        elif not one.ndim or len(one) != batch:
            raise _Wrong(f"{name} is {list(one.shape)}: named in batched, dim 0 must be {batch}")
        elif not _difference(one[sample : sample + 1], other) <= SLICED:
            raise _Wrong(f"{name} of sample {sample} is another one when it is alone")


def _check_equal(wanted: dict[str, Tensor | None], found: dict[str, Tensor | None]) -> None:
    for name, one in wanted.items():
        other = found[name]
        if (one is None) != (other is None) or (
            one is not None and other is not None and not torch.equal(one, other)
        ):
            raise _Wrong(f"the gradient of {name} differs from that of a stored pass")


def _close(found: Any, wanted: Any, bound: float) -> str:
    """How close two outputs of any structure are. Raises _Wrong if it is not close enough."""
    (ours, one), (theirs, other) = tree_flatten(found), tree_flatten(wanted)
    if one != other:
        raise _Wrong(f"have the structure {one}, wanted is {other}")
    differences = [0.0]
    for mine, their in zip(ours, theirs, strict=True):
        if isinstance(their, Tensor):
            if mine.shape != their.shape:
                raise _Wrong(f"are {list(mine.shape)}, wanted is {list(their.shape)}")
            differences.append(_difference(mine, their))
    if not all(difference <= bound for difference in differences):
        raise _Wrong(f"differ by {max(differences):.1g} of the largest value")
    return f"within {max(differences):.1g}"


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest, relative to the largest value; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    found, wanted = found.double(), wanted.double()
    largest = wanted.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found - wanted).abs().max() / largest)


def _plain(model: nn.Module) -> nn.Module:
    """The model that a network was converted from: the same modules in its own class."""
    if not isinstance(model, ReversibleNetwork):
        return model
    if parametrize.is_parametrized(model):  # by its class, of which the model's own knows nothing
        raise UserError(
            "check: the network has parametrisations of its own parameters: check the model that "
            "it was converted from"
        )
    base: Any = model.base
    plain: nn.Module = base.__new__(base)
    plain.__dict__.update({k: v for k, v in model.__dict__.items() if k not in (*CUT, "family")})
    plain._buffers = {k: v for k, v in model._buffers.items() if k != COEFFICIENTS_NAME}
    return plain
