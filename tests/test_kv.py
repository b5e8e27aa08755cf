# SPDX-License-Identifier: MIT
"""The sparse key-value container: compression bit for bit, products, edges, and mistakes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import DEVICES, assert_same

from quantgemm import kv
from quantgemm.kv import reference as ref

Tensor = torch.Tensor
HALVES = [torch.float16, torch.bfloat16]


def cache(
    heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Tensor:
    """Normal values with channels of other sizes and one with a large mean."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, tokens, dim, generator=g)
    x *= torch.randn(dim, generator=g).mul(0.5).exp()
    x[..., 7] += 9
    return x.to(dtype)


def compress(x: Tensor, sparsity: float, bits: int, value: bool) -> kv.Container:
    return (kv.compress_values if value else kv.compress_keys)(x, sparsity, bits)


def decode(c: kv.Container, like: Tensor, bits: int, value: bool) -> Tensor:
    return kv.reconstruct_sparse_matrix(
        *c, like.shape[1], like.shape[2], bits, value, dtype=like.dtype
    )


def assert_same_container(got: Any, want: Any) -> None:
    names = ("bitmaps", "tile_offsets", "packed", "scales", "zeros")
    for name, a, b in zip(names, got, want, strict=True):
        if a is None:
            assert b is None or b.numel() == 0, name
        else:
            assert_same(a, b.to(a.device))


def product(
    x: Tensor, c: kv.Container, tokens: int, dim: int, groups: int, bits: int, value: bool
) -> Tensor:
    if value:
        return kv.sparse_value_spmm(x, *c, head_dim=dim, groups=groups, bits=bits)
    return kv.sparse_key_spmm(x, *c, num_tokens=tokens, groups=groups, bits=bits)


