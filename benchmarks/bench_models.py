# SPDX-License-Identifier: MIT
"""A whole model on the GPU: prompts, generation and memory, quantised and in bfloat16.

    python benchmarks/bench_models.py [--type Q4_K_M] [--layers 32] [--out benchmarks/results]
    python benchmarks/bench_models.py --model qwen3-30b-a3b --part models

Llama-3-8B's shape with random weights (random_model.py), through transformers' own model. "graphs"
is `compile_decode`; the rival is the same class with bfloat16 weights and cuBLAS, with graphs too.
Another model's tables are named after it, and its rival has graphs where transformers allows it.
tg: tokens per second, one sequence; of_copy: bytes of weights per token over the time, of the copy
bandwidth measured in the same run. Load times include reading the file from the page cache.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, copy_bandwidth, print_table, save
from random_model import MIXTURE, MODELS, Sizes, write

import quantgemm
from quantgemm.commands.bench import bytes_per_token, measure
from quantgemm.models import compile_decode
from quantgemm.sampling import NgramDraft, SamplingConfig, speculative_generate

AT_ONCE = (1, 2, 3, 5, 9)  # tokens of a step, one more than drafts
PROMPTS, GENERATED, CONTEXT = (512, 2048), 128, 8192


def plain_model(sizes: Sizes, layers: int) -> Any:
    """The same architecture in bfloat16, as large as the file's."""
    import transformers

    values: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": CONTEXT,
        "dtype": torch.bfloat16,
    }
    name = "Llama"
    if sizes.experts:
        name = "Qwen3Moe"
        values |= {"num_experts": sizes.experts, "num_experts_per_tok": sizes.used}
        values["moe_intermediate_size"] = sizes.expert_feed
    config = getattr(transformers, f"{name}Config")(**values)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return getattr(transformers, f"{name}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def print_profile(name: str, model: Any, steps: int = 4, most: int = 20) -> None:
    """Kernels of a recorded step, those that take the longest first.

    After all timing: once the profiler is attached each launch of the process is slower.
    """
    decoder = compile_decode(model, 1024, batch_sizes=(1,))
    decoder.read(torch.ones(1, 16, dtype=torch.int64, device="cuda"))
    token = torch.ones(1, dtype=torch.int64, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            decoder.step(token)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / steps
    count = sum(event.count for event in events) / steps
    print(f"{name}: {count:.0f} kernels a step, {total:.0f} us")
    for event in events[:most]:
        each = event.self_device_time_total / steps
        print(f"{each:9.1f} us {event.count / steps:5.0f} x {event.key[:120]}")


def rows_of(name: str, load: Any, copy: float) -> list[dict[str, Any]]:
    """Without graphs, then with them."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = load()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    base = {
        "weights": name,
        "load_s": seconds,
        "loaded_GB": torch.cuda.memory_allocated() / 1e9,
        "load_peak_GB": torch.cuda.max_memory_allocated() / 1e9,
    }
    found = []
    for graphs in (False, True):
        try:
            decoder = compile_decode(model, 1024, batch_sizes=(1,)) if graphs else None
        except RuntimeError as error:  # a step that waits for the GPU
            print(f"{name}: no graphs: {str(error).splitlines()[0]}")
            continue
        torch.cuda.reset_peak_memory_stats()
        tg = median(measure(model, "tg", GENERATED, 3, decoder))
        row = {**base, "graphs": "yes" if graphs else "no", f"tg{GENERATED}": tg}
        row["of_copy"] = tg * bytes_per_token(model) / copy
        row["tg_peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
        for length in PROMPTS:
            row[f"pp{length}"] = median(measure(model, "pp", length, 3))
        print_table([row])
        found.append(row)
    return found


def speculation_rows(name: str, model: Any) -> list[dict[str, Any]]:
    """Recorded steps of several tokens, then a whole text with n-gram drafts."""
    decoder = compile_decode(model, 1024, batch_sizes=(1,))
    prompt = torch.arange(16, device="cuda")
    greedy = SamplingConfig(temperature=0)
    found, alone_us, alone = [], 0.0, 0.0
    for count in AT_ONCE:
        decoder.prepare(1, count)
        decoder.read(prompt[None])
        ids = torch.ones(1, count, dtype=torch.int64, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            decoder.step(ids)
        end.record()
        end.synchronize()
        us = start.elapsed_time(end) * 50
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            if count == 1:
                kept = 1.0
                decoder.generate(prompt, GENERATED, greedy, ())
            else:
                text = speculative_generate(
                    decoder, NgramDraft(), prompt, GENERATED, count - 1, greedy
                )
                kept = text.statistics.tokens_per_step
            seconds.append(time.perf_counter() - begin)
        rate = GENERATED / median(seconds)
        alone_us, alone = (us, rate) if count == 1 else (alone_us, alone)
        found.append(
            {
                "weights": name,
                "tokens": count,
                "step_us": us,
                "pays_from": us / alone_us,
                "kept": kept,
                "tok/s": rate,
                "speedup": rate / alone,
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--type", default=MIXTURE, help=f"default: {MIXTURE}")
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b", help=", ".join(MODELS))
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--part", default="models,speculation", help="default: both")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step too")
    parser.add_argument("--out", type=Path, default=None, help=f"for instance {RESULTS}")
    args = parser.parse_args()
    if not torch.cuda.is_available() or quantgemm.build_info().cuda is None:
        print("no CUDA device: nothing to measure")
        return 0
    sizes = MODELS[args.model]
    layers = args.layers or sizes.layers
    suffix = "" if args.model == "llama-3-8b" else f"_{args.model}"
    copy = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    drafted: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write(path, sizes, args.type, layers, CONTEXT)
        size = path.stat().st_size
        loads: dict[str, Callable[[], Any]] = {
            f"{args.type}, {algo}": partial(
                quantgemm.load_model, path, "cuda", algo=algo, progress=False
            )
            for algo in ("auto", "auto_q8")
        }
        for name, load in loads.items():
            if "models" in args.part:
                rows += rows_of(name, load, copy)
            if "speculation" in args.part:
                drafted += speculation_rows(name, load())
        if "models" in args.part:
            loads["bfloat16"] = lambda: plain_model(sizes, layers)
            rows += rows_of("bfloat16", loads["bfloat16"], copy)
        print(f"copy {copy / 1e12:.2f} TB/s; the file has {size / 1e9:.3f} GB")
        for table_name, table in (("models", rows), ("speculation", drafted)):
            if table:
                print_table(table)
                if args.out:
                    save(f"{table_name}{suffix}", table, args.out)
        if args.profile:
            for name, load in loads.items():
                print_profile(name, load())
    return 0


if __name__ == "__main__":
    sys.exit(main())
