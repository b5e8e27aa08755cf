# SPDX-License-Identifier: MIT
"""Decoding with a pruned and quantised key-value cache: bytes, error, and the steps by hand.

First the container of `quantgemm.kv`, then `SparseKVCache`, where attention is one kernel.

    python examples/04_sparse_kv_decode.py

No downloads: keys, values and queries are random with the habits of real ones (channels of
different size, a few with a large mean, queries that look for something). Uses a GPU if there is
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import quantgemm
from quantgemm import SparseKVCache, kv

DEVICE = "cuda" if quantgemm.build_info().cuda and torch.cuda.is_available() else "cpu"
BATCH, HEADS, GROUPS, DIM = 1, 4, 4, 128
TOKENS = 32768 if DEVICE == "cuda" else 4096
WINDOW = 128  # the latest tokens stay as they are


def make_cache() -> tuple[torch.Tensor, torch.Tensor]:
    """k and v ``[BATCH·HEADS, TOKENS, DIM]``, float16."""
    torch.manual_seed(0)
    size = torch.randn(DIM).mul(0.45).exp()
    mean = torch.randn(DIM) * 0.35
    mean[torch.randperm(DIM)[:3]] = 6.0
    mixing = torch.randn(24, DIM) / 24**0.5
    latent = torch.randn(BATCH * HEADS, TOKENS, 24)
    k = mean + size * (0.8 * latent @ mixing + 0.6 * torch.randn(BATCH * HEADS, TOKENS, DIM))
    v = 0.6 * latent @ torch.randn(24, DIM) / 24**0.5 + 0.8 * torch.randn(k.shape)
    return k.half().to(DEVICE), v.half().to(DEVICE)


def make_query(k: torch.Tensor) -> torch.Tensor:
    """One new token for every query head; each likes one token of the past: ``[.., 1, DIM]``."""
    centred = k.float() - k.float().mean(1, keepdim=True)
    liked = torch.randint(0, TOKENS - WINDOW, (BATCH * HEADS * GROUPS,), device=DEVICE)
    heads = torch.arange(BATCH * HEADS, device=DEVICE).repeat_interleave(GROUPS)
    direction = centred[heads, liked]
    query = torch.randn(direction.shape, device=DEVICE) + 1.2 * direction
    return query.half()[:, None]


def dense_attention(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In float32, over dense keys and values."""
    k, v = (x.float().repeat_interleave(GROUPS, 0) for x in (k, v))
    return (query.float() @ k.transpose(1, 2) / DIM**0.5).softmax(-1) @ v


def sparse_attention(
    query: torch.Tensor,
    keys: kv.Container,
    values: kv.Container,
    window: tuple[torch.Tensor, torch.Tensor],
    bits: tuple[int, int],
) -> torch.Tensor:
    """The compressed past and the dense window share one softmax."""
    past = TOKENS - WINDOW
    scaled = query / DIM**0.5
    logits = kv.sparse_key_spmm(scaled, *keys, num_tokens=past, groups=GROUPS, bits=bits[0])
    recent_k, recent_v = (x.repeat_interleave(GROUPS, 0) for x in window)
    recent = scaled @ recent_k.transpose(1, 2)
    scores = torch.cat([logits, recent], -1).softmax(-1)
    old, new = scores.split([past, WINDOW], -1)
    out = kv.sparse_value_spmm(old, *values, head_dim=DIM, groups=GROUPS, bits=bits[1])
    return out + new @ recent_v


def microseconds(call: Callable[[], Any], repeats: int) -> float:
    def wait() -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats * 1e6


def main() -> None:
    k, v = make_cache()
    query = make_query(k)
    past_k, past_v = k[:, :-WINDOW].contiguous(), v[:, :-WINDOW].contiguous()
    window = (k[:, -WINDOW:], v[:, -WINDOW:])
    want = dense_attention(query, k, v)

    # One tile, read by hand: 64 tokens of one channel.
    keys = kv.compress_keys(past_k, sparsity=0.7, bits=2)
    assert keys.scales is not None and keys.zeros is not None
    tile = kv.dequantize_tile(
        keys.bitmaps[0, 5],
        keys.packed[keys.tile_offsets[0, 5] :],
        keys.scales[0, 5],
        keys.zeros[0, 5],
    )
    dense = kv.reconstruct_sparse_matrix(*keys, TOKENS - WINDOW, DIM, bit=2)
    assert torch.equal(tile, dense[0, :64, 5].cpu())
    print(f"channel 5 of the first 64 tokens keeps {(tile != 0).sum()} values, for instance")
    print("  ", [round(float(x), 3) for x in tile[:12]])

    print(f"\n{DEVICE}, {TOKENS} tokens, {HEADS} key-value heads of {DIM}, {GROUPS} queries each")
    print("container               bits/element   of fp16   error of the output   µs per step")
    for sparsity, key_bits, value_bits in (
        (0.5, 16, 16),
        (0.5, 4, 4),
        (0.7, 4, 4),
        (0.5, 4, 2),
        (0.5, 2, 2),
        (0.7, 2, 2),
    ):
        keys = kv.compress_keys(past_k, sparsity, key_bits)
        values = kv.compress_values(past_v, sparsity, value_bits)
        bits = (key_bits, value_bits)
        out = sparse_attention(query, keys, values, window, bits).float()
        error = float((out - want).norm() / want.norm())
        stored = (keys.num_bytes + values.num_bytes) * 8 / (2 * past_k.numel())
        taken = microseconds(
            lambda a=keys, b=values, c=bits: sparse_attention(query, a, b, window, c), 5
        )
        name = f"{sparsity:.0%} pruned, {key_bits:2d} + {value_bits:2d} bits"
        print(f"{name:24s}{stored:12.2f}{stored / 16:10.3f}{error:22.3f}{taken:14.0f}")

    one = query.view(BATCH, HEADS * GROUPS, DIM)
    print("\nSparseKVCache, the window and four sinks as they are")
    for form, sparsity in (
        ("dense4", 0.0),
        ("dense2", 0.0),
        ("bitmap4", 0.5),
        ("bitmap2", 0.5),
        ("bitmap2", 0.7),
        ("4of8_2", 0.5),
    ):
        cache = SparseKVCache(
            1, HEADS, DIM, form, sparsity=sparsity, max_tokens=TOKENS, batch=BATCH, device=DEVICE
        )
        cache.append(0, *(x.view(BATCH, HEADS, TOKENS, DIM) for x in (k, v)))
        cache.advance(TOKENS)
        out = cache.attend(0, one)[0].view(want.shape).float()
        error = float((out - want).norm() / want.norm())
        pages = cache.key_pages.numel() + cache.value_pages.numel()
        stored = pages * 8 / (2 * cache.page_table.numel() * 64 * HEADS * DIM)
        taken = microseconds(lambda c=cache: c.attend(0, one), 5)
        name = f"{form}, {sparsity:.0%} pruned" if form.startswith("bitmap") else form
        print(f"{name:24s}{stored:12.2f}{stored / 16:10.3f}{error:22.3f}{taken:14.0f}")
    print("\nWhat pruning costs depends on the model: measure it on yours (docs/sparse-kv.md).")


if __name__ == "__main__":
    main()
