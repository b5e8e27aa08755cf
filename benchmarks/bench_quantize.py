# SPDX-License-Identifier: MIT
"""Quantisation on the GPU from bfloat16, against the copy bandwidth.

    python benchmarks/bench_quantize.py [--types Q4_0,Q4_K]

The floor is the time a copy of as many bytes (numbers in + blocks out) takes in the same run. For
the types with a scale search the last column is what counts: seconds for 8 billion weights.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from common import copy_bandwidth, print_table, save, time_gpu

from quantgemm import _C, ops
from quantgemm.formats import FORMATS, format_by_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="", help="comma-separated names; default: all")
    parser.add_argument("--rows", type=int, default=28672)
    parser.add_argument("--cols", type=int, default=8192)
    parser.add_argument("--out", default="", help="also save CSV and JSON in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_quantize: no CUDA device, nothing measured")
        return 0
    can_quantize = {row["type_id"] for row in _C.format_table() if row["can_quantize"]}
    names = [n for n in options.types.split(",") if n]
    names = names or [f.name for f in FORMATS.values() if f.type_id in can_quantize]
    bandwidth = copy_bandwidth()
    weights = options.rows * options.cols
    x = torch.randn(options.rows, options.cols, device="cuda", dtype=torch.bfloat16)
    rows = []
    for name in names:
        fmt = format_by_name(name)
        timing = time_gpu([partial(ops.quantize, x, fmt.type_id)], replays=7)
        floor = (weights * 2 + options.rows * fmt.row_bytes(options.cols)) / bandwidth * 1e6
        rows.append(
            {
                "type": name,
                "us": timing.median,
                "low": timing.low,
                "high": timing.high,
                "floor_us": floor,
                "of_copy": floor / timing.median,
                "s_per_8B": timing.median * 1e-6 * 8e9 / weights,
            }
        )
    print(f"copy {bandwidth / 1e12:.2f} TB/s, {options.rows}x{options.cols} from bfloat16")
    print_table(rows)
    if options.out:
        save("quantize", rows, Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
