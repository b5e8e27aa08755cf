# SPDX-License-Identifier: MIT
"""Typed front doors of `torch.ops.quantgemm.*`, each beside its shape rule for tracing.

The C++ op checks its arguments and raises; what stands here adds nothing on the way in. The shape
rules (`register_fake`) let `torch.compile` and `torch.export` see through an op without running it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

import quantgemm._C  # noqa: F401  registers the ops
from quantgemm.formats import Format, format_by_id

__all__ = ["activation_row_bytes", "dequantize", "quantize", "quantize_activations"]

Shape = TypeVar("Shape", bound=Callable[..., torch.Tensor])


def register_fake(op: str) -> Callable[[Shape], Shape]:
    """torch.library.register_fake, which has no type hints of its own."""
    return torch.library.register_fake(op)  # type: ignore[no-any-return]


def dequantize(
    blocks: torch.Tensor, qtype: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """GGUF rows to numbers, bit-exactly as ggml decodes them.

    blocks: uint8 ``[..., row_bytes]``, CPU or CUDA; qtype: a ggml type id such as
    ``QType.Q4_K``; dtype: float32, or float16/bfloat16 (the float32 value rounded to nearest even).
    Returns ``[..., cols]`` on the same device.
    """
    return torch.ops.quantgemm.dequantize(blocks, int(qtype), dtype)  # type: ignore[no-any-return]


@register_fake("quantgemm::dequantize")
def _(blocks: torch.Tensor, qtype: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    fmt = format_by_id(qtype)
    return blocks.new_empty([*blocks.shape[:-1], _cols(fmt, blocks.shape[-1])], dtype=dtype)


def quantize(x: torch.Tensor, qtype: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Numbers to GGUF rows; CPU and CUDA give the same bytes.

    x: float32/float16/bfloat16 ``[..., cols]``; importance: float32 ``[cols]``, a non-negative
    weight per column for the squared error, or None. Returns uint8 ``[..., row_bytes]``.
    """
    return torch.ops.quantgemm.quantize(x, int(qtype), importance)  # type: ignore[no-any-return]


@register_fake("quantgemm::quantize")
def _(x: torch.Tensor, qtype: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    fmt = format_by_id(qtype)
    row_bytes = x.shape[-1] // fmt.block_elems * fmt.block_bytes
    return x.new_empty([*x.shape[:-1], row_bytes], dtype=torch.uint8)


def quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """Activations to int8 rows for integer dot products.

    x: float32/float16/bfloat16 ``[..., cols]``, cols a multiple of 32. Returns uint8
    ``[..., activation_row_bytes(cols)]``: cols int8 codes, then per 32 of them a float32 scale and
    the float32 sum ``scale · Σ code``, then zeros to a multiple of 16 bytes.
    """
    return torch.ops.quantgemm.quantize_activations(x)  # type: ignore[no-any-return]


@register_fake("quantgemm::quantize_activations")
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty([*x.shape[:-1], activation_row_bytes(x.shape[-1])], dtype=torch.uint8)


def activation_row_bytes(cols: int) -> int:
    """Bytes of one row made by `quantize_activations`."""
    return (cols + cols // 32 * 8 + 15) // 16 * 16


def _cols(fmt: Format, row_bytes: int) -> int:
    return row_bytes // fmt.block_bytes * fmt.block_elems
