# SPDX-License-Identifier: MIT
"""moe_gemm: every (token, expert) against float64 with torch's own error as the measure, whatever
the ids say; both ways of grouping, all algorithms."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import DEVICES
from test_gemm import random_weights, random_x
from test_packed import PACKED, assert_accurate
from test_packed import algos as algos_without_experts

from quantgemm import ops
from quantgemm.formats import FORMATS, Format, QType

on_devices = pytest.mark.parametrize("device", DEVICES)
by_name = pytest.mark.parametrize("fmt", PACKED, ids=lambda f: f.name)


def algos(device: str, dtype: torch.dtype) -> list[str]:
    return [algo for algo in algos_without_experts(device, dtype) if algo != "few"]


def experts_of(
    fmt: Format, experts: int, n: int, k: int, device: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Packed weights [experts, strips, strip_bytes], and of each expert float64 [n, k].

    Every seventh expert has the same weights: many large ones take long to make.
    """
    pairs = [random_weights(fmt, n, k, device, seed) for seed in range(min(experts, 7))]
    packed = torch.stack([ops.pack(w, fmt.type_id) for w, _ in pairs])
    every = torch.arange(experts, device=device) % 7
    return packed[every], [pairs[e % 7][1] for e in range(experts)]


def random_ids(tokens: int, top: int, experts: int, device: str, seed: int = 5) -> torch.Tensor:
    """Distinct experts for each token, as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(experts, generator=generator)[:top] for _ in range(tokens)]
    return (
        torch.stack(ids).to(device) if tokens else torch.zeros(0, top, dtype=torch.int64).to(device)
    )


def check(
    x: torch.Tensor,
    packed: torch.Tensor,
    decoded: list[torch.Tensor],
    qtype: int,
    ids: torch.Tensor,
    algo: str,
) -> torch.Tensor:
    """The product, compared expert by expert; rows of ids that are none are zero."""
    n, k = decoded[0].shape
    y = ops.moe_gemm(x, packed, qtype, n, k, ids, algo=algo)
    assert y.shape == (*ids.shape, n) and y.dtype == x.dtype
    each = x if x.dim() == 3 else x[:, None].expand(-1, ids.shape[1], -1)
    for expert in range(len(decoded)):
        if (ids == expert).any():
            assert_accurate(y[ids == expert], each[ids == expert], decoded[expert])
    assert (y[(ids < 0) | (ids >= len(decoded))] == 0).all()
    return y


@on_devices
@by_name
def test_every_type(fmt: Format, device: str) -> None:
    e = fmt.block_elems
    sizes = [(1, 4, 8, 96, 3 * e), (9, 2, 3, 33, max(e, 64))]
    if device == "cuda":
        sizes += [(40, 4, 8, 136, 1024 + e), (300, 2, 4, 200, 2048)]
    dtypes = (
        (torch.bfloat16,) if device == "cpu" else (torch.bfloat16, torch.float16, torch.float32)
    )
    for (tokens, top, experts, n, k), dtype in itertools.product(sizes, dtypes):
        packed, decoded = experts_of(fmt, experts, n, k, device)
        x = random_x(tokens, k, dtype=dtype, device=device)
        ids = random_ids(tokens, top, experts, device)
        for algo in algos(device, dtype):
            check(x, packed, decoded, fmt.type_id, ids, algo)


@on_devices
def test_any_ids(device: str) -> None:
    """Few slots and many, all to one expert, none to any, the same one twice, ids out of range."""
    fmt, n, k, experts = FORMATS[QType.Q4_K], 72, 512, 6
    packed, decoded = experts_of(fmt, experts, n, k, device)
    dtype = torch.bfloat16
    for tokens, top in ((1, 1), (1, 8), (2, 8), (16, 8), (17, 8), (150, 3)):
        x = random_x(tokens, k, dtype=dtype, device=device)
        one = torch.full((tokens, top), 5, device=device)
        generator = torch.Generator().manual_seed(tokens)
        any_ids = torch.randint(-3, experts + 3, (tokens, top), generator=generator).to(device)
        for ids, algo in itertools.product(
            (one, one - 6, any_ids, any_ids.int(), any_ids * 2**31), algos(device, dtype)
        ):
            y = check(x, packed, decoded, fmt.type_id, ids, algo)
            assert torch.equal(y, ops.moe_gemm(x, packed, fmt.type_id, n, k, ids, algo=algo))


@on_devices
def test_rows_weights_and_bias(device: str) -> None:
    """A row of x for each slot, routing weights and a bias, each rounded once into y."""
    fmt, n, k, experts, top = FORMATS[QType.Q4_0], 88, 128, 5, 3
    packed, decoded = experts_of(fmt, experts, n, k, device)
    for tokens, dtype in itertools.product((1, 30, 200), (torch.float32, torch.float16)):
        ids = random_ids(tokens, top, experts, device)
        ids[0, 0] = -1
        x = random_x(tokens, top, k, dtype=dtype, device=device)
        weights = torch.rand(tokens, top, generator=torch.Generator().manual_seed(1)).to(device)
        bias = random_x(experts, n, dtype=dtype, device=device, seed=7)
        for algo in algos(device, dtype):
            y = check(x, packed, decoded, fmt.type_id, ids, algo)
            full = ops.moe_gemm(x, packed, fmt.type_id, n, k, ids, weights, bias, algo).double()
            want = (y.double() + bias.double()[ids.clamp(0)]) * weights.double()[..., None]
            want[ids < 0] = 0
            size = weights[..., None] * (y.double().abs() + bias.double()[ids.clamp(0)].abs())
            assert ((full - want).abs() <= torch.finfo(dtype).eps * 2 * size).all()
            ones = torch.ones_like(weights)
            assert torch.equal(ops.moe_gemm(x, packed, 2, n, k, ids, ones, None, algo), y)


@on_devices
def test_gated(device: str) -> None:
    """silu(gate) · up of each expert: what the two products and torch make of it."""
    fmt, n, k, experts, top = FORMATS[QType.Q4_K], 88, 512, 5, 3
    gate = experts_of(fmt, experts, n, k, device)[0]
    up = gate.flip(0)
    for tokens, dtype in itertools.product((1, 30, 200), (torch.float32, torch.bfloat16)):
        ids = random_ids(tokens, top, experts, device)
        ids[0, 0] = -1
        x = random_x(tokens, k, dtype=dtype, device=device) / 8
        weights = torch.rand(tokens, top, generator=torch.Generator().manual_seed(1)).to(device)
        parts = [ops.moe_gemm(x.float(), w, fmt.type_id, n, k, ids).double() for w in (gate, up)]
        want = torch.nn.functional.silu(parts[0]) * parts[1] * weights[..., None]
        for algo in algos(device, dtype):
            y = ops.moe_gemm(x, gate, fmt.type_id, n, k, ids, weights, None, algo, up)
            error = (y.double() - want).abs().amax(-1)
            largest = parts[0].abs().amax(-1) * parts[1].abs().amax(-1)
            assert (error <= 4 * max(torch.finfo(dtype).eps, 1e-6) * largest).all()
            assert (y[0, 0] == 0).all()


@pytest.mark.cuda
def test_many_experts_and_long_rows() -> None:
    """Pieces that end inside of an expert, columns in several panels, groups of several tiles."""
    fmt = FORMATS[QType.Q4_K]
    for tokens, top, experts, n, k in (
        (16, 8, 128, 768, 2048),
        (64, 8, 128, 130, 512),
        (3, 2, 4, 520, 14336),
        (700, 4, 5, 264, 768),
        (1500, 8, 64, 200, 256),
    ):
        packed, decoded = experts_of(fmt, experts, n, k, "cuda")
        x = random_x(tokens, k, dtype=torch.bfloat16, device="cuda")
        ids = random_ids(tokens, top, experts, "cuda")
        for algo in algos("cuda", torch.bfloat16):
            check(x, packed, decoded, fmt.type_id, ids, algo)


@on_devices
def test_infinite_and_nan_activations(device: str) -> None:
    fmt, n, k = FORMATS[QType.Q4_0], 70, 256
    packed, decoded = experts_of(fmt, 3, n, k, device)
    ids = random_ids(40, 2, 3, device)
    x = random_x(40, k, dtype=torch.bfloat16, device=device)
    x[1, 3], x[2, 17] = float("inf"), float("nan")
    want = torch.einsum("tk,tjnk->tjn", x.double(), torch.stack(decoded)[ids])
    for algo in algos(device, torch.bfloat16):
        y = ops.moe_gemm(x, packed, 2, n, k, ids, algo=algo)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf() & (y > 0), want.isinf() & (want > 0))


@pytest.mark.cuda
def test_graph_sees_new_ids() -> None:
    """Captured once, replayed with other ids: nothing of the grouping is the host's."""
    fmt, n, k = FORMATS[QType.Q4_K], 136, 512
    packed = experts_of(fmt, 8, n, k, "cuda")[0]
    for tokens in (1, 8, 100):
        x = random_x(tokens, k, dtype=torch.bfloat16, device="cuda")
        ids = random_ids(tokens, 4, 8, "cuda")
        ops.moe_gemm(x, packed, fmt.type_id, n, k, ids)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.moe_gemm(x, packed, fmt.type_id, n, k, ids)
        for seed in range(4):
            ids.copy_(random_ids(tokens, 4, 8, "cuda", seed))
            ids[0, seed] = -1
            graph.replay()
            assert torch.equal(y, ops.moe_gemm(x, packed, fmt.type_id, n, k, ids))
            assert (y[0, seed] == 0).all() and (y[:, 3 - seed] != 0).any()


