# SPDX-License-Identifier: MIT
"""`quantgemm verify`: file -> device -> numbers, timed, repeated, and compared with other decoders.

The oracle is `quantgemm.formats`: numpy classes that share nothing with the compiled decoders.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm

from quantgemm.commands.devices import HELP as DEVICE_HELP
from quantgemm.commands.devices import choose_device, device_argument
from quantgemm.commands.files import open_model
from quantgemm.commands.output import (
    CommandError,
    Grid,
    console,
    milliseconds,
    one_line,
    plural,
    printable,
    size,
)
from quantgemm.commands.pipeline import STAGES, Pipeline, make_pipeline, pieces
from quantgemm.formats import Bytes, Floats, Format, format_by_name
from quantgemm.gguf import GGUFTensor
from quantgemm.gguf.errors import shorten

DESCRIPTION = """\
Prove that tensors decode exactly: parse the file, find the tensor, upload its blocks, dequantize
them on the device, download the float32 weights, and compare every one with an independent decoder
on the CPU (numpy). All that is repeated, and the bits of each run compared with the first's.

Without --tensor, --type or --all: the first tensor of a quantized type. NaN equals NaN. The table
gives milliseconds per run; start-up (GPU context, pinned buffers, loading kernels) comes before
the clock starts, the comparison after it has stopped. On the CPU nothing is up- or downloaded.
"""
EPILOG = """\
exit status: 0 if every weight is equal in every run, else 1 and one line on standard error.

examples:
  quantgemm verify model.gguf
  quantgemm verify model.gguf --type Q4_0
  quantgemm verify model.gguf --tensor blk.0.attn_q.weight --repeats 10
  quantgemm verify model.gguf --all --device cuda:1
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="decode on the device, compare with an independent decoder",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="a GGUF file or a whisper .bin")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tensor", metavar="NAME", help="the tensor of this name")
    which.add_argument(
        "--type", type=_type, metavar="TYPE", help="the first tensor of this type, such as Q4_0"
    )
    which.add_argument("--all", action="store_true", help="every tensor")
    parser.add_argument("--device", type=device_argument, help=DEVICE_HELP)
    parser.add_argument(
        "--repeats", type=_positive, default=3, metavar="N", help="runs (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _type(text: str) -> Format:
    try:
        return format_by_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1000, got {text!r}")
    return int(text)


@dataclass
class Clock:
    """Seconds of every stage of one run."""

    parse: float = 0.0
    find: float = 0.0
    moves: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))

    @property
    def total(self) -> float:
        return self.parse + self.find + sum(self.moves)


@dataclass
class Verdict:
    """About one tensor. first: index of the first weight that differs, what came, what should."""

    tensor: GGUFTensor
    wrong: int = 0
    largest: float = 0.0
    first: tuple[int, float, float] | None = None
    changed: int = 0  # runs after the first that gave other bits

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.changed


def run(args: argparse.Namespace) -> int:
    out = console()
    device, device_line = choose_device(args.device)
    if not os.path.exists(args.file):  # before the seconds that a start-up may take
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), args.file)
    start = time.perf_counter()
    pipeline = make_pipeline(device)
    startup = time.perf_counter() - start

    clocks, selections = [], []
    for _ in range(args.repeats):
        clock = Clock()
        selections.append(_parse_and_find(args, clock))
        clocks.append(clock)

    verdicts, comparing = _verify(selections, clocks, pipeline)

    out.print(printable(args.file), style="bold")
    if not args.all:
        tensor = selections[0][0]
        out.print(printable(f"tensor {tensor.name}: {tensor.format.name} {list(tensor.shape)}"))
    out.print(f"{device_line}\n")
    _print_times(out, clocks, verdicts, startup, comparing)
    _print_verdicts(out, verdicts)
    _conclude(out, args.file, verdicts, args.repeats)
    return 0


# ------------------------------------------------------------------------------ the work


def _parse_and_find(args: argparse.Namespace, clock: Clock) -> list[GGUFTensor]:
    start = time.perf_counter()
    model = open_model(args.file)
    clock.parse = time.perf_counter() - start
    start = time.perf_counter()
    found = _select(args, model.tensors)
    clock.find = time.perf_counter() - start
    return found


