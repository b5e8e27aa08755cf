# SPDX-License-Identifier: MIT
"""Chains of some sequences are read and verified by one kernel (read_and_verify.cu), a single one
by several: the same bits, whatever the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_sampling import on, seeds, uniforms

from quantgemm import ops
from quantgemm import reference as ref

Tensor = torch.Tensor
pytestmark = pytest.mark.cuda
KINDS = ("plain", "one_hot", "lse", "stored", "mapped", "broken", "greedy", "strided")
# Sequences, drafts, vocabulary: eight blocks to a sequence and fewer, rows of one strip, strips of
# several chunks, whose last chunk is short, warps far ahead of a verdict.
SIZES = [
    (16, 5, 128256),
    (12, 15, 4096),
    (30, 1, 300000),
    (24, 3, 64),
    (9, 7, 131080),
    (100, 2, 20000),
    (14, 15, 8),
    (8, 15, 4),
    (20, 2, 524280),
    (13, 1, 2056),
    (17, 4, 40008),
]


def chains(kind: str, batch: int, most: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of all lengths; two in three sequences accept all they have, others stop anywhere."""
    g = torch.Generator(device="cuda").manual_seed(vocab + most)
    draft_vocab = vocab // 2 if kind == "mapped" else vocab
    lengths = torch.arange(batch, device="cuda") % (most + 1) + 1
    cu_rows = torch.zeros(batch + 1, dtype=torch.int64, device="cuda")
    cu_rows[1:] = lengths.cumsum(0)
    target = torch.randn(batch * (most + 1), vocab, generator=g, device="cuda").mul(2)
    if kind == "one_hot":  # which is accepted with its probability
        target[:, vocab // 3] += 25
    draft = target[cu_rows[:-1, None] + torch.arange(most, device="cuda"), :draft_vocab]
    for b in range(1, batch, 3):
        draft[b, b // 3 % most :] = draft[b, b // 3 % most :].flip(-1)
    tokens = draft.argmax(-1)
    case: dict[str, Any] = {"target": target.to(dtype), "draft": draft.to(dtype)}
    case |= {"draft_tokens": tokens, "cu_rows": cu_rows} | on("cuda", seeds(batch))
    case["temperature"] = torch.linspace(0.7, 1.4, batch, device="cuda")
    if kind == "one_hot":
        case |= {"draft": None, "seed": None, "position": None} | on("cuda", uniforms(batch, most))
    if kind == "lse":
        temperature = case["temperature"][:, None, None]
        case["draft_lse"] = (case["draft"].float() / temperature).logsumexp(-1)
    if kind == "stored":
        case |= {"draft": draft.softmax(-1).to(dtype), "draft_probs": True}
    if kind == "mapped":
        ids = torch.arange(vocab, device="cuda")
        case["target_to_draft"] = torch.where(ids < draft_vocab, ids, -1)
    if kind == "broken":
        target, draft = case["target"], case["draft"]
        target[2, vocab // 3], target[5, 1], draft[4, 0, 2] = torch.nan, torch.inf, torch.nan
        target[8, -1], draft[6, 0, -1], draft[5, 0] = torch.nan, torch.inf, -torch.inf
        target[9], target[12, ::2] = -torch.inf, -torch.inf
        tokens[3, 0], tokens[6, most - 1], tokens[7, 0] = vocab + 5, -1, -7
        case["temperature"][2:5] = torch.tensor([torch.nan, -1.0, torch.inf])
        cu_rows[4] += 2 * most  # two sequences whose rows cannot be
        cu_rows[-1] += 1 << 40
    if kind == "strided":  # one row of q for all positions, rows of p apart
        case["draft"] = case["draft"][:, :1].expand(-1, most, -1)
        apart = torch.empty(len(target), vocab + 64, dtype=dtype, device="cuda")[:, :vocab]
        case["target"] = apart.copy_(case["target"])
    if kind == "greedy":
        case["temperature"][::2] = 0.0
    return case


def verified(case: dict[str, Any], first: int, end: int) -> tuple[Tensor, ...]:
    shared = ("target", "target_to_draft", "draft_probs", "cu_rows")
    picked = {k: v if k in shared or v is None else v[first:end] for k, v in case.items()}
    return ops.spec_verify(**picked | {"cu_rows": case["cu_rows"][first : end + 1]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "most", "vocab"), SIZES)
def test_same_as_alone(kind: str, batch: int, most: int, vocab: int, dtype: torch.dtype) -> None:
    case = chains(kind, batch, most, vocab, dtype)
    together = verified(case, 0, batch)
    assert kind == "broken" or int(together[3].max()) in (0, ref.EMPTY_RESIDUAL)
    assert kind == "strided" or int(together[1].max()) > 1
    for b in range(batch):
        for got, want in zip(together, verified(case, b, b + 1), strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=0, atol=0, equal_nan=True)
    for _ in range(5):
        for got, want in zip(verified(case, 0, batch), together, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_which_kernels_run() -> None:
    """Else this file would compare something with itself."""
    names = set()
    for batch in (16, 1):
        case = chains("plain", 16, 5, 128256, torch.bfloat16)
        verified(case, 0, batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            verified(case, 0, batch)
            torch.cuda.synchronize()
        if not profile.events():
            pytest.skip("kernels cannot be listed here")
        names.add("".join(sorted(event.name for event in profile.events())))
    if torch.cuda.get_device_capability() == (9, 0):
        assert sum("read_and_verify_kernel" in run for run in names) == 1
        assert sum("spec_verify_kernel" in run for run in names) == 1


def test_calls_behind_each_other_in_a_graph() -> None:
    """Each overlaps with the end of the one before, and finds other numbers in each replay."""
    cases = [chains(kind, 16, 5, 32000, torch.bfloat16) for kind in KINDS for _ in range(2)]
    for case in cases:
        verified(case, 0, 16)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = [verified(case, 0, 16) for case in cases]
    for _ in range(4):
        for case in cases:
            case["temperature"] += 0.1
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        for case, result in zip(cases, results, strict=True):
            for got, want in zip(result, verified(case, 0, 16), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
