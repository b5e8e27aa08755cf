# SPDX-License-Identifier: MIT
"""The names and arguments of the Mustafar kernels, over `quantgemm.kv.ops`.

What differs from the original is what was wrong there: 2 and 4 bits for keys and for values, any
number of rows up to 8, any number of tokens, head dimensions 64, 128 and 256, tiles of equal
values kept exactly; and an error, not silence, for anything else.
"""

from __future__ import annotations

import torch

from quantgemm.kv import ops

Tensor = torch.Tensor
Quantised = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Plain = tuple[Tensor, Tensor, Tensor]


def convert_key_batched_quant(k: Tensor, bit: int = 2) -> Quantised:
    """Pruned keys ``[B, T, D]`` (zeros are what was pruned) to a container.

    Returns bitmaps int64 ``[B, tiles]``, tile_offsets int32 ``[B, tiles]`` in words, packed int32
    ``[words]``, scales and zeros ``[B, tiles]`` in k's dtype. A tile is one channel of 64 tokens.
    """
    return _convert(k, bit, False)


def convert_value_batched_quant(v: Tensor, bit: int = 2) -> Quantised:
    """`convert_key_batched_quant` for values: a tile is 64 channels of one token."""
    return _convert(v, bit, True)


def _convert(x: Tensor, bit: int, value: bool) -> Quantised:
    _expect("bit", (2, 4), bit)
    container = (ops.compress_values if value else ops.compress_keys)(x, 0.0, bit)
    assert container.scales is not None and container.zeros is not None
    return (*container[:3], container.scales, container.zeros)


def convert_key_batched(k: Tensor) -> Plain:
    """`convert_key_batched_quant` without the last step: packed holds the values' own 16 bits."""
    return ops.compress_keys(k, 0.0, 16)[:3]


def convert_value_batched(v: Tensor) -> Plain:
    """`convert_key_batched` for values."""
    return ops.compress_values(v, 0.0, 16)[:3]


def mustafar_key_formulation_quant(
    bitmaps: Tensor,
    packed_quant: Tensor,
    tile_offsets: Tensor,
    scales: Tensor,
    zeros: Tensor,
    query: Tensor,
    M_Global: int,
    K_Global: int,
    Batch_Size: int,
    num_key_value_groups: int,
    bit: int,
    capacity: int,
) -> Tensor:
    """Logits ``query · keysᵀ`` ``[Batch_Size, N, M_Global]``.

    query: ``[Batch_Size, N <= 8, K_Global]``; M_Global: tokens; K_Global: head dimension;
    Batch_Size: batch x query heads; capacity: codes in a word, 32 / bit.
    """
    _check_codes(bit, capacity)
    _check_query("query", query, Batch_Size, "K_Global", K_Global)
    return ops.sparse_key_spmm(
        query,
        bitmaps,
        tile_offsets,
        packed_quant,
        scales,
        zeros,
        num_tokens=M_Global,
        groups=num_key_value_groups,
        bits=bit,
    )


def mustafar_value_formulation_quant(
    bitmaps: Tensor,
    packed_quant: Tensor,
    tile_offsets: Tensor,
    scales: Tensor,
    zeros: Tensor,
    scores: Tensor,
    *sizes: Tensor | int | None,
    Reduction_Workspace: Tensor | None = None,
    **named: int,
) -> Tensor:
    """Attention's output ``scores · values`` ``[Batch_Size, N, M_Global]``.

    After scores ``[Batch_Size, N <= 8, K_Global]`` come M_Global (head dimension), K_Global
    (tokens), Batch_Size, num_key_value_groups, bit and capacity, by place or by name. The original
    has a Reduction_Workspace before M_Global: it may stand there and is not needed.
    """
    head_dim, tokens, batch, groups, bit, capacity = _sizes(VALUE_SIZES, sizes, named)
    _check_codes(bit, capacity)
    _check_query("scores", scores, batch, "K_Global", tokens)
    return ops.sparse_value_spmm(
        scores,
        bitmaps,
        tile_offsets,
        packed_quant,
        scales,
        zeros,
        head_dim=head_dim,
        groups=groups,
        bits=bit,
    )


def mustafar_key_formulation(
    bitmaps: Tensor,
    packed: Tensor,
    tile_offsets: Tensor,
    query: Tensor,
    M_Global: int,
    K_Global: int,
    Batch_Size: int,
    num_key_value_groups: int,
) -> Tensor:
    """`mustafar_key_formulation_quant` for values that are not quantised."""
    _check_query("query", query, Batch_Size, "K_Global", K_Global)
    return ops.sparse_key_spmm(
        query,
        bitmaps,
        tile_offsets,
        packed,
        num_tokens=M_Global,
        groups=num_key_value_groups,
        bits=16,
    )


def mustafar_value_formulation(
    bitmaps: Tensor,
    packed: Tensor,
    tile_offsets: Tensor,
    scores: Tensor,
    *sizes: Tensor | int | None,
    Reduction_Workspace: Tensor | None = None,
    **named: int,
) -> Tensor:
    """`mustafar_value_formulation_quant` for values that are not quantised."""
    head_dim, tokens, batch, groups = _sizes(VALUE_SIZES[:4], sizes, named)
    _check_query("scores", scores, batch, "K_Global", tokens)
    return ops.sparse_value_spmm(
        scores, bitmaps, tile_offsets, packed, head_dim=head_dim, groups=groups, bits=16
    )


VALUE_SIZES = (
    "M_Global",
    "K_Global",
    "Batch_Size",
    "num_key_value_groups",
    "bit",
    "capacity",
)


def _sizes(
    names: tuple[str, ...], places: tuple[Tensor | int | None, ...], named: dict[str, int]
) -> list[int]:
    """The sizes by name, after a workspace that may stand before them."""
    if places and (places[0] is None or isinstance(places[0], Tensor)):
        places = places[1:]
    given = dict(zip(names, places, strict=False))
    if len(places) > len(names) or given.keys() & named.keys() or named.keys() - set(names):
        raise TypeError(f"expected the sizes {', '.join(names)} once each")
    given.update(named)
    if missing := [name for name in names if name not in given]:
        raise TypeError(f"missing arguments: {', '.join(missing)}")
    numbers = [given[name] for name in names]
    for name, number in zip(names, numbers, strict=True):
        if not isinstance(number, int):
            raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
    return [number for number in numbers if isinstance(number, int)]


def _expect(name: str, expected: int | tuple[int, ...], got: int) -> None:
    if got not in (expected if isinstance(expected, tuple) else (expected,)):
        wanted = " or ".join(map(str, expected)) if isinstance(expected, tuple) else expected
        raise ValueError(f"{name}: expected {wanted}, got {got}")


def _check_codes(bit: int, capacity: int) -> None:
    _expect("bit", (2, 4), bit)
    _expect("capacity", 32 // bit, capacity)


def _check_query(name: str, x: Tensor, batch: int, size_name: str, size: int) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name}: expected three dimensions, got shape {list(x.shape)}")
    _expect(f"Batch_Size (first dimension of {name})", x.shape[0], batch)
    _expect(f"{size_name} (last dimension of {name})", x.shape[2], size)
