# SPDX-License-Identifier: MIT
"""The native cache and the sparse container on the GPU: decode attention beside SDPA, compression.

    python benchmarks/bench_sparse_kv.py [--quick] [--only TABLE ...] [--rivals] [--out FOLDER]

32 query heads, 8 key-value heads, head dimension 128, one new token. The container's attention is
three launches: logits, softmax, output; each of them is also timed alone. The rival is the fastest
backend of torch's scaled_dot_product_attention on the dense float16 cache, measured in the same
run; --rivals adds compiled FlexAttention and transformers' own quantised cache. Keys and values
are rotated among copies that together exceed the L2 several times. Every row is printed as it
comes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import copy_bandwidth, pyplot, save, time_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from quantgemm import SparseKVCache, kv
from quantgemm.kv.pages import PAGE, page_bytes, pages_together

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
# name: format of the native cache or those of keys and values, sparsity
CACHES: dict[str, tuple[str, float]] = {
    "dense2": ("dense2", 0),
    "4of8_2": ("4of8_2", 0.5),
    "bitmap2, 50 %": ("bitmap2", 0.5),
    "bitmap2, 70 %": ("bitmap2", 0.7),
    "dense4": ("dense4", 0),
    "4of8_4": ("4of8_4", 0.5),
    "bitmap4, 50 %": ("bitmap4", 0.5),
    "bitmap4, 70 %": ("bitmap4", 0.7),
    "dense4 / bitmap2, 50 %": ("dense4/bitmap2", 0.5),
    "4of8_4 / dense2": ("4of8_4/dense2", 0.5),
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


def attention_rows(
    shapes: list[tuple[int, int]], settings: dict[str, tuple[float, int, int]]
) -> Iterator[dict[str, Any]]:
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
            yield {
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
            del whole, pairs, keys, values


def empty_cache(layers: int, form: str, sparsity: float, tokens: int, batch: int) -> SparseKVCache:
    """form: one format, or that of keys and that of values as in CACHES."""
    key, _, value = form.partition("/")
    return SparseKVCache(
        layers,
        HEADS,
        DIM,
        key,
        value_format=value or key,
        sparsity=sparsity,
        max_tokens=tokens,
        batch=batch,
        device="cuda",
    )


def page_pair_bytes(form: str, sparsity: float) -> int:
    """A page of keys and one of values of a head."""
    key, _, value = form.partition("/")
    keep = kv.kept_values(sparsity, DIM)
    return page_bytes(key, DIM, keep, False) + page_bytes(value or key, DIM, keep, True)


def native_rows(shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """SparseKVCache: one fused kernel; every layer is another copy."""
    for batch, tokens in shapes:
        sdpa = sdpa_times(batch, tokens)
        query = torch.randn(batch, QUERY_HEADS, DIM, device="cuda").half()
        k, v = (dense_cache(batch, tokens, i).view(batch, HEADS, tokens, DIM) for i in (0, 1))
        for name, (form, sparsity) in CACHES.items():
            bits = page_pair_bytes(form, sparsity) * 8 / (2 * PAGE * DIM)
            layers = num_copies(int(2 * k.numel() * bits / 8))
            cache = empty_cache(layers, form, sparsity, tokens + 256, batch)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for layer in range(layers):
                if layer == layers - 1:
                    start.record()
                cache.append(layer, k, v)
            end.record()
            cache.advance(tokens)
            timing = time_gpu([partial(cache.attend, layer, query) for layer in range(layers)])
            one = torch.zeros(batch, HEADS, 1, DIM, device="cuda", dtype=torch.float16)
            appends = [partial(cache.append, layer, one, one) for layer in range(layers)]
            yield {
                "B": batch,
                "T": tokens,
                "format": name,
                "bits/element": bits,
                "attention_us": timing.median,
                "low": timing.low,
                "high": timing.high,
                **{f"sdpa_{n}_us": t for n, t in sdpa.items()},
                "sdpa/ours": min(sdpa.values()) / timing.median,
                "TB/s": 2 * k.numel() * bits / 8 / timing.median * 1e-6,
                "append_us": time_gpu(appends).median,
                "prefill_us": start.elapsed_time(end) * 1000,
            }
            del cache, appends


def compression_rows(
    bandwidth: float, shapes: list[tuple[int, int]], settings: dict[str, tuple[float, int, int]]
) -> Iterator[dict[str, Any]]:
    for batch, tokens in shapes:
        caches = [dense_cache(batch, tokens, i) for i in range(2)]
        for name, (sparsity, key_bits, value_bits) in settings.items():
            for what, bits in (("key", key_bits), ("value", value_bits)):
                keep = kv.kept_values(sparsity, DIM)
                calls: list[Callable[[], Any]] = [
                    partial(kv.sparse_kv_compress, x, bits, keep, what == "value") for x in caches
                ]
                need = caches[0].numel() * 2
                need += kv.ops._compress(caches[0], sparsity, bits, what == "value").num_bytes
                timing = time_gpu(calls)
                yield {
                    "B": batch,
                    "T": tokens,
                    "container": name,
                    "of": what,
                    "us": timing.median,
                    "low": timing.low,
                    "high": timing.high,
                    "of_copy": need / bandwidth * 1e6 / timing.median,
                }


def packing_rows(bandwidth: float, shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """A prompt into an empty cache: its launches, and the step in which pages leave the ring."""
    for batch, tokens in shapes:
        k, v = (dense_cache(batch, tokens, i).view(batch, HEADS, tokens, DIM) for i in (0, 1))
        for name, (form, sparsity) in CACHES.items():
            cache = empty_cache(1, form, sparsity, tokens + 256, batch)
            timing = time_gpu([partial(cache.append, 0, k, v)])  # lengths stay as they are
            page = 4 * PAGE * DIM + page_pair_bytes(form, sparsity)
            together = pages_together(cache.key_format)
            pages = (tokens - cache.sinks - cache.window) // PAGE // together * together
            need = pages * batch * HEADS * page
            one = torch.zeros(batch, HEADS, 1, DIM, device="cuda", dtype=torch.float16)
            # The next token makes a page of 64, or two, behind 4 sinks and 128 recent ones.
            cache.append(0, k[:, :, :387], v[:, :, :387])
            cache.advance(387)
            yield {
                "B": batch,
                "T": tokens,
                "format": name,
                "us": timing.median,
                "low": timing.low,
                "high": timing.high,
                "of_copy": need / bandwidth * 1e6 / timing.median,
                "step_us": time_gpu([partial(cache.append, 0, one, one)] * 20).median,
            }


def rival_rows(shapes: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """FlexAttention, compiled; transformers' own quantised cache, which unpacks all of a layer."""
    from torch.nn.attention.flex_attention import flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    for batch, tokens in shapes:
        times = sdpa_times(batch, tokens)
        query = torch.randn(batch, QUERY_HEADS, 1, DIM, device="cuda").half()
        sources = [
            [
                dense_cache(batch, tokens, i).view(batch, HEADS, tokens, DIM)
                for i in (2 * n, 2 * n + 1)
            ]
            for n in range(num_copies(2 * batch * HEADS * tokens * DIM * 2))
        ]
        row: dict[str, Any] = {
            "B": batch,
            "T": tokens,
            "sdpa_us": min(times.values()),
            "flex_us": None,  # what fails is left out of its column, not its row out of the file
            "transformers_2_bit_us": None,
        }
        try:
            call = partial(flex, query, enable_gqa=True)
            row["flex_us"] = time_gpu([partial(call, key=k, value=v) for k, v in sources]).median
        except Exception as error:  # the compiler's own kinds
            print(f"FlexAttention at batch {batch}: {str(error).splitlines()[0]}")
        try:
            from transformers import QuantizedCache

            cache = QuantizedCache("quanto", _llama_like(), nbits=2)
            k, v = sources[0]
            cache.update(k, v, 0)
            step = partial(_quantized_step, cache, query, k[:, :, :1])
            row["transformers_2_bit_us"] = _time_eager(step)
        except Exception as error:  # not installed, or its back end is not
            print(f"transformers' quantised cache: {str(error).splitlines()[0]}")
        yield row


