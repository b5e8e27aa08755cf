# SPDX-License-Identifier: MIT
"""What formats cost in the output of attention, on a statistical model of keys and values.

It ranks formats and guards against regressions; it says nothing about the quality of a language
model. Keys after their rotary embedding: a low-rank part and noise, channels of different size and
mean. Values: low-rank and noise. Queries look for one token each.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from quantgemm import SparseKVCache, kv

Tensor = torch.Tensor
TOKENS, DIM, WINDOW, QUERIES, RANK = 4096, 128, 128, 32, 24


def noise(shape: tuple[int, ...], tail: str, g: torch.Generator) -> Tensor:
    """Unit variance."""
    if tail == "gauss":
        return torch.randn(shape, generator=g, dtype=torch.float64)
    u = torch.rand(shape, generator=g, dtype=torch.float64) - 0.5
    return -u.sign() * (1 - 2 * u.abs()).log() / math.sqrt(2)


def rotate(x: Tensor) -> Tensor:
    half = DIM // 2
    frequency = 5e5 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 1)


@functools.cache
def head(tail: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [TOKENS, DIM] and queries [QUERIES, DIM], rounded to float16."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    size = (0.45 * normal(DIM)).exp()
    mean = 0.35 * normal(DIM) * size
    latent = normal(TOKENS, RANK)
    latent = 0.7 * latent + 0.5 * (latent.roll(1, 0) + latent.roll(-1, 0))
    level = 0.6 if tail == "gauss" else 0.9
    mixed = latent @ normal(RANK, DIM) / math.sqrt(RANK)
    k = rotate(mean + size * (0.8 * mixed + level * noise((TOKENS, DIM), tail, g)))
    mixed = latent @ normal(RANK, DIM) / math.sqrt(RANK)
    v = 0.6 * mixed + (0.8 if tail == "gauss" else 1.0) * noise((TOKENS, DIM), tail, g)
    v = v * (0.25 * normal(TOKENS, 1)).exp() * (0.25 * normal(DIM)).exp()

    centred = k - k.mean(0)
    query = normal(QUERIES, DIM)
    query *= 1.5 * math.sqrt(DIM) / (query @ centred.T).std(1, keepdim=True)
    liked = centred[torch.randint(0, TOKENS - WINDOW - 64, (QUERIES,), generator=g)]
    length = liked.norm(dim=1, keepdim=True)
    logit = (query * liked).sum(1, keepdim=True) / math.sqrt(DIM)
    query += liked / length * (6 - logit).clamp(min=0) * math.sqrt(DIM) / length
    return k.half(), v.half(), query.half()


def attention(query: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = query.double() @ k.double().T / math.sqrt(DIM)
    return logits.softmax(-1) @ v.double()


def stored(form: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a format makes of all but the latest tokens."""
    if not form.startswith("container"):
        name, _, rest = form.partition(" ")
        options: dict[str, Any] = {"sparsity": 0.7 if "70" in rest else 0.5}
        options["centre"] = "centred" in rest
        key, _, value = name.partition("/")
        options |= {"value_format": value or key, "window": WINDOW, "sinks": 0}
        cache = SparseKVCache(1, 1, DIM, key, max_tokens=TOKENS, **options)
        cache.append(0, k[None, None], v[None, None])
        cache.advance(TOKENS)
        keys, values = cache.dense(0, 0)
        return keys[0], values[0]
    sparsity, bits = {"50 4": (0.5, 4), "50 2": (0.5, 2), "70 2": (0.7, 2)}[form[10:]]
    old = TOKENS - WINDOW
    parts = []
    for x, value in ((k, False), (v, True)):
        c = (kv.compress_values if value else kv.compress_keys)(x[None, :old], sparsity, bits)
        parts.append(kv.reconstruct_sparse_matrix(*c, old, DIM, bits, value)[0])
    return torch.cat([parts[0], k[old:]]), torch.cat([parts[1], v[old:]])


# Relative L2. The first rows are the project's targets, the others guard what is there.
@pytest.mark.parametrize(
    ("form", "gauss", "laplace"),
    [
        ("dense4", 0.114, 0.175),
        ("dense2", 0.428, 0.562),
        ("bitmap4", 0.281, 0.332),
        ("bitmap2", 0.418, 0.556),
        ("4of8_2", 0.456, 0.562),
        ("bitmap2 70", 0.578, 0.665),
        ("4of8_4", 0.33, 0.37),
        ("bitmap4 70", 0.48, 0.54),
        ("bitmap2 centred", 0.418, 0.556),
        ("dense4/bitmap2", 0.22, 0.28),
        ("container 50 4", 0.281, 0.332),
        ("container 50 2", 0.652, 0.848),
        ("container 70 2", 0.585, 0.787),
    ],
)
@pytest.mark.parametrize("tail", ["gauss", "laplace"])
def test_error_of_the_output(form: str, gauss: float, laplace: float, tail: str) -> None:
    errors = []
    for seed in range(3):
        k, v, query = head(tail, seed)
        want = attention(query, k, v)
        got = attention(query, *stored(form, k, v))
        errors.append(((got - want).norm(dim=1) / want.norm(dim=1)).mean())
    error = float(torch.stack(errors).mean())
    assert error <= (gauss if tail == "gauss" else laplace), error
