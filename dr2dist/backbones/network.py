"""A timm model whose blocks run as reversible chains: the same names, calls and outputs."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from dr2dist.backbones.beit import BeitFamily
from dr2dist.backbones.certificate import Certificate
from dr2dist.backbones.eva import EvaFamily
from dr2dist.backbones.family import Branch, Family, Stem, part_of
from dr2dist.backbones.live import bypassed, refuse_hooks, refuse_sharded, structure_of
from dr2dist.backbones.refusal import check_is_model, unsupported
from dr2dist.backbones.relpos import RelPosFamily
from dr2dist.backbones.swin import SwinFamily
from dr2dist.backbones.torchvision_vit import TorchvisionVitFamily
from dr2dist.backbones.vit import VitFamily
from dr2dist.errors import UserError
from dr2dist.reversible import Chain, Piece, Planner, Setting
from dr2dist.reversible.arithmetic.setting import Arithmetic, Memory, round_coefficient
from dr2dist.reversible.failure import OnFailure

log = logging.getLogger(__name__)

_families: list[Family] = [
    VitFamily(),
    EvaFamily(),
    BeitFamily(),
    SwinFamily(),
    RelPosFamily(),
    TorchvisionVitFamily(),
]


COEFFICIENTS_NAME = "reversible_alpha_beta"
"""The buffer that a converted network has beside its model's: alpha and beta, as int64 multiples of
2^-32. Copies that follow a network's state, such as averaged weights, so follow them too."""

_UNIT = 2.0**32


