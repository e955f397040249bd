"""The fp32 masters and moments that a rank holds, named by parameter, on every ZeRO stage.

Each stage lays parameters out in its own way (whole ones, flat partitions, shards of each).
Here each becomes ranges of flattened parameters, so that what is built on them (checkpoints)
knows no layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dr2dist.parallel import adapter
from dr2dist.parallel.fragment import Fragment, bounds
from dr2dist.parallel.originals import Original, Originals


class MasterWeights:
    """Reads and writes masters and moments of a DeepSpeed engine.

    engine: after `deepspeed.initialize`. zero: its stage. originals: what it rounded; trained
    masters start from there, and of frozen parameters this rank's share is kept. group: the ranks
    that hold the same layers, None for all.
    """

    def __init__(
        self, engine: Any, zero: int, originals: Originals | None = None, group: Any = None
    ) -> None:
        self._engine, self._zero, self._group = engine, zero, group
        self._frozen: Originals = {}
        if originals:
            self._take(originals)

    def _take(self, originals: Originals) -> None:
        held = {name: p.dtype for name, p in self._engine.module.named_parameters()}
        for fragment in self.fragments:
            original = originals.get(fragment.name)
            if original is None:
                continue
            first = max(fragment.start, original.start)
            last = min(fragment.start + len(fragment.values), original.start + len(original.values))
            now = fragment.values[first - fragment.start : last - fragment.start]
            given = original.values[first - original.start : last - original.start]
            # Where ranks were given different values the engine has taken those of rank 0.
            same = given.to(held[fragment.name]) == now.to("cpu", held[fragment.name])
            values = torch.where(same, given, now.to("cpu", given.dtype))
            if fragment.owner is None:
                self._frozen[fragment.name] = Original(first, values)
            else:
                now.copy_(values)

    @property
    def fragments(self) -> list[Fragment]:
        """This rank's ranges; found anew, since an engine may move its tensors."""
        find, found = adapter.layout(self._engine, self._zero), []
        for name, parameter in self._engine.module.named_parameters():
            if name in self._frozen:
                found += _kept(self._frozen[name], name, parameter)
            else:
                found += find(name, parameter)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's masters and frozen originals, beside the weights."""
        return sum(fragment.values.nbytes for fragment in self.fragments if fragment.beside)

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """The optimiser's state of a range by name: views [n], and scalars [] such as step."""
        return dict(self._moments(fragment))

    def _moments(self, fragment: Fragment) -> Iterator[tuple[str, Tensor]]:
        if fragment.owner is None:
            return
        optimizer = adapter.torch_optimizer(self._engine)
        for key, value in optimizer.state.get(fragment.owner, {}).items():
            if isinstance(value, Tensor) and value.dim() == 0:
                yield key, value
            elif isinstance(value, Tensor):
                flat = value.view(-1)
                yield key, flat.narrow(0, fragment.offset, len(fragment.values))

    def add_moment(self, fragment: Fragment, key: str, value: Tensor) -> None:
        """Puts a moment [n], or a scalar [], in place; makes it if it is not there yet."""
        owner = fragment.owner
        if owner is None:
            return
        optimizer = adapter.torch_optimizer(self._engine)
        state = optimizer.state[owner]
        if value.dim() == 0:
            if optimizer.defaults.get("fused"):
                value = value.to(owner.device)  # a fused step counts where its values are
            # One scalar serves the whole owner: the largest count of updates in it.
            state[key] = value.clone() if key not in state else torch.maximum(state[key], value)
            return
        whole = state.setdefault(key, torch.zeros_like(owner, requires_grad=False))
        whole.view(-1).narrow(0, fragment.offset, len(value)).copy_(value)

    def publish(self, frozen: bool = False) -> None:
        """Carries written masters over to the weights that the network computes with.

        frozen: frozen parameters' too. Every rank must call it.
        """
        if frozen:
            self._publish_frozen()
        adapter.publish(self._engine, self._zero)

    def _publish_frozen(self) -> None:
        for name, parameter in self._engine.module.named_parameters():
            if name not in self._frozen:
                continue
            values = self._frozen[name].values
            if self._zero == 3:
                adapter.held(parameter).data.view(-1)[: len(values)].copy_(values)
            else:
                parameter.data.view(-1).copy_(self._gathered(values, parameter))

    def _gathered(self, share: Tensor, parameter: Tensor) -> Tensor:
        """All ranks' shares of a parameter, in its type and on its device."""
        ranks = dist.get_world_size(self._group)
        padded = parameter.new_zeros(bounds(parameter.numel(), 0, ranks)[1])
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=self._group)
        return torch.cat(parts)[: parameter.numel()]


def _kept(original: Original, name: str, parameter: Any) -> list[Fragment]:
    """A share of a frozen parameter as it was given."""
    if not len(original.values):
        return []
    shape = adapter.whole_shape(parameter)
    return [Fragment(name, shape, original.start, original.values, False)]
