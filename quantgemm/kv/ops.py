# SPDX-License-Identifier: MIT
"""Typed front doors of the sparse key-value ops, each beside its shape rule for tracing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quantgemm.kv import reference
from quantgemm.ops import register_fake

Tensor = torch.Tensor


class Container(NamedTuple):
    """Keys or values of ``heads`` key-value heads; a tile is 64 elements.

    The last two are None where bits is 16: values that are pruned but not quantised.
    """

    bitmaps: Tensor  # int64 [heads, tiles], the top bit is element 0
    tile_offsets: Tensor  # int32 [heads, tiles], where a tile's codes begin in packed
    packed: Tensor  # int32 [words]
    scales: Tensor | None = None  # [heads, tiles] of the values' dtype
    zeros: Tensor | None = None  # [heads, tiles] of the values' dtype: whole numbers

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if t is not None)


def kept_values(sparsity: float, head_dim: int) -> int:
    """Values that pruning keeps of each token and head: ``round((1 - sparsity)·head_dim)``."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected 0 to 1, got {sparsity}")
    return round((1 - sparsity) * head_dim)


def prune_keys(k: Tensor, sparsity: float) -> Tensor:
    """k ``[..., tokens, head_dim]`` with all but the largest magnitudes of each token set to zero.

    Of equal ones the first stay, so that `kept_values` are kept, no more. Keys are pruned after
    their rotary embedding.
    """
    return k.where(reference.kept_mask(k, kept_values(sparsity, k.shape[-1])), 0)


def prune_values(v: Tensor, sparsity: float) -> Tensor:
    """`prune_keys` for values: the same rule."""
    return prune_keys(v, sparsity)


def compress_keys(k: Tensor, sparsity: float = 0.0, bits: int = 2) -> Container:
    """Prune, quantise and pack keys ``[heads, tokens, head_dim]`` (float16/bfloat16) in one pass.

    bits: 2, 4, or 16 for values as they are. Waits for the GPU to learn how much was packed;
    `sparse_kv_compress` does not.
    """
    return _compress(k, sparsity, bits, False)


def compress_values(v: Tensor, sparsity: float = 0.0, bits: int = 2) -> Container:
    """`compress_keys` for values, whose tiles are 64 channels of one token."""
    return _compress(v, sparsity, bits, True)


def _compress(x: Tensor, sparsity: float, bits: int, value: bool) -> Container:
    keep = kept_values(sparsity, x.shape[-1]) if x.dim() else 0
    bitmaps, tile_offsets, packed, scales, zeros, num_words = sparse_kv_compress(
        x, bits, keep, value
    )
    packed = packed[: int(num_words)].clone()
    return Container(bitmaps, tile_offsets, packed, *((scales, zeros) if bits != 16 else ()))


def sparse_kv_compress(
    x: Tensor, bits: int, keep: int, value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x ``[heads, tokens, head_dim]`` to the fields of a `Container` and its number of words.

    keep: values kept of each token, the largest ones; head_dim keeps all. value: how tiles lie.
    ``packed`` has room for the worst case, zero behind the last word; ``num_words`` is int64
    ``[1]`` on the device, so nothing waits and the call can be captured in a CUDA graph.
    """
    return torch.ops.quantgemm.sparse_kv_compress(  # type: ignore[no-any-return]
        x, bits, keep, value
    )


@register_fake("quantgemm::sparse_kv_compress")
def _(
    x: Tensor, bits: int, keep: int, value: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, tokens, channels = x.shape
    tiles = (tokens + 63) // 64 * channels
    room = heads * (tokens * keep // (32 // bits) + (tiles if keep else 0))
    fits = x.new_empty([heads, tiles if bits != 16 else 0])
    return (
        x.new_empty([heads, tiles], dtype=torch.int64),
        x.new_empty([heads, tiles], dtype=torch.int32),
        x.new_empty([room], dtype=torch.int32),
        fits,
        torch.empty_like(fits),
        x.new_empty([1], dtype=torch.int64),
    )


def sparse_key_spmm(
    query: Tensor,
    bitmaps: Tensor,
    tile_offsets: Tensor,
    packed: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    *,
    num_tokens: int,
    groups: int = 1,
    bits: int = 2,
) -> Tensor:
    """``query · keysᵀ``: query ``[heads·groups, n, head_dim]``, n at most 8; float32 sums.

    groups: query heads that share a key-value head; its tiles are decoded once for all of them.
    Returns ``[heads·groups, n, num_tokens]`` in query's dtype, unscaled.
    """
    return torch.ops.quantgemm.sparse_key_spmm(  # type: ignore[no-any-return]
        query, bitmaps, tile_offsets, packed, scales, zeros, num_tokens, groups, bits
    )


@register_fake("quantgemm::sparse_key_spmm")
def _(
    query: Tensor,
    bitmaps: Tensor,
    tile_offsets: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_tokens: int,
    groups: int,
    bits: int,
) -> Tensor:
    return query.new_empty([*query.shape[:2], num_tokens])


def sparse_value_spmm(
    scores: Tensor,
    bitmaps: Tensor,
    tile_offsets: Tensor,
    packed: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    *,
    head_dim: int,
    groups: int = 1,
    bits: int = 2,
) -> Tensor:
    """``scores · values``: scores ``[heads·groups, n, tokens]``, n at most 8; float32 sums.

    Returns ``[heads·groups, n, head_dim]`` in scores' dtype.
    """
    return torch.ops.quantgemm.sparse_value_spmm(  # type: ignore[no-any-return]
        scores, bitmaps, tile_offsets, packed, scales, zeros, head_dim, groups, bits
    )


@register_fake("quantgemm::sparse_value_spmm")
def _(
    scores: Tensor,
    bitmaps: Tensor,
    tile_offsets: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    head_dim: int,
    groups: int,
    bits: int,
) -> Tensor:
    return scores.new_empty([*scores.shape[:2], head_dim])
