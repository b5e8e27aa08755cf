# SPDX-License-Identifier: MIT
"""The packed layout on the GPU: packing and unpacking, products beside the time that reading takes.

    python benchmarks/bench_packed.py [--part pack,types,tokens,int8,moe,chain,heatmap]
                                      [--types Q4_K] [--shapes 4096x4096] [--out benchmarks/results]

Weights are cold (copies rotate past the L2) and calls are replays of a CUDA graph. `read_us` is a
kernel that reads as many bytes and does nothing with them, in a graph of the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, copy_bandwidth, print_table, save, time_gpu
from limits import SHAPES as HEAT_SHAPES
from limits import TOKENS, Clock, fractions, parse_shapes, plot_heatmap, summary

from quantgemm import _C, ops
from quantgemm.formats import FORMATS, Format, format_by_name

SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192), (4096, 14336), (1024, 4096)]
INT8_SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
INT8_TOKENS = [512, 1024, 2048, 4096]
MOE_SHAPES = [(128, 8, 768, 2048), (128, 8, 1536, 4096), (8, 2, 14336, 4096)]  # experts, top, n, k
MOE_TOKENS = [1, 2, 4, 8, 16, 64, 256, 1024, 4096]
# A layer of Llama 3 8B: its matrices [n, k] in the order in which a token meets them.
LAYER = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
LAYERS = 4  # one after the other, so that weights are cold
BYTES_PER_SECOND = 4.45e12  # of one kernel that reads much, on an H200
PARTS = ("pack", "types", "tokens", "int8", "moe", "chain", "heatmap")
CHAIN_TYPES = ["Q4_K", "Q4_0"]
TYPES = "Q4_0,Q8_0,Q4_K,Q6_K"
ROTATED_BYTES = 250e6
MODEL_BYTES = 4.5e9
Rows = list[dict[str, Any]]

READ_KERNEL = """
extern "C" __global__ void read_bytes(const uint4* from, int count, unsigned* out) {
  unsigned all = 0;
  const int first = blockIdx.x * 4 * blockDim.x + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = first + j * blockDim.x;
    v[j] = i < count ? __ldcs(from + i) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) all ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  if (all == 0x12345678u) *out = all;
}
"""
READ_THREADS = 512


def reader() -> Callable[[torch.Tensor], None]:
    """A function that reads a tensor's bytes on the GPU: blocks of 32 kB that lie side by side."""
    kernel = torch.cuda._compile_kernel(READ_KERNEL, "read_bytes")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(t: torch.Tensor) -> None:
        count = t.numel() // 16
        blocks = -(-count // (4 * READ_THREADS))
        kernel(grid=(blocks, 1, 1), block=(READ_THREADS, 1, 1), args=[t, count, out])

    return read


def timed(call: Callable[[torch.Tensor], Any], copies: Sequence[torch.Tensor]) -> float:
    return time_gpu([partial(call, copy) for copy in copies], replays=10).median


def blocks(fmt: Format, n: int, k: int) -> torch.Tensor:
    """Quantised normal weights: rows drawn from a few."""
    some = ops.quantize(0.02 * torch.randn(64, k, device="cuda"), fmt.type_id)
    return some[torch.randint(0, 64, (n,), device="cuda")]


def packed_copies(fmt: Format, n: int, k: int) -> list[torch.Tensor]:
    count = max(2, min(64, int(ROTATED_BYTES / (n * fmt.row_bytes(k)))))
    return [ops.pack(blocks(fmt, n, k), fmt.type_id) for _ in range(count)]


def packing(types: Sequence[str], bandwidth: float) -> Rows:
    """Both ways for the largest shape; what a model of 4.5 GB would take, beside a copy of it."""
    n, k = 28672, 8192
    rows: Rows = []
    for name in types:
        fmt = format_by_name(name)
        w = [blocks(fmt, n, k) for _ in range(2)]
        packed = [ops.pack(v, fmt.type_id) for v in w]
        row: dict[str, Any] = {"type": name, "MB": w[0].numel() / 1e6}
        row["copy_us"] = 2 * w[0].numel() / bandwidth * 1e6
        row["pack_us"] = timed(lambda v, t=fmt.type_id: ops.pack(v, t), w)
        row["unpack_us"] = timed(lambda p, t=fmt.type_id: ops.unpack(p, t, n, k), packed)
        row["ms_per_4.5GB"] = row["pack_us"] * 1e-3 * MODEL_BYTES / w[0].numel()
        rows.append(row)
    return rows


def every_type(n: int, k: int, read: Callable[[torch.Tensor], None] | None) -> Rows:
    """One token, every type with a packed form."""
    x = torch.randn(1, k, device="cuda")
    rows: Rows = []
    for entry in _C.format_table():
        if not entry["can_pack"]:
            continue
        fmt = FORMATS[entry["type_id"]]
        copies = packed_copies(fmt, n, k)
        row: dict[str, Any] = {"type": fmt.name, "MB": copies[0].numel() / 1e6}
        row["read_us"] = timed(read, copies) if read else float("nan")
        for dtype in (torch.bfloat16, torch.float16):
            row[str(dtype)[6:]] = timed(product(x.to(dtype), fmt, n, k), copies)
        row["x_read"] = row["bfloat16"] / row["read_us"]
        rows.append(row)
    return rows


def product(
    x: torch.Tensor, fmt: Format, n: int, k: int, algo: str = "auto"
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda packed: ops.gemm_packed(x, packed, fmt.type_id, n, k, None, algo)


def dense_copies(n: int, k: int) -> int:
    return max(2, min(16, int(ROTATED_BYTES / (2 * n * k))))


def tokens(types: Sequence[str], read: Callable[[torch.Tensor], None] | None) -> Rows:
    """Microseconds of `auto` by tokens, each shape and type on a line; cuBLAS with bfloat16."""
    rows: Rows = []
    row: dict[str, Any]
    for n, k in SHAPES:
        dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(dense_copies(n, k))]
        row = {"n": n, "k": k, "type": "cuBLAS", "MB": dense[0].nbytes / 1e6}
        row["read_us"] = float("nan")
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda").bfloat16()
            row[f"m={m}"] = timed(lambda w, x=x: x @ w.T, dense)
        rows.append({**row, "x_read": float("nan")})
        del dense
        for name in types:
            fmt = format_by_name(name)
            copies = packed_copies(fmt, n, k)
            row = {"n": n, "k": k, "type": name, "MB": copies[0].numel() / 1e6}
            row["read_us"] = timed(read, copies) if read else float("nan")
            for m in TOKENS:
                x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
                row[f"m={m}"] = timed(product(x, fmt, n, k), copies)
            row["x_read"] = row["m=1"] / row["read_us"]
            rows.append(row)
    return rows


def in_int8(types: Sequence[str]) -> Rows:
    """Microseconds of `int8` and `auto`; cuBLAS with bfloat16; torch._int_mm without scales."""
    rows: Rows = []
    for n, k in INT8_SHAPES:
        dense = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(dense_copies(n, k))]
        codes = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in dense]
        for m in INT8_TOKENS:
            x = torch.randn(m, k, device="cuda").bfloat16()
            q = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
            row: dict[str, Any] = {"n": n, "k": k, "m": m}
            row["cuBLAS"] = timed(lambda w, x=x: x @ w.T, dense)
            row["_int_mm"] = timed(lambda w, q=q: torch._int_mm(q, w.T), codes)
            for name in types:
                fmt = format_by_name(name)
                copies = packed_copies(fmt, n, k)
                row[name] = timed(product(x, fmt, n, k, "int8"), copies)
                row[f"{name} auto"] = timed(product(x, fmt, n, k), copies)
            row["x_cuBLAS"] = row["cuBLAS"] / row[types[0]]
            rows.append(row)
        del dense, codes
    return rows