def _select(args: argparse.Namespace, tensors: Mapping[str, GGUFTensor]) -> list[GGUFTensor]:
    if args.tensor is not None:
        if args.tensor not in tensors:
            close = difflib.get_close_matches(args.tensor, tensors, n=1, cutoff=0.4)
            hint = f"; did you mean {shorten(close[0])}?" if close else f"; {_inventory(tensors)}"
            raise CommandError(f"{args.file}: no tensor named {shorten(args.tensor)}{hint}")
        return [tensors[args.tensor]]
    if args.all:
        found = list(tensors.values())
        wanted = "tensors at all"
    elif args.type is not None:
        found = [t for t in tensors.values() if t.format is args.type][:1]
        wanted = f"tensor of type {args.type.name}"
    else:
        found = [t for t in tensors.values() if not t.format.is_plain][:1]
        wanted = "tensor of a quantized type (--all takes the others too)"
    if not found:
        raise CommandError(f"{args.file}: no {wanted}; {_inventory(tensors)}")
    return found


def _inventory(tensors: Mapping[str, GGUFTensor]) -> str:
    counts = Counter(tensor.format.name for tensor in tensors.values())
    listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return f"the file holds {listed or 'no tensors'}"


def _verify(
    selections: Sequence[list[GGUFTensor]], clocks: Sequence[Clock], pipeline: Pipeline
) -> tuple[list[Verdict], float]:
    """Send every tensor through the pipeline, once per run; also the seconds of the comparison.

    Runs go side by side, piece by piece, each with its own mapping of the file, so that only two
    pieces of decoded weights exist at a time.
    """
    verdicts: list[Verdict] = []
    comparing = 0.0
    nbytes = sum(tensor.nbytes for tensor in selections[0])
    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=nbytes, unit="B", unit_scale=True, disable=None, leave=False) as progress,
    ):
        for copies in zip(*selections, strict=True):
            verdict, done = Verdict(copies[0]), 0
            fmt = verdict.tensor.format
            streams = map(_timed_pieces, copies, clocks)
            for same in zip(*streams, strict=True):
                first = _send(pipeline, same[0], fmt, clocks[0], again=False)
                for blocks, clock in zip(same[1:], clocks[1:], strict=True):
                    other = _send(pipeline, blocks, fmt, clock, again=True)
                    verdict.changed += not torch.equal(
                        first.view(torch.int32), other.view(torch.int32)
                    )
                start = time.perf_counter()
                _compare(verdict, same[0].numpy(), first.numpy(), done, pool, threads)
                comparing += time.perf_counter() - start
                done += len(first)
                progress.update(same[0].nbytes)
            verdicts.append(verdict)
    return verdicts, comparing


def _timed_pieces(tensor: GGUFTensor, clock: Clock) -> Iterator[torch.Tensor]:
    """Taking the view of the file (of a big-endian one, a swapped copy) counts as finding."""
    start = time.perf_counter()
    blocks = tensor.blocks
    clock.find += time.perf_counter() - start
    if blocks.numel():
        yield from pieces(blocks, tensor.format)


def _send(
    pipeline: Pipeline, blocks: torch.Tensor, fmt: Format, clock: Clock, again: bool
) -> torch.Tensor:
    weights, seconds = pipeline.run(blocks, fmt, again)
    clock.moves = [a + b for a, b in zip(clock.moves, seconds, strict=True)]
    return weights


