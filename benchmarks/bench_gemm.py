# SPDX-License-Identifier: MIT
"""Products with quantised weights on the GPU: the rungs of the ladder, every type at one token, and
the way from one token to thousands, beside cuBLAS and every peer that is installed.

    python benchmarks/bench_gemm.py [--part ladder,types,tokens] [--out benchmarks/results]

Weights are cold (copies rotate past the L2) and calls are replays of a CUDA graph. `floor_us` is
the time a copy of as many bytes as the weights have takes in the same run; `TFLOPs` counts 2·m·n·k.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, copy_bandwidth, print_table, pyplot, save, time_gpu
from gemm_peers import has_vllm, installed, vllm_gguf
from kernel_facts import launches, spills

import quantgemm
from quantgemm import ops
from quantgemm.formats import FORMATS, Format, format_by_name

MAIN_TYPES = ["Q4_0", "Q8_0", "Q4_K", "Q6_K"]
SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 4096]
ROTATED_BYTES = 400e6  # of weights in a graph: several times the L2
Rows = list[dict[str, Any]]


def weights(fmt: Format, n: int, k: int) -> list[torch.Tensor]:
    """Copies of quantised normal weights; of random finite blocks where there is no encoder."""
    count = max(2, min(48, int(ROTATED_BYTES / (n * fmt.row_bytes(k)))))
    try:
        some = ops.quantize(0.02 * torch.randn(256, k, device="cuda"), fmt.type_id)
    except NotImplementedError:
        blocks = torch.randint(0, 256, (4096, fmt.block_bytes), dtype=torch.uint8, device="cuda")
        blocks = blocks[ops.dequantize(blocks, fmt.type_id).isfinite().all(-1)]
        some = blocks[torch.randint(0, len(blocks), (256, k // fmt.block_elems), device="cuda")]
        some = some.flatten(1)
    picks = [torch.randint(0, 256, (n,), device="cuda") for _ in range(count)]
    return [some[pick] for pick in picks]


def gemm(algo: str, x: torch.Tensor, fmt: Format) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda w: ops.gemm(x, w, fmt.type_id, algo)


def call_with(x: torch.Tensor) -> Callable[[Any], Any]:
    return lambda layer: layer(x)


def timed(product: Callable[..., Any], copies: Sequence[Any]) -> float:
    return time_gpu([partial(product, copy) for copy in copies], replays=10).median


def peer_times(n: int, k: int, x: torch.Tensor) -> dict[str, float]:
    """Microseconds of each installed peer."""
    times = {}
    for name, prepare in installed():
        count = max(2, min(8, int(ROTATED_BYTES / (n * k / 2))))
        try:
            copies = [prepare(0.02 * torch.randn(n, k, device="cuda")) for _ in range(count)]
            times[name] = timed(call_with(x), copies)
        except Exception as error:
            print(f"[{name}] {n}x{k}, {x.shape[0]} tokens: {type(error).__name__}: {error}")
    return times


def ladder(size: int) -> Rows:
    """Each rung at size³: what it adds, and what its kernel takes of the chip.

    The profiler comes after all timing, here and in `main`: once attached it stays, and each launch
    of the process is half a microsecond slower.
    """
    fmt = format_by_name("Q4_0")
    x = torch.randn(size, size, device="cuda").to(torch.bfloat16)
    x32 = x.float()
    dense = [0.02 * torch.randn(size, size, device="cuda") for _ in range(2)]
    packed = weights(fmt, size, size)[:2]
    q4, f32 = f"{fmt.name} bf16", "F32 f32"
    steps: list[tuple[str, str, str, Callable[[torch.Tensor], Any], list[torch.Tensor]]] = [
        ("fp32 naive", f32, "F32", lambda w: ops.gemm_fp32(x32, w, "naive"), dense),
        ("fp32 tiled", f32, "F32", lambda w: ops.gemm_fp32(x32, w, "tiled"), dense),
        *(
            (algo, q4, fmt.name, gemm(algo, x, fmt), packed)
            for algo in ("naive", "tiled", "dp4a", "mma", "mma_q8")
        ),
        ("cuBLAS f32", f32, "", lambda w: x32 @ w.T, dense),
        ("cuBLAS bf16", "bf16 bf16", "", lambda w: x @ w.T, [d.to(torch.bfloat16) for d in dense]),
    ]
    rows: Rows = []
    for name, types, _, product, copies in steps:
        us = timed(product, copies)
        rows.append({"rung": name, "weights x": types, "us": us, "TFLOPs": 2 * size**3 / us / 1e6})
    naive = next(row["us"] for row in rows if row["rung"] == "naive")
    for row in rows:
        row["x_naive"] = naive / row["us"]
        row["of_cublas"] = rows[-1]["us"] / row["us"]
    for row, (_, _, type_name, product, copies) in zip(rows, steps, strict=True):
        kernel = max(launches(partial(product, copies[0])), key=lambda launch: launch["us"])
        row |= {key: kernel[key] for key in ("threads", "registers", "shared_KiB")}
        row["local_bytes"] = spills(kernel["kernel"], type_name) if type_name else "?"
    return rows


def every_type(n: int, k: int, bandwidth: float) -> Rows:
    """One token, every type: the memory-bound end."""
    x = torch.randn(1, k, device="cuda").to(torch.bfloat16)
    rows: Rows = []
    for fmt in FORMATS.values():
        if fmt.is_plain or k % fmt.block_elems:
            continue
        copies = weights(fmt, n, k)
        row: dict[str, Any] = {"type": fmt.name, "MB": copies[0].numel() / 1e6}
        row["floor_us"] = copies[0].numel() / bandwidth * 1e6
        for algo in ("dp4a", "mma", "tiled"):
            row[algo] = timed(gemm(algo, x, fmt), copies)
        row["of_floor"] = row["floor_us"] / row["dp4a"]
        row["us_per_MB"] = row["dp4a"] / row["MB"]
        rows.append(row)
    return rows


def tokens(types: Sequence[str], bandwidth: float) -> Rows:
    """From one token to thousands, per shape and type, with the peers on each line."""
    rows: Rows = []
    for n, k in SHAPES:
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
            peers = peer_times(n, k, x)
            for name in types:
                fmt = format_by_name(name)
                copies = weights(fmt, n, k)
                row: dict[str, Any] = {"n": n, "k": k, "m": m, "type": name}
                row["floor_us"] = copies[0].numel() / bandwidth * 1e6
                for algo in ("auto", "dp4a", "mma", "mma_q8"):
                    row[algo] = timed(gemm(algo, x, fmt), copies)
                if has_vllm():
                    row["vLLM"] = timed(call_with(x), [vllm_gguf(fmt.type_id, w) for w in copies])
                plan = quantgemm.explain_gemm(m, n, k, fmt.type_id, "cuda", torch.bfloat16)
                rows.append({**row, **peers, "auto_is": plan.algo})
    return rows


def plot_roofline(rows: Rows, bandwidth: float, folder: Path) -> None:
    """results/gemm_roofline.png: speed over arithmetic intensity, one line per algorithm."""
    if (plt := pyplot()) is None:
        return

    n, k = SHAPES[1]
    mine = [row for row in rows if (row["n"], row["k"], row["type"]) == (n, k, "Q4_0")]
    figure, axes = plt.subplots(figsize=(8, 5))
    intensity = [
        2 * row["m"] * n * k / (row["floor_us"] * 1e-6 * bandwidth + 2 * row["m"] * (n + k))
        for row in mine
    ]
    peak = max(2 * row["m"] * n * k / row["cuBLAS bf16"] / 1e6 for row in mine)
    axes.plot(intensity, [min(peak, i * bandwidth / 1e12) for i in intensity], "k--", label="roof")
    for name in ("dp4a", "mma", "mma_q8", "cuBLAS bf16"):
        speeds = [2 * row["m"] * n * k / row[name] / 1e6 for row in mine]
        axes.plot(intensity, speeds, marker="o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="TFLOP/s"
    )
    axes.set_title(f"Q4_0, {n}x{k}, m = {mine[0]['m']} to {mine[-1]['m']} (cuBLAS: bf16 weights)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "gemm_roofline.png", dpi=110)


def plot_ladder(rows: Rows, folder: Path) -> None:
    """results/gemm_ladder.png: a bar per rung."""
    if (plt := pyplot()) is None:
        return

    figure, axes = plt.subplots(figsize=(8, 3.6))
    bars = axes.barh(
        [row["rung"] for row in rows], [row["TFLOPs"] for row in rows], color="#3b6ea5"
    )
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set(xscale="log", xlabel="TFLOP/s")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "gemm_ladder.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="ladder,types,tokens", help="which tables")
    parser.add_argument("--size", type=int, default=4096, help="of the ladder's cube")
    parser.add_argument("--types", default=",".join(MAIN_TYPES), help="for the table of tokens")
    parser.add_argument("--out", default="", help=f"also save here, e.g. {RESULTS}")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gemm: no CUDA device, nothing measured")
        return 0
    parts, folder = options.part.split(","), Path(options.out)
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    tables = {
        "ladder": lambda: ladder(options.size),
        "types": lambda: every_type(14336, 4096, bandwidth),
        "tokens": lambda: tokens(options.types.split(","), bandwidth),
    }
    for part in sorted(parts, key=lambda part: part == "ladder"):  # the one that profiles, last
        rows = tables[part]()
        print_table(rows)
        if options.out:
            save(f"gemm_{part}", rows, folder)
            if part == "ladder":
                plot_ladder(rows, folder)
            elif part == "tokens":
                plot_roofline(rows, bandwidth, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
