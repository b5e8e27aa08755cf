# SPDX-License-Identifier: MIT
"""Calls one right behind another, in a graph and in two streams: as each of them gives it alone.

A kernel begins while the one before it ends, and a call uses the scratch memory of the call before.
So what would be read too early here is the data of another call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quantgemm import ops

pytestmark = pytest.mark.cuda

VOCAB, DRAFTS = 128256, 5
Case = dict[str, Tensor]
KINDS = {  # drafts, type, batch, truncated; how rows are read
    "one launch": (DRAFTS, torch.float32, 16, False),
    "one launch, eight blocks": (DRAFTS, torch.bfloat16, 12, False),
    "three waves": (DRAFTS, torch.bfloat16, 32, False),
    "two waves, laws": (DRAFTS, torch.float32, 16, True),
    "one wave": (DRAFTS, torch.bfloat16, 10, False),
    "one wave, laws": (DRAFTS, torch.bfloat16, 16, True),
    "many waves": (DRAFTS, torch.bfloat16, 48, False),
    "sample": (0, torch.bfloat16, 256, False),
    "sample, truncated": (0, torch.float32, 200, True),
}


def case_of(kind: str, seed: int) -> Case:
    drafts, dtype, batch, truncated = KINDS[kind]
    g = torch.Generator(device="cuda").manual_seed(seed)
    order = torch.arange(batch, device="cuda")
    target = torch.randn(batch * (drafts + 1), VOCAB, generator=g, device="cuda").mul(2).to(dtype)
    case = {
        "target": target,
        "seed": order * 31 + seed,
        "position": order + 100 * seed,
        "temperature": ((order + seed) % 5 != 4).float(),
    }
    if truncated:
        case["top_k"] = torch.randint(20, 60, (batch,), generator=g, device="cuda")
        case["top_p"] = torch.rand(batch, generator=g, device="cuda") * 0.3 + 0.7
    if drafts:
        draft = target.view(batch, drafts + 1, VOCAB)[:, :drafts].clone()
        flipped = torch.rand(batch, drafts, generator=g, device="cuda") < 0.3
        case["draft"] = torch.where(flipped[..., None], draft.flip(-1), draft)
        case["draft_tokens"] = case["draft"].argmax(-1)
        case["cu_rows"] = torch.arange(batch + 1, device="cuda") * (drafts + 1)
    return case


def call_of(case: Case) -> tuple[Tensor, ...]:
    if "draft" in case:
        result = ops.spec_verify(**case)
        return result[0], result[1], result[2], result[3]
    more: Any = {k: v for k, v in case.items() if k != "target"}
    result = ops.sample(case["target"], **more)
    return result[0], result[1], result[2]


def alone(case: Case) -> tuple[Tensor, ...]:
    torch.cuda.synchronize()
    result = call_of(case)
    torch.cuda.synchronize()
    return result


def captured(calls: list[Case], stream: torch.cuda.Stream) -> tuple[Callable[[], None], list[Any]]:
    results: list[Any] = []
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for case in calls:
            results.append(call_of(case))
    return graph.replay, results


def assert_same(got: list[Any], want: list[Any]) -> None:
    for some, others in zip(got, want, strict=True):
        for a, b in zip(some, others, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_in_a_graph_are_what_each_is_alone(kind: str) -> None:
    calls = [case_of(kind, i) for i in range(3)]
    alone(calls[0])  # loads the kernels
    replay, results = captured(calls, torch.cuda.Stream())
    for turn in range(3):
        fresh = [case_of(kind, 10 * turn + 10 + i) for i in range(3)]
        want = [alone(case) for case in fresh]
        for buffers, case in zip(calls, fresh, strict=True):
            for name, buffer in buffers.items():
                buffer.copy_(case[name])
        del fresh
        replay()
        replay()
        torch.cuda.synchronize()
        assert_same(results, want)


@pytest.mark.parametrize(
    "kinds",
    [("three waves", "sample, truncated"), ("one wave", "sample"), ("one launch", "one launch")],
)
def test_two_streams_at_once(kinds: tuple[str, str]) -> None:
    cases = [[case_of(kind, 10 * i + j) for j in range(2)] for i, kind in enumerate(kinds)]
    want = [[alone(case) for case in some] for some in cases]
    streams = [torch.cuda.Stream() for _ in kinds]
    graphs = [captured(some, stream) for some, stream in zip(cases, streams, strict=True)]
    for _ in range(5):
        for _, results in graphs:
            for tensor in (t for result in results for t in result):
                tensor.fill_(-7)
        torch.cuda.synchronize()
        for _ in range(8):
            for (replay, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    replay()
        torch.cuda.synchronize()
        for (_, results), expected in zip(graphs, want, strict=True):
            assert_same(results, expected)