def _compare(
    verdict: Verdict, blocks: Bytes, got: Floats, offset: int, pool: ThreadPoolExecutor, ways: int
) -> None:
    """Decode `blocks` with numpy, in `ways` parts at once, and note where `got` differs."""
    fmt = verdict.tensor.format
    count = len(got) // fmt.block_elems
    bounds = [count * i // ways for i in range(ways + 1)]
    ranges = [(a, b) for a, b in pairwise(bounds) if a < b]
    cuts = (blocks[a * fmt.block_bytes : b * fmt.block_bytes] for a, b in ranges)
    wanted = pool.map(fmt.decode, cuts)
    for (a, b), want in zip(ranges, wanted, strict=True):
        part = got[a * fmt.block_elems : b * fmt.block_elems]
        differ = (part != want) & ~(np.isnan(part) & np.isnan(want))
        where = np.flatnonzero(differ)
        if len(where):
            verdict.wrong += len(where)
            with np.errstate(invalid="ignore", over="ignore"):
                gaps = np.abs(part[where].astype(np.float64) - want[where])
            gaps[np.isnan(gaps)] = math.inf  # a number where NaN should be, or the other way round
            verdict.largest = max(verdict.largest, float(gaps.max()))
            if verdict.first is None:
                at = int(where[0])
                verdict.first = (offset + at, float(part[at]), float(want[at]))
        offset += len(part)


# ------------------------------------------------------------------------------ the report


def _print_times(
    out: Console,
    clocks: Sequence[Clock],
    verdicts: Sequence[Verdict],
    startup: float,
    comparing: float,
) -> None:
    stored = sum(v.tensor.nbytes for v in verdicts)
    decoded = 4 * sum(math.prod(v.tensor.shape) for v in verdicts)
    moved = {"upload": size(stored), "download": size(decoded)}
    runs = [f">run {i + 1}" for i in range(min(len(clocks), 8))]  # more do not fit a line
    grid = Grid("milliseconds per stage", "stage", ">bytes", *runs)
    grid.row("start-up (not in the total)", "", milliseconds(startup), *[""] * (len(runs) - 1))
    grid.line()
    shown = clocks[: len(runs)]
    grid.row("parse", "", *(milliseconds(c.parse) for c in shown))
    grid.row("find", "", *(milliseconds(c.find) for c in shown))
    for i, stage in enumerate(STAGES):
        grid.row(stage, moved.get(stage, ""), *(milliseconds(c.moves[i]) for c in shown))
    grid.line()
    grid.row("total", "", *(milliseconds(c.total) for c in shown), style="bold")
    grid.line()
    compared = milliseconds(comparing)
    grid.row("compare with numpy (not in the total)", "", compared, *[""] * (len(runs) - 1))
    grid.print(out)
    if len(clocks) > 1:
        totals = sorted(c.total for c in clocks)
        best, middle = milliseconds(totals[0]), milliseconds(totals[len(totals) // 2])
        out.print(f"total of {len(clocks)} runs: best {best} ms, median {middle} ms\n")


def _print_verdicts(out: Console, verdicts: Sequence[Verdict]) -> None:
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.tensor.format.name, []).append(verdict)
    grid = Grid("", "type", ">tensors", ">weights", ">largest difference", "runs")
    for name, group in groups.items():
        weights = sum(math.prod(v.tensor.shape) for v in group)
        largest = max(v.largest for v in group)
        same = "differ" if any(v.changed for v in group) else "identical"
        style = "green" if all(v.ok for v in group) else "red"
        grid.row(name, f"{len(group):,}", f"{weights:,}", f"{largest:g}", same, style=style)
    grid.print(out)


def _conclude(out: Console, path: str, verdicts: Sequence[Verdict], repeats: int) -> None:
    bad = [v for v in verdicts if not v.ok]
    if not bad:
        weights = plural(sum(math.prod(v.tensor.shape) for v in verdicts), "weight")
        tensors = plural(len(verdicts), "tensor")
        runs = f", {repeats} runs identical" if repeats > 1 else ""
        out.print(f"OK: {tensors}, {weights}, largest difference 0{runs}", style="bold green")
        return
    worst, others = bad[0], len(bad) - 1
    name = f"tensor {shorten(worst.tensor.name)} ({worst.tensor.format.name})"
    count = f"{math.prod(worst.tensor.shape):,}"
    if worst.first is not None:
        index, got, want = worst.first
        problem = f"{worst.wrong:,} of {count} weights differ from the numpy decoder: largest "
        problem += f"difference {worst.largest:g}, first at weight {index}: "
        problem += f"expected {want:.9g}, got {got:.9g}"
    else:
        problem = f"{plural(worst.changed, 'later run')} gave other bits than the first"
    more = f" (and {plural(others, 'more tensor')})" if others else ""
    raise CommandError(one_line(f"{path}: {name}: {problem}{more}"))