@on_devices
def test_empty(device: str) -> None:
    packed = experts_of(FORMATS[QType.Q4_0], 2, 40, 64, device)[0]
    x = torch.zeros(0, 64, device=device)
    ids = torch.zeros(0, 3, dtype=torch.int64, device=device)
    assert ops.moe_gemm(x, packed, 2, 40, 64, ids).shape == (0, 3, 40)
    ids = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert ops.moe_gemm(torch.zeros(2, 64, device=device), packed, 2, 40, 64, ids).shape == (
        2,
        0,
        40,
    )
    ids = torch.zeros(2, 1, dtype=torch.int64, device=device)
    y = ops.moe_gemm(torch.zeros(2, 64, device=device), packed[:0], 2, 40, 64, ids)
    assert torch.equal(y, torch.zeros(2, 1, 40, device=device))


def test_errors_name_the_argument() -> None:
    packed, x = (
        torch.stack([ops.pack(torch.zeros(3, 36, dtype=torch.uint8), 2)] * 2),
        torch.zeros(4, 64),
    )
    ids = torch.zeros(4, 2, dtype=torch.int64)
    cases = [
        (ValueError, r"packed: expected shape \[experts, 4, 576\] for Q4_0 .*, got \[4, 576\]",
         lambda: ops.moe_gemm(x, packed[0], 2, 3, 64, ids)),
        (NotImplementedError, "packed: expected at most 4096 experts, got 4097",
         lambda: ops.moe_gemm(x, packed[:1].expand(4097, -1, -1), 2, 3, 64, ids)),
        (ValueError, r"x: expected shape \[4, 64\] or \[4, 2, 64\], got \[3, 64\]",
         lambda: ops.moe_gemm(x[:3], packed, 2, 3, 64, ids)),
        (ValueError, r"x: expected shape .*, got \[4, 3, 64\]",
         lambda: ops.moe_gemm(torch.zeros(4, 3, 64), packed, 2, 3, 64, ids)),
        (TypeError, "expert_ids: expected torch.int64 or torch.int32, got torch.float32",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids.float())),
        (ValueError, r"expert_ids: expected two dimensions \[tokens, top\], got shape \[4\]",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids[:, 0])),
        (TypeError, "weights: expected torch.float32, got torch.float16",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, torch.ones(4, 2).half())),
        (ValueError, r"weights: expected shape \[4, 2\] as expert_ids, got \[4, 1\]",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, torch.ones(4, 1))),
        (ValueError, r"bias: expected shape \[2, 3\], got \[3\]",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, None, torch.zeros(3))),
        (ValueError, r"up: expected shape \[experts, 4, 576\]",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, up=packed[0])),
        (ValueError, "up: expected 2 experts as packed, got 1",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, up=packed[:1])),
        (ValueError, "bias: expected none beside up",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, None, torch.zeros(2, 3), up=packed)),
        (ValueError, "k: expected at least 1, got 0",
         lambda: ops.moe_gemm(x[:, :0], packed[..., :0], 2, 3, 0, ids)),
        (NotImplementedError, "the CPU has no tensor cores",
         lambda: ops.moe_gemm(x, packed, 2, 3, 64, ids, algo="gemv")),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@on_devices
