# SPDX-License-Identifier: MIT
"""Truncated rows that leave few values, which a GPU lists: each against float64, alone and among
many rows, whose ends are a launch of their own.

Values are compared by their keys there, the bits of a float32 in the order of the numbers. A top-k
that many groups of 256 values reach gives a bound without reading the row again: the largest key,
less a multiple of a power of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES
from test_sampling import assert_law, assert_token

from quantgemm import ops

Tensor = torch.Tensor
GROUP = 256
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# As many rows as there are cases: one launch. Of 40 by type, of 104 two.
in_batches = pytest.mark.parametrize(
    ("device", "batch"),
    [("cpu", 1), *(pytest.param("cuda", n, marks=pytest.mark.cuda) for n in (1, 40, 104))],
)


def check(
    logits: Tensor, settings: list[dict[str, Any]], batch: int, device: str, dtype: torch.dtype
) -> None:
    """Rows and their settings, by turns if there are to be more; each time with other noise."""
    logits, batch = logits.to(dtype), max(batch, len(logits))
    own = [i % len(logits) for i in range(batch)]
    u = torch.rand(batch, 1, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)
    given = {
        name: torch.tensor([(OFF | settings[i])[name] for i in own], device=device) for name in OFF
    }
    given["uniforms"] = u.to(device)
    rows = logits[own].to(device)
    drawn = ops.draft_sample(rows, **given, return_probs=True)
    for i, (row, how) in enumerate(zip(logits, settings, strict=True)):
        edge = ("top_p" in how or "min_p" in how) and dtype == torch.float32
        assert_law(drawn, i, row, how, 2 if edge else 0)
    for b, i in enumerate(own):
        assert_token(int(drawn[0][b]), drawn[3][b], float(u[b]))
        assert all(torch.equal(x[b], x[i]) for x in drawn[1:])
    for a, w in zip(ops.draft_sample(rows, **given)[:3], drawn, strict=False):
        assert torch.equal(a, w)
    tokens, logprobs, status = ops.sample(rows, **given)
    assert torch.equal(tokens, drawn[0]) and not status.any()
    p = drawn[3].gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, p.log(), rtol=1e-6, atol=1e-6)
    # As a chain without drafts the row is ended elsewhere.
    chain = {
        "target": rows,
        "draft_tokens": torch.full((batch, 2), -1, device=device),
        "cu_rows": torch.arange(batch + 1, device=device),
    }
    given["uniforms"] = torch.cat([torch.full((batch, 2), 0.5), u], 1).to(device)
    in_chain = ops.spec_verify(**chain, **given)
    assert torch.equal(in_chain[0][:, 0], tokens) and not in_chain[3].any()
    torch.testing.assert_close(in_chain[2][:, 0], logprobs, rtol=1e-6, atol=1e-6)


@in_batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [70000, 70001])
def test_bound_of_the_lowest_value(vocab: int, dtype: torch.dtype, device: str, batch: int) -> None:
    """-1 is 2^30 keys above -inf, -4 is 63 · 2^24: where a top-k goes down to the largest negative
    numbers, its bound is the least key there is. Of up to 64 values, and of more, all are in the
    list, although few of them are kept; a temperature that large gives them weight."""
    g = torch.Generator().manual_seed(1)
    least = torch.finfo(dtype).min

    def row(top: float, near: int, far: Tensor) -> Tensor:
        """The largest value, some near it, and those far below, each in a group of its own."""
        values = torch.cat([torch.tensor([top]), top - 8 * torch.rand(near, generator=g), far])
        places = torch.randperm(vocab // GROUP, generator=g)[: len(values)] * GROUP
        out = torch.full((vocab,), -torch.inf)
        out[places + torch.randint(0, GROUP, places.shape, generator=g)] = values
        return out

    def far(count: int) -> Tensor:
        return -(torch.rand(count, generator=g) * 2 + 1) * 1e38

    equal = torch.full((50,), -1.7e38)
    many_equal = row(-1.0, 9, far(22))  # the largest value 40 times, in ten groups
    many_equal[(many_equal > -100).nonzero()[:, 0, None] // GROUP * GROUP + torch.arange(4)] = -1
    many_equal[(many_equal < -1) & (many_equal > -100)] = -torch.inf
    heat = {"temperature": 5e37}
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (row(-1.0, 5, equal), heat | {"top_k": 30}),
        (row(-1.0, 5, equal), {"top_k": 30}),
        (row(-1.0, 5, far(58)), heat | {"top_k": 30}),
        (row(-4.0, 5, far(58)), heat | {"top_k": 40, "top_p": 0.9}),
        (row(-1.0, 5, far(58)), heat | {"top_k": 50, "min_p": 0.05}),
        (row(-4.0, 5, far(24)), heat | {"top_k": 30}),  # as many as there are
        (many_equal, heat | {"top_k": 25}),
        (row(-1.0, 5, far(200)), heat | {"top_k": 100}),
        (row(-1.0, 19, torch.full((20,), least)), heat | {"top_k": 30}),
        (row(-1.0, 19, torch.full((20,), least)), heat | {"top_k": 30, "min_p": 0.01}),
        (row(-1.0, 19, torch.full((20,), least)), {"top_k": 30, "top_p": 0.5}),
    ]
    for first in (0, 4, 8):
        some = cases[first : first + 4]
        check(torch.stack([x for x, _ in some]), [s for _, s in some], batch, device, dtype)


@in_batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [128256, 128255])
def test_few_values_out_of_many_vectors(
    vocab: int, dtype: torch.dtype, device: str, batch: int
) -> None:
    """Lanes know the upper half of their largest key: all that have the bound's are looked at, in
    each group that reaches the bound, until there are more vectors than are listed, 2048. Here
    every value has that half, and a group has 64 vectors, or 32 of 16-bit values."""
    rng = np.random.default_rng(3)
    steps = {torch.float32: 1, torch.float16: 1 << 13, torch.bfloat16: 1 << 16}[dtype]
    edge = max(1 << 15, steps)  # bits above those of 4.0 from where on a value reaches the bound
    most = GROUP // 4 if dtype == torch.float32 else GROUP // 8
    rows, settings = [], []
    for groups in (2048 // most, 2048 // most + 1, 2048 // most + 8, 300):
        bits = 0x40800000 + rng.integers(0, edge // steps, vocab) * steps
        places = rng.permutation(vocab // GROUP)[:groups] * GROUP + rng.integers(0, GROUP, groups)
        last = max(1, (1 << 15) // steps) * steps
        bits[places] = 0x40800000 + edge + rng.integers(0, last // steps, groups) * steps
        bits[places[0]] = 0x40800000 + edge + last - steps
        row = torch.from_numpy(bits.astype(np.int32)).view(torch.float32)
        assert torch.equal(row.to(dtype).float(), row)
        for more in ({}, {"top_p": 0.9}):
            rows.append(row)
            settings.append({"top_k": groups - 1, "temperature": 0.004} | more)
    check(torch.stack(rows), settings, batch, device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "batch"), [(5000, 65), (20000, 130), (128256, 65)])
def test_many_rows_that_leave_few(vocab: int, batch: int, dtype: torch.dtype, device: str) -> None:
    """Whose probabilities are written by the block that has ended them, all its threads."""
    if device == "cpu" and vocab > 5000:
        pytest.skip("the same code as for smaller vocabularies; the GPU runs these")
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(13, vocab, generator=g).mul(3)
    logits[3] = logits[3].mul(2).round().div(2)  # ties
    logits[4, : vocab // 2] = -torch.inf
    kept = [1, 2, 8, 20, 40, 60, 64, 65, 20, 50, 50, 0, 400]
    settings: list[dict[str, Any]] = [{"top_k": k} for k in kept]
    settings[8] |= {"temperature": 0.5}
    settings[9] |= {"top_p": 0.8}
    settings[10] |= {"min_p": 0.1, "temperature": 2.0}
    settings[11] = {"top_p": 0.1}
    check(logits, settings, batch, device, dtype)
