# SPDX-License-Identifier: MIT
"""What `make demo` shows: a GGUF file made on the spot, looked into, checked, and decoding speed.

Takes seconds, downloads nothing and keeps its files in a temporary directory.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import quantgemm
from quantgemm import QType, cli, ops
from quantgemm.formats import format_by_name

TYPES = ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS")
ROWS, COLS = 4096, 4096


def make_model(path: Path) -> None:
    """One small tensor of each of several types, with the names of a llama model."""
    torch.manual_seed(0)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
    types = (*TYPES, "MXFP4", "TQ2_0")
    tensors: dict[str, torch.Tensor | tuple[torch.Tensor, str]] = {
        "token_embd.weight": torch.randn(1000, 512).bfloat16(),
        "blk.0.attn_norm.weight": torch.ones(512),
    }
    for name, type_name in zip(names, types, strict=True):
        weight = torch.randn(256, 512) / 512**0.5
        blocks = ops.quantize(weight, QType[type_name])
        tensors[f"blk.0.{name}.weight"] = (blocks, type_name)
    metadata = {
        "general.architecture": "llama",
        "general.name": "demo",
        "llama.block_count": 1,
        "tokenizer.ggml.tokens": [f"<token {i}>" for i in range(1000)],
    }
    quantgemm.save_gguf(path, tensors, metadata)


def show(*command: str) -> None:
    print(f"$ quantgemm {' '.join(command)}\n", flush=True)
    if cli.main(command):
        raise SystemExit(f"quantgemm {command[0]} failed")
    print()


def best_ms(call: Callable[[], object], at_least: int, sync: Callable[[], None]) -> float:
    """Milliseconds of the fastest of some calls, after one that does not count."""
    call()
    sync()
    times = []
    while len(times) < at_least or (sum(times) < 200 and len(times) < 100):
        start = time.perf_counter()
        call()
        sync()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def pypi_ms(blocks: torch.Tensor, qtype: int) -> float | None:
    """The same with PyPI gguf's numpy decoder; None where it is not installed."""
    try:
        import gguf
    except ImportError:
        return None
    kind, array = gguf.GGMLQuantizationType(qtype), blocks.numpy()
    start = time.perf_counter()
    gguf.quants.dequantize(array, kind)
    return (time.perf_counter() - start) * 1e3


def print_speeds() -> None:
    gpu = bool(quantgemm.build_info().cuda) and torch.cuda.is_available()
    print(f"dequantize to float32, {ROWS} x {COLS}, milliseconds")
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads")
    print(f"GPU: {torch.cuda.get_device_name() if gpu else 'none'}\n")
    print(f"{'type':8}{'CPU':>10}{'GB/s':>8}{'PyPI gguf':>12}{'faster':>9}{'GPU':>10}{'GB/s':>8}")
    for name in TYPES:
        qtype = format_by_name(name).type_id
        # A few rows are quantized and repeated: this is about decoding.
        sample = ops.quantize(torch.randn(64, COLS), qtype)
        blocks = sample.repeat(ROWS // len(sample), 1)
        moved = blocks.nbytes + 4 * ROWS * COLS  # read and written
        cpu = best_ms(lambda b=blocks, q=qtype: ops.dequantize(b, q), 5, lambda: None)
        line = f"{name:8}{cpu:10.2f}{moved / cpu / 1e6:8.1f}"
        theirs = pypi_ms(blocks, qtype)
        line += f"{theirs:12.1f}{theirs / cpu:8.0f}x" if theirs else f"{'-':>12}{'-':>9}"
        if gpu:
            on_gpu = blocks.cuda()
            ms = best_ms(lambda b=on_gpu, q=qtype: ops.dequantize(b, q), 20, torch.cuda.synchronize)
            line += f"{ms:10.3f}{moved / ms / 1e6:8.0f}"
        else:
            line += f"{'-':>10}{'-':>8}"
        print(line, flush=True)
    print("\nThe GPU figures include a launch and a synchronization; benchmarks/ measures kernels.")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.gguf"
        make_model(path)
        show("ls", str(path))
        show("verify", "--all", str(path))
    print_speeds()


if __name__ == "__main__":
    main()
