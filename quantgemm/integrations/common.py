# SPDX-License-Identifier: MIT
"""What the integrations share: a product of any number of rows, and a hand in other libraries."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quantgemm import ops
from quantgemm.formats import FORMATS

__all__ = ["Patch", "linear", "module_of", "version_of"]

# Rows from which on decoding the weights and multiplying by cuBLAS takes less time than our kernels
# on blocks. From measured parts (H200, Q4_0; docs/ladder.md, docs/performance.md): 4096×4096, 128
# rows 30 µs against 11 + 14; 14336×4096, 128 rows 63 against 38 + 34, 256 rows 90 against 38 + 45.
MANY_ROWS = 192
DECODED_WEIGHTS = 64 << 20  # at a time


def linear(
    x: torch.Tensor,
    blocks: torch.Tensor,
    qtype: int,
    bias: torch.Tensor | None = None,
    algo: str = "auto",
) -> torch.Tensor:
    """``x[..., k] · dequantize(blocks)[n, k]ᵀ + bias[n]`` in x's dtype, differentiable in x.

    Many rows on a GPU are multiplied with decoded weights, a part of them at a time.
    """
    rows = x.numel() // x.shape[-1]
    if x.is_cuda and rows >= MANY_ROWS and not (torch.is_grad_enabled() and x.requires_grad):
        parts = torch.split(blocks, max(1, DECODED_WEIGHTS // x.shape[-1]))
        products = [x @ ops.dequantize(part, qtype, x.dtype).T for part in parts]
        y = products[0] if len(products) == 1 else torch.cat(products, -1)
    else:
        y = ops.gemm(x, blocks, qtype, algo)
    return y if bias is None else y.add_(bias)  # in place: y is nobody else's


def serves(qtype: int) -> bool:
    """Whether rows of this ggml type can be multiplied with: those made of blocks."""
    return qtype in FORMATS and FORMATS[qtype].block_elems > 1


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package} is not installed: pip install {package}") from None


def module_of(package: str, name: str, wanted: dict[str, tuple[str, ...]], advice: str) -> Any:
    """A module of another library, once everything that will be used of it is known to exist.

    wanted: attributes of the module, each with the attributes that it should have itself.
    """
    found = version_of(package)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{package} {found} has no {name} ({error}): {advice}") from error
    for attribute, parts in wanted.items():
        thing = getattr(module, attribute, None)
        missing = [attribute] if thing is None else [p for p in parts if not hasattr(thing, p)]
        if missing:
            raise ImportError(f"{name} of {package} {found} has no {', '.join(missing)}: {advice}")
    return module


class Patch:
    """Attributes of other libraries' modules and classes, replaced until undone."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._before)

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._before:
            owner, name, value = self._before.pop()
            setattr(owner, name, value)
