"""A timm model whose blocks run as reversible chains: the same names, calls and outputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dr2dist.backbones.backbone import OUTPUT, Backbone, Transition
from dr2dist.backbones.branch import Branch, part_of
from dr2dist.backbones.certificate import Certificate
from dr2dist.backbones.forward import AutogradDriver
from dr2dist.backbones.heads import TASK_HEAD, TaskHead
from dr2dist.backbones.in_force import InForce
from dr2dist.backbones.live import bypassed, refuse_sharded, refuse_uncalled, structure_of
from dr2dist.backbones.walk import Flow, Place, Tap, places_of, walk
from dr2dist.errors import UserError, nearest
from dr2dist.reversible import Chain, Piece, Planner


class ReversibleNetwork(InForce):
    """What `convert` adds to a model's class. Chains are kept beside the modules, not among
    them, so that names in state_dict and named_parameters stay the model's; the state has the
    coefficients besides. A module that is replaced takes effect at the next forward pass."""

    base: ClassVar[type[nn.Module]]
    """The model's own class."""
    family: Backbone
    items: tuple[Any, ...]
    """Chains and what stands between them, in order: Chain, Piece, or a Transition with sides."""
    places: tuple[Place, ...]
    """All layers in order, as `walk` goes over them."""
    pieces: tuple[Piece, ...]
    """What stands between the chains and after them and is run again in the backward pass."""
    planner: Planner

    def certificate(self) -> Certificate:
        """What the last backward pass verified, read to the host; without chains before the first.

        Raises ReversalError for an earlier pass that failed, as far as `on_failure` says so.
        """
        found = (chain.certificate() for chain in self.chains)
        return Certificate(tuple(chain for chain in found if chain is not None))

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        """As the model's own: inputs [B, ...], such as images [B, C, H, W], to its output.

        x: a tensor, or inputs by name, of which the stem takes what its family says. args,
        options: more of the model's own arguments, such as attn_mask. Raises UserError for what a
        reversible network cannot do, such as hooks on its blocks, and ReversalError for an earlier
        backward pass on a GPU that failed.
        """
        return self._walk(self.places, x, args, options, self.head_taps)

    def forward_features(self, x: Any, *args: Any, **options: Any) -> Tensor:
        """As the model's own: inputs to the features before pooling, such as [B, N, C]."""
        flow: Flow = self._walk(self.places[:-1], x, args, options)
        return self.family.norm(self, flow.value)

    def forward_taps(
        self, x: Any, taps: Collection[Tap], until: Tap | None = None, **options: Any
    ) -> Flow:
        """Inputs to tokens after all layers, with those after some functions in `taps`.

        until: ends behind that function. Taps are (item, function), see `items`.
        """
        places = self.places[:-1]
        if until is not None:
            (end,) = (
                number
                for number, place in enumerate(places)
                if place.kind == "function" and place.tap == until
            )
            places = places[: end + 1]
        flow: Flow = self._walk(places, x, (), options, taps)
        return flow

    def _walk(
        self,
        places: Sequence[Place],
        x: Any,
        args: Sequence[Any],
        options: dict[str, Any],
        taps: Collection[Tap] = (),
    ) -> Any:
        options |= dict(zip(("attn_mask", "is_causal"), args, strict=False))
        self._renew()
        # Nothing but the stem's graph shall hold its output: it is in the flow alone.
        return walk(places, x, AutogradDriver(self, options, taps))

    @property
    def task_head(self) -> TaskHead | None:
        """The head of a task, if it has brought one."""
        return cast("TaskHead | None", self._modules.get(TASK_HEAD))

    @property
    def head_taps(self) -> tuple[Tap, ...]:
        """What a task's head takes, but for the backbone's output."""
        return tuple(tap for tap in self._taps if tap is not None)

    def run_tail(self, flow: Flow) -> Any:
        """Norm and head, of the tokens after the last layer."""
        tokens, taps = flow.value, flow.taps
        head = self.task_head
        if head is not None:
            found = [
                self.family.norm(self, tokens) if tap is None else taps[tap] for tap in self._taps
            ]
            return head(found)
        if self._tail is None:
            return self.family.head(self, self.family.norm(self, tokens))
        cast(_Tail, self._tail.module).renew(self)
        return self._tail(tokens, self._slice_of(flow.rows))

    @property
    def names_its_tail(self) -> bool:
        """Whether it is known which modules norm and head use, as far as they are run."""
        own = self.task_head is not None and None not in self._taps
        return own or self.family.tail is not None

    def tail_parameters(self) -> list[nn.Parameter]:
        """Those of norm and head, as far as the family names them."""
        found = [] if self._tail is None else list(self._tail.module.parameters())
        if self.task_head is not None:
            found = list(self.task_head.parameters())
            if None in self._taps:
                found += _Tail(self, self.family).parameters()
        return found

    def run_transition(self, place: Place, flow: Flow) -> Flow:
        """What stands between chains."""
        item = self.items[place.item]
        if isinstance(item, Transition):
            value, sides = item.module(flow.value, flow.sides)
            return replace(flow, value=value, sides=sides)
        return replace(flow, value=item(flow.value, self._slice_of(flow.rows)))

    def _slice_of(self, rows: int) -> int | None:
        """Rows per slice of the pieces, of whole samples: theirs are small, so one sample at a time
        unless it is said."""
        size = self.chains[0].setting.chunk_size
        return None if size is None else rows * (1 if size == "auto" else size)

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As the model's own; states of the chains stand for the outputs of blocks.

        Raises UserError for a family that gives none, ValueError for an output_fmt that the family
        does not have.
        """
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
        self.cut_layers()

    def prune_intermediate_layers(self, *args: Any, **options: Any) -> Any:
        """As the model's own."""
        self._refuse_in_engine()
        kept = super().prune_intermediate_layers(*args, **options)  # type: ignore[misc]
        self.cut_layers()
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

    @torch.compiler.disable
    def _renew(self) -> None:
        """Takes up what was changed in the network since its last pass.

        Raises UserError for what a reversible network cannot do.
        """
        structure = structure_of(self)
        changed = structure != self._structure
        hooked = not self.chains[0].runner.nested  # an engine has hooks of its own
        if not hooked:
            self._refuse_in_engine(changed)
        else:
            refuse_sharded((self, *structure))
            if changed:
                self.cut_layers()
            refuse_uncalled(self, self._bypassed)
        for branch in self._branches():
            branch.renew(hooked)
        if not torch.compiler.is_compiling():  # what torch.export traces has no values
            self._take_coefficients()

    def _branches(self) -> Iterator[Branch]:
        """What is cut from blocks: functions, and transitions that are a part of one."""
        for item in self.items:
            parts = item.functions if hasattr(item, "functions") else (item.module,)
            yield from (part for part in parts if isinstance(part, Branch))

    def _refuse_in_engine(self, changed: bool = True) -> None:
        if changed and self.chains[0].runner.nested:
            raise UserError(
                "modules were replaced after the engine was made, which keeps those that it knows; "
                "replace them before"
            )

    def cut_layers(self, options: Mapping[str, Any] | None = None) -> None:
        """(Re)builds the chains from the model's present modules; known ones stay the same.

        options: of the chains, if they are new.
        """
        known = {chain.name: chain for chain in self.chains}
        items: list[Any] = []
        for layer in self.family.layers(self):
            if isinstance(layer, Transition):
                items.append(layer if layer.sides else Piece(layer.module, len(items)))
                continue
            new = Chain(
                layer.functions,
                name=layer.name,
                channel_dim=layer.channel_dim,
                **(options or self.chains[0].options),
            )
            chain = known.get(layer.name, new)
            chain.functions, chain.item = new.functions, len(items)
            items.append(chain)
        self.take_items(items)
        self.planner = Planner([chain.name for chain in self.chains])
        for chain in self.chains:
            chain.planner = self.planner
        named = self.family.tail is not None and self.task_head is None
        self._tail = Piece(_Tail(self, self.family), len(items)) if named else None
        tail = () if self._tail is None else (self._tail,)
        self.pieces = (*(item for item in items if isinstance(item, Piece)), *tail)
        self._taps = self._find_taps()
        self._bypassed = bypassed(self, [branch.block for branch in self._branches()])
        self._structure = structure_of(self)

    def take_items(self, items: Sequence[Any]) -> None:
        """Takes chains and what stands between them for the network's layers."""
        self.items = tuple(items)
        self.chains = tuple(item for item in items if hasattr(item, "functions"))
        self.places = (Place("stem"), *places_of(items), Place("tail"))

    def _find_taps(self) -> tuple[Tap | None, ...]:
        """What the task's head takes, in its order; None is the backbone's output."""
        head = self.task_head
        if head is None:
            return ()
        known = {info.name: info for info in self.family.features(self)}
        of_chain = [n for n, item in enumerate(self.items) if isinstance(item, Chain)]
        found: list[Tap | None] = []
        for name in head.taps:
            if name not in known and name != OUTPUT:
                raise UserError(
                    f"the head takes the feature {name!r}{nearest(name, known)}; "
                    f"{self.family.name} has {', '.join(known)}"
                )
            info = None if name == OUTPUT else known[name]
            found.append(None if info is None else (of_chain[info.chain], info.function))
        return tuple(found)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles name the model's own class, since this one is made at run time."""
        if parametrize.is_parametrized(self):
            raise UserError(
                "a network with parametrisations of its own parameters cannot be pickled: save its "
                "state_dict(), or remove them"
            )
        return blank, (self.base,), self._copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self._copied, memo))
        return copied

    @property
    def _copied(self) -> dict[str, Any]:
        """What a copy has. It cuts anew: its functions do not know their blocks."""
        return {**self.__dict__, "_structure": ()}


