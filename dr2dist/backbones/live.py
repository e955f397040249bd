"""What people do to a converted network's modules: replaced ones take effect, and what a
reversible network cannot do is refused."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from dr2dist.errors import UserError
from dr2dist.reversible.trees import has_hooks


def structure_of(net: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that the network is made of: another one in any place gives another result."""
    found: list[nn.Module] = []
    waiting = [net]
    while waiting:
        children = [child for child in waiting.pop()._modules.values() if child is not None]
        found += children
        waiting += children
    return tuple(found)


def bypassed(net: nn.Module, blocks: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The modules that the network never calls: blocks, of which it runs the residual functions,
    and the lists that they are in."""
    cut = set(map(id, blocks))
    names = {name for name, module in net.named_modules() if id(module) in cut}
    inside = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    return [(name, net.get_submodule(name)) for name in sorted(inside)]


def refuse_sharded(modules: Iterable[nn.Module]) -> None:
    """Raises UserError if FSDP has sharded one of them."""
    if any("_is_fsdp_managed_module" in module.__dict__ for module in modules):
        raise UserError(
            "the network is sharded by FSDP (fully_shard), which gathers parameters around modules "
            "that a reversible network does not call: use DistributedDataParallel, or ZeRO by "
            "dr2dist train"
        )


def refuse_uncalled(net: nn.Module, unseen: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises UserError for what would never be called: hooks, and a forward that was replaced.

    unseen: what `bypassed` gives.
    """
    if "forward_features" in net.__dict__:
        raise UserError(
            "the network's forward_features was replaced, which its forward never calls"
        )
    for name, module in unseen:
        if "forward" in module.__dict__:
            raise UserError(
                f"{name} has a forward that was replaced, which would never be called: a "
                "reversible network runs its residual functions, not the whole"
            )
        if has_hooks(module):
            raise UserError(
                f"{name} has a hook, which would never be called: a reversible network runs its "
                "residual functions, not the whole; put it on a module inside of a block (its "
                "attn, mlp or norms), or take features by forward_intermediates"
            )
