"""What tests of chains share: a reference, a count of memory, a model, a rank's case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dr2dist.reversible import Chain
from tests.functions import WIDTH, Mlp, make_chain, tokens


def error(one: Tensor | list[Tensor], other: Tensor | list[Tensor]) -> float:
    """|one - other| / |other| in fp64, all tensors of a list as one vector."""
    first, second = (
        torch.cat([t.detach().double().flatten() for t in (x if isinstance(x, list) else [x])])
        for x in (one, other)
    )
    return float((first - second).norm() / second.norm())


def plain(
    chain: Chain, x: Tensor, taps: tuple[int, ...] = (), **sides: Any
) -> tuple[Tensor, list[Tensor]]:
    """The two equations with the chain's coefficients, by plain autograd: (x_L, tapped)."""
    alpha, beta = chain.setting.alpha, chain.setting.beta
    y = beta * x
    tapped = []
    for index, function in enumerate(chain.functions):
        x, y = function(x, **sides) + alpha * x + y, beta * x
        if index in taps:
            tapped.append(x)
    return x, tapped


class Storages(TorchDispatchMode):
    """Knows every storage made inside, also those that only a graph refers to."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {reference.cdata for reference, _ in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for reference, size in _storages(result):
            if reference.cdata not in given:
                self._made[reference.cdata] = reference, size
        return result

    @property
    def alive(self) -> int:
        """Bytes of those that still live."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _storages(values: Any) -> list[tuple[StorageWeakRef, int]]:
    storages = [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]
    return [(StorageWeakRef(storage), storage.nbytes()) for storage in storages]


class Liar(Mlp):
    """From its second call on, one element is a little off."""

    calls = 0

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        branch = super().forward(x, bias)
        self.calls += 1
        if self.calls == 1:
            return branch
        off = torch.zeros_like(branch)
        off.view(-1)[3] = 0.01
        return branch + off


class Net(nn.Module):
    """Stem, chain, head: the chain inside a model of one's own."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.chain = make_chain(count=6, **setting)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.chain(self.stem(x)).mean(1))


def joint_gradients(batch: int, micro_batches: int, **setting: Any) -> dict[str, Tensor]:
    """Gradients of the mean loss over `micro_batches` batches, in one process."""
    net = Net(**setting)
    for step in range(micro_batches):
        (net(tokens(batch, seed=step)).square().mean() / micro_batches).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def distributed_gradients(
    batch: int, micro_batches: int, **setting: Any
) -> tuple[dict[str, Tensor], int, set[int]]:
    """The same by this rank of a group, from its share of each batch.

    Returns (gradients, the certificate's failures, how often parameters got a gradient).
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    net = Net(**setting)
    counts: dict[str, int] = {}
    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: counts.update({name: counts.get(name, 0) + 1})
        )
    # Small buckets, so that reductions start while the chain is still being reversed.
    parallel = DistributedDataParallel(net, bucket_cap_mb=0.02)
    for step in range(micro_batches):
        parallel.require_backward_grad_sync = step == micro_batches - 1
        share = tokens(batch, seed=step).chunk(ranks)[rank]
        (parallel(share).square().mean() / micro_batches).backward()
    certificate = net.chain.certificate()
    assert certificate is not None and certificate.verified
    grads = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    return grads, certificate.failures, set(counts.values())
