"""Exact arithmetic on a GPU: each step of a state is one Triton kernel, one read and one write.

The same bits as the plain version (`exact.py`) for every state in range; only the layout of the
packed remainders differs. What of them was tried where: docs/memory.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dr2dist.reversible.arithmetic import triton_kernels as kernels
from dr2dist.reversible.arithmetic.checksum import OutputChecksum
from dr2dist.reversible.arithmetic.exact import ExactArithmetic
from dr2dist.reversible.arithmetic.packing import packed_bytes
from dr2dist.reversible.arithmetic.scales import inner_size
from dr2dist.reversible.arithmetic.state import State
from dr2dist.reversible.constants import Constants


class FusedArithmetic(ExactArithmetic):
    """The coupling in kernels. Remainders are planes of one bit, 8 neighbours to a byte.

    Coefficients travel as fp32, which holds every multiple of 2^-16 up to 2, and its product with
    every step 2^k.
    """

    def start(self, h: Tensor) -> State:
        """See ExactArithmetic."""
        state = torch.empty(h.shape, dtype=self.held, device=h.device)
        kernels.launch(
            kernels.start,
            state,
            h.contiguous(),
            state,
            self._values(h, onto_grid=True),
            state.numel(),
            **self._channels(h),
            narrow=self.narrow,
            block=kernels.ELEMENTS,
        )
        return State(state, state)

    def tokens(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """See ExactArithmetic."""
        x = torch.empty(state.shape, dtype=dtype, device=state.device)
        kernels.launch(
            kernels.tokens,
            x,
            state,
            x,
            self._values(state, onto_grid=False),
            x.numel(),
            **self._channels(state),
            wide=tl.float64 if self.dtype == torch.float64 else tl.float32,
            block=kernels.ELEMENTS,
        )
        return x

    def advance(
        self,
        state: State,
        f: Tensor,
        out: State,
        keep: bool,
        seen: OutputChecksum | None,
        factor: float = 1.0,
    ) -> Tensor | None:
        """See ExactArithmetic. A state outside the range ends there in any case."""
        bits = self.bits if keep else 0
        count = f.numel()
        remainders = f.new_empty(packed_bytes(bits, count), dtype=torch.uint8)
        seen = seen or OutputChecksum.on(f.device)
        assert seen.largest is not None
        peaks = seen.peaks if self.narrow else None
        kernels.launch(
            kernels.advance,
            f,
            state.previous,
            state.current,
            f,
            out.current,
            remainders,
            seen.bits,
            seen.largest.view(torch.int64),
            seen.bits if peaks is None else peaks,
            self._values(f, onto_grid=True, factor=factor),
            seen.place,
            count,
            self.alpha,
            self.beta,
            **self._channels(f),
            narrow=self.narrow,
            peaked=peaks is not None,
            bits=bits,
            share=kernels.BYTES,
        )
        seen.advance(count)
        return remainders if keep else None

    def retreat(
        self,
        state: State,
        f: Tensor,
        remainders: Tensor,
        seen: OutputChecksum,
        factor: float = 1.0,
    ) -> State:
        """See ExactArithmetic."""
        kernels.launch(
            kernels.retreat,
            f,
            state.current,
            state.previous,
            f,
            remainders,
            seen.bits,
            self._values(f, onto_grid=True, factor=factor),
            seen.place,
            f.numel(),
            self.alpha,
            self.beta,
            **self._channels(f),
            bits=self.bits,
            share=kernels.BYTES,
        )
        seen.advance(f.numel())
        return State(state.previous, state.current)

    def deviation(self, state: State, f: Tensor, seen: OutputChecksum) -> Tensor:
        """See ExactArithmetic."""
        count = torch.zeros((), dtype=torch.int64, device=f.device)
        kernels.launch(
            kernels.deviation,
            f,
            state.current,
            state.previous,
            f,
            count,
            seen.bits,
            self._values(f, onto_grid=True),
            seen.place,
            f.numel(),
            self.alpha,
            self.beta,
            **self._channels(f),
            share=kernels.BYTES,
        )
        seen.advance(f.numel())
        return count

    def sums(self, state: State) -> Tensor:
        """See ExactArithmetic; elements weigh by their place in each tensor."""
        parts = state[:1] if state.previous is state.current else state
        return torch.stack([kernels.weighted_bits(part, 0) for part in parts])

    def _values(self, like: Tensor, onto_grid: bool, factor: float = 1.0) -> Tensor:
        """What brings each channel onto the grid, or back: fp32; one for states of 32 bits."""
        if self.scales is not None:
            values = self.scales.values(like.device, onto_grid)
            return values if factor == 1 else values * factor
        return _one(factor * (self.scale if onto_grid else 1 / self.scale), like.device)

    def _channels(self, like: Tensor) -> dict[str, Any]:
        """How kernels find an element's channel."""
        if self.scales is None:
            return {"channels": 1, "inner": 1}
        inner = inner_size(like.shape, self.scales.dim)
        return {"channels": len(self.scales.exponents), "inner": inner}


_known = Constants()


def _one(value: float, device: torch.device) -> Tensor:
    def make() -> Tensor:
        return torch.full((1,), value, dtype=torch.float32, device=device)

    return _known.get((value, device), make)
