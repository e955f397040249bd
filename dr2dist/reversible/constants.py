"""Tensors that never change, made once for each device."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

MOST = 64
"""So many are kept; the oldest goes."""


class Constants:
    """Tensors by key, kept where they are real ones.

    What is made while a program is traced (torch.export, a FakeTensorMode) has no values, and
    would be found by the passes to come.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key, which `make` makes if it is not known."""
        if key in self._known:
            return self._known[key]
        made = make()
        if type(made) is Tensor:
            if len(self._known) >= MOST:
                del self._known[next(iter(self._known))]
            self._known[key] = made
        return made