def _quantized_step(cache: Any, query: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """A token's attention as transformers does it: all of the layer unpacked, then SDPA."""
    keys, values = cache.update(one, one, 0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN plans each new length, for 50 ms
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _llama_like() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=1, num_attention_heads=QUERY_HEADS, num_key_value_heads=HEADS
    )


def _time_eager(call: Callable[[], Any], times: int = 10) -> float:
    """µs, for what cannot be captured in a graph."""
    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / times


def show(rows: Iterator[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    """All of them, each printed as it comes."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        widths = [max(len(k), 6) for k in row]
        if not kept or kept[-1].keys() != row.keys():
            print("     s  " + "  ".join(k.rjust(w) for k, w in zip(row, widths, strict=True)))
        line = "  ".join(t.rjust(w) for t, w in zip(texts, widths, strict=True))
        print(f"{time.perf_counter() - since:6.1f}  {line}", flush=True)
        kept.append(row)
    return kept


# Relative L2 of attention's output, Gauss, and bits per element, keys and values together:
# tests/test_kv_accuracy.py and Container.num_bytes.
ERRORS = {
    "dense4": (4.25, 0.092),
    "dense2": (2.25, 0.378),
    "bitmap4, 50 %": (3.19, 0.238),
    "bitmap2, 50 %": (2.19, 0.352),
    "bitmap2, 70 %": (1.8, 0.490),
    "4of8_2": (2.19, 0.402),
    "4 bits, 50 %": (4.22, 0.235),
    "2 bits, 50 %": (3.22, 0.482),
    "2 bits, 70 %": (2.9, 0.490),
}


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Speed against dense SDPA over the number of tokens; error over bits per element."""
    if (plt := pyplot()) is None:
        return

    figure, (speed, error) = plt.subplots(1, 2, figsize=(10, 4.2))
    names = [row.get("format") or row["container"] for row in rows]
    for name in dict.fromkeys(names):
        own = [row for row, n in zip(rows, names, strict=True) if n == name]
        chosen = sorted((row["B"] * row["T"], row["sdpa/ours"]) for row in own)
        speed.plot([c[0] for c in chosen], [c[1] for c in chosen], marker="o", label=name)
    speed.axhline(1, color="#888888", linewidth=1)
    speed.set(xscale="log", xlabel="batch · context", ylabel="speed against dense SDPA")
    speed.set_ylim(bottom=0)
    speed.legend(fontsize=8)
    for name, (bits, size) in ERRORS.items():
        error.plot(bits, size, "o", color="#3b6ea5" if name.startswith("dense") else "#b5651d")
        error.annotate(name, (bits, size), (5, 5), textcoords="offset points", fontsize=8)
    error.set(xlabel="bits per element", ylabel="error of the output (statistical model)")
    error.set_ylim(0, 0.6)
    error.set_xlim(1.5, 5.2)
    figure.tight_layout()
    figure.savefig(folder / "sparse_kv.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("cache", "container", "compression", "packing")
    parser.add_argument("--quick", action="store_true", help="two shapes, three containers")
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="these tables")
    parser.add_argument("--rivals", action="store_true", help="FlexAttention and others as well")
    parser.add_argument("--out", default="", help="also save CSV, JSON and a plot in this folder")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure (examples/04_sparse_kv_decode.py runs on a CPU)")
        return 0
    gc.freeze()  # a capture collects garbage; what is here now is none
    since = time.perf_counter()
    quick = ("2 bits, 70 %", "4 bits, 50 %", "16 bits, 70 %")
    settings = {n: s for n, s in SETTINGS.items() if not options.quick or n in quick}
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    shapes = SHAPES[:2] if options.quick else SHAPES
    tables: dict[str, Iterator[dict[str, Any]]] = {
        "kv_cache": native_rows(shapes),
        "sparse_kv_attention": attention_rows(shapes, settings),
        "sparse_kv_compression": compression_rows(bandwidth, SHAPES[1:2], settings),
        "kv_packing": packing_rows(bandwidth, SHAPES[1:2]),
    }
    wanted = {
        n: t for (n, t), short in zip(tables.items(), names, strict=True) if short in options.only
    }
    if options.rivals:
        wanted["kv_rivals"] = rival_rows(shapes)
    kept: dict[str, list[dict[str, Any]]] = {}
    for name, rows in wanted.items():
        kept[name] = show(rows, since)
        if options.out:
            save(name, kept[name], Path(options.out))
    if options.out:
        plot(kept.get("kv_cache", []) + kept.get("sparse_kv_attention", []), Path(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