def assert_close(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """float32 sums of `terms` in any order, then one rounding to got's dtype."""
    eps = torch.finfo(got.dtype).eps
    error = (got.cpu().double() - want.cpu()).abs()
    assert error.isfinite().all()
    bound = eps * want.cpu().abs() + 1e-5 * terms.cpu() + torch.finfo(got.dtype).tiny
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [False, True], ids=["key", "value"])
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("heads", "tokens", "dim", "sparsity"),
    [
        (2, 256, 128, 0.5),
        (3, 1, 64, 0.0),
        (1, 19, 256, 0.95),
        (2, 111, 128, 0.7),
        (1, 989, 64, 0.3),
        (2, 70, 256, 0.0),  # 16 bits: more shared memory than a block has unasked
    ],
)
def test_compression_is_that_of_the_reference(
    heads: int,
    tokens: int,
    dim: int,
    sparsity: float,
    dtype: torch.dtype,
    bits: int,
    value: bool,
    device: str,
) -> None:
    x = cache(heads, tokens, dim, dtype).to(device)
    got = compress(x, sparsity, bits, value)
    assert_same_container(got, ref.compress(x, kv.kept_values(sparsity, dim), bits, value))
    # And back: the pruned positions exactly, the values within half a step and their rounding.
    pruned, decoded = kv.prune_keys(x, sparsity), decode(got, x, bits, value)
    if bits == 16:
        assert_same(decoded, pruned)
        return
    assert got.scales is not None
    step = ref.from_tiles(got.scales[..., None].expand(-1, -1, 64).float(), tokens, dim, value)
    error = (decoded.float() - pruned.float()).abs()
    bound = step.abs() / 2 + 4 * torch.finfo(dtype).eps * pruned.float().abs() + 1e-6
    assert (error <= bound.where(pruned != 0, 0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [False, True], ids=["key", "value"])
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("heads", "groups", "n", "tokens", "dim"),
    [
        (2, 4, 1, 256, 128),
        (1, 1, 8, 130, 128),
        (2, 8, 1, 1, 64),
        (3, 3, 2, 63, 256),
        (1, 16, 1, 989, 128),
        (2, 5, 7, 111, 64),
        (1, 4, 1, 4200, 128),
    ],
)
def test_products(
    heads: int,
    groups: int,
    n: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    bits: int,
    value: bool,
    device: str,
) -> None:
    x = cache(heads, tokens, dim, dtype, seed=tokens)
    c = compress(x, 0.5, bits, value)
    g = torch.Generator().manual_seed(1)
    length = tokens if value else dim
    query = torch.randn(heads * groups, n, length, generator=g).to(dtype)
    dense = decode(c, x, bits, value)
    want = kv.sparse_matmul_reference(query, dense, groups, value)
    terms = kv.sparse_matmul_reference(query.abs(), dense.abs(), groups, value)
    c = kv.Container(*(t if t is None else t.to(device) for t in c))
    got = product(query.to(device), c, tokens, dim, groups, bits, value)
    assert got.shape == want.shape and got.dtype == dtype
    assert_close(got, want, terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("dtype", HALVES)
def test_pruning_keeps_exactly_k(sparsity: float, dtype: torch.dtype, device: str) -> None:
    """The original kept one too many; equal magnitudes are a case of their own."""
    x = cache(2, 70, 128, dtype).to(device)
    x[0, :20] = x[0, :20].sign()  # all equal: the first ones stay
    x[1, 3], x[1, 4, ::3] = 0, 0
    keep = kv.kept_values(sparsity, 128)
    assert keep == round((1 - sparsity) * 128)
    pruned = kv.prune_values(x, sparsity)
    count = (pruned != 0).sum(-1)
    assert torch.equal(count, (x != 0).sum(-1).clamp(max=keep))
    assert (pruned[0, :20, keep:] == 0).all()
    smallest = pruned.abs().where(pruned != 0, torch.inf).amin(-1)
    largest_gone = x.abs().where(pruned == 0, 0).amax(-1)
    assert (smallest >= largest_gone).all()
    for value in (False, True):
        c = compress(x, sparsity, 16, value)
        assert_same(decode(c, x, 16, value), pruned)
        bits_set = ref.to_tiles(pruned, value) != 0
        assert_same(
            ((c.bitmaps[..., None] >> torch.arange(63, -1, -1).to(device)) & 1).bool(), bits_set
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [False, True], ids=["key", "value"])
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_gaps_in_tiles(bits: int, value: bool, device: str) -> None:
    """Tiles with 30 to 64 zeros side by side anywhere, beside tiles without; NaN in one of two."""
    x = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(11)).half()
    tiles = x.transpose(1, 2) if not value else x
    for i in range(128):
        zeros = (30, 31, 32, 33, 48, 64)[i % 6]
        first = i // 2 % (65 - zeros)
        tiles[0, i, first : first + zeros] = 0
        tiles[0, i, 127 - first : 128 - first + i % 40] = 0
    x[1, 70, 5] = torch.nan
    for sparsity in (0.0, 0.6):
        got = compress(x.to(device), sparsity, bits, value)
        assert_same_container(got, ref.compress(x, kv.kept_values(sparsity, 128), bits, value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [False, True], ids=["key", "value"])
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("dim", "sparsity"), [(128, 0.5), (128, 0.0), (256, 0.7), (256, 0.0)])
def test_blocks_with_what_is_no_usual_number(
    dim: int, sparsity: float, dtype: torch.dtype, bits: int, value: bool, device: str
) -> None:
    """They have a loop of their own, for all tiles of a block: the second and the last one here."""
    x = cache(1, 200, dim, dtype)
    x[0, 65, 3], x[0, 70, 9], x[0, 70, 99], x[0, 199, 60] = math.nan, math.inf, -math.inf, math.nan
    x[0, 66, :4], x[0, 67, ::3], x[0, 69], x[0, 71, 5] = 0, 1.5, -0.25, torch.finfo(dtype).max
    x = x.to(device)
    got = compress(x, sparsity, bits, value)
    assert_same_container(got, ref.compress(x, kv.kept_values(sparsity, dim), bits, value))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", HALVES)
