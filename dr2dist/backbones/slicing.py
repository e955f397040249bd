"""How branches run on some of a sample's tokens, and what an attention must know of the others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from timm.layers.attention import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torchvision.ops import StochasticDepth

from dr2dist.backbones.tokenwise import is_tokenwise
from dr2dist.reversible.calls.slices import Ranges, TokenSlice
from dr2dist.reversible.trees import modules_of

ATTENTIONS = (Attention, AttentionRope, EvaAttention, BeitAttention, RelPosAttention)


Run = Callable[..., Tensor]
"""Computes a branch: run(part, x, **sides)."""

Given = dict[str, Any]
"""Sides by the keyword that a branch takes them as."""


def even_ranges(length: int, step: int) -> list[Ranges]:
    """0 .. length in ranges of `step`."""
    return [(slice(start, min(start + step, length)),) for start in range(0, length, step)]


class Slicing(ABC):
    """How a branch is computed for some of a sample's tokens; the default is each by itself."""

    needs_context = False
    smaller_inside = False
    """Whether a slice of all tokens takes less than the branch as it stands."""
    across: tuple[str, ...] = ()
    """Modules of the branch that look at other tokens, which `compute` sees to. Others must be
    known not to (dr2dist/backbones/tokenwise.py)."""

    @abstractmethod
    def ranges(self, part: Any, shape: torch.Size, tokens: int, sides: Given) -> Sequence[Ranges]:
        """Slices of about `tokens` tokens that cover dim 1 of [B, N, C] or rows of [B, H, W, C].

        None where modules in `across` are not known to allow it.
        """

    def compute(self, run: Run, part: Any, x: Tensor, told: TokenSlice, sides: Given) -> Any:
        """The branch of the slice's tokens x, or its share of the context."""
        return run(part, x, **sides)


class Tokenwise(Slicing):
    """MLPs with their norms, each token by itself."""

    def ranges(self, part: Any, shape: torch.Size, tokens: int, sides: Given) -> Sequence[Ranges]:
        """See Slicing."""
        return even_ranges(shape[1], max(tokens // math.prod(shape[2:-1]), 1))


class Queries(Slicing):
    """Attention of some queries to all tokens: the context are their keys and values.

    The attention's own code runs on the slice. Where it calls torch's attention, the keys and
    values of all tokens take the place of the slice's, a few heads after the other: so the
    gradients of keys and values exist for these heads only.
    """

    needs_context = True
    across = ("attn",)

    def ranges(self, part: Any, shape: torch.Size, tokens: int, sides: Given) -> Sequence[Ranges]:
        """See Slicing."""
        known = type(part.attn) in ATTENTIONS and part.attn.fused_attn and _asks_torch(part.attn)
        if not known or sides.get("is_causal"):
            return []
        apart = all(map(is_tokenwise, modules_of(part.attn)[1:]))
        return even_ranges(shape[1], tokens) if apart else []

    def compute(self, run: Run, part: Any, x: Tensor, told: TokenSlice, sides: Given) -> Any:
        """See Slicing."""
        (found,) = told.ranges
        if sides.get("rope") is not None:
            part, sides = _turned(part, sides, found)
        if told.context is not None:
            with _Attend(told.context, found, told.length):
                return run(part, x, **sides)
        with _Capture() as capture:
            run(part, x, **sides)
        if not capture.found:
            kind = type(part.attn).__name__
            raise RuntimeError(f"{kind} has not called torch's attention: leave chunk_tokens out")
        return tuple(capture.found)


def _asks_torch(attention: nn.Module) -> bool:
    """Whether its code has torch's attention: another may have been put in its place."""
    code = getattr(type(attention).forward, "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


def _turned(part: Any, sides: dict[str, Any], found: slice) -> tuple[Any, dict[str, Any]]:
    """The branch and its sides with the rotary embeddings of some tokens only."""
    prefix = part.attn.num_prefix_tokens
    attention = shallow_copy(part.attn)
    attention.num_prefix_tokens = min(max(prefix - found.start, 0), found.stop - found.start)
    rope = sides["rope"][..., max(found.start - prefix, 0) : max(found.stop - prefix, 0), :]
    rope = rope if rope.shape[-2] else None
    return replaced_modules(part, {"attn": attention}), {**sides, "rope": rope}


def shallow_copy(module: Any) -> Any:
    """Another module with the same in it; `copy.copy` refuses one with parametrisations."""
    kind: Any = type(module)
    result = kind.__new__(kind)
    result.__dict__.update(module.__dict__)
    return result


def replaced_modules(part: nn.Module, modules: dict[str, Any]) -> Any:
    """A shallow copy of a module with others in some places."""
    result = shallow_copy(part)
    result._modules = {**part._modules, **modules}
    return result


class _Capture(TorchFunctionMode):
    """Keeps the keys and values that an attention computes: [B, n, heads, C] for some heads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            queries, *others = args[:3]
            groups = (_groups(other.transpose(1, 2), dim=2) for other in others)
            self.found = [tensor for pair in zip(*groups, strict=True) for tensor in pair]
            return queries
        return function(*args, **(kwargs or {}))


class _Attend(TorchFunctionMode):
    """Answers an attention's call with that of its queries to all keys and values."""

    def __init__(self, context: tuple[Tensor, ...], found: slice, length: int) -> None:
        super().__init__()
        self.context, self.found, self.length = context, found, length

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        outputs, head = [], 0
        mask = kwargs.pop("attn_mask", None)
        pairs = zip(self.context[::2], self.context[1::2], strict=True)
        for query, (keys, values) in zip(_groups(args[0], dim=1), pairs, strict=True):
            kwargs["attn_mask"] = self._mask(mask, head, query.shape[1])
            outputs.append(function(query, keys.transpose(1, 2), values.transpose(1, 2), **kwargs))
            head += query.shape[1]
        return torch.cat(outputs, dim=1)

    def _mask(self, mask: Tensor | None, head: int, heads: int) -> Tensor | None:
        """Of some heads and the slice's queries, from one that broadcasts to [B, heads, N, N]."""
        if mask is None:
            return None
        if mask.ndim > 2 and mask.shape[-3] > 1:
            mask = mask.narrow(-3, head, heads)
        return mask[..., self.found, :] if mask.shape[-2] == self.length else mask


def _groups(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Groups of heads: on a CPU as many as there are threads, which divide the heads of a call."""
    return tensor.split(torch.get_num_threads() if tensor.device.type == "cpu" else 1, dim)


class Factor:
    """Stands for a branch's DropPath where it was drawn for the whole sample."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, x: Tensor) -> Tensor:
        """x: [1, ...]."""
        return x * self.value.view(-1, *[1] * (x.ndim - 1))


def drop_paths(part: nn.Module) -> dict[str, nn.Module]:
    """The branch's active DropPaths by name, timm's and torchvision's."""
    found: dict[str, nn.Module] = {}
    for name, module in part._modules.items():
        timms = isinstance(module, DropPath) and module.drop_prob
        torchvisions = isinstance(module, StochasticDepth) and module.p
        if module is not None and module.training and (timms or torchvisions):
            found[name] = module
    return found
