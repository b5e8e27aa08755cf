# SPDX-License-Identifier: MIT
"""The CPU backend beside PyPI gguf and torch: decoding, products, and opening a large vocabulary.

    python benchmarks/bench_cpu.py [--rows 1024] [--threads 2]

Both libraries get the same bytes. Decoding is measured twice: on a matrix whose result stays in
memory that the process already owns, and on a large one, where fresh pages from the operating
system cost as much as the decoding. Products stand beside torch's float32 `x @ w.T` of the same
shape, by the fastest of many calls: `GB_per_s` counts the bytes of quantised weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import print_table, save, time_cpu

import quantgemm
from quantgemm import ops
from quantgemm.formats import format_by_name

COLS = 4096


def decoding(names: list[str], num_rows: int) -> list[dict[str, object]]:
    import gguf

    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for name in names:
        fmt = format_by_name(name)
        shape = (num_rows, fmt.row_bytes(COLS) // fmt.block_bytes, fmt.block_bytes)
        blocks = rng.integers(0, 256, shape, dtype=np.uint8).reshape(num_rows, -1)
        ours = time_cpu(partial(ops.dequantize, torch.from_numpy(blocks), fmt.type_id))
        qtype = gguf.GGMLQuantizationType(fmt.type_id)
        with np.errstate(all="ignore"):
            theirs = time_cpu(partial(gguf.quants.dequantize, blocks, qtype))
        rows.append(
            {
                "type": name,
                "shape": f"{num_rows}x{COLS}",
                "ours_ms": ours.median / 1e3,
                "gguf_ms": theirs.median / 1e3,
                "times_faster": theirs.median / ours.median,
                "G_weights_per_s": num_rows * COLS / ours.median / 1e3,
            }
        )
    return rows


def read_bandwidth(num_bytes: int = 1 << 28) -> float:
    """GB/s of summing memory that no cache holds."""
    numbers = torch.ones(num_bytes // 8, dtype=torch.int64)
    return num_bytes / fastest(numbers.sum) / 1e3


def products(names: list[str], num_tokens: int, n: int = 4096) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, COLS, generator=generator)
    dense = torch.randn(n, COLS, generator=generator)
    rows: list[dict[str, object]] = []
    for name in names:
        fmt = format_by_name(name)
        try:
            w = ops.quantize(dense, fmt.type_id)
        except NotImplementedError:  # a type that needs calibration to encode: any bytes do
            w = torch.randint(0, 256, (n, fmt.row_bytes(COLS)), dtype=torch.uint8)
        theirs = fastest(
            partial(torch.matmul, x, dense.T)
        )  # beside each: the machine may be shared
        row: dict[str, object] = {"type": name, "m": num_tokens, "torch_ms": theirs / 1e3}
        for algo in ("tiled", "dp4a"):
            ours = fastest(partial(ops.gemm, x, w, fmt.type_id, algo))
            row |= {
                f"{algo}_ms": ours / 1e3,
                f"{algo}_times_faster": theirs / ours,
                f"{algo}_GB_per_s": w.numel() / ours / 1e3,
                f"{algo}_GFLOP_per_s": 2 * num_tokens * n * COLS / ours / 1e3,
            }
        rows.append(row)
    return rows


def fastest(call: Callable[[], object]) -> float:
    """Microseconds of the fastest of many calls: what other work on the machine disturbs least."""
    call()
    times: list[float] = []
    until = time.perf_counter() + 1.0
    while len(times) < 5 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def vocabulary_file(path: Path, tokens: int) -> None:
    """A file with what a tokenizer needs: tokens, scores, types and merges; no tensors."""
    words = [f"token{i * 7919 % tokens:06d}" for i in range(tokens)]
    quantgemm.save_gguf(
        path,
        {},
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": words,
            "tokenizer.ggml.scores": [float(i) for i in range(tokens)],
            "tokenizer.ggml.token_type": [1] * tokens,
            "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairwise(words)],
        },
    )


def opening(tokens: int = 150_000) -> list[dict[str, object]]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        vocabulary_file(path, tokens)

        def open_and_read() -> object:
            return quantgemm.open_gguf(path).metadata["tokenizer.ggml.tokens"]

        ours = time_cpu(partial(quantgemm.open_gguf, path))
        with_tokens = time_cpu(open_and_read)
        theirs = time_cpu(partial(gguf.GGUFReader, path), least=3)
    return [
        {
            "tokens": tokens,
            "open_ms": ours.median / 1e3,
            "open_and_list_tokens_ms": with_tokens.median / 1e3,
            "gguf_reader_ms": theirs.median / 1e3,
            "times_faster": theirs.median / ours.median,
        }
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--types", default="Q4_0,Q4_K,Q6_K,Q8_0,Q5_0,IQ4_NL,IQ2_XS")
    parser.add_argument("--out", default="", help="also save CSV and JSON in this folder")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.types.split(",")
    decoded = decoding(names, options.rows) + decoding(names[:3], 4 * options.rows)
    print(f"decoding to float32, {torch.get_num_threads()} threads")
    print_table(decoded)
    multiplied = [row for m in (1, 4, 512) for row in products(names, m)]
    print(f"products with {COLS}x{COLS}; memory is read at {read_bandwidth():.1f} GB/s")
    print_table(multiplied)
    opened = opening()
    print("opening a GGUF with a large vocabulary")
    print_table(opened)
    if options.out:
        save("cpu_dequantize", decoded, Path(options.out))
        save("cpu_gemm", multiplied, Path(options.out))
        save("gguf_open", opened, Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