class _Tail(nn.Module):
    """Norm and head of a network, as they are when it is renewed."""

    def __init__(self, net: ReversibleNetwork, family: Backbone) -> None:
        super().__init__()
        self.family = family
        self.part = nn.Module()
        self.renew(net)

    def renew(self, net: ReversibleNetwork) -> None:
        """Takes up what was changed in the network: a new classifier, its training flag."""
        attributes = {key: value for key, value in net.__dict__.items() if key not in CUT}
        plain: nn.Module = type(net).__new__(type(net))
        plain.__dict__.update(attributes)
        self.part = part_of(plain, self.family.tail)
        self.training = net.training

    def forward(self, tokens: Tensor) -> Any:
        """Tokens after the last chain to the model's output."""
        return self.family.head(self.part, self.family.norm(self.part, tokens))


CUT = (
    "items",
    "places",
    "chains",
    "planner",
    "pieces",
    "_tail",
    "_taps",
    "_bypassed",
    "_structure",
)
"""What a network has beside its modules."""


def blank(base: type[nn.Module]) -> nn.Module:
    """A reversible network of a model's class with nothing in it."""
    kind: Any = _reversible_class(base)  # type: ignore[arg-type]
    net: nn.Module = kind.__new__(kind)
    return net


@functools.cache
def _reversible_class(base: Any) -> Any:
    return type(f"Reversible{base.__name__}", (ReversibleNetwork, base), {"base": base})
