# SPDX-License-Identifier: MIT
"""The CPU's products: instruction sets agree, and tiles, threads and batches do not show in y."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import BLOCK_FORMATS, assert_same, random_blocks

from quantgemm import ops
from quantgemm.formats import Format, format_by_name

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ("plain", "avx2", "avx512")  # more than the processor has falls back to what it has
ALGOS = ("tiled", "dp4a")


@cache
def weights_of(fmt: Format, n: int, k: int) -> torch.Tensor:
    """Rows whose weights are finite: random bytes with the rows of any other kind replaced."""
    blocks = torch.from_numpy(random_blocks(fmt, 8 * n, k))
    decoded = ops.dequantize(blocks, fmt.type_id)
    usual = decoded.isfinite().all(-1) & (decoded.abs().amax(-1) < 1e30)
    kept = blocks[usual]
    if len(kept) < n:  # hardly any random row of this type is: one good block, repeated
        singles = torch.from_numpy(random_blocks(fmt, 4096, fmt.block_elems))
        values = ops.dequantize(singles, fmt.type_id)
        good = singles[values.isfinite().all(-1) & (values.abs().amax(-1) < 1e30)]
        count = n * k // fmt.block_elems
        picks = good[torch.arange(count) % len(good)]
        return picks.reshape(n, -1)
    return kept[:n].contiguous()


def activations(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * k)).to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What dp4a multiplies: x as int8 times its scale, in float64."""
    k = x.shape[-1]
    rows = ops.quantize_activations(x)
    codes = rows[:, :k].contiguous().view(torch.int8).double().unflatten(-1, (-1, 32))
    scales = rows[:, k : k + k // 4].contiguous().view(torch.float32)[:, ::2].double()
    return (codes * scales[..., None]).flatten(1)


def assert_product(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, last_bits: float) -> None:
    """Summation order only, and the rounding of y to its type."""
    terms = x.double().abs() @ w.double().abs().T
    error = (y.double() - x.double() @ w.double().T).abs()
    assert (error <= 1e-5 * terms + last_bits * y.double().abs() + 1e-7).all(), error.max()


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_formats(fmt: Format, dtype: torch.dtype) -> None:
    """One block, a tail after whole panels, ragged tiles."""
    for m, n, cols in ((1, 5, 1), (2, 3, 1030), (9, 35, 4200)):
        k = -(-cols // fmt.block_elems) * fmt.block_elems
        w = weights_of(fmt, n, k)
        decoded = ops.dequantize(w, fmt.type_id)
        w = w[decoded.abs().amax(-1) < 100] if dtype == torch.float16 else w
        decoded = ops.dequantize(w, fmt.type_id)
        x = activations(m, k, dtype)
        last_bits = torch.finfo(dtype).eps
        tiled = ops.gemm(x, w, fmt.type_id, "tiled")
        assert tiled.dtype == dtype
        assert_product(tiled, x, decoded, last_bits)
        assert_product(ops.gemm(x, w, fmt.type_id, "dp4a"), rounded(x), decoded, last_bits)


LEVEL_SCRIPT = """
import sys, torch
from conftest import BLOCK_FORMATS
from quantgemm import ops
from test_gemm_cpu import activations, weights_of
out = []
for fmt in BLOCK_FORMATS:
    w = weights_of(fmt, 7, 3 * 512)
    for m in (1, 5):
        for algo in ("tiled", "dp4a"):
            out.append(ops.gemm(activations(m, 3 * 512), w, fmt.type_id, algo))
torch.save(out, sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    results = []
    for level in LEVELS:
        path = tmp_path / level
        others = os.environ.get("PYTHONPATH", "")
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests"), others))
        env = {**os.environ, "QUANTGEMM_CPU": level, "PYTHONPATH": paths}
        command = [sys.executable, "-c", LEVEL_SCRIPT, str(path)]
        subprocess.run(command, env=env, cwd=tmp_path, check=True)
        results.append(torch.load(path))
    index = 0
    for fmt in BLOCK_FORMATS:
        w = ops.dequantize(weights_of(fmt, 7, 3 * 512), fmt.type_id).double()
        for m in (1, 5):
            x = activations(m, 3 * 512)
            for exact in (x.double(), rounded(x)):
                terms = exact.abs() @ w.abs().T
                for result in results:
                    error = (result[index].double() - exact @ w.T).abs()
                    assert (error <= 1e-5 * terms + 1e-30).all(), fmt.name
                index += 1


@pytest.mark.parametrize("algo", ["naive", *ALGOS])
def test_threads_do_not_show(algo: str) -> None:
    before = torch.get_num_threads()
    try:
        for name, m, n, k in (("Q4_K", 1, 301, 2560), ("Q6_K", 13, 77, 1280), ("Q4_0", 530, 3, 96)):
            fmt = format_by_name(name)
            x, w = activations(m, k), weights_of(fmt, n, k)
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(ops.gemm(x, w, fmt.type_id, algo))
            for result in results[1:]:
                assert torch.equal(result, results[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_NL"])
def test_a_token_does_not_see_its_batch(algo: str, name: str) -> None:
    """Bits of a row are the same alone and among 37, where other tiles serve it."""
    fmt = format_by_name(name)
    x, w = activations(37, 3072), weights_of(fmt, 70, 3072)
    together = ops.gemm(x, w, fmt.type_id, algo)
    alone = torch.cat([ops.gemm(row[None], w, fmt.type_id, algo) for row in x])
    assert torch.equal(together, alone)
    assert torch.equal(ops.gemm(x[:3], w[5:9], fmt.type_id, algo), together[:3, 5:9])


@pytest.mark.parametrize("algo", ALGOS)
def test_long_sums(algo: str) -> None:
    """k = 2^18 with a mean: errors stay below twice torch's float32 product."""
    fmt = format_by_name("Q8_0")
    k = 1 << 18
    w = ops.quantize(torch.rand(6, k, generator=torch.Generator().manual_seed(1)), fmt.type_id)
    x = activations(3, k).abs()
    decoded = ops.dequantize(w, fmt.type_id)
    exact_x = rounded(x) if algo == "dp4a" else x.double()
    exact = exact_x @ decoded.double().T
    error = (ops.gemm(x, w, fmt.type_id, algo).double() - exact).abs().amax(-1)
    torchs = (exact_x.float() @ decoded.T - exact).abs().amax(-1)
    assert (error <= 2 * torchs + 4e-7 * exact.abs().amax(-1)).all(), (error, torchs)


@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_activations_reach_y(algo: str, value: float) -> None:
    fmt = format_by_name("Q4_0")
    x, w = activations(6, 128), weights_of(fmt, 9, 128)
    clean = ops.gemm(x, w, fmt.type_id, algo)
    x[4, 77] = value
    y = ops.gemm(x, w, fmt.type_id, algo)
    touched = ops.dequantize(w, fmt.type_id)[:, 77] != 0
    assert not y[4, touched].isfinite().any()
    rest = [0, 1, 2, 3, 5]
    assert_same(y[rest], clean[rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unquantised_rows(dtype: torch.dtype) -> None:
    for name, make in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        fmt = format_by_name(name)
        w = torch.randn(67, 1031, generator=torch.Generator().manual_seed(3)).to(make)
        for m in (1, 7):
            x = activations(m, 1031, dtype)
            y = ops.gemm(x, w.view(torch.uint8), fmt.type_id, "tiled")
            assert_product(y, x, w, torch.finfo(dtype).eps)
