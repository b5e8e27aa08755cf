# SPDX-License-Identifier: MIT
"""Speculative verification and sampling on the GPU: times against the bytes that must be read.

    python benchmarks/bench_sampling.py [--quick] [--out FOLDER]

Three tables: V = 128256, K = 5 in every input mode with the floor (bytes that must be read over the
copy bandwidth of the same run) and what was aimed at; peers on probabilities (the Python loop,
vectorised PyTorch eager and in a CUDA graph, FlashInfer if it is installed); and grids of
batch × spec_len: the time, and the speed-up over the loop and over PyTorch in a CUDA graph.
Uniform random drafts from q; q and p are independent, so half of them are accepted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import copy_bandwidth, print_table, pyplot, save, time_gpu

from quantgemm import ops, reference

VOCAB, SPEC_LEN = 128256, 5
L2_BYTES = 60 << 20


def inputs(
    batch: int, spec_len: int, vocab: int, seed: int, mode: dict[str, Any]
) -> dict[str, Any]:
    g = torch.Generator(device="cuda").manual_seed(seed)
    dtype = mode.get("dtype", torch.float32)
    target = torch.empty(batch * (spec_len + 1), vocab, dtype=dtype, device="cuda")
    target.normal_(generator=g)
    case: dict[str, Any] = {"target": target, "draft": None}
    tokens = torch.randint(0, vocab, (batch, spec_len), device="cuda", generator=g)
    if not mode.get("one_hot"):
        draft = torch.empty(batch, spec_len, vocab, dtype=dtype, device="cuda")
        draft.normal_(generator=g)
        if mode.get("same"):  # q is p: all drafts are accepted, and no row can be skipped
            draft.copy_(target.view(batch, spec_len + 1, vocab)[:, :spec_len])
        for b in range(batch):  # by sequence: multinomial over everything would need copies
            tokens[b] = torch.multinomial(draft[b].float().softmax(-1), 1, generator=g)[:, 0]
            if mode.get("probs"):
                draft[b] = draft[b].softmax(-1)
        if mode.get("probs"):
            for row in target:
                row.copy_(row.softmax(-1))
        case["draft"] = draft
    case["draft_tokens"] = tokens
    case["cu_rows"] = torch.arange(batch + 1, device="cuda") * (spec_len + 1)
    case |= {"target_probs": mode.get("probs", False), "draft_probs": mode.get("probs", False)}
    case["seed"] = torch.arange(batch, device="cuda") + 1000 * seed
    case["position"] = torch.full((batch,), 17, device="cuda")
    if mode.get("truncated"):
        case["top_k"] = torch.full((batch,), 50, device="cuda")
        case["top_p"] = torch.full((batch,), 0.9, device="cuda")
    return case


def bytes_read(case: dict[str, Any], mode: dict[str, Any]) -> int:
    """Whole rows that must be read: the stopping one of p (and of q), or all rows of logits."""
    size, vocab = case["target"].element_size(), case["target"].shape[1]
    batch = len(case["cu_rows"]) - 1
    if mode.get("probs"):
        return batch * vocab * size * 2
    rows = len(case["target"]) + (0 if case["draft"] is None else case["draft"][..., 0].numel())
    return rows * vocab * size


def copies(make: Callable[[int], Any], num_bytes: int) -> list[Any]:
    """As many as together exceed the L2 several times, two at least."""
    return [make(i + 1) for i in range(max(2, min(48, 4 * L2_BYTES // num_bytes + 1)))]


MODES: dict[str, dict[str, Any]] = {
    "probabilities f32": {"probs": True},
    "logits f32": {},
    "logits f32, all accepted": {"same": True},
    "logits f32 top-k 50 top-p 0.9": {"truncated": True},
    "logits bf16": {"dtype": torch.bfloat16},
    "logits bf16, one-hot draft": {"dtype": torch.bfloat16, "one_hot": True},
}


# µs, by mode and batch; 1 is V = 32000
PROBABILITIES = {1: 6.0, 16: 10.0, 64: 24.0, 256: 80.0}
LOGITS = {16: 32.0, 64: 115.0, 256: 440.0}


def aim(mode: str, batch: int, floor: float, plain: float | None) -> float | None:
    """What was aimed at. plain: the time of float32 logits without truncation in the same run."""
    if mode == "probabilities f32":
        return PROBABILITIES.get(batch)
    if mode.startswith("sample"):
        return 1.5 * floor if "top-k" in mode else None
    if batch not in LOGITS or "one-hot" in mode:
        return None
    if "top-k" in mode:
        return None if plain is None else 1.3 * plain
    return LOGITS[batch] / 2 + 5 if "bf16" in mode else LOGITS[batch]


def modes_table(bandwidth: float, batches: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    plain = {}  # of logits in float32, by batch
    for name, mode in MODES.items():
        for batch, vocab in [(1, 32000)] + [(b, VOCAB) for b in batches]:
            first = inputs(batch, SPEC_LEN, vocab, 0, mode=mode)
            need = bytes_read(first, mode)
            make = partial(inputs, batch, SPEC_LEN, vocab, mode=mode)
            cases = [first, *copies(make, need)]
            timing = time_gpu([partial(ops.spec_verify, **case) for case in cases])
            floor = need / bandwidth * 1e6
            if name == "logits f32":
                plain[batch] = timing.median
            rows.append(row(name, batch, vocab, timing, floor, plain.get(batch)))
            del cases, first
    for dtype in (torch.float32, torch.bfloat16):
        for name, settings in {"": {}, " top-k 50 top-p 0.9": {"truncated": True}}.items():
            batch = batches[-1]
            mode = {"one_hot": True, "dtype": dtype} | settings
            make = partial(inputs, batch, 0, VOCAB, mode=mode)
            cases = copies(make, batch * VOCAB * dtype.itemsize)
            keys = ("seed", "position", "top_k", "top_p")
            calls = [
                partial(ops.sample, c["target"], **{k: c[k] for k in keys if k in c}) for c in cases
            ]
            floor = batch * VOCAB * dtype.itemsize / bandwidth * 1e6
            label = f"sample {str(dtype)[6:]}{name}"
            rows.append(row(label, batch, VOCAB, time_gpu(calls), floor))
    return rows


def row(
    mode: str, batch: int, vocab: int, timing: Any, floor: float, plain: float | None = None
) -> dict[str, Any]:
    aimed_at = aim(mode, batch, floor, plain)
    return {
        "mode": mode,
        "B": batch,
        "V": vocab,
        "us": timing.median,
        "aim_us": "" if aimed_at is None else aimed_at,
        "low": timing.low,
        "high": timing.high,
        "floor_us": floor,
        "of_floor": floor / timing.median,
    }


def time_eager(call: Callable[[], Any], repeats: int = 5) -> float:
    """Host time of a call that may synchronise, in µs: the best of a few, after a warm-up."""
    call()
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e6)
    return min(samples)


def flashinfer_call(case: dict[str, Any]) -> Callable[[], Any] | None:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer.sampling import chain_speculative_sampling

    batch, spec_len = case["draft_tokens"].shape
    target = case["target"].view(batch, spec_len + 1, -1)
    return partial(chain_speculative_sampling, case["draft"], case["draft_tokens"].int(), target)


def peers_table(batches: list[int]) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        cases = [inputs(batch, SPEC_LEN, VOCAB, i, mode={"probs": True}) for i in range(3)]
        ours = time_gpu([partial(ops.spec_verify, **c) for c in cases]).median
        vectorized = partial(reference.rejection_sample_vectorized, **cases[0])
        graph = time_gpu([partial(reference.rejection_sample_vectorized, **c) for c in cases])
        loop = time_eager(partial(reference.rejection_sample_loop, **cases[0]), 2)
        entry = {
            "B": batch,
            "fused_us": ours,
            "loop_us": loop,
            "loop/fused": loop / ours,
            "torch_eager_us": time_eager(vectorized),
            "torch_graph_us": graph.median,
            "graph/fused": graph.median / ours,
        }
        call = flashinfer_call(cases[0])
        if call is not None:
            entry["flashinfer_us"] = time_gpu([call]).median
        rows.append(entry)
    if importlib.util.find_spec("flashinfer") is None:
        print("flashinfer: not installed, not measured")
    return rows


def grid_tables(vocab: int = 32000) -> dict[str, list[dict[str, Any]]]:
    """Batch × spec_len: µs, and how many times faster than the loop and than PyTorch in a graph."""
    fused, over_loop, over_graph = "sampling_grid_us", "sampling_grid", "sampling_grid_graph"
    tables: dict[str, list[dict[str, Any]]] = {fused: [], over_loop: [], over_graph: []}
    for batch in (1, 2, 4, 8, 16, 32, 64):
        for rows in tables.values():
            rows.append({"batch": batch})
        for spec_len in (1, 3, 5, 8):
            case = inputs(batch, spec_len, vocab, 0, mode={"probs": True})
            loop = time_eager(partial(reference.rejection_sample_loop, **case), 1)
            us = time_gpu([partial(ops.spec_verify, **case)] * 8).median
            vectorized = partial(reference.rejection_sample_vectorized, **case)
            times = {fused: us, over_loop: loop / us}
            times[over_graph] = time_gpu([vectorized] * 2, 5).median / us
            for name, rows in tables.items():
                rows[-1][f"K={spec_len}"] = times[name]
    return tables


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    if (plt := pyplot()) is None:
        return

    names = [m for m in MODES if any(r["mode"] == m and r["V"] == VOCAB for r in rows)]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in names:
        chosen = [r for r in rows if r["mode"] == name and r["V"] == VOCAB]
        batches = [r["B"] for r in chosen]
        (line,) = axes.plot(batches, [r["us"] for r in chosen], marker="o", label=name)
        axes.plot(batches, [r["floor_us"] for r in chosen], "--", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="µs (dashed: floor)")
    axes.set_title(f"spec_verify, V = {VOCAB}, K = {SPEC_LEN}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "sampling.svg")


def plot_speedups(tables: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """A panel for each grid of speed-ups, with the least that was aimed at."""
    if (plt := pyplot()) is None:
        return

    least = {
        "sampling_grid": ("the Python loop", 35.57),
        "sampling_grid_graph": ("PyTorch in a CUDA graph", 5.0),
    }
    grids = {name: rows for name, rows in tables.items() if name in least}
    figure, axes = plt.subplots(1, len(grids), figsize=(5 * len(grids), 4), squeeze=False)
    for panel, (name, rows) in zip(axes[0], grids.items(), strict=True):
        over, aimed_at = least[name]
        for column in list(rows[0])[1:]:
            panel.plot(
                [r["batch"] for r in rows], [r[column] for r in rows], marker="o", label=column
            )
        panel.axhline(aimed_at, linestyle="--", color="#888888")
        panel.set(xscale="log", yscale="log", xlabel="sequences", ylabel="times as fast")
        panel.set_title(f"over {over} (dashed: the least aimed at)", fontsize=10)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "sampling_speedup.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first table only")
    parser.add_argument("--out", default="", help="also save CSV, JSON and a plot in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_sampling: no CUDA device, nothing measured")
        return 0
    bandwidth = copy_bandwidth()
    print(
        f"copy {bandwidth / 1e12:.2f} TB/s; V = {VOCAB}, K = {SPEC_LEN} where nothing else is said"
    )
    tables = {"sampling_modes": modes_table(bandwidth, [16, 64, 256])}
    if not options.quick:
        tables["sampling_peers"] = peers_table([1, 16, 64])
        tables |= grid_tables()
    for name, rows in tables.items():
        print(name)
        print_table(rows)
        if options.out:
            save(name, rows, Path(options.out))
    if options.out:
        plot(tables["sampling_modes"], Path(options.out))
        if not options.quick:
            plot_speedups(tables, Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
