# SPDX-License-Identifier: MIT
"""What of the benchmarks needs no GPU: tables from a clock that is made up, and their picture."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantgemm import load_model
from quantgemm.commands.bench import bytes_per_token, weight_bytes
from quantgemm.formats import Format, format_by_name

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return importlib.import_module("limits")


class Clock:
    """Reading takes 1 µs per 1000 bytes, a product twice that and m, a dense one n · m / 1000."""

    def read(self, fmt: Format, n: int, k: int) -> float:
        return n * fmt.row_bytes(k) / 1000

    def product(self, fmt: Format, n: int, k: int, m: int) -> float:
        return 2 * self.read(fmt, n, k) + m

    def dense(self, n: int, k: int, m: int) -> float:
        assert m > 64
        return n * m / 1000


def test_what_sampling_is_to_take(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    bench = importlib.import_module("bench_sampling")
    assert bench.aim("probabilities f32", 16, 4.0, None) == 10
    assert bench.aim("logits f32, all accepted", 64, 85.0, 77.0) == 115
    assert bench.aim("logits bf16", 16, 10.0, 30.0) == 21
    assert bench.aim("logits f32 top-k 50 top-p 0.9", 16, 21.0, 30.0) == 39
    assert bench.aim("sample float32 top-k 50 top-p 0.9", 256, 30.0, None) == 45
    assert bench.aim("sample float32", 256, 30.0, None) is None
    assert bench.aim("logits f32", 1, 0.3, 9.0) is None
    pytest.importorskip("matplotlib")
    grid = [{"batch": b, "K=1": 100.0 * b, "K=5": 200.0 * b} for b in (1, 4)]
    bench.plot_speedups({"sampling_grid_us": grid, "sampling_grid": grid}, tmp_path)
    assert "<svg" in (tmp_path / "sampling_speedup.svg").read_text()


def test_fractions(limits: Any) -> None:
    types = [format_by_name(name) for name in ("Q4_0", "Q4_K")]
    rows = limits.fractions(types, [(1000, 256), (500, 32)], [1, 64, 128], Clock())
    assert [(r["type"], r["n"], r["m"]) for r in rows] == [
        *[(name, 1000, m) for name in ("Q4_0", "Q4_K") for m in (1, 64, 128)],
        *[("Q4_0", 500, m) for m in (1, 64, 128)],  # 32 columns are no block of Q4_K
    ]
    first, _, last = rows[:3]
    assert first == {
        "type": "Q4_0", "n": 1000, "k": 256, "m": 1, "us": 289.0,
        "limit": "read", "limit_us": 144.0, "fraction": 0.4983,
    }  # fmt: skip
    assert (last["limit"], last["limit_us"], last["fraction"]) == ("cuBLAS", 128.0, 0.3077)
    lines = limits.summary(rows)
    assert [line["type"] for line in lines] == ["Q4_0", "Q4_K"]
    assert lines[1] == {
        "type": "Q4_K",
        "m=1": "0.50..0.50",
        "m=64": "0.41..0.41",
        "m=128": "0.31..0.31",
    }
    types_of, tokens, values = limits.grid(rows, (500, 32))
    assert types_of == ["Q4_0", "Q4_K"] and tokens == [1, 64, 128]
    assert values[0][0] == pytest.approx(9 / 19, abs=1e-4) and values[1][0] != values[1][0]


def test_picture(limits: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    types = [format_by_name(name) for name in ("Q4_0", "Q4_K")]
    rows = limits.fractions(types, limits.SHAPES[:5], limits.TOKENS, Clock())
    limits.plot_heatmap("heat", rows, tmp_path)
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_shapes(limits: Any) -> None:
    assert limits.parse_shapes("4096x4096,1024x64") == [(4096, 4096), (1024, 64)]
    for wrong in ("4096", "4096x", "axb", ""):
        with pytest.raises(ValueError, match="shapes: expected such as 4096x4096"):
            limits.parse_shapes(wrong)


def test_layer_of_the_chain(limits: Any) -> None:
    bench = importlib.import_module("bench_packed")
    assert sum(n * k for n, k in bench.LAYER.values()) == 218_103_808  # of Llama 3 8B
    assert set(bench.PARTS) == {"pack", "types", "tokens", "int8", "moe", "chain", "heatmap"}


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-30b-a3b"])
def test_random_model(limits: Any, name: str, tmp_path: Path) -> None:
    """A small one of the same kind is a file that load_model takes."""
    pytest.importorskip("transformers")
    random_model = importlib.import_module("random_model")
    small = {"hidden": 64, "feed": 96, "heads": 4, "kv_heads": 2, "vocab": 40, "head_dim": 32}
    if random_model.MODELS[name].experts:
        small |= {"experts": 4, "used": 2, "expert_feed": 32}
    sizes = dataclasses.replace(random_model.MODELS[name], **small)
    random_model.write(tmp_path / "m.gguf", sizes, "Q8_0", 2, 64)
    model = load_model(tmp_path / "m.gguf", "cpu", progress=False)
    with torch.no_grad():
        assert model(torch.arange(5)[None]).logits.isfinite().all()
    unread = 39 * 64 // 32 * 34  # rows of the embedding
    if sizes.experts:
        unread += 2 * 3 * 2 * (32 * 64 // 32 * 34)  # layers, stacks, experts of each
    assert bytes_per_token(model) == weight_bytes(model) - unread
