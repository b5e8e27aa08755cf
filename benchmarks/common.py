# SPDX-License-Identifier: MIT
"""One way to measure, for all benchmarks.

GPU times: the calls are captured in a CUDA graph, each on another copy of its input so that nothing
sits in the L2, and the graph is replayed; short calls take turns until the graph has 16 of them, so
that its own start, 1.5 to 3 µs, is not theirs. A result is the median over replays with the spread
(10th to 90th percentile). CPU times: median of repeated calls. Every table says on what it was
measured.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import quantgemm

RESULTS = Path(__file__).parent / "results"
GRAPH_CALLS, SHORT_US = 16, 2000  # calls of a graph, and no more of them when they take so long


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        ordered = sorted(samples)
        tenth = len(ordered) // 10
        return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def replay_times(calls: Sequence[Callable[[], Any]], replays: int) -> list[float]:
    """Microseconds of one call, for each replay of a graph of all of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / len(calls))
    return samples[3:]


def time_gpu(calls: Sequence[Callable[[], Any]], replays: int = 20) -> Timing:
    """Microseconds of one call; `calls` are the same work on different copies of its data."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # what the calls read may still be on its way
    with torch.cuda.stream(side):
        calls[0]()  # loads kernels before the capture
    side.synchronize()
    samples = replay_times(calls, 1 if len(calls) < GRAPH_CALLS else replays)
    if len(calls) < GRAPH_CALLS:
        turns = min(GRAPH_CALLS, SHORT_US / samples[0]) / len(calls)
        samples = replay_times([*calls] * max(1, math.ceil(turns)), replays)
    return Timing.of(samples)


def time_cpu(call: Callable[[], Any], seconds: float = 1.0, least: int = 5) -> Timing:
    """Microseconds of one call on the CPU."""
    call()
    samples: list[float] = []
    until = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return Timing.of(samples)


def copy_bandwidth(num_bytes: int = 1 << 32) -> float:
    """Bytes per second of a large device-to-device copy, read and write counted.

    Timed outside a graph: a captured copy runs at two thirds of the speed of an eager one.
    """
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    samples = []
    for _ in range(200):  # long enough for the clocks to rise before anything counts
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return 2 * num_bytes / statistics.median(samples[100:])


def machine() -> dict[str, str]:
    """What a number was measured on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda_toolkit": quantgemm.build_info().cuda or "none",
        "commit": commit or "unknown",
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Aligned columns; floats to four significant digits."""
    texts = [
        {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    widths = {k: max(len(k), *(len(t[k]) for t in texts)) for k in texts[0]}
    print("  ".join(k.rjust(w) for k, w in widths.items()))
    for text in texts:
        print("  ".join(text[k].rjust(w) for k, w in widths.items()))


def save(
    name: str,
    rows: Sequence[dict[str, Any]],
    folder: Path = RESULTS,
    summary: Sequence[dict[str, Any]] | None = None,
) -> None:
    """rows -> results/name.csv and .json, the latter with the machine they were measured on.

    summary: what the .json, and so a document's table, has in place of many rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with (folder / f"{name}.json").open("w") as file:
        kept = rows if summary is None else summary
        json.dump({"machine": machine(), "rows": list(kept)}, file, indent=1)
        file.write("\n")
    print(f"[{name}] {machine()}")


def pyplot() -> Any | None:
    """matplotlib.pyplot, drawing into files; None, and a line that says so, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def plot_fractions(
    name: str, rows: Sequence[dict[str, Any]], value: str, title: str, folder: Path = RESULTS
) -> None:
    """results/name.png: a bar per type, `value` as a fraction of the floor. Needs matplotlib."""
    if (plt := pyplot()) is None:
        return

    figure, axes = plt.subplots(figsize=(9, 0.24 * len(rows) + 1.2))
    bars = axes.barh([row["type"] for row in rows], [row[value] for row in rows], color="#3b6ea5")
    axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1, color="#888888", linewidth=1)
    axes.set_xlabel("fraction of the floor (a copy of as many bytes)")
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=110)
