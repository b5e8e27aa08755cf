# SPDX-License-Identifier: MIT
"""The sparse key-value container in plain PyTorch: slow, short, and what the kernels must equal.

Compression is bit-exact with the C++ and CUDA kernels; products are theirs up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor
Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

TILE = 64


def kept_mask(x: Tensor, keep: int) -> Tensor:
    """bool, like x ``[..., channels]``: the `keep` largest magnitudes, of equal ones the first.

    NaN is larger than everything.
    """
    # Without their sign bit, floats are ordered as integers are.
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    key = x.view(integer) & torch.iinfo(integer).max
    order = key.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order)
    )
    return rank < keep


def to_tiles(x: Tensor, value: bool) -> Tensor:
    """``[heads, tokens, channels]`` to ``[heads, tiles, 64]``, padded with zeros to 64 tokens."""
    heads, tokens, channels = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TILE))
    blocks = x.shape[1] // TILE
    if value:
        x = x.view(heads, blocks, TILE, channels // TILE, TILE).transpose(2, 3)
    else:
        x = x.view(heads, blocks, TILE, channels).transpose(2, 3)
    return x.reshape(heads, blocks * channels, TILE)


def from_tiles(tiles: Tensor, tokens: int, channels: int, value: bool) -> Tensor:
    """The inverse of `to_tiles`."""
    heads, blocks = tiles.shape[0], (tokens + TILE - 1) // TILE
    if value:
        x = tiles.view(heads, blocks, channels // TILE, TILE, TILE).transpose(2, 3)
    else:
        x = tiles.view(heads, blocks, channels, TILE).transpose(2, 3)
    return x.reshape(heads, blocks * TILE, channels)[:, :tokens]


def fit_tiles(tiles: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """scale and zero ``[heads, tiles]`` in the dtype of tiles: value = (code - zero)·scale.

    scale = (max - min) / (2^bits - 1) over the non-zeros, rounded to the dtype before zero is
    computed from it. A tile of equal values is kept exactly: code 1 of scale = value. NaN or
    infinity makes the tile NaN.
    """
    x, is_set = tiles.float(), tiles != 0
    empty = ~is_set.any(-1)
    lo = x.where(is_set, torch.inf).amin(-1).where(~empty, 0)
    hi = x.where(is_set, -torch.inf).amax(-1).where(~empty, 0)
    half_levels = torch.full_like(hi, 0.5 * (2**bits - 1))  # a number would become its reciprocal
    scale = (0.5 * hi - 0.5 * lo) / half_levels
    finite, equal = scale.isfinite(), lo == hi
    stored = scale.to(tiles.dtype)
    smallest = torch.ones_like(stored, dtype=torch.int16).view(tiles.dtype)
    stored = torch.where(equal, lo.to(tiles.dtype), stored.where(stored != 0, smallest))
    zero = (-lo / stored.float()).round().to(tiles.dtype).where(~equal, 0)
    return stored.where(finite, torch.nan), zero.where(finite, 0)


def compress(x: Tensor, keep: int, bits: int, value: bool) -> Fields:
    """x ``[heads, tokens, channels]`` to bitmaps, tile_offsets, packed, scales, zeros.

    With bits = 16 the last two are ``[heads, 0]`` and the codes the values' own bits.
    """
    tiles = to_tiles(x.where(kept_mask(x, keep), 0), value)
    is_set = tiles != 0
    shifts = torch.arange(TILE - 1, -1, -1, device=x.device)
    bitmaps = (is_set.long() << shifts).sum(-1)
    scales = zeros = x.new_empty(len(x), 0)
    if bits == 16:
        codes = tiles.view(torch.int16).long() & 0xFFFF
    else:
        scales, zeros = fit_tiles(tiles, bits)
        codes = (tiles.float() / scales[..., None].float()).round() + zeros[..., None].float()
        codes = codes.nan_to_num(0).clamp(0, 2**bits - 1).long()
    # The codes of set elements to the front, and 32 / bits of them into a word.
    front = (~is_set).byte().sort(dim=-1, stable=True).indices
    codes = codes.where(is_set, 0).gather(-1, front)
    codes = codes.view(*codes.shape[:2], TILE * bits // 32, 32 // bits)
    words = (codes << (torch.arange(32 // bits, device=x.device) * bits)).sum(-1)
    counts = (is_set.sum(-1) * bits + 31) // 32
    is_used = torch.arange(words.shape[-1], device=x.device) < counts[..., None]
    ends = counts.flatten().cumsum(0).view_as(counts)
    signed = (words ^ 1 << 31) - (1 << 31)
    return bitmaps, (ends - counts).int(), signed[is_used].int(), scales, zeros


def dequantize_tile(
    bitmap: int | Tensor,
    words: Tensor | Sequence[int],
    scale: Tensor | float = 1.0,
    zero: Tensor | float = 0.0,
    bit: int = 2,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """The 64 values of one tile, element by element as a reader would do it.

    words: packed from the tile's offset on. With bit = 16 the codes are the values' bits.
    """
    bitmap = int(bitmap)
    values = torch.zeros(TILE, dtype=dtype)
    rank = 0
    for i in range(TILE):
        if not bitmap >> (TILE - 1 - i) & 1:
            continue
        word, shift = divmod(rank * bit, 32)
        code = int(words[word]) >> shift & ((1 << bit) - 1)
        if bit == 16:
            signed = torch.tensor((code ^ 1 << 15) - (1 << 15), dtype=torch.int16)
            values[i] = signed.view(dtype)
        else:
            values[i] = (code - float(zero)) * float(scale)
        rank += 1
    return values


def reconstruct_sparse_matrix(
    bitmaps: Tensor,
    tile_offsets: Tensor,
    packed: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    num_tokens: int,
    head_dim: int,
    bit: int = 2,
    value: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The dense ``[heads, num_tokens, head_dim]`` that a container stands for.

    dtype: of the values; only where there are no scales to tell it.
    """
    shifts = torch.arange(TILE - 1, -1, -1, device=bitmaps.device)
    is_set = (bitmaps[..., None] >> shifts & 1).bool()
    bit_at = (is_set.cumsum(-1) - 1).clamp(min=0) * bit
    at = tile_offsets[..., None].long() + bit_at // 32
    padded = torch.nn.functional.pad(packed.long() & 0xFFFFFFFF, (0, 1))
    codes = padded[at.clamp(0, len(packed))] >> bit_at % 32 & ((1 << bit) - 1)
    if scales is None or zeros is None:
        signed = (codes ^ 1 << 15) - (1 << 15)
        values = signed.short().view(dtype or torch.float16)
    else:
        values = (codes - zeros[..., None].float()) * scales[..., None].float()
        values = values.to(scales.dtype)
    return from_tiles(values.where(is_set, 0), num_tokens, head_dim, value)


def sparse_matmul_reference(
    x: Tensor, dense: Tensor, groups: int = 1, value: bool = False
) -> Tensor:
    """The products with a reconstructed matrix in float64: ``x · keysᵀ`` or ``x · values``.

    x: ``[heads·groups, n, head_dim]`` for keys, ``[heads·groups, n, tokens]`` for values.
    """
    each = dense.double().repeat_interleave(groups, 0)
    return x.double() @ (each if value else each.transpose(1, 2))
