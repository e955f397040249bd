"""What decides which kernels compute a function: frozen with its first run, for the second."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import backends
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


class _Switch(NamedTuple):
    """A setting of the process: how it is read and how it is set."""

    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _attribute(owner: Any, name: str) -> _Switch:
    return _Switch(partial(getattr, owner, name), partial(setattr, owner, name))


_MATMUL: Any = backends.cuda.matmul
_CUDNN: Any = backends.cudnn
_MKLDNN: Any = backends.mkldnn
_SWITCHES = (
    _Switch(torch.get_num_threads, torch.set_num_threads),
    _Switch(
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    *(  # TF32, and bf16 in the matrix products of CPUs
        _attribute(owner, "fp32_precision")
        for owner in (backends, _MATMUL, _CUDNN.conv, _MKLDNN.matmul, _MKLDNN.conv)
    ),
    _attribute(_MATMUL, "allow_fp16_reduced_precision_reduction"),
    _attribute(_MATMUL, "allow_bf16_reduced_precision_reduction"),
    _attribute(_CUDNN, "enabled"),
    _attribute(_CUDNN, "benchmark"),
    _attribute(_CUDNN, "deterministic"),
    _Switch(backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp),
    _Switch(backends.cuda.mem_efficient_sdp_enabled, backends.cuda.enable_mem_efficient_sdp),
    _Switch(backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp),
    _Switch(backends.cuda.cudnn_sdp_enabled, backends.cuda.enable_cudnn_sdp),
    _Switch(
        backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        backends.cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
    # torch.nn.attention.sdpa_kernel(..., set_priority=True) has no other way to be read.
    _Switch(torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
)


def _read() -> tuple[Any, ...]:
    return tuple(switch.read() for switch in _SWITCHES)


@dataclass(frozen=True)
class Kernels:
    """Autocast, precision of matrix products, attention's backends, determinism, CPU threads.

    The cache of cast weights stays off inside: its entries hold one graph, which the first
    slice's gradient would free.
    """

    device_type: str
    autocast: bool
    dtype: torch.dtype
    switches: tuple[Any, ...]

    @classmethod
    def current(cls, device: torch.device) -> Kernels:
        """What is in force for the device."""
        kind = device.type
        if kind == "cuda":
            _settle(device)
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), _read())

    def autocasting(self) -> torch.autocast:
        """Inside, autocast is as it was."""
        return torch.autocast(self.device_type, self.dtype, self.autocast, cache_enabled=False)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, all the rest is as it was."""
        present = _read()
        _set(present, self.switches)
        try:
            yield
        finally:
            _set(self.switches, present)


@functools.cache
def _settle(device: torch.device) -> None:
    """Has torch decide now whether attention prefers cuDNN on this machine's GPUs.

    It does so once in a process, when attention first looks for its kernels, which is later than
    what is in force is noted (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
    priority_order).
    """
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device=device)
    with torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):  # which takes anything
        scaled_dot_product_attention(q, q, q)


def _set(present: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    """Sets what differs."""
    for switch, old, new in zip(_SWITCHES, present, wanted, strict=True):
        if old != new:
            switch.write(new)
