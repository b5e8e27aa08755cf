# SPDX-License-Identifier: MIT
"""The native cache and the sparse container on the GPU: decode attention beside SDPA, compression.

    python benchmarks/bench_sparse_kv.py [--quick] [--out FOLDER]

32 query heads, 8 key-value heads, head dimension 128, one new token. Attention is three launches:
logits, softmax, output; each of them is also timed alone. The rival is the fastest backend of
torch's scaled_dot_product_attention on the dense float16 cache, measured in the same run. Keys and
values are rotated among copies that together exceed the L2 several times.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import copy_bandwidth, print_table, pyplot, save, time_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quantgemm import SparseKVCache, kv
from quantgemm.kv.cache import FORMATS

QUERY_HEADS, HEADS, DIM = 32, 8, 128
GROUPS = QUERY_HEADS // HEADS
L2_BYTES = 60 << 20
SHAPES = [(1, 8192), (8, 8192), (1, 65536), (8, 32768), (32, 8192)]
# name: sparsity, bits of keys, bits of values
SETTINGS: dict[str, tuple[float, int, int]] = {
    "2 bits, 50 %": (0.5, 2, 2),
    "2 bits, 70 %": (0.7, 2, 2),
    "4 bits, 50 %": (0.5, 4, 4),
    "keys 4, values 2, 70 %": (0.7, 4, 2),
    "16 bits, 70 %": (0.7, 16, 16),
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def num_copies(num_bytes: int) -> int:
    """As many as together exceed the L2 several times, two at least."""
    return max(2, min(48, 4 * L2_BYTES // max(num_bytes, 1) + 1))


def clone(c: kv.Container) -> kv.Container:
    return kv.Container(*(t if t is None else t.clone() for t in c))


def dense_cache(batch: int, tokens: int, seed: int) -> torch.Tensor:
    g = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.empty(batch * HEADS, tokens, DIM, dtype=torch.float16, device="cuda")
    return x.normal_(generator=g)


@functools.cache
def sdpa_times(batch: int, tokens: int) -> dict[str, float]:
    """µs of each backend that takes the shape."""
    print(f"batch {batch}, {tokens} tokens", flush=True)
    count = num_copies(2 * batch * HEADS * tokens * DIM * 2)
    caches = [
        [dense_cache(batch, tokens, i).view(batch, HEADS, tokens, DIM) for i in (2 * n, 2 * n + 1)]
        for n in range(count)
    ]
    query = torch.randn(batch, QUERY_HEADS, 1, DIM, device="cuda").half()
    times = {}
    for name, backend in BACKENDS.items():
        call = partial(scaled_dot_product_attention, query, enable_gqa=True)
        try:
            with sdpa_kernel(backend):
                times[name] = time_gpu([partial(call, key=k, value=v) for k, v in caches]).median
        except RuntimeError as error:
            print(f"{name} at batch {batch}, {tokens} tokens: {str(error).splitlines()[0]}")
    return times


def attention(
    query: torch.Tensor,
    keys: kv.Container,
    values: kv.Container,
    bits: tuple[int, int],
    tokens: int,
) -> torch.Tensor:
    logits = kv.sparse_key_spmm(query, *keys, num_tokens=tokens, groups=GROUPS, bits=bits[0])
    scores = logits.softmax(-1)  # query carries the scale
    return kv.sparse_value_spmm(scores, *values, head_dim=DIM, groups=GROUPS, bits=bits[1])


def attention_table(
    shapes: list[tuple[int, int]], settings: dict[str, tuple[float, int, int]]
) -> list[dict[str, Any]]:
    rows = []
    for batch, tokens in shapes:
        sdpa = sdpa_times(batch, tokens)
        best = min(sdpa.values())
        query = torch.randn(batch * QUERY_HEADS, 1, DIM, device="cuda").half() / DIM**0.5
        scores = torch.rand(batch * QUERY_HEADS, 1, tokens, device="cuda").half() / tokens
        k, v = dense_cache(batch, tokens, 0), dense_cache(batch, tokens, 1)
        for name, (sparsity, key_bits, value_bits) in settings.items():
            keys = kv.compress_keys(k, sparsity, key_bits)
            values = kv.compress_values(v, sparsity, value_bits)
            count = num_copies(keys.num_bytes)
            pairs = [(clone(keys), clone(values)) for _ in range(count)]
            key = partial(kv.sparse_key_spmm, num_tokens=tokens, groups=GROUPS, bits=key_bits)
            value = partial(kv.sparse_value_spmm, head_dim=DIM, groups=GROUPS, bits=value_bits)
            bits = (key_bits, value_bits)
            whole = [partial(attention, query, *pair, bits, tokens) for pair in pairs]
            total = time_gpu(whole).median
            rows.append(
                {
                    "B": batch,
                    "T": tokens,
                    "container": name,
                    "key_us": time_gpu([partial(key, query, *p[0]) for p in pairs]).median,
                    "value_us": time_gpu([partial(value, scores, *p[1]) for p in pairs]).median,
                    "attention_us": total,
                    **{f"sdpa_{n}_us": t for n, t in sdpa.items()},
                    "sdpa/ours": best / total,
                    "bits/element": (keys.num_bytes + values.num_bytes) * 4 / k.numel(),
                }
            )
            del pairs
    return rows


def native_table(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """SparseKVCache: one fused kernel; every layer is another copy."""
    rows = []
    for batch, tokens in shapes:
        sdpa = sdpa_times(batch, tokens)
        query = torch.randn(batch, QUERY_HEADS, DIM, device="cuda").half()
        k, v = (dense_cache(batch, tokens, i).view(batch, HEADS, tokens, DIM) for i in (0, 1))
        for form in FORMATS:
            bits = FORMATS[form] + 0.375  # of keys and values together
            layers = num_copies(int(2 * k.numel() * bits / 8))
            cache = SparseKVCache(
                layers, HEADS, DIM, form, max_tokens=tokens + 256, batch=batch, device="cuda"
            )
            for layer in range(layers):
                cache.append(layer, k, v)
            cache.advance(tokens)
            timing = time_gpu([partial(cache.attend, layer, query) for layer in range(layers)])
            one = torch.zeros(batch, HEADS, 1, DIM, device="cuda", dtype=torch.float16)
            appends = [partial(cache.append, layer, one, one) for layer in range(layers)]
            rows.append(
                {
                    "B": batch,
                    "T": tokens,
                    "format": form,
                    "attention_us": timing.median,
                    "low": timing.low,
                    "high": timing.high,
                    **{f"sdpa_{n}_us": t for n, t in sdpa.items()},
                    "sdpa/ours": min(sdpa.values()) / timing.median,
                    "TB/s": 2 * k.numel() * bits / 8 / timing.median * 1e-6,
                    "append_us": time_gpu(appends).median,
                }
            )
            del cache
    return rows


def compression_table(bandwidth: float, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for batch, tokens in shapes:
        caches = [dense_cache(batch, tokens, i) for i in range(2)]
        for name, (sparsity, key_bits, value_bits) in SETTINGS.items():
            for what, bits in (("key", key_bits), ("value", value_bits)):
                keep = kv.kept_values(sparsity, DIM)
                calls: list[Callable[[], Any]] = [
                    partial(kv.sparse_kv_compress, x, bits, keep, what == "value") for x in caches
                ]
                need = caches[0].numel() * 2
                need += kv.ops._compress(caches[0], sparsity, bits, what == "value").num_bytes
                timing = time_gpu(calls)
                rows.append(
                    {
                        "B": batch,
                        "T": tokens,
                        "container": name,
                        "of": what,
                        "us": timing.median,
                        "low": timing.low,
                        "high": timing.high,
                        "of_copy": need / bandwidth * 1e6 / timing.median,
                    }
                )
    return rows


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    if (plt := pyplot()) is None:
        return

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(row["container"] for row in rows):
        chosen = sorted(
            (row["B"] * row["T"], row["sdpa/ours"]) for row in rows if row["container"] == name
        )
        axes.plot([c[0] for c in chosen], [c[1] for c in chosen], marker="o", label=name)
    axes.axhline(1, color="#888888", linewidth=1)
    axes.set(xscale="log", xlabel="batch · context", ylabel="speed against dense SDPA")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "sparse_kv.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, three containers")
    parser.add_argument("--out", default="", help="also save CSV, JSON and a plot in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure (examples/04_sparse_kv_decode.py runs on a CPU)")
        return 0
    quick = ("2 bits, 70 %", "4 bits, 50 %", "16 bits, 70 %")
    settings = {n: s for n, s in SETTINGS.items() if not options.quick or n in quick}
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    shapes = SHAPES[:2] if options.quick else SHAPES
    tables = {
        "kv_cache": native_table(shapes),
        "sparse_kv_attention": attention_table(shapes, settings),
        "sparse_kv_compression": compression_table(bandwidth, SHAPES[1:2]),
    }
    for name, rows in tables.items():
        print_table(rows)
        if options.out:
            save(name, rows, Path(options.out))
    if options.out:
        plot(tables["sparse_kv_attention"], Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
