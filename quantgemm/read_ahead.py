# SPDX-License-Identifier: MIT
"""ReadAhead: each product with packed weights is told which weights the next one reads."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

import torch

__all__ = ["ReadAhead"]

_ACTIVE: ContextVar[ReadAhead | None] = ContextVar("quantgemm_read_ahead", default=None)


class ReadAhead:
    """The order of a model's products, learned in one run of its step and used in the next.

        ahead = ReadAhead()
        for _ in range(2):  # the second run, or the recording of one, has the hints
            with ahead:
                model(ids)

    While a kernel ends and the next one begins, memory has nothing to do; a product of few tokens
    that knows what is read next has the first of it brought into the L2 meanwhile. Results do not
    depend on it. Tensors that were seen live as long as this object.
    """

    def __init__(self) -> None:
        self._behind: dict[int, torch.Tensor] = {}  # of the weights at an address
        self._last: int | None = None
        self._tokens: list[Token[ReadAhead | None]] = []

    def __enter__(self) -> ReadAhead:
        self._tokens.append(_ACTIVE.set(self))
        return self

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.reset(self._tokens.pop())

    def follow(self, packed: torch.Tensor) -> torch.Tensor | None:
        """Notes that `packed` is read now. What came behind it before, if it may be a hint."""
        at = packed.data_ptr()
        if self._last is not None:
            self._behind[self._last] = packed
        self._last = at
        hint = self._behind.get(at)
        if hint is None or hint.device != packed.device:
            return None
        return hint if hint.is_contiguous() and hint.data_ptr() % 16 == 0 else None


def following(packed: torch.Tensor) -> torch.Tensor | None:
    """`ahead` of a product with `packed`: None outside of a `ReadAhead`."""
    if torch.compiler.is_compiling():
        return None
    active = _ACTIVE.get()
    return None if active is None else active.follow(packed)