class ReversibleNetwork(nn.Module):
    """What `convert` adds to a model's class. Chains are kept beside the modules, not among
    them, so that names in state_dict and named_parameters stay the model's; the state has the
    coefficients besides. A module that is replaced takes effect at the next forward pass."""

    family: Family
    chains: tuple[Chain, ...]
    pieces: tuple[Piece, ...]
    """What stands between the chains and after them, as far as the family says so."""
    planner: Planner

    @property
    def coefficients(self) -> tuple[float, float]:
        """alpha and beta in force."""
        self._take_coefficients()
        setting = self.chains[0].setting
        return setting.alpha, setting.beta

    def set_coefficients(self, alpha: float, beta: float) -> None:
        """Changes alpha and beta of all chains, or of none if one refuses.

        Raises ValueError for values that are not allowed, RuntimeError while a forward pass
        still waits for its backward pass.
        """
        for chain in self.chains:
            chain.check_coefficients(alpha, beta)
        for chain in self.chains:
            chain.set_coefficients(alpha, beta)
        self._note_coefficients()

    def _note_coefficients(self) -> None:
        """Writes the coefficients in force to the buffer; by kernels, so that no host waits."""
        buffer = self._buffers[COEFFICIENTS_NAME]
        assert buffer is not None
        with torch.no_grad():
            for place, value in enumerate(self._units):
                buffer[place].fill_(value)
        self._noted, self._written = _version(buffer), self._units

    @property
    def _units(self) -> list[int]:
        """The coefficients in force as the buffer holds them."""
        setting = self.chains[0].setting
        return [round(value * _UNIT) for value in (setting.alpha, setting.beta)]

    def _take_coefficients(self) -> None:
        """Takes what others have written to the buffer: a loaded state, a copy's update."""
        buffer = self._buffers[COEFFICIENTS_NAME]
        assert buffer is not None
        # On a GPU a read makes the host wait, so that in training only what torch counts as a
        # write is looked at; writes through .data and by collectives are not.
        seen = buffer.is_cuda and torch.is_grad_enabled() and _version(buffer) == self._noted
        if buffer.is_meta or seen:
            return
        self._noted, values = _version(buffer), buffer.tolist()
        if values == self._written:
            return  # a chain alone may have others
        try:
            self.set_coefficients(*(round_coefficient(value / _UNIT) for value in values))
        except ValueError as error:
            raise UserError(f"{COEFFICIENTS_NAME} in the loaded state: {error}") from None

    def certificate(self) -> Certificate:
        """What the last backward pass verified, read to the host."""
        found = (chain.certificate() for chain in self.chains)
        return Certificate(tuple(chain for chain in found if chain is not None))

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As the model's own: images [B, C, H, W] to its output."""
        tokens = self._tokens(x, *args, **options)
        if self._tail is None:
            return self.family.head(self, self.family.norm(self, tokens))
        cast(_Tail, self._tail.module).renew(self)
        return self._tail(tokens, self._chunk_size)

    def forward_features(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """As the model's own: images [B, C, H, W] to the features before pooling."""
        return self.family.norm(self, self._tokens(x, *args, **options))

    def _tokens(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Images to what the last chain gives."""
        options |= dict(zip(("attn_mask", "is_causal"), args, strict=False))
        self._renew()
        stem = self.family.stem(self, x, **options)
        tokens, stem.tokens = stem.tokens, x  # nothing but the stem's graph shall hold its output
        for index in range(len(self.chains)):
            tokens = self.run_chain(index, tokens, stem)
        return tokens

    @property
    def _chunk_size(self) -> int | None:
        """Samples per slice of the pieces: theirs are small, so one at a time unless it is said."""
        size = self.chains[0].setting.chunk_size
        return 1 if size == "auto" else size

    def run_chain(self, index: int, tokens: Tensor, stem: Stem | None = None) -> Tensor:
        """Chain `index`, after what stands before it; `stem` has the sides."""
        chain, transition = self.chains[index], self._transitions.get(index)
        if transition is not None:
            tokens = transition(tokens, self._chunk_size)
        if stem is None:
            return cast(Tensor, chain(tokens))
        return cast(Tensor, chain(tokens, batched=tuple(stem.batched), **stem.sides))

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As the model's own; states of the chains stand for the outputs of blocks."""
        if args:
            options["indices"], *more = args
            if more:
                raise TypeError("forward_intermediates takes all but indices by keyword")
        self._renew()
        return self.family.intermediates(self, x, **options)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Refused: chains replace it."""
        if enable:
            raise UserError(
                "gradient checkpointing has no effect on a reversible network; "
                "convert with memory='checkpoint' instead"
            )

    def set_input_size(self, *args: Any, **options: Any) -> None:
        """As the model's own."""
        self._refuse_in_engine()
        super().set_input_size(*args, **options)  # type: ignore[misc]
        self._cut()

    def prune_intermediate_layers(self, *args: Any, **options: Any) -> Any:
        """As the model's own."""
        self._refuse_in_engine()
        kept = super().prune_intermediate_layers(*args, **options)  # type: ignore[misc]
        self._cut()
        return kept

    def train(self, mode: bool = True) -> Self:
        """As any module's."""
        super().train(mode)
        self._renew()
        return self

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As any module's. A state without coefficients, as timm's are, leaves them as they are."""
        result = super().load_state_dict(*args, **options)
        self._renew()
        return result

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        own = {prefix + COEFFICIENTS_NAME: torch.tensor(self._units, device="cpu")}
        super()._load_from_state_dict({**own, **state}, prefix, *rest)

    @torch.compiler.disable
    def _renew(self) -> None:
        """Takes up what was changed in the network since its last pass.

        Raises UserError for what a reversible network cannot do.
        """
        structure = structure_of(self)
        changed = structure != self._structure
        if self.chains[0].runner.nested:  # an engine has hooks of its own
            self._refuse_in_engine(changed)
        else:
            refuse_sharded((self, *structure))
            if changed:
                self._cut()
            refuse_hooks(self._bypassed)
        for chain in self.chains:
            for function in chain.functions:
                if isinstance(function, Branch):
                    function.renew()
        if not torch.compiler.is_compiling():  # what torch.export traces has no values
            self._take_coefficients()

    def _refuse_in_engine(self, changed: bool = True) -> None:
        if changed and self.chains[0].runner.nested:
            raise UserError(
                "modules were replaced after the engine was made, which keeps those that it knows; "
                "replace them before"
            )

    def _cut(self, options: Mapping[str, Any] | None = None) -> None:
        """(Re)builds the chains from the model's present modules; known ones stay the same.

        options: of the chains, if they are new.
        """
        known = {chain.name: chain for chain in self.chains}
        chains = []
        for name, functions in self.family.functions(self):
            new = Chain(functions, name=name, **(options or self.chains[0].options))
            chain = known.get(name, new)
            chain.functions = new.functions
            chains.append(chain)
        self.chains = tuple(chains)
        self.planner = Planner([chain.name for chain in self.chains])
        for chain in self.chains:
            chain.planner = self.planner
        found = ((index, self.family.transition(self, index)) for index in range(len(self.chains)))
        self._transitions = {index: Piece(module) for index, module in found if module is not None}
        self._tail = None if self.family.tail is None else Piece(_Tail(self, self.family))
        tail = () if self._tail is None else (self._tail,)
        self.pieces = (*self._transitions.values(), *tail)
        functions = [function for chain in self.chains for function in chain.functions]
        blocks = [function.block for function in functions if isinstance(function, Branch)]
        self._bypassed = bypassed(self, blocks)
        self._structure = structure_of(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles name the model's own class, since this one is made at run time."""
        base = type(self).__bases__[1]
        # A copy cuts anew: its functions do not know their blocks.
        return _blank, (base,), {**self.__dict__, "_structure": ()}


class _Tail(nn.Module):
    """Norm and head of a network, as they are when it is renewed."""

    def __init__(self, net: ReversibleNetwork, family: Family) -> None:
        super().__init__()
        self.family = family
        self.part = nn.Module()
        self.renew(net)

    def renew(self, net: ReversibleNetwork) -> None:
        """Takes up what was changed in the network: a new classifier, its training flag."""
        attributes = {key: value for key, value in net.__dict__.items() if key not in _CUT}
        plain = _blank(type(net).__bases__[1])
        plain.__dict__.update(attributes)
        self.part = part_of(plain, self.family.tail)

    def forward(self, tokens: Tensor) -> Any:
        """Tokens after the last chain to the model's output."""
        return self.family.head(self.part, self.family.norm(self.part, tokens))


_CUT = ("chains", "planner", "pieces", "_transitions", "_tail", "_bypassed", "_structure")
"""What a network has beside its modules."""


def _blank(base: type[nn.Module]) -> nn.Module:
    kind: Any = _reversible_class(base)  # type: ignore[arg-type]
    net: nn.Module = kind.__new__(kind)
    return net


@functools.cache
def _reversible_class(base: Any) -> Any:
    return type(f"Reversible{base.__name__}", (ReversibleNetwork, base), {})


def convert(
    model: nn.Module,
    alpha: float = 0.9,
    beta: float = 0.1,
    arithmetic: Arithmetic = "exact",
    memory: Memory = "reverse",
    chunk_size: int | Literal["auto"] | None = None,
    fraction_bits: int = 18,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    chunk_budget: int | None = None,
    on_failure: OnFailure = "raise",
    compile: bool = False,
) -> Any:
    """A reversible network from a supported model (Dr2Net, arXiv 2401.04105).

    The result is called as the model is, gives outputs of the same structure and shares its
    parameters, buffers and modules by reference; the model itself stays usable.

    alpha, beta: coefficients of the two residuals. arithmetic: "exact" reverses bit for bit,
    "float" with round-off. memory: "reverse" reconstructs activations, "store" keeps them,
    "checkpoint" keeps each function's input, "budget" keeps as many as memory_budget bytes hold.
    chunk_size: samples per slice of the batch; "auto" for the largest slices, of samples or
    tokens, whose working set stays within chunk_budget bytes.
    fraction_bits: resolution of exact states, 2^-fraction_bits. chunk_tokens: tokens per slice
    inside a sample, with a chunk_size of 1, for functions that can run so (see docs/memory.md).
    on_failure: what happens at a backward pass whose reversal is not proven: "raise" ReversalError,
    "warn", or "record" for `certificate()`; on a GPU at a later forward pass, so that the host
    never waits. compile: run residual functions in training by torch.compile, forth and back.

    Raises UserError for a model that is not supported and ValueError for a setting that is not.
    """
    setting = Setting(
        alpha,
        beta,
        arithmetic,
        memory,
        chunk_size,
        fraction_bits,
        chunk_tokens,
        memory_budget,
        chunk_budget,
    )
    family = _find(model)
    net = _blank(type(model))
    net.__dict__.update({key: _own(value) for key, value in model.__dict__.items()})
    assert isinstance(net, ReversibleNetwork)
    net.family = family
    net.chains = ()
    net._cut({**asdict(setting), "on_failure": on_failure, "compile": compile})
    values = torch.empty(2, dtype=torch.int64, device="cpu")
    net.register_buffer(COEFFICIENTS_NAME, values)
    net._note_coefficients()
    # Every rank sets its own; a broadcast of them would make the host wait at each pass.
    object.__setattr__(net, "_ddp_params_and_buffers_to_ignore", [COEFFICIENTS_NAME])
    return net


def _version(buffer: Tensor) -> object:
    """Another one after every write to the buffer; of inference tensors always another one."""
    return object() if buffer.is_inference() else (id(buffer), buffer._version)


def _own(value: Any) -> Any:
    """Registries are copied, so that changing the network's leaves the model's as they were."""
    return copy.copy(value) if isinstance(value, dict | set) else value


def _find(model: nn.Module) -> Family:
    check_is_model(model)
    if isinstance(model, ReversibleNetwork):
        raise UserError("the model is converted already")
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise UserError(
            "the model has gradient checkpointing switched on, which has no effect on a "
            "reversible network; switch it off, or convert with memory='checkpoint'"
        )
    for family in _families:
        if family.matches(model):
            return family
    raise UserError(f"convert: {unsupported(model, _families)}")


def register_backbone(family: Family) -> None:
    """Makes `convert` know a family of one's own; it is asked before the ones known so far.

    One of the same name is replaced, which is logged: cells of a notebook are run again.
    """
    for known in [known for known in _families if known.name == family.name]:
        log.warning("the backbone family '%s' is replaced by %s", known.name, type(family).__name__)
        _families.remove(known)
    _families.insert(0, family)


def supported_backbones() -> dict[str, tuple[str, ...]]:
    """Families that `convert` knows, each with patterns of model names."""
    return {family.name: family.patterns for family in _families}
