# SPDX-License-Identifier: MIT
"""Dequantisation on the GPU: every format, 28672×8192 to bfloat16, against the copy bandwidth.

    python benchmarks/bench_dequantize.py [--types Q4_0,Q6_K] [--dtype bfloat16]

The floor is the time a copy of as many bytes (blocks in + numbers out) takes in the same run. The
last row, torch's own fill_ of the result, shows what writing alone costs.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from common import Timing, copy_bandwidth, plot_fractions, print_table, save, time_gpu

from quantgemm import ops
from quantgemm.formats import FORMATS, format_by_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="", help="comma-separated names; default: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=28672)
    parser.add_argument("--cols", type=int, default=8192)
    parser.add_argument("--out", default="", help="also save CSV and JSON in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_dequantize: no CUDA device, nothing measured")
        return 0
    dtype = getattr(torch, options.dtype)
    names = [n for n in options.types.split(",") if n] or [
        f.name for f in FORMATS.values() if not f.is_plain or f.name in ("F16", "F32")
    ]
    bandwidth = copy_bandwidth()
    result_bytes = options.rows * options.cols * dtype.itemsize

    def row(name: str, timing: Timing, num_bytes: int) -> dict[str, object]:
        floor = num_bytes / bandwidth * 1e6
        times = {"us": timing.median, "low": timing.low, "high": timing.high}
        return {"type": name, **times, "floor_us": floor, "of_copy": floor / timing.median}

    rows = []
    for name in names:
        fmt = format_by_name(name)
        shape = (options.rows, fmt.row_bytes(options.cols))
        copies = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(2)]
        decode = partial(ops.dequantize, qtype=fmt.type_id, dtype=dtype)
        timing = time_gpu([partial(decode, blocks) for blocks in copies])
        rows.append(row(name, timing, copies[0].numel() + result_bytes))
    result = torch.empty(options.rows, options.cols, dtype=dtype, device="cuda")
    rows.append(row("torch fill_", time_gpu([partial(result.fill_, 1.0)]), result_bytes))
    print(f"copy {bandwidth / 1e12:.2f} TB/s, {options.rows}x{options.cols} to {options.dtype}")
    print_table(rows)
    if options.out:
        save("dequantize", rows, Path(options.out))
        title = f"dequantise {options.rows}x{options.cols} to {options.dtype}"
        plot_fractions("dequantize", rows, "of_copy", title, Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