def test_tiles_of_equal_values_are_exact(dtype: torch.dtype, bits: int, device: str) -> None:
    """0.4 decoded to 0.0 in the original."""
    smallest = torch.tensor([1], dtype=torch.int16).view(dtype)
    for number in (0.4, -0.4, 1e-3, 3e4, -7.0, float(smallest)):
        x = torch.full((1, 100, 64), number, dtype=dtype, device=device)
        x[0, 1::3, ::5] = 0
        for value in (False, True):
            c = compress(x, 0.0, bits, value)
            assert_same(decode(c, x, bits, value), x)
            query = torch.zeros(1, 1, 100 if value else 64, dtype=dtype, device=device)
            query[0, 0, 2] = 1
            out = product(query, c, 100, 64, 1, bits, value)[0, 0]
            assert_same(out, x[0, 2] if value else x[0, :, 2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [False, True], ids=["key", "value"])
@pytest.mark.parametrize("bits", [2, 4])
def test_four_bits_and_every_number_of_codes(bits: int, value: bool, device: str) -> None:
    """0 to 64 values in a tile, so that its codes end anywhere in a word; all codes occur."""
    x = torch.zeros(1, 64, 64)
    levels = 2**bits
    for i in range(64):
        x[0, :i, i] = torch.arange(i) % levels + 1.0
    x = (x.transpose(1, 2) if value else x).half().contiguous().to(device)
    c = compress(x, 0.0, bits, value)
    counts = (c.tile_offsets[0].diff()).tolist()
    assert counts == [math.ceil(i * bits / 32) for i in range(63)]
    assert int(c.tile_offsets[0, 63]) + math.ceil(63 * bits / 32) == len(c.packed)
    decoded = decode(c, x, bits, value)
    assert ((decoded - x).abs() <= 0.5).all() and torch.equal(decoded != 0, x != 0)
    query = torch.eye(64, device=device, dtype=torch.float16).view(8, 8, 64)
    for rows in query:
        got = product(rows[None], c, 64, 64, 1, bits, value)
        want = rows.float() @ (decoded[0].float() if value else decoded[0].float().T)
        assert_same(got[0].float(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_and_values_of_different_widths(device: str) -> None:
    """A whole attention: 4-bit keys, 2-bit values, any number of rows, against float64."""
    k, v = cache(2, 301, 128).to(device), cache(2, 301, 128, seed=1).to(device)
    keys, values = kv.compress_keys(k, 0.5, 4), kv.compress_values(v, 0.7, 2)
    dense_k, dense_v = decode(keys, k, 4, False), decode(values, v, 2, True)
    for n in range(1, 9):
        query = torch.randn(8, n, 128, device=device).half()
        logits = kv.sparse_key_spmm(query, *keys, num_tokens=301, groups=4, bits=4)
        scores = (logits.float() / 128**0.5).softmax(-1).half()
        out = kv.sparse_value_spmm(scores, *values, head_dim=128, groups=4, bits=2).double()
        want = kv.sparse_matmul_reference(query, dense_k, 4) / 128**0.5
        want = kv.sparse_matmul_reference(want.softmax(-1), dense_v, 4, True)
        error = (out - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
        assert error.mean() <= 2e-3 and error.max() <= 6e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 4, 16])
def test_empty_tiles_rows_and_contexts(bits: int, device: str) -> None:
    zeros = torch.zeros(2, 70, 128, dtype=torch.float16, device=device)
    for value in (False, True):
        c = compress(zeros, 0.5, bits, value)
        assert len(c.packed) == 0 and not c.bitmaps.any()
        query = torch.ones(2, 1, 70 if value else 128, dtype=torch.float16, device=device)
        assert not product(query, c, 70, 128, 1, bits, value).any()
        empty = compress(zeros[:, :0], 0.5, bits, value)
        assert empty.bitmaps.shape == (2, 0) and len(empty.packed) == 0
        got = product(query[..., : 0 if value else 128], empty, 0, 128, 1, bits, value)
        assert got.shape == (2, 1, 128 if value else 0) and not got.any()
        assert product(query[:, :0], c, 70, 128, 1, bits, value).shape[1] == 0
        assert compress(zeros[:0], 0.5, bits, value).bitmaps.shape == (0, 256)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 4, 16])
@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity(dtype: torch.dtype, bits: int, device: str) -> None:
    x = cache(1, 130, 64, dtype)
    x[0, 65, 3], x[0, 70, 9], x[0, 129, 60] = math.nan, math.inf, -math.inf
    for value in (False, True):
        c = compress(x.to(device), 0.5, bits, value)
        assert_same_container(c, ref.compress(x, 32, bits, value))
        decoded = decode(c, x, bits, value).cpu()
        bad = ~ref.to_tiles(x, value).isfinite().all(-1)
        got_bad = ~ref.to_tiles(decoded, value).isfinite().all(-1)
        assert torch.equal(bad, got_bad)
        # Through the product: whatever meets a bad value is bad, and nothing else.
        query = torch.ones(1, 1, 130 if value else 64, dtype=dtype)
        out = product(query.to(device), c, 130, 64, 1, bits, value).cpu()
        want = kv.sparse_matmul_reference(query, decoded, 1, value)
        assert torch.equal(out.isfinite(), want.isfinite())
    query = torch.ones(1, 2, 64, dtype=dtype)
    query[0, 1, 5] = math.nan
    c = kv.compress_keys(cache(1, 130, 64, dtype).to(device), 0.0, bits)
    out = kv.sparse_key_spmm(query.to(device), *c, num_tokens=130, bits=bits)
    assert out[0, 0].isfinite().all() and out[0, 1].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 4])
