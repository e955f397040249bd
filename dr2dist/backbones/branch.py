"""Residual functions as parts of a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dr2dist.backbones.refusal import OWN_FAMILY
from dr2dist.backbones.slicing import Factor, Slicing, drop_paths, replaced_modules, shallow_copy
from dr2dist.backbones.tokenwise import is_cuttable
from dr2dist.errors import UserError
from dr2dist.reversible.calls.slices import Ranges, TokenSlice

Compute = Callable[..., Tensor]


class Branch(nn.Module):
    """A residual function made of some of a block's modules.

    block: the block it is cut from. names: the block's modules and parameters that it uses,
    None for all. compute: called as compute(part, x, **sides), where part looks like the block
    with only those modules; gives the branch alone, of x's shape [B, ...]. sides: names of the
    sides it takes, each with the keyword it is given as; None for none. slicing: how it runs on
    some of a sample's tokens (dr2dist/backbones/slicing.py), None if it cannot. alone: whether the
    block may be called on tokens and sides, as `dr2dist.check` does to compare.
    """

    block: nn.Module

    def __init__(
        self,
        block: nn.Module,
        names: Sequence[str] | None,
        compute: Compute,
        sides: Mapping[str, str] | None = None,
        slicing: Slicing | None = None,
        alone: bool = True,
    ) -> None:
        super().__init__()
        self.alone = alone
        self.part = part_of(block, names)
        self.names = names
        object.__setattr__(self, "block", block)  # beside the modules: only the part is run
        self.slicing, self.hooked = slicing, True
        self.compute = compute
        self.keywords = dict(sides or {})

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not know the block: the network that it is for cuts anew."""
        return {key: value for key, value in self.__dict__.items() if key != "block"}

    def renew(self, hooked: bool = True) -> None:
        """Takes up what was changed in the block: its modules, parameters, attributes, mode.

        hooked: whether hooks on its modules are anybody's but an engine's.
        """
        self.hooked = hooked
        block = self.__dict__.get("block")
        if block is not None:
            renew_part(self.part, block, self.names)
            self.training = block.training  # nothing else would say it: chains are no modules

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that the chain hands to this function."""
        return tuple(self.keywords)

    @property
    def needs_context(self) -> bool:
        """See TokenSliced."""
        return self.slicing is not None and self.slicing.needs_context

    def token_ranges(
        self, shape: torch.Size, tokens: int, sides: dict[str, Any]
    ) -> Sequence[Ranges]:
        """See TokenSliced."""
        if self.slicing is None or not is_cuttable(self.part, self.slicing.across, self.hooked):
            return []
        found = self.slicing.ranges(self.part, shape, tokens, self.keywords_of(sides))
        return found if len(found) > 1 or self.slicing.smaller_inside else []

    def draw(self, x: Tensor) -> Tensor | None:
        """See TokenSliced."""
        factor = x.new_ones(x.shape[0], 1)
        drops = drop_paths(self.part)
        for drop in drops.values():
            factor = drop(factor)
        return factor if drops else None

    def forward(self, x: Tensor, tokens: TokenSlice | None = None, **sides: Any) -> Any:
        """The branch alone, [B, ...] to the same shape, without the residual.

        tokens: which of a sample's tokens, see TokenSliced (dr2dist/reversible/calls/slices.py);
        None for all. sides: by the chain's names.
        """
        given = self.keywords_of(sides)
        if tokens is None:
            return self.compute(self.part, x, **given)
        assert self.slicing is not None
        part = self.part
        if tokens.factor is not None:
            part = replaced_modules(part, dict.fromkeys(drop_paths(part), Factor(tokens.factor)))
        return self.slicing.compute(self.compute, part, x, tokens, given)

    def keywords_of(self, sides: dict[str, Any]) -> dict[str, Any]:
        """Sides by the keywords that `compute` takes them as."""
        return {self.keywords[name]: value for name, value in sides.items()}


def part_of(block: nn.Module, names: Sequence[str] | None) -> nn.Module:
    """The same class, attributes and modules as the block, less those that are not named.

    It shares them with the block, so that they are found under one name in state_dict.
    """
    part: nn.Module = shallow_copy(block)
    renew_part(part, block, names)
    return part


def renew_part(part: nn.Module, block: nn.Module, names: Sequence[str] | None) -> None:
    """Makes a part what `part_of` would make now."""
    values = block.__dict__.copy()
    if names is not None:
        computed = values["_modules"].get("parametrizations", {})
        for kind in ("_modules", "_parameters"):
            values[kind] = {k: v for k, v in values[kind].items() if k in names}
        own = {name: found for name, found in computed.items() if name in names}
        if own:  # parameters that the block's class computes of others
            values["_modules"]["parametrizations"] = nn.ModuleDict(own)
    part.__dict__.update(values)


@dataclass(frozen=True)
class BranchSpec:
    """One branch of a block type: the modules it uses, how it computes, which sides it takes, how
    it runs on some tokens, whether its block takes tokens alone."""

    names: tuple[str, ...] | None
    compute: Compute
    sides: tuple[str, ...] = ()
    slicing: Slicing | None = None
    alone: bool = True

    def cut(self, block: nn.Module, sides: Mapping[str, str] | None = None) -> Branch:
        """The branch of a block. sides: as Branch takes them."""
        return Branch(block, self.names, self.compute, sides, self.slicing, self.alone)


def branches(
    blocks: Sequence[nn.Module],
    parts: Mapping[type, Sequence[BranchSpec]],
    where: str,
    rename: Callable[[str, int], str] = lambda side, depth: side,
) -> list[nn.Module]:
    """The residual functions of blocks in order.

    rename: the chain's name of a side for the block at a depth. Raises UserError for a block
    whose type is not in `parts` or that computes in its own way.
    """
    functions: list[nn.Module] = []
    for depth, block in enumerate(blocks):
        for part in _parts_of(block, parts, f"{where}.{depth}"):
            sides = {rename(side, depth): side for side in part.sides}
            functions.append(part.cut(block, sides))
    return functions


def _parts_of(
    block: nn.Module, parts: Mapping[type, Sequence[BranchSpec]], where: str
) -> Sequence[BranchSpec]:
    known = (kind for kind in parts if isinstance(block, kind))
    for kind in known if "forward" not in block.__dict__ else ():
        if _forward(type(block)) is _forward(kind):
            return parts[kind]
    allowed = ", ".join(kind.__name__ for kind in parts)
    own = isinstance(block, tuple(parts))
    how = " with a forward of its own, which need not be x + F(x)" if own else ""
    raise UserError(
        f"{where} is a {type(block).__name__}{how}; supported blocks are {allowed}; {OWN_FAMILY}"
    )


def _forward(kind: Any) -> Any:
    return kind.forward
