# SPDX-License-Identifier: MIT
"""RotaryTables: the rotary angles of all positions, computed once, so that a step looks up its own.

A rotary embedding of transformers is some nine small kernels, once for each step.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RotaryTables"]


class RotaryTables:
    """While this is entered, the rotary embeddings of a model look up positions below `positions`.

    Only where tables hold what the module computes, bit for bit; others compute as before.
    """

    def __init__(self, model: torch.nn.Module, positions: int) -> None:
        self.tables: list[_Table] = []
        for module in model.modules():
            table = _table_of(module, positions, model.dtype)  # type: ignore[arg-type]
            if table is not None:
                self.tables.append(table)

    def __enter__(self) -> RotaryTables:
        for table in self.tables:
            table.module.forward = table
        return self

    def __exit__(self, *_: object) -> None:
        for table in self.tables:
            del table.module.forward


class _Table:
    """The forward of a rotary embedding. cos, sin: ``[positions, channels]``."""

    def __init__(self, module: torch.nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.module, self.cos, self.sin = module, cos, sin

    def __call__(
        self, x: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids ``[batch, tokens]`` to cos and sin ``[batch, tokens, channels]``."""
        embedding = torch.nn.functional.embedding
        return embedding(position_ids, self.cos), embedding(position_ids, self.sin)


def _table_of(module: torch.nn.Module, positions: int, dtype: torch.dtype) -> _Table | None:
    own = getattr(module, "inv_freq", None)
    named = type(module).__name__.endswith("RotaryEmbedding")
    if not named or not isinstance(own, torch.Tensor) or "forward" in module.__dict__:
        return None
    x = torch.empty(1, dtype=dtype, device=own.device)
    ids = torch.arange(positions, device=own.device)[None]
    random = torch.randint(positions, (2, 3), generator=torch.Generator().manual_seed(0))
    lone = torch.tensor([[positions // 3]])  # a text's length would show
    with torch.no_grad():
        try:
            cos, sin = module(x, position_ids=ids)
            if cos.dim() != 3 or cos.shape[:2] != ids.shape or cos.shape != sin.shape:
                return None
            table = _Table(module, cos[0].contiguous(), sin[0].contiguous())
            same = True
            for some in (random.to(own.device), lone.to(own.device)):
                want: tuple[Any, ...] = module(x, position_ids=some)
                same &= all(torch.equal(a, b) for a, b in zip(table(x, some), want, strict=True))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return None  # it wants something else
    return table if same else None