def test_extreme_tiles(bits: int, dtype: torch.dtype, device: str) -> None:
    """Values far from zero (a large zero point), subnormal ones, and the largest there are."""
    g = torch.Generator().manual_seed(0)
    largest = torch.finfo(dtype).max
    x = torch.randn(1, 64, 64, generator=g)
    x[0, :, :8] = 1000 + x[0, :, :8]
    x[0, :, 8:16] *= 1e-7 if dtype == torch.float16 else 1e-40
    x[0, :, 16:24] = torch.rand(64, 8, generator=g) * largest * 0.99 - largest * 0.5
    x = x.to(dtype).to(device)
    for value in (False, True):
        c = compress(x, 0.0, bits, value)
        assert_same_container(c, ref.compress(x, 64, bits, value))
        if value:
            continue
        decoded = decode(c, x, bits, value)
        assert decoded.isfinite().all()
        assert c.scales is not None
        step = ref.from_tiles(c.scales[..., None].expand(-1, -1, 64).float(), 64, 64, value)
        error = (decoded.float() - x.float()).abs()
        assert (error <= step.abs() / 2 + 4 * torch.finfo(dtype).eps * x.float().abs() + 1e-7).all()
        query = torch.zeros(1, 1, 64, dtype=dtype, device=device)
        query[0, 0, 3] = 1
        got = kv.sparse_key_spmm(query, *c, num_tokens=64, bits=bits)[0, 0].float()
        # A code less a zero beyond what the dtype counts exactly may be rounded once more.
        want = decoded[0, :, 3].float()
        assert ((got - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs()).all()


def test_tiles_one_by_one() -> None:
    """dequantize_tile, the reader's version, says what the vectorised one says."""
    for bits, value, dtype in itertools.product((2, 4, 16), (False, True), HALVES):
        x = cache(1, 70, 64, dtype)
        c = compress(x, 0.6, bits, value)
        tiles = ref.to_tiles(decode(c, x, bits, value), value)
        for i in range(0, tiles.shape[1], 17):
            scale = 1.0 if c.scales is None else float(c.scales[0, i])
            zero = 0.0 if c.zeros is None else float(c.zeros[0, i])
            words = c.packed[int(c.tile_offsets[0, i]) :]
            got = kv.dequantize_tile(c.bitmaps[0, i], words, scale, zero, bits, dtype)
            assert_same(got, tiles[0, i])
    assert ref.from_tiles(ref.to_tiles(x, True), 70, 64, True).equal(x)


def test_layout() -> None:
    """Where things lie, spelled out: tiles, the top bit first, the lowest codes first."""
    x = torch.zeros(1, 128, 128, dtype=torch.float16)
    x[0, 64, 5], x[0, 66, 5], x[0, 67, 5] = 1, 3, 2
    bitmaps, offsets, packed, scales, zeros = kv.convert_key_batched_quant(x)
    tile = 1 * 128 + 5  # token block 1, channel 5
    assert bitmaps.nonzero().tolist() == [[0, tile]]
    assert int(bitmaps[0, tile]) & (1 << 64) - 1 == 0b1011 << 60
    assert packed.tolist() == [
        0 | 3 << 2 | 1 << 4
    ]  # scale 2/3: codes of 1, 3, 2 are 0, 3 and 1 or 2
    assert offsets[0, tile] == 0 and offsets[0, tile + 1] == 1 and offsets[0, tile - 1] == 0
    assert scales[0, tile] == torch.tensor(2 / 3).half() and zeros[0, tile] == -2
    bitmaps, *_ = kv.convert_value_batched_quant(x)
    # token block 1, column block 0, tokens 0, 2, 3 of the block
    assert bitmaps.nonzero()[:, 1].tolist() == [128, 130, 131]
    assert int(bitmaps[0, 128]) == 1 << (63 - 5)


@pytest.mark.parametrize("device", DEVICES)
def test_mustafar_names_and_arguments(device: str) -> None:
    k, v = cache(2, 200, 128).to(device), cache(2, 200, 128, seed=2).to(device)
    k, v = kv.prune_keys(k, 0.5), kv.prune_values(v, 0.5)
    query = torch.randn(8, 8, 128, device=device).half()
    for bit in (2, 4):
        bitmaps, offsets, packed, scales, zeros = kv.convert_key_batched_quant(k, bit)
        args = (bitmaps, packed, offsets, scales, zeros)
        logits = kv.mustafar_key_formulation_quant(*args, query, 200, 128, 8, 4, bit, 32 // bit)
        dense = kv.reconstruct_sparse_matrix(bitmaps, offsets, packed, scales, zeros, 200, 128, bit)
        want = kv.sparse_matmul_reference(query, dense, 4)
        assert_close(logits, want, kv.sparse_matmul_reference(query.abs(), dense.abs(), 4))

        scores = logits.float().softmax(-1).half()
        bitmaps, offsets, packed, scales, zeros = kv.convert_value_batched_quant(v, bit)
        args = (bitmaps, packed, offsets, scales, zeros)
        sizes = (128, 200, 8, 4, bit, 32 // bit)
        out = kv.mustafar_value_formulation_quant(*args, scores, *sizes)
        workspace = torch.empty(1, device=device)
        same = kv.mustafar_value_formulation_quant(*args, scores, workspace, *sizes)
        named = dict(zip(kv.mustafar.VALUE_SIZES, sizes, strict=True))
        by_name = kv.mustafar_value_formulation_quant(*args, scores, **named)
        assert torch.equal(out, same) and torch.equal(out, by_name)
        dense = kv.reconstruct_sparse_matrix(
            *args[:1], offsets, packed, scales, zeros, 200, 128, bit, True
        )
        want = kv.sparse_matmul_reference(scores, dense, 4, True)
        assert_close(out, want, kv.sparse_matmul_reference(scores, dense.abs(), 4, True))
    bitmaps, offsets, packed = kv.convert_key_batched(k)
    logits = kv.mustafar_key_formulation(bitmaps, packed, offsets, query, 200, 128, 8, 4)
    terms = kv.sparse_matmul_reference(query.abs(), k.abs(), 4)
    assert_close(logits, kv.sparse_matmul_reference(query, k, 4), terms)
    bitmaps, offsets, packed = kv.convert_value_batched(v)
    out = kv.mustafar_value_formulation(bitmaps, packed, offsets, scores, 128, 200, 8, 4)
    want = kv.sparse_matmul_reference(scores, v, 4, True)
    assert_close(out, want, kv.sparse_matmul_reference(scores, v.abs(), 4, True))


def test_bytes() -> None:
    """Bits per element of docs/sparse-kv.md: bitmap 1, offset and fit 0.5 each, and the codes."""
    x = torch.randn(2, 4096, 128, generator=torch.Generator().manual_seed(0)).half()
    most = {(0.5, 2): 3.26, (0.7, 2): 2.94, (0.5, 4): 4.28, (0.7, 4): 3.47, (0.5, 16): 9.77}
    for (sparsity, bits), bound in most.items():
        for value in (False, True):
            c = compress(x, sparsity, bits, value)
            assert c.num_bytes * 8 / x.numel() <= bound, (sparsity, bits, value)


def test_codes_outside_are_not_read() -> None:
    """Offsets are data: wrong ones give wrong numbers and no fault."""
    x = cache(1, 130, 128)
    for bits, value in itertools.product((2, 4, 16), (False, True)):
        c = compress(x, 0.5, bits, value)
        query = torch.ones(1, 1, 130 if value else 128, dtype=torch.float16)
        for shift in (1 << 29, -(1 << 29), len(c.packed)):
            broken = c._replace(tile_offsets=c.tile_offsets + shift)
            assert product(query, broken, 130, 128, 1, bits, value).shape[0] == 1


def good_call(device: str = "cpu") -> dict[str, Any]:
    c = kv.compress_keys(cache(2, 100, 128).to(device), 0.5, 2)
    query = torch.zeros(8, 1, 128, dtype=torch.float16, device=device)
    return {"query": query, **c._asdict(), "num_tokens": 100, "groups": 4, "bits": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, ValueError, "bits: expected 2, 4 or 16"),
        ({"groups": 3}, ValueError, "query: first dimension 8 .* not a multiple of groups = 3"),
        ({"groups": 0}, ValueError, "groups: expected"),
        ({"groups": 8}, ValueError, r"bitmaps: expected shape \[1, 256\].* got \[2, 256\]"),
        ({"num_tokens": 300}, ValueError, r"bitmaps: expected shape \[2, 640\]"),
        ({"num_tokens": -1}, ValueError, "num_tokens: expected at least 0, got -1"),
        (
            {"query": torch.zeros(8, 9, 128).half()},
            ValueError,
            "query: expected at most 8 rows .* got 9",
        ),
        ({"query": torch.zeros(8, 1, 96).half()}, ValueError, "64, 128 or 256, got 96"),
        ({"query": torch.zeros(8, 128).half()}, ValueError, "query: expected three dimensions"),
        (
            {"query": torch.zeros(8, 1, 128)},
            TypeError,
            "query: .*torch.bfloat16, got torch.float32",
        ),
        (
            {"query": torch.zeros(8, 1, 128).bfloat16()},
            TypeError,
            "scales: expected torch.bfloat16",
        ),
        ({"bitmaps": torch.zeros(2, 256)}, TypeError, "bitmaps: expected torch.int64"),
        ({"tile_offsets": torch.zeros(2, 256)}, TypeError, "tile_offsets: expected torch.int32"),
        ({"packed": torch.zeros(9).half()}, TypeError, "packed: expected torch.int32"),
        ({"packed": torch.zeros(3, 3).int()}, ValueError, "packed: expected one dimension"),
        ({"scales": None}, ValueError, "scales: expected a tensor"),
        ({"zeros": torch.zeros(2, 255).half()}, ValueError, r"zeros: expected shape \[2, 256\]"),
        ({"bits": 16}, ValueError, "scales: expected None"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = good_call()
    kv.sparse_key_spmm(**call)
    with pytest.raises(error, match=message):
        kv.sparse_key_spmm(**(call | change))


def test_mistakes_of_compression_and_of_the_old_names() -> None:
    x = cache(1, 10, 64)
    with pytest.raises(ValueError, match="x: expected a head dimension of 64, 128 or 256, got 80"):
        kv.compress_keys(torch.zeros(1, 4, 80).half(), 0.5)
    with pytest.raises(TypeError, match=r"x: .*got torch.float32"):
        kv.compress_keys(x.float(), 0.5)
    with pytest.raises(ValueError, match=r"x: expected three dimensions .* got shape \[10, 64\]"):
        kv.compress_keys(x[0], 0.5)
    with pytest.raises(ValueError, match=r"sparsity: expected 0 to 1, got 1\.5"):
        kv.compress_keys(x, 1.5)
    with pytest.raises(ValueError, match="keep: expected 0 to 64"):
        kv.sparse_kv_compress(x, 2, 65, False)
    with pytest.raises(ValueError, match="bits: expected 2, 4 or 16"):
        kv.compress_values(x, 0.5, 8)
    with pytest.raises(ValueError, match="bit: expected 2 or 4, got 16"):
        kv.convert_key_batched_quant(x, 16)
    bitmaps, offsets, packed, scales, zeros = kv.convert_key_batched_quant(x)
    args = (bitmaps, packed, offsets, scales, zeros)
    query = torch.zeros(2, 1, 64).half()
    sizes: tuple[int, int, int, int, int, int]
    for sizes, message in (
        ((10, 64, 2, 2, 2, 8), "capacity: expected 16, got 8"),
        ((10, 64, 2, 2, 3, 16), "bit: expected 2 or 4, got 3"),
        ((10, 128, 2, 2, 2, 16), "K_Global .* expected 64, got 128"),
        ((10, 64, 4, 2, 2, 16), "Batch_Size .* expected 2, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            kv.mustafar_key_formulation_quant(*args, query, *sizes)
    with pytest.raises(TypeError, match="missing arguments: capacity"):
        kv.mustafar_value_formulation_quant(*args, query, 64, 10, 2, 2, 2)
    with pytest.raises(TypeError, match="M_Global: expected an int"):
        kv.mustafar_value_formulation_quant(*args, query, None, 64.0, 10, 2, 2, 2, 16)


@pytest.mark.cuda
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """The last head of a cache of 2^31 + elements."""
    heads, tokens = 17, 1 << 20
    x = torch.zeros(heads, tokens, 128, dtype=torch.float16, device="cuda")
    x[-1].normal_()
    query = torch.randn(heads, 1, 128, device="cuda").half()
    c = kv.compress_keys(x, 0.7, 2)
    last = kv.compress_keys(x[-1:], 0.7, 2)
    assert torch.equal(c.bitmaps[-1:], last.bitmaps) and torch.equal(c.packed, last.packed)
    got = kv.sparse_key_spmm(query, *c, num_tokens=tokens, bits=2)
    want = kv.sparse_key_spmm(query[-1:].clone(), *last, num_tokens=tokens, bits=2)
    assert torch.equal(got[-1:], want) and not got[:-1].any()
