# SPDX-License-Identifier: MIT
"""The native key-value cache: attention against float64, appending in any portions, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES, assert_same
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from quantgemm import SparseKVCache, ops
from quantgemm.kv.pages import FORMATS, PAGE, unpack_pages

Tensor = torch.Tensor
HALVES = [torch.float16, torch.bfloat16]
SPARSE = ["bitmap2", "bitmap4", "4of8_2", "4of8_4"]
MIXED = [
    f"{key}/{value}"
    for key in FORMATS
    for value in FORMATS
    if FORMATS[key].kind != FORMATS[value].kind
]


def formats(form: str) -> dict[str, str]:
    """One format, or that of keys and that of values."""
    key, _, value = form.partition("/")
    return {"key_format": key, "value_format": value or key}


def tokens_of(
    batch: int, heads: int, count: int, dim: int, dtype: torch.dtype = torch.float16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values with channels of other sizes and one with a large mean."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, heads, count, dim, generator=g)
    k = k * torch.randn(dim, generator=g).mul(0.45).exp()
    k[..., 7] += 6
    return k.to(dtype), v.to(dtype)


def exact_attention(cache: SparseKVCache, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """float64 over what the cache holds; query [batch, query heads(, tokens), head_dim]."""
    several = query.unflatten(1, (query.shape[1], -1)) if query.dim() == 3 else query
    tokens = several.shape[2]
    outs, lses = [], []
    for b in range(cache.batch):
        k, v = (x.double().cpu() for x in cache.dense(layer, b))
        q = several[b].double().cpu().reshape(len(k), -1, tokens, cache.head_dim)
        logits = q @ k[:, None].transpose(2, 3) * cache.head_dim**-0.5
        behind = torch.arange(k.shape[1] - tokens, k.shape[1])[:, None]  # each sees itself
        logits.masked_fill_(torch.arange(k.shape[1]) > behind, -torch.inf)
        outs.append((logits.softmax(-1) @ v[:, None]).flatten(0, 1))
        lses.append(logits.logsumexp(-1).flatten(0, 1))
    out, lse = torch.stack(outs), torch.stack(lses)
    return out.view(query.shape), lse.view(query.shape[:-1])


def assert_attention(cache: SparseKVCache, query: Tensor) -> None:
    out, lse = cache.attend(0, query)
    want, want_lse = exact_attention(cache, 0, query)
    got = out.double().cpu()
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    limit = 1 if query.dtype == torch.float16 else 8  # the rounding of out alone is 8 times larger
    assert error.mean() <= 1e-3 * limit and error.max() <= 2e-3 * limit, (error.mean(), error.max())
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=-1)
    assert cosine.min() >= 1 - 1e-5 * limit
    torch.testing.assert_close(lse.double().cpu(), want_lse, rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("dense2", "dense2"), ("dense4", "dense2"), ("dense2", "dense4")],
        *[(form, form) for form in SPARSE],
        *[("bitmap4", "bitmap2"), ("4of8_4", "4of8_2"), ("4of8_2", "4of8_4")],
    ],
)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "count", "sinks", "window"),
    [
        (2, 4, 128, 700, 4, 128),
        (1, 1, 64, 1, 4, 64),
        (3, 16, 64, 333, 0, 0),
        (1, 9, 256, 517, 7, 100),
        (2, 2, 128, 195, 4, 128),
        (2, 2, 128, 259, 4, 128),
    ],
)
def test_attention(
    heads: int,
    groups: int,
    dim: int,
    count: int,
    sinks: int,
    window: int,
    key: str,
    value: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Ragged sequences against float64 over the same decoded cache."""
    cache = SparseKVCache(
        1,
        heads,
        dim,
        key_format=key,
        value_format=value,
        sparsity=0.7 if count == 333 else 0.5,
        centre=count == 517,
        sinks=sinks,
        window=window,
        max_tokens=1024,
        batch=3,
        device=device,
        dtype=dtype,
    )
    k, v = tokens_of(3, heads, count, dim, dtype)
    counts = torch.tensor([count, count // 2 + 1, max(1, count - 65)], device=device)
    cache.append(0, k.to(device), v.to(device), counts)
    cache.advance(count, counts)
    assert torch.equal(cache.lens, counts)
    g = torch.Generator().manual_seed(1)
    query = torch.randn(3, heads * groups, dim, generator=g).to(dtype).to(device)
    assert_attention(cache, query)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "count", "sinks", "window", "dtype"),
    [
        (2, 4, 128, 333, 4, 128, torch.float16),
        (1, 9, 64, 260, 0, 0, torch.bfloat16),
        (1, 2, 256, 250, 7, 64, torch.float16),
    ],
)
@pytest.mark.parametrize("form", MIXED)
def test_keys_and_values_of_different_kinds(
    form: str,
    heads: int,
    groups: int,
    dim: int,
    count: int,
    sinks: int,
    window: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    """All pairs: ragged sequences, some tokens one by one, one of the last three and all three."""
    options = {"sparsity": 0.7 if count == 260 else 0.5, "centre": count == 250}
    options |= {"sinks": sinks, "window": window, "max_tokens": 384, "batch": 3}
    cache = SparseKVCache(1, heads, dim, **formats(form), **options, device=device, dtype=dtype)
    k, v = (x.to(device) for x in tokens_of(3, heads, count, dim, dtype))
    counts = torch.tensor([count, count // 2 + 1, 1], device=device)
    cache.append(0, k, v, counts)
    cache.advance(count, counts)
    for i in range(3):
        cache.append(0, k[:, :, i : i + 1], v[:, :, i : i + 1])
        cache.advance(1)
    g = torch.Generator().manual_seed(1)
    query = torch.randn(3, heads * groups, 3, dim, generator=g).to(dtype).to(device)
    assert_attention(cache, query[:, :, 0])
    if window:
        assert_attention(cache, query)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense4", "dense2", "bitmap2", "4of8_4", "4of8_2/dense4"])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "count", "sinks", "window", "tokens"),
    [
        (2, 4, 128, 700, 1, 128, 5),
        (1, 7, 64, 16, 1, 64, 16),
        (2, 1, 256, 333, 1, 2, 3),
        (1, 3, 128, 90, 0, 90, 4),
        (1, 2, 64, 67, 0, 3, 3),  # all that is not packed is hidden from nobody
        (1, 2, 64, 131, 0, 3, 3),  # likewise with dense keys
    ],
)
def test_several_tokens_ask(
    heads: int,
    groups: int,
    dim: int,
    count: int,
    sinks: int,
    window: int,
    tokens: int,
    form: str,
    device: str,
) -> None:
    """Each of the last tokens sees those before it and itself, whatever the others would give."""
    options = {"window": window, "sinks": sinks, "max_tokens": 1024, "batch": 3}
    cache = SparseKVCache(1, heads, dim, **formats(form), **options, device=device)
    k, v = (x.to(device) for x in tokens_of(3, heads, count, dim))
    g = torch.Generator().manual_seed(1)
    query = torch.randn(3, heads * groups, tokens, dim, generator=g).half().to(device)
    # A token's own key is what it looks for: a maximum that the tokens before must not see.
    k[:, :, -tokens:] = 3 * query[:, ::groups]
    counts = torch.tensor([count, count, tokens], device=device)
    k[2], v[2] = k[2].roll(tokens, 1), v[2].roll(tokens, 1)
    cache.append(0, k, v, counts)
    cache.advance(count, counts)
    assert_attention(cache, query)
    if window > 2 * tokens:
        alone = cache.attend(0, query[:, :, -1])[0]
        torch.testing.assert_close(cache.attend(0, query)[0][:, :, -1], alone, rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value_format", ["dense4", "bitmap2"])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "tokens"), [(2, 4, 128, 5), (1, 7, 64, 16), (2, 1, 256, 3)]
)
def test_several_tokens_ask_as_each_alone(
    heads: int,
    groups: int,
    dim: int,
    tokens: int,
    value_format: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    """Bit for bit where nothing is packed: then drafts never change the text they speed up."""
    cache = SparseKVCache(
        1,
        heads,
        dim,
        key_format="dense4",
        value_format=value_format,
        window=1024,
        sinks=0,
        max_tokens=1024,
        device=device,
        dtype=dtype,
    )
    k, v = (x.to(device) for x in tokens_of(1, heads, 700, dim, dtype))
    cache.append(0, k, v)
    cache.advance(700)
    g = torch.Generator().manual_seed(1)
    query = torch.randn(1, heads * groups, tokens, dim, generator=g).to(dtype).to(device)
    for count in (16, 17, 35, 64 + tokens - 1, 321, 700):
        cache.lens.fill_(count)
        out, lse = cache.attend(0, query)
        for t in range(tokens):
            cache.lens.fill_(count - tokens + 1 + t)
            alone, its_lse = cache.attend(0, query[:, :, t])
            assert torch.equal(out[:, :, t], alone), (count, t)
            assert torch.equal(lse[:, :, t], its_lse), (count, t)


# Tokens that a cache has room for decide into how many parts a GPU cuts a context: with two heads 2
# to 8, 9 to 17 that become up to 8, and more.
ROOMS = [256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 5120]


@pytest.mark.cuda
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("groups", "dim", "tokens", "form", "dtype"),
    [
        (1, 128, 1, "dense4", torch.bfloat16),
        (4, 128, 1, "dense2", torch.float16),
        (9, 64, 1, "dense4", torch.float16),
        (16, 256, 1, "dense4", torch.bfloat16),
        (2, 128, 5, "dense4", torch.float16),
        (4, 64, 16, "dense2", torch.bfloat16),
        (3, 256, 3, "dense4", torch.float16),
        (4, 128, 2, "bitmap2", torch.float16),
        (7, 64, 1, "4of8_4", torch.bfloat16),
        (2, 256, 1, "bitmap4/bitmap2", torch.float16),
    ],
)
def test_parts_of_a_context(
    room: int, groups: int, dim: int, tokens: int, form: str, dtype: torch.dtype
) -> None:
    """A full context, one of few tokens, most of whose parts are empty, and all but one page."""
    options = {"sinks": 1, "max_tokens": room, "batch": 3, "centre": dim == 256}
    cache = SparseKVCache(1, 2, dim, **formats(form), **options, device="cuda", dtype=dtype)
    k, v = (x.cuda() for x in tokens_of(3, 2, room, dim, dtype))
    counts = torch.tensor([room, tokens, room - 65], device="cuda")
    cache.append(0, k, v, counts)
    cache.advance(room, counts)
    g = torch.Generator().manual_seed(1)
    query = torch.randn(3, 2 * groups, tokens, dim, generator=g).to(dtype).cuda()
    assert_attention(cache, query if tokens > 1 else query[:, :, 0])
    first = cache.attend(0, query)
    for _ in range(3):  # whichever block is first
        assert all(map(torch.equal, cache.attend(0, query), first))


@pytest.mark.cuda
@pytest.mark.parametrize("room", ROOMS[:10])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_is_one_launch(room: int, dim: int) -> None:
    """Blocks of a cluster add up their parts, and a query of NaN stays with its head."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no clusters of blocks")
    cache = SparseKVCache(1, 8, dim, "dense4", max_tokens=room, device="cuda")
    cache.append(0, *(x.cuda() for x in tokens_of(1, 8, room, dim)))
    cache.advance(room)
    query = torch.randn(1, 32, dim, device="cuda").half()
    query[0, 5, 3] = torch.nan
    launches, (out, lse) = kernels_of(lambda: cache.attend(0, query))
    assert len(launches) == 1, launches
    assert out[0, 5].isnan().all() and torch.isfinite(out[0].sum(1)).sum() == 31
    assert torch.isfinite(lse[0]).sum() >= 31


def kernels_of(call: Callable[[], Any]) -> tuple[list[str], Any]:
    """Names of the kernels that a call starts, and what it returns."""
    for _ in range(2):  # a process's first one may have more in it
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
            got = call()
            torch.cuda.synchronize()
    names = [event.name for event in found.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if "kernel" in name], got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "tokens", "window", "form"),
    [
        (2, 4, 128, 1, 128, "dense4"),
        (1, 16, 64, 16, 64, "dense2"),
        (3, 1, 256, 3, 2, "dense4"),  # a page takes what has just come
        (3, 1, 256, 2, 2, "dense4"),
        (2, 3, 64, 17, 64, "dense4"),
        (2, 2, 128, 5, 128, "bitmap2"),
        (1, 5, 256, 1, 0, "4of8_4"),
        (2, 2, 64, 1, 64, "dense4/bitmap2"),
        (2, 2, 128, 4, 700, "dense4"),
    ],
)
def test_rotated_on_the_way(
    heads: int,
    groups: int,
    dim: int,
    tokens: int,
    window: int,
    form: str,
    dtype: torch.dtype,
    device: str,
) -> None:
    """All bytes of the cache, and queries, as from two ops; q, k and v are parts of a product."""
    options = {"window": window, "sinks": 1, "max_tokens": 320, "batch": 2}
    mine, plain = (
        SparseKVCache(2, heads, dim, **formats(form), **options, device=device, dtype=dtype)
        for _ in range(2)
    )
    g = torch.Generator().manual_seed(1)
    angles = torch.randn(2, 2, 320, dim, generator=g).to(dtype).to(device)
    all_heads = heads * (groups + 2)
    for first in range(0, 300, tokens):
        product = torch.randn(2, tokens, all_heads * dim, generator=g).to(dtype).to(device)
        product[0, 0, dim // 3] = torch.inf
        both = product.view(2, tokens, all_heads, dim).transpose(1, 2)
        q, k, v = both.split([heads * groups, heads, heads], 1)
        cos, sin = angles[:, : 1 + first % 2, first : first + tokens]
        got = mine.append_rotated(1, q, k, v, cos, sin)
        want, turned = ops.rotary(q, k, cos, sin)
        plain.append(1, turned, v)
        assert_same(got, want)
        for cache in (mine, plain):
            cache.advance(tokens)
    for name in ("key_pages", "value_pages", "recent_keys", "recent_values"):
        assert_same(getattr(mine, name)[1], getattr(plain, name)[1])


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_rotating_and_storing_is_one_launch(tokens: int) -> None:
    """Of parts of a product, none of which is copied."""
    cache = SparseKVCache(1, 8, 128, max_tokens=256, device="cuda", dtype=torch.bfloat16)
    product = torch.randn(1, tokens, 48, 128, device="cuda").bfloat16().transpose(1, 2)
    cos, sin = torch.randn(2, 1, tokens, 128, device="cuda").bfloat16()
    q, k, v = product.split([32, 8, 8], 1)
    assert len(kernels_of(lambda: cache.append_rotated(0, q, k, v, cos, sin))[0]) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2", "dense4"])
def test_pages_hold_what_was_appended(form: str, device: str) -> None:
    """Each value within half a step, recent ones and sinks exactly; CUDA bytes as the CPU's."""
    k, v = tokens_of(2, 2, 500, 128)
    k[0, 1, 4:132, 3], v[1, 0, 80] = 0.4, -1.25  # groups of equal values are exact
    caches = []
    for where in dict.fromkeys(("cpu", device)):
        cache = SparseKVCache(1, 2, 128, form, max_tokens=512, batch=2, device=where)
        cache.append(0, k.to(where), v.to(where))
        cache.advance(500)
        caches.append(cache)
    for name in ("key_pages", "value_pages", "recent_keys", "recent_values"):
        assert_same(getattr(caches[-1], name), getattr(caches[0], name))
    bits = FORMATS[form].bits
    for b in range(2):
        dense_k, dense_v = caches[-1].dense(0, b)
        end = 4 + (500 - 4 - 128) // 128 * 128
        for got, x, groups in ((dense_k, k[b], 2), (dense_v, v[b], 3)):
            want = x.float().to(device)
            assert_same(got[:, :4], want[:, :4])
            assert_same(got[:, end:], want[:, end:])
            old = want[:, 4:end].view(2, -1, 128, 128)  # two pages share a channel's scale
            step = (old.amax(groups, True) - old.amin(groups, True)) / (2**bits - 1)
            error = (got[:, 4:end].view_as(old) - old).abs()
            # With 2 bits the range may be narrowed by 0.225 at either end.
            most = 0.5 if bits == 4 else 0.225 * 3
            assert (error <= step * most + 0.004 * step * 2**bits + 1e-3 * old.abs()).all()
    dense_k, _ = caches[-1].dense(0, 0)
    assert (dense_k[1, 4:132, 3] == torch.tensor(0.4).half().float()).all()
    _, dense_v = caches[-1].dense(0, 1)
    assert (dense_v[0, 80] == -1.25).all()


def packed_by_hand(x: np.ndarray, form: str, keep: int, value: bool) -> bytes:
    """A sparse page of x float16 ``[64, channels]``, as csrc/kv_sparse_page.h describes it."""
    channels, (kind, bits) = x.shape[1], FORMATS[form]
    magnitude = (x.view(np.uint16) & 0x7FFF).astype(int)
    of, kept = (channels, keep) if kind == "bitmap" else (8, 4)
    chosen = np.zeros(x.shape, bool)
    for t in range(64):
        for first in range(0, channels, of):
            order = sorted(range(first, first + of), key=lambda c: (-magnitude[t, c], c))
            chosen[t, order[:kept]] = True
    chosen &= magnitude != 0

    scales = []
    for n in range(64 if value else channels):
        group = abs(x[n] if value else x[:, n]).astype(np.float32)
        own = chosen[n] if value else chosen[:, n]
        sums = [np.float32(0)] * 2
        for i in range(len(group)):
            if own[i]:
                sums[i // 8 % 2 if value else i // 32] += group[i]
        lo, hi = (group[own].min(), group[own].max()) if own.any() else (np.float32(0),) * 2
        if bits == 4:
            scale = lo if lo == hi else hi / np.float32(7)
        elif hi <= 2 * lo:
            scale = lo
        else:
            scale = np.float32(0.875) * ((sums[0] + sums[1]) / np.float32(own.sum()))
        scales.append(scale.astype(np.float16))

    def code(t: int, c: int) -> int:
        v, scale = np.float32(x[t, c]), np.float32(scales[t if value else c])
        if bits == 2:
            return int(abs(v) > np.float32(1.5) * scale) + 2 * int(v < 0)
        return int(np.clip(np.rint(v * (np.float32(1) / scale)), -8, 7)) & 15

    total = 0  # the page as one number
    half = channels // 64

    def lane_of(t: int, g: int) -> int:
        return g % 8 * 4 + t % 8 // 2 if value else t % 8 * 4 + g % 4

    def numbers(t: int, g: int) -> tuple[int, int, int]:
        return (t // 8, g // 8, t % 2) if value else (t // 8, g // 4 % half, g // 4 // half)

    def word_at(lane: int, word: int) -> int:
        return 32 * ((word // 4 * 32 + lane) * 4 + word % 4)

    if kind == "bitmap":
        at = 64 * channels
        places = {}
        for t in range(64):
            for c in range(channels):
                x_, j, even = numbers(t, c // 8)
                y = c % 8 + 8 * j
                if value:
                    in_word = (x_ // 4 * 2 + x_ % 2) * 8 + y % 2 * 4 + x_ // 2 % 2 * 2 + even
                else:
                    in_word = x_ * 4 + y % 2 * 2 + even
                bit = y // 2 * 32 + in_word
                places[(bit // 64 * 32 + lane_of(t, c // 8)) * 64 + bit % 64] = (t, c)
        for place, (t, c) in sorted(places.items()):
            if chosen[t, c]:
                total |= 1 << place | code(t, c) << at
                at += bits
        end = 8 * channels + 64 * keep * bits // 8
    else:
        planes = 8 + 4 * bits
        for t in range(64):
            for g in range(channels // 8):
                x_, j, even = numbers(t, g)
                own = [c for c in range(8 * g, 8 * g + 8) if chosen[t, c]]
                record = sum(1 << c % 8 for c in own)
                for n, c in enumerate(own):  # those of the second half count from the end
                    rank = n if c % 8 < 4 else 4 - len(own) + n
                    record |= code(t, c) << 8 + rank * bits
                bit = 16 * even + (
                    x_ % 4 + 4 * (j % 2) + 8 * (x_ // 4) if value else x_ + 8 * (j % 2)
                )
                for p in range(planes):
                    word, own_bit = j // 2 * planes + p, bit
                    if channels == 64 and p >= planes // 2:
                        word, own_bit = p - planes // 2, bit + (4 if value else 8)
                    total |= (record >> p & 1) << word_at(lane_of(t, g), word) + own_bit
        end = channels * planes
    for n, scale in enumerate(scales):
        if value:
            at = ((n // 32 * 4 + n % 8 // 2) * 4 + n // 8 % 4) * 2 + n % 2
        else:
            _, j, even = numbers(0, n // 8)
            y = n % 8 + 8 * j
            at = ((y // 4 * 4 + n // 8 % 4) * 4 + y % 2 * 2 + y // 2 % 2) * 2 + even
        total |= int(scale.view(np.uint16)) << 8 * end + 16 * at
    return total.to_bytes(end + 2 * len(scales), "little")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("form", "sparsity"),
    [
        *[(form, sparsity) for form in ("bitmap2", "bitmap4") for sparsity in (0, 0.5, 0.7, 0.98)],
        *[("4of8_2", 0.5), ("4of8_4", 0.5)],
    ],
)
def test_sparse_pages_by_hand(form: str, dim: int, sparsity: float, device: str) -> None:
    """Bytes, what they decode to, how many are kept: ties, zeros, equal values among them."""
    k, v = tokens_of(1, 1, 64, dim, seed=dim)
    k[0, 0, 5], v[0, 0, 6] = 0.0, -0.0  # nothing to keep
    k[0, 0, 9], v[0, 0, 9] = 0.75, -1.25  # everything is as large as the rest
    k[..., 11] = 0.4
    k[0, 0, 20, ::2], v[0, 0, 21, : dim // 2] = 2.0, -2.0  # ties
    v[0, 0, 30, 3:], k[0, 0, 5, 11] = 0.0, 0.0
    options = {"sparsity": sparsity, "window": 0, "sinks": 0, "max_tokens": 64, "device": device}
    cache = SparseKVCache(1, 1, dim, form, **options)
    cache.append(0, k.to(device), v.to(device))
    cache.advance(64)
    kept = cache.keep if form.startswith("bitmap") else dim // 2
    for pages, x, value in ((cache.key_pages, k, False), (cache.value_pages, v, True)):
        page = pages[0, 0, 0].cpu()
        want = packed_by_hand(x[0, 0].numpy(), form, cache.keep, value)
        assert_same(page, torch.frombuffer(bytearray(want), dtype=torch.uint8))
        levels = unpack_pages(page, form, dim, cache.keep, value)
        full = x[0, 0].count_nonzero(-1)
        counts = levels.count_nonzero(-1)
        if FORMATS[form].bits == 2:  # 4 bits have a level 0
            usual = [t for t in range(64) if t not in (5, 6, 30)]
            assert (counts[usual] == kept).all()
            assert counts[5 if not value else 6] == 0 and counts[30] <= full[30]
        error = (levels - x[0, 0].float()).where(levels != 0, 0).abs()
        group = 1 if value else 0
        largest = x[0, 0].float().abs().amax(group, True)
        assert (error <= (0.075 if FORMATS[form].bits == 4 else 1) * largest + 1e-6).all()
    dense_k, dense_v = cache.dense(0, 0)
    if form.startswith("bitmap") and sparsity:
        kept_k = dense_k[0, :, 11]
        close = torch.tensor(0.4).half().float().to(device)
        assert ((kept_k == 0) | (kept_k == close)).all()  # a channel of equal values
    assert set(dense_v[0, 9].tolist()) <= {0.0, -1.25}


@pytest.mark.cuda
@pytest.mark.parametrize("form", [*FORMATS, "bitmap2/dense4"])
@pytest.mark.parametrize("dtype", HALVES)
def test_bytes_are_the_same_on_both_devices(form: str, dtype: torch.dtype) -> None:
    """Also unpacked by both: several pages, heads, sequences, means, a NaN and an infinity."""
    for dim, centre in ((64, True), (128, False), (256, True)):
        k, v = tokens_of(2, 2, 300, dim, dtype)
        k[0, 0, 10, 3], v[1, 1, 20, 5], k[1, 0, 99, 7] = torch.nan, -torch.nan, torch.inf
        caches = []
        for where in ("cpu", "cuda"):
            cache = SparseKVCache(
                *(1, 2, dim),
                **formats(form),
                sparsity=0.6,
                centre=centre,
                max_tokens=512,
                batch=2,
                device=where,
                dtype=dtype,
            )
            if cache.means is not None:
                g = torch.Generator().manual_seed(2)
                cache.means.copy_(torch.randn(cache.means.shape, generator=g))
            for part in (1, 180, 119):  # the first says nothing of means
                cache.append(0, k[:, :, :part].to(where), v[:, :, :part].to(where))
                cache.advance(part)
            caches.append(cache)
        for name in ("key_pages", "value_pages", "recent_keys", "recent_values"):
            assert_same(getattr(caches[-1], name), getattr(caches[0], name))
        for b in range(2):
            for a, w in zip(caches[-1].dense(0, b), caches[0].dense(0, b), strict=True):
                torch.testing.assert_close(a.cpu(), w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2", "dense4/bitmap2", "bitmap4/dense2", "4of8_2"])
def test_pages_lie_anywhere(form: str, device: str) -> None:
    """Neighbours share nothing but what they are to; a page without a place is left out, with dense
    keys both of those that share a channel's scale."""
    k, v = (x.to(device) for x in tokens_of(2, 2, 600, 64))
    options = {**formats(form), "window": 64, "max_tokens": 600, "batch": 2, "device": device}
    query = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    ordered, cache = (SparseKVCache(1, 2, 64, **options) for _ in range(2))
    order = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(2))
    cache.page_table.copy_(order.view(cache.page_table.shape))
    for c in (ordered, cache):
        c.append(0, k, v)
        c.advance(600)
    for pages, other in (
        (cache.key_pages, ordered.key_pages),
        (cache.value_pages, ordered.value_pages),
    ):
        assert_same(pages[:, order], other)
    assert_attention(cache, query)
    for a, w in zip(cache.attend(0, query), ordered.attend(0, query), strict=True):
        assert_same(a, w)

    whole = cache.dense(0, 0)
    cache.page_table[0, 3] = -1
    out, _ = cache.attend(0, query)
    there = torch.ones(600, dtype=torch.bool, device=device)
    there[4 + (2 if form.startswith("dense") else 3) * 64 : 4 + 4 * 64] = False
    keys, values = (x[:, there].double() for x in whole)
    logits = query[0].double().view(2, 2, 64) @ keys.transpose(1, 2) / 8
    want = (logits.softmax(-1) @ values).flatten(0, 1)
    assert ((out[0].double() - want).norm(dim=-1) <= 2e-3 * want.norm(dim=-1)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2", "bitmap2", "4of8_4"])
def test_centring(form: str, device: str) -> None:
    """A constant in every channel costs nothing; output and the logarithm are right."""
    k, v = tokens_of(3, 2, 400, 64)
    offset = 4 * torch.randn(2, 1, 2, 1, 64, generator=torch.Generator().manual_seed(9))
    shifted = [(x.float() + o).half() for x, o in zip((k, v), offset, strict=True)]
    query = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    counts = torch.tensor([400, 0, 170], device=device)
    errors = []
    for centre in (False, True):
        cache = SparseKVCache(
            1, 2, 64, form, centre=centre, window=64, max_tokens=600, batch=3, device=device
        )
        cache.append(0, shifted[0].to(device), shifted[1].to(device), counts)
        cache.advance(400, counts)
        for n in (100, 1):
            cache.append(0, *(x[:, :, :n].to(device) for x in shifted))
            cache.advance(n)
        assert_attention(cache, query)
        _, dense_v = cache.dense(0, 0)
        errors.append((dense_v[:, :400].cpu() - shifted[1][0]).norm() / v[0].float().norm())
        assert cache.num_bytes > 0
    assert errors[1] < errors[0] and errors[1] < 0.75
    assert cache.means is not None
    means = cache.means.float().cpu()
    torch.testing.assert_close(means[0, 0, 0], shifted[0][0].float().mean(1), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        means[0, 1, 1], shifted[1][1, :, :100].float().mean(1), rtol=1e-2, atol=1e-2
    )
    before = cache.dense(0, 2)
    cache.fork(2, 1)
    cache.reorder([1, 0, 2])
    for a, w in zip(cache.dense(0, 0), before, strict=True):
        assert_same(a, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 64, 128, 100])
@pytest.mark.parametrize(
    "form", ["dense4", "bitmap2", "4of8_2", "bitmap4/dense2", "dense4/bitmap2", "dense2/4of8_4"]
)
def test_portions_do_not_matter(form: str, window: int, device: str) -> None:
    """Token by token, in odd portions, and all at once leave the same bytes."""
    k, v = (x.to(device) for x in tokens_of(2, 2, 400, 64, seed=3))
    options = {**formats(form), "window": window, "max_tokens": 400, "batch": 2}
    whole = SparseKVCache(1, 2, 64, **options, device=device)
    whole.append(0, k, v)
    whole.advance(400)
    for portions in ([1] * 400, [7, 64, 1, 128, 200], [399, 1]):
        cache = SparseKVCache(1, 2, 64, **options, device=device)
        at = 0
        for n in portions:
            cache.append(0, k[:, :, at : at + n], v[:, :, at : at + n])
            cache.advance(n)
            at += n
        assert_same(cache.key_pages, whole.key_pages)
        assert_same(cache.value_pages, whole.value_pages)
        for b in range(2):
            for a, w in zip(cache.dense(0, b), whole.dense(0, b), strict=True):
                assert_same(a, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2", "bitmap2", "4of8_4", "dense4/bitmap4"])
def test_a_portion_around_a_ring_of_many_pages(form: str, device: str) -> None:
    """New tokens take the slots of a thousand that the same call packs, and of each other's."""
    k, v = (x.to(device) for x in tokens_of(2, 2, 2700, 64, seed=4))
    options = {**formats(form), "window": 1000, "max_tokens": 5000, "batch": 2}
    whole, cache = (SparseKVCache(1, 2, 64, **options, device=device) for _ in range(2))
    whole.append(0, k, v)
    whole.advance(2700)
    at = [0, 0]
    for portion in ([950, 1063], [1750, 137], [0, 1500]):  # the ring has 1000 and some slots
        new = [torch.zeros(2, 2, max(portion), 64, dtype=k.dtype, device=device) for _ in range(2)]
        for b, n in enumerate(portion):
            for to, x in zip(new, (k, v), strict=True):
                to[b, :, :n] = x[b, :, at[b] : at[b] + n]
            at[b] += n
        counts = torch.tensor(portion, device=device)
        cache.append(0, new[0], new[1], counts)
        cache.advance(max(portion), counts)
    assert at == [2700, 2700]
    assert_same(cache.key_pages, whole.key_pages)
    assert_same(cache.value_pages, whole.value_pages)
    for b in range(2):
        for a, w in zip(cache.dense(0, b), whole.dense(0, b), strict=True):
            assert_same(a, w)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2", "dense4", "bitmap2", "dense4/4of8_2"])
def test_pages_in_parts_of_any_begin_and_length(form: str, device: str) -> None:
    """Contexts cut at odd pages too, in parts of several; with and without pages in their places.

    Sequences are copies of eight with 2 to 24 pages: the more there are, the larger the parts that
    a GPU's warps take. An even page without a place takes the odd one of dense keys with it."""
    most, lengths = 24, torch.tensor([2, 6, 10, 14, 15, 19, 22, 24])
    lengths = lengths * PAGE + torch.tensor([8, 0, 63, 1, 30, 8, 17, 40])  # recent tokens besides
    options = {**formats(form), "window": 0, "sinks": 0, "device": device}
    source = SparseKVCache(1, 1, 64, **options, max_tokens=(most + 2) * PAGE)
    k, v = (x.to(device) for x in tokens_of(1, 1, most * PAGE, 64))
    source.append(0, k, v)
    source.advance(most * PAGE)
    g = torch.Generator().manual_seed(1)
    query = torch.randn(8, 2, 64, generator=g).half().to(device)
    packed = [x[0].double() for x in source.dense(0, 0)]
    together = 2 if form.startswith("dense") else 1
    for copies in (1,) if device == "cpu" else (1, 9, 75):
        cache = SparseKVCache(1, 1, 64, **options, max_tokens=2 * PAGE, batch=8 * copies)
        cache.key_pages, cache.value_pages = source.key_pages, source.value_pages
        cache.page_table = source.page_table[:, :most].repeat(8 * copies, 1)
        recent = tokens_of(8, 1, cache.recent_keys.shape[3], 64, seed=2)
        for to, x in zip((cache.recent_keys, cache.recent_values), recent, strict=True):
            to.copy_(x.repeat(copies, 1, 1, 1))
        cache.lens.copy_(lengths.repeat(copies))
        for gone in ([], [0], [4, 7], [13, 14, 15]):
            cache.page_table[:, gone] = -1
            there = torch.ones(most, dtype=torch.bool)
            for page in gone:
                first = page // together * together
                there[first : first + together] = False
            out, lse = cache.attend(0, query.repeat(copies, 1, 1))
            for b, length in enumerate(lengths.tolist()):
                pages = length // PAGE // together * together
                seen = there[:pages].repeat_interleave(PAGE).to(device)
                slots = torch.arange(pages * PAGE, length) % cache.recent_keys.shape[3]
                rings = (cache.recent_keys[0, b, 0], cache.recent_values[0, b, 0])
                keys, values = (
                    torch.cat([old[: len(seen)][seen], ring[slots.to(device)].double()])
                    for old, ring in zip(packed, rings, strict=True)
                )
                logits = query[b].double() @ keys.T / 8
                want, norm = logits.softmax(-1) @ values, values.norm(dim=-1).mean()
                assert ((out[b].double() - want).norm(dim=-1) <= 2e-3 * norm).all()
                torch.testing.assert_close(
                    lse[b].double(), logits.logsumexp(-1), rtol=1e-3, atol=4e-3
                )
            assert_same(out, out[:8].repeat(copies, 1, 1))
            cache.page_table.copy_(source.page_table[:, :most].expand_as(cache.page_table))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2", "dense4/bitmap4", "bitmap2/dense4", "4of8_4"])
@pytest.mark.parametrize("gone", [2, 3])
def test_pages_that_have_no_place_yet(gone: int, form: str, device: str) -> None:
    """What cannot be packed is not, and changes nothing else; with dense keys its neighbour's keys
    are not either, but its values are. Attention leaves out what is not there at all."""
    k, v = (x.to(device) for x in tokens_of(1, 2, 420, 64, seed=6))
    options = {**formats(form), "window": 60, "max_tokens": 500, "device": device}
    whole, cache = (SparseKVCache(1, 2, 64, **options) for _ in range(2))
    place = int(cache.page_table[0, gone])
    cache.page_table[0, gone] = -1
    for n in (130, 190, 100):  # page by page, and several at once
        for c in (whole, cache):
            at = int(c.lens[0])
            c.append(0, k[:, :, at : at + n].contiguous(), v[:, :, at : at + n].contiguous())
            c.advance(n)
    together = 2 if form.startswith("dense") else 1
    without = gone // together * together + torch.arange(together)  # keys
    assert whole.key_pages[:, without].any() and whole.value_pages[:, place].any()
    whole.key_pages[:, without] = 0
    whole.value_pages[:, place] = 0
    assert_same(cache.key_pages, whole.key_pages)
    assert_same(cache.value_pages, whole.value_pages)
    query = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    out, lse = cache.attend(0, query)
    there = torch.ones(420, dtype=torch.bool, device=device)
    there[4 + int(without[0]) * PAGE : 4 + (int(without[-1]) + 1) * PAGE] = False
    cache.page_table[0, gone] = place
    keys, values = (x[:, there].double() for x in cache.dense(0, 0))
    logits = query[0].double().view(2, 2, 64) @ keys.transpose(1, 2) / 8
    want = (logits.softmax(-1) @ values).flatten(0, 1)
    assert ((out[0].double() - want).norm(dim=-1) <= 2e-3 * want.norm(dim=-1)).all()
    torch.testing.assert_close(
        lse[0].double(), logits.logsumexp(-1).flatten(), rtol=1e-3, atol=4e-3
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["dense2/bitmap4", "bitmap2/dense4", "4of8_4/bitmap2"])
def test_ragged_portions_of_different_kinds(form: str, device: str) -> None:
    """Some sequences of a call pack no page, some one or two, some many, and begin at odd and even
    ones; from an empty cache too, with sinks to come. The bytes are the CPU's for each alone."""
    k, v = tokens_of(4, 1, 450, 64, seed=7)
    options = {**formats(form), "sparsity": 0.6, "window": 70, "max_tokens": 450}
    cache = SparseKVCache(1, 1, 64, **options, batch=4, device=device)
    portions = [[3, 0, 450, 1], [197, 64, 0, 200], [1, 200, 0, 127], [65, 1, 0, 64]]
    portions += [[128, 63, 0, 1], [0, 122, 0, 57], [56, 0, 0, 0]]
    at = [0] * 4
    for portion in portions:
        new = [torch.zeros(4, 1, max(portion), 64, dtype=k.dtype) for _ in range(2)]
        for b, n in enumerate(portion):
            for to, x in zip(new, (k, v), strict=True):
                to[b, :, :n] = x[b, :, at[b] : at[b] + n]
            at[b] += n
        counts = torch.tensor(portion, device=device)
        cache._most = [0] * 4  # portions that not all take
        cache.append(0, new[0].to(device), new[1].to(device), counts)
        cache.advance(max(portion), counts)
    for b, n in enumerate(at):
        alone = SparseKVCache(1, 1, 64, **options)
        alone.append(0, k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        alone.advance(n)
        own = cache.page_table[b].long()
        assert_same(cache.key_pages[:, own], alone.key_pages)
        assert_same(cache.value_pages[:, own], alone.value_pages)
        positions = torch.cat([torch.arange(4), torch.arange(n - 70, n)])  # sinks and window
        slots = (positions - 4) % (cache.recent_keys.shape[3] - 4) + 4
        slots[:4] = positions[:4]
        for a, w in (
            (cache.recent_keys, alone.recent_keys),
            (cache.recent_values, alone.recent_values),
        ):
            assert_same(a[:, b, :, slots.to(device)], w[:, 0, :, slots])


@pytest.mark.cuda
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "batch", "dtype"),
    [(8, 4, 128, 1, torch.bfloat16), (2, 2, 64, 3, torch.float16), (1, 9, 256, 2, torch.float16)],
)
@pytest.mark.parametrize(
    "form", ["dense4/4of8_4", "4of8_4/dense2", "bitmap2/dense4", "dense2/bitmap4", "4of8_2/bitmap2"]
)
def test_different_kinds_one_right_behind_another(
    form: str,
    heads: int,
    groups: int,
    dim: int,
    batch: int,
    dtype: torch.dtype,
    recorded: bool,
) -> None:
    """Keys and values come by two kernels, and what follows may begin while both still run: a
    prompt of several pages, then token by token until one more is full, layer after layer. The
    bits, and those of the cache, are what they are if each op ends before the next one begins."""
    layers, prompt, single = 3, 4 + 64 + 5 * PAGE + 50, 24
    options = {**formats(form), "window": 64, "max_tokens": prompt + single, "batch": batch}
    cache = SparseKVCache(layers, heads, dim, **options, device="cuda", dtype=dtype)
    tensors = [cache.key_pages, cache.value_pages, cache.recent_keys, cache.recent_values]
    g = torch.Generator().manual_seed(1)
    portions = []  # of each layer keys, values and queries, so that nothing is copied on the way
    for count in [prompt] + [1] * single:
        seeds = range(layers * len(portions), layers * (len(portions) + 1))
        tokens = [tokens_of(batch, heads, count, dim, dtype, seed) for seed in seeds]
        queries = torch.randn(layers, batch, heads * groups, dim, generator=g).to(dtype).cuda()
        new = [(k.cuda(), v.cuda(), q) for (k, v), q in zip(tokens, queries, strict=True)]
        portions.append((count, new))

    def clear() -> None:
        for b in range(batch):
            cache.reset(b)
        for tensor in tensors:
            tensor.zero_()
        torch.cuda.synchronize()

    def run(wait: Callable[[], Any]) -> list[Tensor]:
        found = []
        for count, new in portions:
            for layer, (k, v, query) in enumerate(new):
                cache.append(layer, k, v)
                wait()
                found += cache.attend(layer, query, appended=count)
                wait()
            cache.advance(count)
            wait()
        return found

    clear()
    want = run(torch.cuda.synchronize)
    want_tensors = [tensor.clone() for tensor in tensors]
    assert all(out.isfinite().all() for out in want) and cache.lens.min() == prompt + single
    clear()
    if recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run(lambda: None)
    for _ in range(3):
        clear()
        if recorded:
            graph.replay()
        else:
            torch.cuda._sleep(50_000_000)  # what is launched meanwhile has no gaps
            got = run(lambda: None)
        torch.cuda.synchronize()
        for a, w in zip(got + tensors, want + want_tensors, strict=True):
            assert torch.equal(a, w)


@pytest.mark.parametrize("device", DEVICES)
def test_sequences_join_and_leave(device: str) -> None:
    k, v = (x.to(device) for x in tokens_of(3, 1, 300, 64))
    query = torch.randn(3, 4, 64, device=device).half()
    cache = SparseKVCache(2, 1, 64, max_tokens=400, batch=3, device=device)
    out, lse = cache.attend(1, query)
    assert not out.any() and (lse == -torch.inf).all()  # nothing yet
    counts = torch.tensor([300, 0, 77], device=device)
    for layer in range(2):
        cache.append(layer, k, v, counts)
    cache.advance(300, counts)
    out, _ = cache.attend(1, query)
    assert not out[1].any() and out[0].any() and out[2].any()
    before = [cache.dense(1, b) for b in range(3)]
    cache.reorder([2, 0, 0])
    for b, old in enumerate((2, 0, 0)):
        for a, w in zip(cache.dense(1, b), before[old], strict=True):
            assert_same(a, w)
    cache.reset(1)
    out, _ = cache.attend(0, query)
    assert not out[1].any() and out[0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 64, 100])
@pytest.mark.parametrize("form", ["dense4", "bitmap4", "4of8_2", "4of8_4/bitmap2"])
def test_fork_and_crop(form: str, window: int, device: str) -> None:
    """A copy goes its own way; what is left after cropping reads as before, also out of pages."""
    k, v = (x.to(device) for x in tokens_of(2, 2, 500, 64, seed=5))
    options = {"centre": form == "bitmap4", "window": window, "max_tokens": 500, "batch": 2}
    cache = SparseKVCache(2, 2, 64, **formats(form), device=device, **options)
    for layer in range(2):
        cache.append(layer, k, v, torch.tensor([400, 70], device=device))
    cache.advance(400, torch.tensor([400, 70], device=device))
    cache.fork(0, 1)
    before = cache.dense(1, 0)
    for length in (400, 391, 300, 261, 66, 2, 0):
        cache.crop(1, length)
        for a, w in zip(cache.dense(1, 1), before, strict=True):
            if length:  # packed values are rounded to the ring's dtype, less their mean if centred
                atol = 1e-3 if cache.means is None else 4e-3
                torch.testing.assert_close(a, w[:, :length], rtol=1e-3, atol=atol)
        for a, w in zip(cache.dense(1, 0), before, strict=True):
            assert_same(a, w)
    cache.fork(0, 1)
    cache.crop(1, 350)
    for layer in range(2):
        cache.append(layer, k[:, :, 400:], v[:, :, 400:], torch.tensor([0, 100], device=device))
    cache.advance(100, torch.tensor([0, 100], device=device))
    for a, w, x in zip(cache.dense(1, 1), before, (k, v), strict=True):
        # What was packed, unpacked and packed again may have moved by a step.
        most = 0.05 if form == "dense4" else 0.3
        assert ((a[:, :350] - w[:, :350]).norm() <= most * w[:, :350].norm()).all()
        recent = x[1, :, 500 - window : 500].float() if window else x[1, :, :0].float()
        if cache.means is not None:
            torch.testing.assert_close(
                a[:, 450 - window :][:, : recent.shape[1]], recent, rtol=0, atol=4e-3
            )
            continue
        assert_same(a[:, 450 - window :][:, : recent.shape[1]], recent)
    with pytest.raises(ValueError, match="tokens: the sequence has 450, got 451"):
        cache.crop(1, 451)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("advance", [1]),
        ("reorder", [[1, 0]]),
        ("fork", [1, 0]),
        ("crop", [0, 3]),
        ("reset", [0]),
    ],
)
def test_lengths_behind_appended_tokens(change: str, arguments: list[Any], device: str) -> None:
    """They are new ones behind whatever changes lengths, with any layer first."""
    cache = SparseKVCache(2, 1, 64, max_tokens=64, batch=2, device=device)
    k, v = (x.to(device) for x in tokens_of(2, 1, 20, 64))
    counts = torch.tensor([20, 9], device=device)
    for layer in (0, 1):
        cache.append(layer, k, v, counts)
    cache.advance(20, counts)
    query = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(1)).half().to(device)
    for step in range(2):
        cache.append(1, k[:, :, :1], v[:, :, :1])
        got = cache.attend(1, query, appended=1)
        cache.lens += 1
        want = cache.attend(1, query)
        cache.lens -= 1
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
        if step == 0:
            getattr(cache, change)(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMATS)
def test_nan_reaches_the_output_of_its_head(form: str, device: str) -> None:
    k, v = tokens_of(1, 2, 300, 64)
    v[0, 1, 20, 5] = torch.nan
    cache = SparseKVCache(1, 2, 64, form, max_tokens=300, device=device)
    cache.append(0, k.to(device), v.to(device))
    cache.advance(300)
    out, _ = cache.attend(0, torch.randn(1, 4, 64).half().to(device))
    assert out[0, :2].isfinite().all() and out[0, 2:].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    "form", [*SPARSE, "dense4/bitmap2", "dense2/4of8_4", "4of8_2/bitmap4", "bitmap4/4of8_2"]
)
def test_nan_is_in_the_channels_that_keep_it(form: str, dim: int, device: str) -> None:
    """A value token with a NaN: what it keeps is NaN, what it does not keep still is zero."""
    k, v = tokens_of(1, 2, 300, dim)
    v[0, 1, 20, 5] = torch.nan
    cache = SparseKVCache(1, 2, dim, **formats(form), max_tokens=300, device=device)
    cache.append(0, k.to(device), v.to(device))
    cache.advance(300)
    query = torch.randn(1, 4, dim, generator=torch.Generator().manual_seed(1)).half().to(device)
    out, lse = cache.attend(0, query)
    want = cache.dense(0, 0)[1].isnan().any(1)  # [heads, channels]
    assert 1 < want[1].sum() < dim and not want[0].any() and lse.isfinite().all()
    assert torch.equal(out[0].isnan(), want.repeat_interleave(2, 0))


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_that_cannot_be_do_not_hang(device: str) -> None:
    """Lengths are data on the device; before they are written there may be anything in them."""
    k, v = (x.to(device) for x in tokens_of(3, 1, 500, 64))
    query = torch.randn(3, 4, 64, device=device).half()
    cache = SparseKVCache(1, 1, 64, max_tokens=500, batch=3, device=device)
    cache.append(0, k, v)
    cache.advance(500)
    want, _ = cache.attend(0, query)
    cache.lens.copy_(torch.tensor([2**62, -(2**62), 500]))
    out, lse = cache.attend(0, query)
    assert out.isfinite().all() and not out[1].any() and (lse[1] == -torch.inf).all()
    assert_same(out[2], want[2])


@pytest.mark.parametrize(
    ("form", "sparsity", "bits"),
    [
        ("dense2", 0, 2.25),
        ("dense4", 0, 4.25),
        ("bitmap2", 0.5, (2.25 + 2.125) / 2),
        ("bitmap2", 0.7, (1.84 + 1.72) / 2),
        ("bitmap4", 0.5, (3.25 + 3.125) / 2),
        ("bitmap4", 0.7, (2.44 + 2.32) / 2),
        ("4of8_2", 0, (2.25 + 2.125) / 2),
        ("4of8_4", 0, (3.25 + 3.125) / 2),
        ("dense4/bitmap2", 0.5, (4.25 + 2.125) / 2),
        ("dense4/bitmap2", 0.7, (4.25 + 1.72) / 2),
        ("bitmap4/dense2", 0.7, (2.44 + 2.25) / 2),
        ("dense2/dense4", 0, 3.25),
        ("4of8_2/dense2", 0, 2.25),
        ("4of8_4/dense2", 0, 2.75),
    ],
)
def test_bytes(form: str, sparsity: float, bits: float) -> None:
    """Bits per element by what the cache says it has in all, with every page full: within 1 % of
    what a format promises. What is not in pages is the window, here as small as it can be."""
    options = {**formats(form), "sparsity": sparsity, "batch": 2, "sinks": 0, "window": 0}
    few, many = (SparseKVCache(3, 2, 128, **options, max_tokens=n) for n in (1280, 12800))
    assert few.recent_keys.shape == many.recent_keys.shape
    grown = many.num_bytes - few.num_bytes  # pages and the table of their places
    elements = 2 * 3 * 2 * 2 * 128 * (12800 - 1280)
    assert grown * 8 / elements <= 1.01 * bits, grown * 8 / elements
    assert few.recent_keys.shape[3] <= 2 * PAGE
    unpacked = unpack_pages(few.key_pages[0], few.key_format, 128, few.keep, False)
    assert unpacked.shape == (40, 2, PAGE, 128) and not unpacked.any()


def test_mistakes() -> None:
    with pytest.raises(NotImplementedError, match="key_format: expected one of dense2, dense4, b"):
        SparseKVCache(1, 1, 64, "bitmap3", max_tokens=64)
    with pytest.raises(NotImplementedError, match=r"value_format: expected one of .* '4of9'"):
        SparseKVCache(1, 1, 64, key_format="dense2", value_format="4of9", max_tokens=64)
    for sparsity in (-0.1, 1, 0.999, torch.nan):
        with pytest.raises(ValueError, match="sparsity: expected 0 or more, and 1 of 64 channels"):
            SparseKVCache(1, 1, 64, "bitmap2", sparsity=sparsity, max_tokens=64)
    cache = SparseKVCache(1, 1, 64, "bitmap2", max_tokens=400)
    query = torch.zeros(1, 2, 64).half()
    for name, wrong, match in (
        ("keep", 0, "keep: expected 1 to 64 of a token's channels, got 0"),
        ("keep", 31, r"key_pages: expected shape \[4, 1, 1136\], got \[4, 1, 1152\]"),
        ("value_format", "4of9", "value_format: expected one of dense2, .*4of8_4, got 4of9"),
    ):
        old = getattr(cache, name)
        setattr(cache, name, wrong)
        with pytest.raises(ValueError, match=match):
            cache.attend(0, query)
        setattr(cache, name, old)
    # Tensors of another layout, out of a file perhaps, are refused by their sizes.
    cache = SparseKVCache(1, 1, 64, "dense2", max_tokens=600)
    cache.key_pages = torch.zeros(1, 6, 1, 1024 + 256, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"key_pages: expected shape \[6, 1, 1152\], got .* 1280\]"
    ):
        cache.attend(0, query)
    cache.recent_keys = cache.recent_values = torch.zeros(1, 1, 1, 4 + 192, 64).half()
    with pytest.raises(ValueError, match=r"at least window \+ 128 = 256 tokens, got 196 slots"):
        cache.attend(0, query)
    with pytest.raises(ValueError, match="head_dim: expected 64, 128 or 256, got 80"):
        SparseKVCache(1, 1, 80, max_tokens=64)
    cache = SparseKVCache(1, 2, 64, max_tokens=100)
    k, v = tokens_of(1, 2, 101, 64)
    with pytest.raises(ValueError, match="the cache holds 100 tokens"):
        cache.append(0, k, v)
    with pytest.raises(TypeError, match=r"keys: expected torch.float16, got torch.float32"):
        cache.append(0, k[:, :, :5].float(), v[:, :, :5])
    with pytest.raises(ValueError, match=r"values: expected shape \[1, 2, 5, 64\], got"):
        cache.append(0, k[:, :, :5], v[:, :, :4])
    with pytest.raises(ValueError, match="query: expected 1 to 16 query heads for each of 2"):
        cache.attend(0, torch.zeros(1, 3, 64).half())
    with pytest.raises(ValueError, match=r"query: expected shape \[1, 4, 64\]"):
        cache.attend(0, torch.zeros(1, 4, 128).half())
    with pytest.raises(ValueError, match=r"query: expected 1 to 16 tokens, .*, got 17"):
        cache.attend(0, torch.zeros(1, 2, 17, 64).half())
    with pytest.raises(ValueError, match="order: expected 1 sequences"):
        cache.reorder([0, 0])