def test_autocast_and_gradients(device: str) -> None:
    """In a region of another dtype x and bias are cast, and what has no gradient says so."""
    fmt = FORMATS[QType.Q4_0]
    packed, _ = experts_of(fmt, 3, 40, 64, device)
    x = random_x(4, 64, dtype=torch.float32, device=device)
    ids = random_ids(4, 2, 3, device)
    bias = torch.randn(3, 40, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.moe_gemm(x, packed, QType.Q4_0, 40, 64, ids, bias=bias)
        gated = ops.gemm_packed_gated(x, packed[0], packed[1], QType.Q4_0, 40, 64)
    half = x.bfloat16()
    want = ops.moe_gemm(half, packed, QType.Q4_0, 40, 64, ids, bias=bias.bfloat16())
    assert torch.equal(y, want)
    want = ops.gemm_packed_gated(half, packed[0], packed[1], QType.Q4_0, 40, 64)
    assert torch.equal(gated, want)
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="moe_gemm has no gradient"):
        ops.moe_gemm(x, packed, QType.Q4_0, 40, 64, ids)
    with pytest.raises(NotImplementedError, match="gemm_packed_gated has no gradient"):
        ops.gemm_packed_gated(x, packed[0], packed[1], QType.Q4_0, 40, 64)
    with torch.no_grad():
        assert not ops.moe_gemm(x, packed, QType.Q4_0, 40, 64, ids).requires_grad


@pytest.mark.cuda
def test_weights_that_are_copied_first() -> None:
    """Views with gaps: the kernel, which reads weights early, must see the copy."""
    fmt = FORMATS[QType.Q8_0]
    x = random_x(1, 4096, dtype=torch.bfloat16, device="cuda")
    for seed in range(5):
        both = [
            ops.pack(random_weights(fmt, 2048, 4096, "cuda", seed + i)[0], QType.Q8_0)
            for i in (0, 1)
        ]
        mixed = torch.stack(both, 1)
        got = ops.gemm_packed_gated(x, mixed[:, 0], mixed[:, 1], QType.Q8_0, 2048, 4096)
        want = ops.gemm_packed_gated(x, both[0], both[1], QType.Q8_0, 2048, 4096)
        assert torch.equal(got, want)
