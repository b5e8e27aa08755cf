# SPDX-License-Identifier: MIT
"""The native key-value cache: attention against float64, appending in any portions, mistakes."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES, assert_same

from quantgemm import SparseKVCache
from quantgemm.kv.cache import unpack_pages

Tensor = torch.Tensor
HALVES = [torch.float16, torch.bfloat16]


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
    ("key", "value"), [("dense2", "dense2"), ("dense4", "dense2"), ("dense2", "dense4")]
)
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "count", "sinks", "window"),
    [
        (2, 4, 128, 700, 4, 128),
        (1, 1, 64, 1, 4, 64),
        (3, 16, 64, 333, 0, 0),
        (1, 9, 256, 517, 7, 100),
        (2, 2, 128, 195, 4, 128),
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
@pytest.mark.parametrize("form", ["dense4", "dense2"])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "count", "window", "tokens"),
    [
        (2, 4, 128, 700, 128, 5),
        (1, 7, 64, 16, 64, 16),
        (2, 1, 256, 333, 2, 3),
        (1, 3, 128, 90, 90, 4),
    ],
)
def test_several_tokens_ask(
    heads: int,
    groups: int,
    dim: int,
    count: int,
    window: int,
    tokens: int,
    form: str,
    device: str,
) -> None:
    """Each of the last tokens sees those before it and itself, whatever the others would give."""
    cache = SparseKVCache(
        1, heads, dim, form, window=window, sinks=1, max_tokens=1024, batch=3, device=device
    )
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
@pytest.mark.parametrize("form", ["dense2", "dense4"])
def test_pages_hold_what_was_appended(form: str, device: str) -> None:
    """Each value within half a step, recent ones and sinks exactly; CUDA bytes as the CPU's."""
    k, v = tokens_of(2, 2, 500, 128)
    k[0, 1, 68:132, 3], v[1, 0, 80] = 0.4, -1.25  # groups of equal values are exact
    caches = []
    for where in dict.fromkeys(("cpu", device)):
        cache = SparseKVCache(1, 2, 128, form, max_tokens=512, batch=2, device=where)
        cache.append(0, k.to(where), v.to(where))
        cache.advance(500)
        caches.append(cache)
    for name in ("key_pages", "value_pages", "recent_keys", "recent_values"):
        assert_same(getattr(caches[-1], name), getattr(caches[0], name))
    bits = caches[0].key_bits
    for b in range(2):
        dense_k, dense_v = caches[-1].dense(0, b)
        pages = (500 - 4 - 128) // 64
        for got, x, groups in ((dense_k, k[b], 2), (dense_v, v[b], 3)):
            want = x.float().to(device)
            assert_same(got[:, :4], want[:, :4])
            assert_same(got[:, 4 + pages * 64 :], want[:, 4 + pages * 64 :])
            old = want[:, 4 : 4 + pages * 64].view(2, pages, 64, 128)
            step = (old.amax(groups, True) - old.amin(groups, True)) / (2**bits - 1)
            error = (got[:, 4 : 4 + pages * 64].view_as(old) - old).abs()
            # With 2 bits the range may be narrowed by 0.225 at either end.
            most = 0.5 if bits == 4 else 0.225 * 3
            assert (error <= step * most + 0.004 * step * 2**bits + 1e-3 * old.abs()).all()
    dense_k, _ = caches[-1].dense(0, 0)
    assert (dense_k[1, 68:132, 3] == torch.tensor(0.4).half().float()).all()
    _, dense_v = caches[-1].dense(0, 1)
    assert (dense_v[0, 80] == -1.25).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 64, 128, 100])
def test_portions_do_not_matter(window: int, device: str) -> None:
    """Token by token, in odd portions, and all at once leave the same bytes."""
    k, v = (x.to(device) for x in tokens_of(2, 2, 400, 64, seed=3))
    whole = SparseKVCache(1, 2, 64, window=window, max_tokens=400, batch=2, device=device)
    whole.append(0, k, v)
    whole.advance(400)
    for portions in ([1] * 400, [7, 64, 1, 128, 200], [399, 1]):
        cache = SparseKVCache(1, 2, 64, window=window, max_tokens=400, batch=2, device=device)
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
def test_fork_and_crop(window: int, device: str) -> None:
    """A copy goes its own way; what is left after cropping reads as before, also out of pages."""
    k, v = (x.to(device) for x in tokens_of(2, 2, 500, 64, seed=5))
    cache = SparseKVCache(2, 2, 64, window=window, max_tokens=500, batch=2, device=device)
    for layer in range(2):
        cache.append(layer, k, v, torch.tensor([400, 70], device=device))
    cache.advance(400, torch.tensor([400, 70], device=device))
    cache.fork(0, 1)
    before = cache.dense(1, 0)
    for length in (400, 391, 300, 261, 66, 2, 0):
        cache.crop(1, length)
        for a, w in zip(cache.dense(1, 1), before, strict=True):
            if length:  # packed values are rounded to the ring's dtype
                torch.testing.assert_close(a, w[:, :length], rtol=1e-3, atol=1e-3)
        for a, w in zip(cache.dense(1, 0), before, strict=True):
            assert_same(a, w)
    cache.fork(0, 1)
    cache.crop(1, 350)
    for layer in range(2):
        cache.append(layer, k[:, :, 400:], v[:, :, 400:], torch.tensor([0, 100], device=device))
    cache.advance(100, torch.tensor([0, 100], device=device))
    for a, w, x in zip(cache.dense(1, 1), before, (k, v), strict=True):
        # What was packed, unpacked and packed again may have moved by a step.
        assert ((a[:, :350] - w[:, :350]).norm() <= 0.05 * w[:, :350].norm()).all()
        recent = x[1, :, 500 - window : 500].float() if window else x[1, :, :0].float()
        assert_same(a[:, 450 - window :][:, : recent.shape[1]], recent)
    with pytest.raises(ValueError, match="tokens: the sequence has 450, got 451"):
        cache.crop(1, 451)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_reaches_the_output_of_its_head(device: str) -> None:
    k, v = tokens_of(1, 2, 300, 64)
    v[0, 1, 20, 5] = torch.nan
    cache = SparseKVCache(1, 2, 64, max_tokens=300, device=device)
    cache.append(0, k.to(device), v.to(device))
    cache.advance(300)
    out, _ = cache.attend(0, torch.randn(1, 4, 64).half().to(device))
    assert out[0, :2].isfinite().all() and out[0, 2:].isnan().any()


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


def test_bytes() -> None:
    """Bits per element of the pages: codes, and 32 bits per channel or per token."""
    cache = SparseKVCache(1, 1, 128, "dense2", max_tokens=64 * 100, window=0, sinks=0)
    elements = 64 * 100 * 128
    assert cache.key_pages.numel() * 8 / elements == 2.5
    assert cache.value_pages.numel() * 8 / elements == 2.25
    assert unpack_pages(cache.key_pages[0], 128, 2, False).shape == (100, 1, 64, 128)


def test_mistakes() -> None:
    with pytest.raises(NotImplementedError, match="key_format: expected one of dense2, dense4"):
        SparseKVCache(1, 1, 64, "bitmap2", max_tokens=64)
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
