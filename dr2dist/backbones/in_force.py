"""What a network's chains have in force beside their weights: alpha and beta, how functions are
joined beside them, and scales."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dr2dist.errors import UserError, nearest
from dr2dist.reversible import Chain
from dr2dist.reversible.arithmetic.scales import ChannelScales
from dr2dist.reversible.arithmetic.setting import Gain, HandOn, round_coefficient

COEFFICIENTS_NAME = "reversible_alpha_beta"
"""The buffer that a converted network has beside its model's: alpha and beta, as int64 multiples of
2^-32. Copies that follow a network's state, such as averaged weights, so follow them too."""

_UNIT = 2.0**32

JOINED_NAME = "reversible_gain_hand_on"
"""How functions are joined beside that, where it is not as it mostly is: int16 places in GAINS and
HANDS in a network's state."""

GAINS: tuple[Gain, ...] = get_args(Gain)
HANDS: tuple[HandOn, ...] = get_args(HandOn)

SCALES_NAME = "reversible_scales."
"""What begins the names of 16-bit states' scales in a network's state, where they are found: int16
exponents [channels] by chain."""


class InForce(nn.Module):
    """The part of a reversible network that has coefficients, gains and scales, and keeps them in
    its state."""

    chains: tuple[Chain, ...]

    @property
    def coefficients(self) -> tuple[float, float]:
        """alpha and beta in force, multiples of 2^-16."""
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
        self.note_coefficients()

    def note_coefficients(self) -> None:
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

    @property
    def scales(self) -> dict[str, list[int]]:
        """Exponents of the scales of 16-bit states, by chain and channel; empty before they are
        found, and for states of 32 bits."""
        found = {chain.name: chain.scales for chain in self.chains}
        return {name: list(known.exponents) for name, known in found.items() if known is not None}

    @property
    def stale_scales(self) -> list[str]:
        """Chains whose scales had to grow far: others are found in the next pass that trains."""
        return [chain.name for chain in self.chains if chain.scales and chain.scales.stale]

    def set_scales(self, scales: Mapping[str, Sequence[int]], stale: Collection[str] = ()) -> None:
        """Takes what `scales`, and `stale_scales`, have given; chains that are not named find their
        own.

        Raises UserError for a chain that the network does not have, RuntimeError while a forward
        pass still waits for its backward pass.
        """
        names = [chain.name for chain in self.chains]
        for name in scales:
            if name not in names:
                raise UserError(f"scales: no chain is called {name!r}{nearest(name, names)}")
        for chain in self.chains:
            known = scales.get(chain.name)
            place = chain.channel_dim, chain.name in stale
            chain.set_scales(None if known is None else ChannelScales(tuple(known), *place))

    def _join(self, gain: Gain, hand_on: HandOn) -> None:
        """Takes what a loaded state says. Raises UserError where its settings do not allow it."""
        for chain in self.chains:
            try:
                chain.setting = replace(chain.setting, gain=gain, hand_on=hand_on)
            except ValueError as error:
                raise UserError(f"{JOINED_NAME} in the loaded state: {error}") from None

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """As any module's, and behind all else what is in force: averages go by the order of
        entries, of which scales are there only from the first pass on."""
        found = super().state_dict(*args, prefix=prefix, **options)
        prefix = args[1] if len(args) > 1 else prefix
        setting = self.chains[0].setting
        joined = [GAINS.index(setting.gain), HANDS.index(setting.hand_on)]
        entries = {JOINED_NAME: joined} if any(joined) else {}
        entries |= {f"{SCALES_NAME}{name}": scale for name, scale in self.scales.items()}
        for name, values in entries.items():
            found[prefix + name] = torch.tensor(values, dtype=torch.int16, device="cpu")
        return found

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        own = {prefix + COEFFICIENTS_NAME: torch.tensor(self._units, device="cpu")}
        start = prefix + SCALES_NAME
        scales = {name: value for name, value in state.items() if name.startswith(start)}
        known = {*scales, prefix + JOINED_NAME}
        rest_of_state = {name: value for name, value in state.items() if name not in known}
        if prefix + COEFFICIENTS_NAME in state:  # a converted network's
            gain, hand_on = state.get(prefix + JOINED_NAME, torch.zeros(2)).int().tolist()
            self._join(GAINS[gain], HANDS[hand_on])
        super()._load_from_state_dict({**own, **rest_of_state}, prefix, *rest)
        if scales and self.chains[0].setting.by_channel:
            self.set_scales({name[len(start) :]: v.tolist() for name, v in scales.items()})


def adjusted_names(state: Mapping[str, Any]) -> list[str]:
    """Which names in a network's state are not its model's."""
    own = (COEFFICIENTS_NAME, JOINED_NAME)
    return [name for name in state if name in own or name.startswith(SCALES_NAME)]


def _version(buffer: Tensor) -> object:
    """Another one after every write to the buffer; of inference tensors always another one."""
    return object() if buffer.is_inference() else (id(buffer), buffer._version)
