# SPDX-License-Identifier: MIT
"""Products of packed weights by wgmma whose tiles several blocks share through memory: right, and
the same bits in any call, in graphs and beside each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_gemm import random_x
from test_packed import algos, assert_accurate

from quantgemm import ops
from quantgemm.formats import Format, format_by_name

pytestmark = pytest.mark.cuda

# Where an H200 cuts tiles: into two pieces or three, up to eight, whole tiles beside them, all
# tiles of tokens, ragged m and n.
SIZES = [
    (17, 1001, 4096),
    (40, 4000, 8192),
    (128, 336, 8192),
    (130, 100, 4096),
    (20, 19000, 2048),
    (70, 20008, 1024),
    (128, 18000, 1536),
    (280, 4096, 8192),
    (300, 18000, 1536),
    (1100, 17000, 4096),
    (600, 17001, 4096),
]
TYPES = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")
by_type = pytest.mark.parametrize("name", TYPES)


@pytest.fixture(autouse=True)
def skip_unless_able() -> None:
    if "wgmma" not in algos("cuda", torch.bfloat16):
        pytest.skip("wgmma is of compute capability 9.0")


def packed_weights(fmt: Format, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed, and as float64; made on the GPU, since they are large."""
    generator = torch.Generator(device="cuda").manual_seed(n + k)
    w = ops.quantize(torch.randn(n, k, generator=generator, device="cuda"), fmt.type_id)
    return ops.pack(w, fmt.type_id), ops.dequantize(w, fmt.type_id, torch.float32).double()


def product_of(
    name: str, m: int, n: int, k: int
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """x, whose numbers may change, and its product."""
    fmt = format_by_name(name)
    packed, _ = packed_weights(fmt, n, k)
    x = random_x(m, k, dtype=torch.bfloat16, device="cuda")
    return x, lambda: ops.gemm_packed(x, packed, fmt.type_id, n, k, None, "wgmma")


def spoil_free_memory() -> None:
    """What a product finds where its sums go is neither zero nor a number."""
    blocks = [
        torch.full((1 << shift,), 0xFF, dtype=torch.uint8, device="cuda") for shift in range(12, 26)
    ]
    del blocks


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize(
    ("name", "dtype"), [("Q4_0", torch.float16), *((name, torch.bfloat16) for name in TYPES)]
)
def test_against_float64(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    fmt = format_by_name(name)
    packed, weights = packed_weights(fmt, n, k)
    x = random_x(m, k, dtype=dtype, device="cuda")
    spoil_free_memory()
    y = ops.gemm_packed(x, packed, fmt.type_id, n, k, None, "wgmma")
    assert_accurate(y, x, weights)
    bias, residual = (
        random_x(n, dtype=dtype, device="cuda"),
        random_x(m, n, dtype=dtype, device="cuda"),
    )
    both = ops.gemm_packed(x, packed, fmt.type_id, n, k, bias, "wgmma", residual)
    unit = torch.finfo(dtype).eps
    most = y.float().abs() + bias.float().abs() + residual.float().abs()
    error = (both.float() - (y.float() + bias.float() + residual.float())).abs()
    assert bool((error <= 2 * unit * most).all())


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@by_type
def test_same_bits_again(name: str, m: int, n: int, k: int) -> None:
    _, product = product_of(name, m, n, k)
    want = product()
    for _ in range(20):
        spoil_free_memory()
        assert torch.equal(product(), want)
    results = [product() for _ in range(20)]  # one launch right behind the other
    assert all(torch.equal(y, want) for y in results)


def captured(
    products: list[Callable[[], torch.Tensor]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = [product() for product in products]
    return graph, results


def test_in_a_graph() -> None:
    pairs = [product_of(name, *sizes) for name in TYPES for sizes in SIZES[:8]]
    products = [product for _, product in pairs]
    for product in products:
        product()
    graph, results = captured(products, torch.cuda.Stream())
    for _ in range(3):
        for x, _ in pairs:
            x.normal_()
        want = [product() for product in products]
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        for y, expected in zip(results, want, strict=True):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("sizes", [(SIZES[4], SIZES[6]), (SIZES[1], SIZES[8])])
def test_two_streams_at_once(sizes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    """Blocks of both wait for others of theirs, and share the multiprocessors."""
    products = [product_of("Q4_K", *size)[1] for size in sizes]
    want = [product() for product in products]
    streams = [torch.cuda.Stream() for _ in products]
    graphs = [
        captured([product] * 4, stream) for product, stream in zip(products, streams, strict=True)
    ]
    for _ in range(5):
        for _, results in graphs:
            for y in results:
                y.fill_(-7)
        torch.cuda.synchronize()
        for _ in range(8):
            for (graph, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for (_, results), expected in zip(graphs, want, strict=True):
            assert all(torch.equal(y, expected) for y in results)


def test_gated() -> None:
    """Two products that have the same memory for their sums."""
    fmt, (m, n, k) = format_by_name("Q4_K"), SIZES[4]
    gate, up = (packed_weights(fmt, n, k)[0] for _ in range(2))
    x = random_x(m, k, dtype=torch.bfloat16, device="cuda")
    want = ops.gemm_packed_gated(x, gate, up, fmt.type_id, n, k, "wgmma")
    parts = [ops.gemm_packed(x, w, fmt.type_id, n, k, None, "wgmma").float() for w in (gate, up)]
    apart = torch.nn.functional.silu(parts[0]) * parts[1]
    assert bool(((want.float() - apart).abs() <= apart.abs().amax() / 100).all())
    for _ in range(20):
        assert torch.equal(ops.gemm_packed_gated(x, gate, up, fmt.type_id, n, k, "wgmma"), want)