def experts_of_m(
    fmt: Format,
    packed: torch.Tensor,
    dense: torch.Tensor,
    top: int,
    m: int,
    read: Callable[[torch.Tensor], None] | None,
) -> dict[str, Any]:
    """One row of `experts`: m tokens."""
    count, n, k = dense.shape
    calls = 8 if m <= 64 else 2
    ids = [torch.rand(m, count, device="cuda").topk(top).indices for _ in range(calls)]
    x = torch.randn(m, k, device="cuda").bfloat16()
    size = int(sum(len(i.unique()) for i in ids) / calls * packed[0].numel())
    row: dict[str, Any] = {"m": m, "MB": size / 1e6, "read_us": float("nan")}
    if read:
        whole = packed.flatten()[: packed.numel() // size * size]
        row["read_us"] = timed(read, list(whole.view(-1, size)[:calls]))
    row["us"] = timed(lambda i: ops.moe_gemm(x, packed, fmt.type_id, n, k, i), ids)

    tokens = x.repeat_interleave(top, 0)
    counts = ids[0].flatten().bincount(minlength=count)
    ends = counts.cumsum(0).int()
    parts = [(dense[e], part) for e, part in enumerate(tokens.split(counts.tolist())) if len(part)]
    row["loop_us"] = timed(lambda _: [part @ w.T for w, part in parts], ids[:1])
    row["grouped_us"] = float("nan")
    if hasattr(torch, "_grouped_mm"):
        row["grouped_us"] = timed(lambda _: torch._grouped_mm(tokens, dense.mT, ends), ids[:1])
    return {**row, "x_read": row["us"] / row["read_us"]}


def experts(types: Sequence[str], read: Callable[[torch.Tensor], None] | None) -> Rows:
    """Experts chosen evenly; other ones in each call, so that weights are cold.

    `read_us` reads as many bytes as the experts have that are chosen. `loop_us` is a product of
    cuBLAS for each expert, `grouped_us` torch's own grouped product: bfloat16 weights, tokens
    sorted beforehand and the sorting not counted.
    """
    rows: Rows = []
    for count, top, n, k in MOE_SHAPES:
        dense = torch.randn(count, n, k, device="cuda", dtype=torch.bfloat16)
        for name in types:
            fmt = format_by_name(name)
            packed = ops.pack(blocks(fmt, count * n, k), fmt.type_id).view(count, n // 16, -1)
            row = {"experts": count, "top": top, "n": n, "k": k, "type": name}
            rows += [{**row, **experts_of_m(fmt, packed, dense, top, m, read)} for m in MOE_TOKENS]
        del dense
    return rows


class GpuClock:
    """Times on this GPU; it keeps the weights that it was asked for last."""

    def __init__(self, read: Callable[[torch.Tensor], None] | None) -> None:
        self._read = read
        self._of: tuple[int, int, int] | None = None
        self._copies: list[torch.Tensor] = []

    def _weights(self, fmt: Format, n: int, k: int) -> list[torch.Tensor]:
        if self._of != (fmt.type_id, n, k):
            self._copies = []  # before others take their memory
            first = ops.pack(blocks(fmt, n, k), fmt.type_id)
            count = max(2, min(64, int(ROTATED_BYTES / first.numel())))
            self._copies = [first, *(first.clone() for _ in range(count - 1))]
            self._of = fmt.type_id, n, k
        return self._copies

    def read(self, fmt: Format, n: int, k: int) -> float:
        copies = self._weights(fmt, n, k)
        return quickly(self._read, copies) if self._read else float("nan")

    def product(self, fmt: Format, n: int, k: int, m: int) -> float:
        x = torch.randn(m, k, device="cuda").bfloat16()
        copies = self._weights(fmt, n, k)
        return quickly(product(x, fmt, n, k), copies if m < 512 else copies[:2])

    def dense(self, n: int, k: int, m: int) -> float:
        x = torch.randn(m, k, device="cuda").bfloat16()
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        return quickly(lambda w: x @ w.T, [w, *(w.clone() for _ in range(dense_copies(n, k) - 1))])


def quickly(call: Callable[[torch.Tensor], Any], copies: Sequence[torch.Tensor]) -> float:
    return time_gpu([partial(call, copy) for copy in copies], replays=5).median


def packable() -> list[str]:
    return [row["name"] for row in _C.format_table() if row["can_pack"]]


def heatmap(types: Sequence[str], shapes: Sequence[tuple[int, int]], clock: Clock) -> Rows:
    return fractions([format_by_name(name) for name in types], shapes, TOKENS, clock)


def seven(fmt: Format, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A layer's matrices, each on what the one before it gave."""

    def by(part: str, x: torch.Tensor) -> torch.Tensor:
        return ops.gemm_packed(x, w[part], fmt.type_id, *LAYER[part])

    q, _, _ = (by(part, x) for part in "qkv")
    o = by("o", q)
    inner, _ = by("gate", o), by("up", o)
    return by("down", inner)


def four(fmt: Format, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The same with q, k and v as one and gate and up as one, as `compile_decode` has them."""
    n = sum(LAYER[part][0] for part in "qkv")
    q = ops.gemm_packed(x, w["qkv"], fmt.type_id, n, LAYER["q"][1])[:, : LAYER["q"][0]]
    o = ops.gemm_packed(q, w["o"], fmt.type_id, *LAYER["o"])
    inner = ops.gemm_packed_gated(o, w["gate"], w["up"], fmt.type_id, *LAYER["gate"])
    return ops.gemm_packed(inner, w["down"], fmt.type_id, *LAYER["down"])


def chain(types: Sequence[str], read: Callable[[torch.Tensor], None] | None) -> Rows:
    """One token through the matrices of a layer in a CUDA graph, in seven launches and in four.

    Kernels begin to read weights before the one before them has ended. `stream_us`: the bytes at
    4.45 TB/s; `read_us`: one kernel that reads them and does nothing with them, in this run.
    """
    rows: Rows = []
    x = torch.randn(1, 4096, device="cuda").bfloat16()
    for name in types:
        fmt = format_by_name(name)
        layers = [
            {part: ops.pack(blocks(fmt, n, k), fmt.type_id) for part, (n, k) in LAYER.items()}
            for _ in range(LAYERS)
        ]
        size = sum(n * fmt.row_bytes(k) for n, k in LAYER.values())
        row: dict[str, Any] = {"type": name, "MB": size / 1e6, "read_us": float("nan")}
        row["stream_us"] = size / BYTES_PER_SECOND * 1e6
        if read:
            row["read_us"] = timed(
                read, [torch.cat([p.flatten() for p in w.values()]) for w in layers]
            )
        for w in layers:
            w["qkv"] = torch.cat([w[part] for part in "qkv"])
        for run in (seven, four):
            us = time_gpu([partial(run, fmt, w, x) for w in layers]).median
            row |= {f"{run.__name__}_us": us, f"{run.__name__}_of_read": row["read_us"] / us}
            row[f"{run.__name__}_TB/s"] = size / us / 1e6
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default=",".join(PARTS), help="which tables")
    parser.add_argument("--types", default="", help=f"default {TYPES}; for heatmap all")
    parser.add_argument("--shapes", default="", help="n x k for heatmap, e.g. 4096x4096,1024x4096")
    parser.add_argument("--out", default="", help=f"also save here, e.g. {RESULTS}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_packed: no CUDA device, nothing measured")
        return 0
    parts, folder = options.part.split(","), Path(options.out)
    types = (options.types or TYPES).split(",")
    shapes = parse_shapes(options.shapes) if options.shapes else HEAT_SHAPES
    all_types = types if options.types else packable()
    read = None
    try:
        read = reader()
        read(torch.zeros(1024, dtype=torch.uint8, device="cuda"))
    except (AttributeError, RuntimeError, OSError) as error:  # torch without its NVRTC helper
        print(f"no time for reading alone: {type(error).__name__}: {error}")
    bandwidth = copy_bandwidth(1 << 30)
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    tables = {
        "pack": lambda: packing(types, bandwidth),
        "types": lambda: every_type(14336, 4096, read),
        "tokens": lambda: tokens(types, read),
        "int8": lambda: in_int8(types),
        "moe": lambda: experts(["Q4_K"], read),
        "chain": lambda: chain(options.types.split(",") if options.types else CHAIN_TYPES, read),
        "heatmap": lambda: heatmap(all_types, shapes, GpuClock(read)),
    }
    for part in parts:
        rows = tables[part]()
        short = summary(rows) if part == "heatmap" else None
        print_table(short or rows)
        if options.out:
            save(f"packed_{part}", rows, folder, short)
            if part == "heatmap":
                plot_heatmap(f"packed_{part}", rows, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
