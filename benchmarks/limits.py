# SPDX-License-Identifier: MIT
"""How near products with packed weights come to what bounds them, for every type, shape and m.

Up to READ_BOUND tokens that is the time to read the weights, measured in the same run; beyond, the
time of a bfloat16 product of cuBLAS of the same sizes. `fractions` asks a clock for all times and
is plain arithmetic; `plot_heatmap` draws a panel for each shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from common import RESULTS, pyplot
from tqdm import tqdm

from quantgemm.formats import Format

READ_BOUND = 64  # tokens
SHAPES = [
    (4096, 4096),
    (14336, 4096),
    (28672, 8192),
    (4096, 14336),
    (6144, 4096),
    (4096, 11008),
    (1024, 4096),
    (128256, 4096),
]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 512, 4096]
Rows = list[dict[str, Any]]
Shape = tuple[int, int]


class Clock(Protocol):
    """Microseconds of one call, each on cold weights."""

    def read(self, fmt: Format, n: int, k: int) -> float:
        """Of reading packed weights ``[n, k]`` and doing nothing with them."""

    def product(self, fmt: Format, n: int, k: int, m: int) -> float:
        """Of m tokens times them."""

    def dense(self, n: int, k: int, m: int) -> float:
        """Of m tokens times bfloat16 weights, by cuBLAS."""


def parse_shapes(text: str) -> list[Shape]:
    """'4096x4096,14336x4096': n x k of each."""
    shapes = []
    for part in text.split(","):
        n, by, k = part.partition("x")
        if not (by and n.isdigit() and k.isdigit()):
            raise ValueError(f"shapes: expected such as 4096x4096,14336x4096, got {part!r}")
        shapes.append((int(n), int(k)))
    return shapes


def fractions(
    types: Sequence[Format], shapes: Sequence[Shape], tokens: Sequence[int], clock: Clock
) -> Rows:
    """A row for each type, shape and m: its time, its limit's, and what fraction it reaches.

    A shape that is no multiple of a type's block is left out for it.
    """
    rows: Rows = []
    with tqdm(total=len(types) * len(shapes), unit="matrix", leave=False, disable=None) as bar:
        for n, k in shapes:
            dense = {m: clock.dense(n, k, m) for m in tokens if m > READ_BOUND}
            for fmt in types:
                bar.set_description(f"{fmt.name} {n}x{k}")
                bar.update()
                if k % fmt.block_elems:
                    continue
                read = clock.read(fmt, n, k)
                for m in tokens:
                    us = clock.product(fmt, n, k, m)
                    limit, least = ("read", read) if m <= READ_BOUND else ("cuBLAS", dense[m])
                    row = {"type": fmt.name, "n": n, "k": k, "m": m, "us": round(us, 2)}
                    row |= {"limit": limit, "limit_us": round(least, 2)}
                    rows.append({**row, "fraction": round(least / us, 4)})
    return rows


def summary(rows: Rows) -> Rows:
    """A line for each type: over all shapes, the lowest and the middle fraction of each m."""
    lines: Rows = []
    tokens = sorted({row["m"] for row in rows})
    for name in dict.fromkeys(row["type"] for row in rows):
        line: dict[str, Any] = {"type": name}
        for m in tokens:
            found = sorted(r["fraction"] for r in rows if (r["type"], r["m"]) == (name, m))
            line[f"m={m}"] = f"{found[0]:.2f}..{found[len(found) // 2]:.2f}" if found else "-"
        lines.append(line)
    return lines


def grid(rows: Rows, shape: Shape) -> tuple[list[str], list[int], list[list[float]]]:
    """Types, tokens and fractions ``[types][tokens]`` of a shape; NaN where there is none."""
    types = list(dict.fromkeys(row["type"] for row in rows))
    tokens = sorted({row["m"] for row in rows})
    found = {(r["type"], r["m"]): r["fraction"] for r in rows if (r["n"], r["k"]) == shape}
    return types, tokens, [[found.get((t, m), float("nan")) for m in tokens] for t in types]


def plot_heatmap(name: str, rows: Rows, folder: Path = RESULTS) -> None:
    """results/name.png. Needs matplotlib."""
    if (plt := pyplot()) is None:
        return
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    wide = min(4, len(shapes))
    high = -(-len(shapes) // wide)
    types, tokens, _ = grid(rows, shapes[0])
    size = (0.8 + 0.36 * len(tokens) * wide + 0.7, (0.24 * len(types) + 0.7) * high + 0.9)
    figure, panels = plt.subplots(
        high, wide, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    image = None
    for axes in panels.flat[len(shapes) :]:
        axes.set_visible(False)
    for axes, (n, k) in zip(panels.flat, shapes, strict=False):
        values = grid(rows, (n, k))[2]
        image = axes.imshow(values, cmap="RdYlGn", vmin=0.2, vmax=1.0, aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if value == value:
                    ink = "black" if 0.32 < value < 0.96 else "white"
                    text = f"{100 * value:.0f}"
                    axes.text(j, i, text, ha="center", va="center", fontsize=6, color=ink)
        border = sum(m <= READ_BOUND for m in tokens) - 0.5
        axes.axvline(border, color="black", linewidth=1)
        axes.set_title(f"{n} × {k}", fontsize=9)
        axes.set_xticks(range(len(tokens)), tokens, fontsize=6, rotation=45)
        axes.set_yticks(range(len(types)), types, fontsize=7)
        axes.set_xlabel("tokens", fontsize=7)
        axes.label_outer()
    figure.suptitle(
        f"Per cent of the limit: up to {READ_BOUND} tokens the time to read the weights, "
        "right of the line a bfloat16 product of cuBLAS",
        fontsize=9,
    )
    figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=130)
    plt.close(figure)
