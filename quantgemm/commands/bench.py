# SPDX-License-Identifier: MIT
"""`quantgemm bench`: tokens per second for a prompt and for generation, as llama-bench counts."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from typing import Any

import torch

import quantgemm
from quantgemm.commands.devices import choose_device
from quantgemm.commands.models import (
    add_model_arguments,
    file_name,
    load,
    peak_memory,
    synchronize,
    weight_bytes,
)
from quantgemm.commands.output import CommandError, Grid, console, printable, size
from quantgemm.gguf import open_gguf
from quantgemm.models import Decoder, compile_decode, resolve_model_path

COPY_BYTES = 1 << 28

DESCRIPTION = """\
Time a model. ppN: a prompt of N tokens in one pass; tgN: N tokens one after the other, from an
empty context. Tokens are random, nothing is sampled, and one run beforehand does not count. On a
GPU the steps of tg are CUDA graphs (docs/models.md), where the model can have them.

GB/s of tg is the weights that one token reads times tokens per second; 'of copy' relates it to
the bytes that a copy of 256 MiB moves per second on the same device, measured in the same run.
"""
EPILOG = """\
examples:
  quantgemm bench model.gguf
  quantgemm bench model.gguf -p 512,2048 -n 128 -r 5 --json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="tokens per second of a model",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    for short, name, default in (("-p", "--prompt", "512"), ("-n", "--generate", "128")):
        what = "prompts" if short == "-p" else "generated texts"
        parser.add_argument(
            short,
            name,
            type=_lengths,
            default=_lengths(default),
            metavar="N[,N...]",
            help=f"lengths of {what}, 0 for none (default: {default})",
        )
    parser.add_argument(
        "-r", "--repetitions", type=_positive, default=3, metavar="N", help="default: 3"
    )
    parser.add_argument("--no-graphs", action="store_true", help="tg without CUDA graphs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def _lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < 1 << 24 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}")
    return [int(part) for part in parts if int(part)]


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 999, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    out = console()
    device, device_line = choose_device(args.device)
    model = load(args.model, device, args.dtype, args.algo)
    longest = max([*args.prompt, *args.generate], default=0)
    if longest > model.config.max_position_embeddings:
        context = model.config.max_position_embeddings
        raise CommandError(f"{longest} tokens, but the model's context has {context}")
    file = open_gguf(resolve_model_path(args.model))
    found: dict[str, Any] = {
        "model": file_name(args.model),
        "architecture": file.metadata["general.architecture"],
        "bytes": weight_bytes(model),
        "parameters": sum(math.prod(t.shape) for t in file.tensors.values()),
        "device": device_line.removeprefix("device: "),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "algo": args.algo,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantgemm": quantgemm.__version__,
        "torch": torch.__version__,
        "bytes_per_token": bytes_per_token(model),
    }
    decoder, found["graphs"] = None, False
    if device.type == "cuda" and args.generate and not args.no_graphs:
        try:
            decoder = compile_decode(model, max(args.generate), batch_sizes=(1,))
            found["graphs"] = True
        except (NotImplementedError, TypeError, ValueError, torch.OutOfMemoryError) as error:
            print(f"without CUDA graphs: {error}", file=sys.stderr)
    speeds: list[tuple[str, list[float]]] = []
    for kind, lengths in (("pp", args.prompt), ("tg", args.generate)):
        for length in lengths:
            times = measure(model, kind, length, args.repetitions, decoder)
            speeds.append((f"{kind}{length}", times))
    found["peak_process_bytes"], found["peak_device_bytes"] = peak_memory(device)
    found["copy_bytes_per_second"] = copy_speed(device)
    found["tests"] = [_summary(name, times, found) for name, times in speeds]
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    out.print(device_line)
    title = f"{found['model']}: {found['architecture']}, {size(found['bytes'])}, "
    title += f"{found['parameters'] / 1e6:,.1f} M parameters, {found['dtype']}, {args.algo}"
    title += ", CUDA graphs" if found["graphs"] else ""
    out.print(printable(title), style="bold")
    grid = Grid("", "test", ">tokens/s", ">±", ">GB/s", ">of copy")
    for test in found["tests"]:
        speed, spread = test["tokens_per_second"], test["standard_deviation"]
        moved = test["gigabytes_per_second"]
        cells = ("", "") if moved is None else (f"{moved:.2f}", f"{test['of_copy']:.1%}")
        grid.row(test["test"], f"{speed:.2f}", f"{spread:.2f}", *cells)
    grid.print(out)
    host, on_device = found["peak_process_bytes"], found["peak_device_bytes"]
    peaks = [f"process {size(host)}"] if host is not None else []
    peaks += [f"device {size(on_device)}"] if on_device is not None else []
    out.print(f"peak memory: {', '.join(peaks) or 'unknown'}")
    return 0


def bytes_per_token(model: Any) -> int:
    """Weights that one token reads: all but the embedding's other rows, unless the head has them.

    A head without a table of its own reads the embedding's; of experts, those that are chosen.
    """
    total = weight_bytes(model)
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            matrices = [p for p in module.parameters() if p.dim() == 3]
            unread = 1 - model.config.num_experts_per_tok / len(matrices[0])
            total -= round(unread * sum(p.nbytes for p in matrices))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight.data_ptr() == table.weight.data_ptr():
        return total
    return total - int(table.weight.nbytes) + int(table.weight[0].nbytes)


def copy_speed(device: torch.device, repeats: int = 5) -> float:
    """Bytes read and written per second by the fastest of some copies."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best


def measure(
    model: Any, kind: str, length: int, repetitions: int, decoder: Decoder | None = None
) -> list[float]:
    """Tokens per second of each repetition."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    ids = ids.to(model.device)
    steps = [ids] if kind == "pp" else [ids[:, i : i + 1] for i in range(length)]
    speeds = []
    for turn in range(-1, repetitions):
        few = steps[: max(1, len(steps) // 8)] if turn < 0 else steps  # the warm-up
        synchronize(model.device)
        start = time.perf_counter()
        if decoder is not None and kind == "tg":
            _go_on(decoder, few)
        else:
            _read(model, few)
        synchronize(model.device)
        if turn >= 0:
            speeds.append(length / (time.perf_counter() - start))
    return speeds


def _read(model: Any, steps: list[torch.Tensor]) -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        for ids in steps:
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _go_on(decoder: Decoder, steps: list[torch.Tensor]) -> None:
    decoder.read(steps[0])
    for ids in steps[1:]:
        decoder.step(ids[0])


def _summary(name: str, speeds: list[float], found: dict[str, Any]) -> dict[str, Any]:
    speed = statistics.fmean(speeds)
    moved = speed * found["bytes_per_token"] if name.startswith("tg") else None
    return {
        "test": name,
        "tokens_per_second": speed,
        "standard_deviation": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "repetitions": speeds,
        "gigabytes_per_second": None if moved is None else moved / 1e9,
        "of_copy": None if moved is None else moved / found["copy_bytes_per_second"],
    }
