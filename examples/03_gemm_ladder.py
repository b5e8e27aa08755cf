# SPDX-License-Identifier: MIT
"""The GEMM ladder in five steps: what quantised weights cost in accuracy, and where it comes from.

    python examples/03_gemm_ladder.py [--size 512] [--type Q4_0] [--device cpu]

Each step prints the normalised mean-square error against float64 of the weights it multiplies by:
nmse = mean((y − y64)²) / mean(y64²), and its square root, the relative error, in per cent.
docs/ladder.md has the algebra.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time

import torch

import quantgemm
from quantgemm import QType, ops
from quantgemm.formats import FORMATS


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).square().mean() / want.square().mean()).item()


def say(step: str, what: str, error: float) -> None:
    print(f"{step:4} {what:62} nmse {error:9.2e}   {100 * error**0.5:9.4f} %")


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What quantize_activations stores: codes [m, k/32, 32] and scales [m, k/32, 1], in float64."""
    m, k = x.shape
    rows = ops.quantize_activations(x)
    codes = rows[:, :k].view(torch.int8).double().reshape(m, k // 32, 32)
    pairs = rows[:, k : k + k // 4].contiguous().view(torch.float32).reshape(m, k // 32, 2)
    return codes, pairs[:, :, :1].double()


def q4_0_with_and_without(x: torch.Tensor, w: torch.Tensor) -> tuple[float, float]:
    """Errors of d_w·d_a·Σ c·q − 8·d_w·s_a with its second term and without, c the codes 0…15."""
    codes, scales = int8_rows(x)
    packed = ops.quantize(w, QType.Q4_0)
    decoded = ops.dequantize(packed, QType.Q4_0).double()
    d = packed.reshape(-1, 18)[:, :2].contiguous().view(torch.float16).double()
    unsigned = decoded + 8 * d.reshape(len(w), -1).repeat_interleave(32, 1)
    rounded, exact = (codes * scales).reshape(x.shape), x.double() @ decoded.T
    return nmse(rounded @ decoded.T, exact), nmse(rounded @ unsigned.T, exact)


def seconds(call: object) -> float:
    assert callable(call)
    call()
    best = float("inf")
    for _ in range(3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_gpu = torch.cuda.is_available() and quantgemm.build_info().cuda is not None
    parser.add_argument("--size", type=int, default=512, help="m = n = k, a multiple of 256")
    parser.add_argument("--type", default="Q4_0", help="a type that quantize can write")
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    options = parser.parse_args()
    fmt = FORMATS[QType[options.type]]
    if options.size % 256:
        parser.error(f"--size: expected a multiple of 256, got {options.size}")
    size, device = options.size, options.device

    torch.manual_seed(0)
    x = torch.randn(size, size, device=device) + 1.0  # a mean, so that offsets matter
    w = 0.02 * torch.randn(size, size, device=device)
    truth = x.double() @ w.double().T

    print(f"y[{size}, {size}] = x · wᵀ with {fmt.name} weights on {device}\n")
    say("1", "float32 weights, the naive loop", nmse(ops.gemm_fp32(x, w, "naive"), truth))
    say("", "float32 weights, tiled", nmse(ops.gemm_fp32(x, w, "tiled"), truth))

    packed = ops.quantize(w, fmt.type_id)
    decoded = ops.dequantize(packed, fmt.type_id)
    print(f"     weights: {w.numel() * 4:,} bytes -> {packed.numel():,}")
    say("2", f"the weights themselves after {fmt.name}", nmse(decoded, w))
    say(
        "", "the exact product of the decoded weights", nmse(x.double() @ decoded.double().T, truth)
    )

    exact = x.double() @ decoded.double().T  # from here on the truth is the decoded weights'
    plan = quantgemm.explain_gemm(size, size, size, fmt.type_id, device, torch.float32)
    rungs = [algo for algo in plan.available if algo in ("naive", "tiled")]
    for algo in rungs:
        y = ops.gemm(x, packed, fmt.type_id, algo)
        say(
            "3" if algo == rungs[0] else "", f"W4A16, {algo}: decode, then multiply", nmse(y, exact)
        )

    codes, scales = int8_rows(x)
    rounded = (codes * scales).reshape(size, size)
    for algo in [a for a in plan.available if a in ("dp4a", "mma_q8")]:
        y = ops.gemm(x, packed, fmt.type_id, algo)
        say("4", f"W4A8, {algo}: against the same integers", nmse(y, rounded @ decoded.double().T))
        say("", f"W4A8, {algo}: against the decoded weights", nmse(y, exact))
        say("", f"W4A8, {algo}: against float64 of the original weights", nmse(y, truth))
    with_term, without = q4_0_with_and_without(x, w)
    say("", "Q4_0, W4A8, all terms", with_term)
    say("", "Q4_0, W4A8, without the compensation term −8·d_w·s_a", without)

    print("\n5    speed beside what is installed (one call, not a benchmark: see benchmarks/)")
    print(f"     {'torch float32':24} {1e3 * seconds(lambda: x @ w.T):8.3f} ms")
    for algo in plan.available:
        call = lambda a=algo: ops.gemm(x, packed, fmt.type_id, a)  # noqa: E731
        print(f"     {'quantgemm ' + algo:24} {1e3 * seconds(call):8.3f} ms")
    if importlib.util.find_spec("gguf"):
        import gguf

        blocks = packed.cpu().numpy()
        kind = gguf.GGMLQuantizationType(fmt.type_id)

        def with_gguf() -> None:
            torch.from_numpy(gguf.dequantize(blocks, kind)).to(device) @ x.T

        print(f"     {'gguf.dequantize, torch':24} {1e3 * seconds(with_gguf):8.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
