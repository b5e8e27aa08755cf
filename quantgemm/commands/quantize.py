# SPDX-License-Identifier: MIT
"""`quantgemm quantize`: a model's weights into a GGUF file of another type.

One tensor after another, and of a tensor one piece after another, goes to the device, is quantized,
decoded again to measure the error, and written: memory does not depend on the model's size.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from quantgemm import _C, ops
from quantgemm.commands.devices import HELP as DEVICE_HELP
from quantgemm.commands.devices import choose_device, device_argument
from quantgemm.commands.output import (
    CommandError,
    Grid,
    console,
    plural,
    printable,
    shorten,
    size,
)
from quantgemm.commands.sources import PLAIN, Source, SourceTensor, open_source
from quantgemm.formats import FORMATS, Format
from quantgemm.gguf import GGUFValue, GGUFWriter

PIECE_WEIGHTS = 1 << 24  # of a tensor on the device at a time
WORST_SHOWN = 5
ACTIVATIONS = {"Q8_1", "Q8_K"}  # types of intermediate results, not of weights
FLOATS = {"F64", "F32", "F16", "BF16"}
F32 = FORMATS[0]
NORM_OR_BIAS = re.compile("norm|bias", re.IGNORECASE)
# What chooses experts: small, and its closest calls change with every rounding.
ROUTER = re.compile(r"ffn_gate_inp|(mlp|block_sparse_moe)\.gate\.weight$")
# general.file_type: what most of a file is. There are no numbers for the types not listed.
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10},
    **{"Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32},
    **{"TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40},
}
QUANTIZATION_VERSION = 2  # general.quantization_version: today's block layouts

DESCRIPTION = """\
Quantize the weights of IN and write them to the GGUF file OUT.

IN is recognized by its content: a safetensors file (or the .index.json of several), a GGUF file
(any part of a split one; its metadata is carried over, quantized tensors are decoded first) or a
torch state dict (loaded with weights_only=True). Tensors keep their names.

Whisper models become a GGUF that `quantgemm transcribe` takes, with tokenizer and OpenAI's names:
IN is then a folder with the config.json of transformers or CTranslate2, or a whisper.cpp .bin.
Positions and convolutions of a Whisper model keep their type.

The first rule that holds for a tensor decides:
  1. integers                                            keep their type
  2. one row (1-D, or all leading dimensions are 1),
     or a name that contains 'norm' or 'bias',
     or that of a router of experts (ffn_gate_inp)       F32
  3. a name that matches --keep, or no elements          keeps its type (F64: F32)
  4. already of the type asked for                       copied as it is
  5. rows not a multiple of the type's block             keep their type (F64: F32)
  6. all others                                          quantized

Of types that GGUF lacks, bool becomes I8, uint8 I16 and float8 F16, which hold the same values. A
file made from safetensors or torch has no model metadata but its name.
"""
EPILOG = """\
OUT appears complete or not at all: it is written under another name and renamed at the end. The
errors printed are root mean squares of (weight - decoded), relative to that of the weights.

examples:
  quantgemm quantize model.safetensors model-q4_k.gguf --type Q4_K
  quantgemm quantize model-f16.gguf model-q8_0.gguf --type Q8_0 --device cpu --force
  quantgemm quantize pytorch_model.bin out.gguf --type IQ4_XS --keep 'lm_head*' --verbose
"""


def targets() -> dict[str, Format]:
    """The types that --type takes, by name."""
    writable = {row["name"] for row in _C.format_table() if row["can_quantize"]} - ACTIVATIONS
    writable |= {"F32", "F16", "BF16"}
    return {fmt.name: fmt for fmt in FORMATS.values() if fmt.name in writable}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="safetensors, GGUF or a torch state dict to a quantized GGUF",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", metavar="IN", help="safetensors, GGUF or torch file, or a Whisper")
    parser.add_argument("output", metavar="OUT", help="the GGUF file to write")
    parser.add_argument("--type", type=_target, required=True, help=", ".join(targets()))
    parser.add_argument("--device", type=device_argument, help=DEVICE_HELP)
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="GLOB",
        help="keep the type of tensors whose name matches, such as 'output*' (repeatable)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every tensor")
    parser.set_defaults(run=run)


def _target(text: str) -> Format:
    known = targets()
    if text.upper() not in known:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {text!r}")
    return known[text.upper()]


@dataclass
class Step:
    """What becomes of a tensor. why: it is not quantized, else ''; error: relative rms."""

    tensor: SourceTensor
    format: Format
    why: str
    before: int = 0
    after: int = 0
    error: float = 0.0


def run(args: argparse.Namespace) -> int:
    out = console()
    target: Format = args.type
    _check_output(args.output, args.force)
    source = open_source(args.input)
    if not source.tensors:
        raise CommandError(f"{args.input}: expected tensors, got {source.kind} without any")
    device, device_line = choose_device(args.device)
    title = f"{args.input} ({source.kind}) -> {args.output} ({target.name})"
    out.print(printable(title), style="bold")
    out.print(device_line)
    start = time.perf_counter()
    steps = [plan(tensor, target, args.keep, source.needed) for tensor in source.tensors]
    try:
        with GGUFWriter(args.output, _metadata(source, target, args.input)) as writer:
            for step in steps:
                writer.declare(step.tensor.name, step.tensor.shape, step.format)
            _write(writer, steps, device)
    except ValueError as error:  # a name or shape that GGUF cannot hold
        raise CommandError(f"{args.output}: not written: {error}") from None
    _report(out, args, source, steps, time.perf_counter() - start)
    return 0


# ------------------------------------------------------------------------------ the rules


def plan(
    tensor: SourceTensor, target: Format, keep: Sequence[str] = (), needed: Sequence[str] = ()
) -> Step:
    """The rules of DESCRIPTION. needed: globs of what the kind of model has as numbers."""
    own, shape = tensor.format, tensor.shape
    same = F32 if own.name == "F64" else own
    if own.is_plain and own.name not in FLOATS:
        return Step(tensor, own, "integers")
    if math.prod(shape[:-1]) == 1:
        return Step(tensor, F32, "one row")
    if NORM_OR_BIAS.search(tensor.name):
        return Step(tensor, F32, "norm or bias by its name")
    if ROUTER.search(tensor.name):
        return Step(tensor, F32, "router of experts by its name")
    if any(fnmatch.fnmatchcase(tensor.name, glob) for glob in keep):
        return Step(tensor, same, "--keep")
    if any(fnmatch.fnmatchcase(tensor.name, glob) for glob in needed):
        return Step(tensor, same, "the model needs numbers")
    if 0 in shape:
        return Step(tensor, same, "no elements")
    if own is target:
        return Step(tensor, own, "already of that type")
    if shape[-1] % target.block_elems:
        return Step(tensor, same, f"rows not a multiple of {target.block_elems}")
    return Step(tensor, target, "")


def _check_output(path: str, force: bool) -> None:
    parent = Path(path).absolute().parent
    if os.path.isdir(path):
        raise CommandError(f"{path}: expected a file name, got a directory")
    if not parent.is_dir():
        raise CommandError(f"{path}: no such directory: {parent}")
    if os.path.lexists(path) and not force:
        raise CommandError(f"{path}: the file exists (--force overwrites it)")


def _metadata(source: Source, target: Format, path: str) -> dict[str, GGUFValue]:
    metadata = dict(source.metadata) or {"general.name": GGUFValue("str", Path(path).stem)}
    metadata.pop("general.file_type", None)
    if target.name in FILE_TYPES:
        metadata["general.file_type"] = GGUFValue("u32", FILE_TYPES[target.name])
    metadata["general.quantization_version"] = GGUFValue("u32", QUANTIZATION_VERSION)
    return metadata


# ------------------------------------------------------------------------------ the work


def _write(writer: GGUFWriter, steps: Sequence[Step], device: torch.device) -> None:
    total = sum(_nbytes(step.tensor.shape, step.tensor.format) for step in steps)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as progress:
        for step in steps:
            blocks = step.tensor.load()
            step.before = blocks.nbytes
            step.after = _nbytes(step.tensor.shape, step.format)
            if step.format is step.tensor.format:
                writer.write(step.tensor.name, blocks)
                progress.update(blocks.nbytes)
                continue
            wrong = square = 0.0
            rows = blocks.reshape(-1, blocks.shape[-1])
            per_piece = max(1, PIECE_WEIGHTS // max(1, math.prod(step.tensor.shape[-1:])))
            for first in range(0, len(rows), per_piece):
                piece = rows[first : first + per_piece]
                values = ops.dequantize(piece.to(device), step.tensor.format.type_id)
                encoded = encode(values, step.format)
                writer.write(step.tensor.name, encoded)
                decoded = ops.dequantize(encoded, step.format.type_id)
                wrong += _sum_of_squares(decoded.sub_(values))
                square += _sum_of_squares(values)
                progress.update(piece.nbytes)
            step.error = math.sqrt(wrong / square) if square else wrong


def encode(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    """float32 [rows, cols] to uint8 [rows, row_bytes]"""
    if fmt.is_plain:
        return values.to(PLAIN[fmt.name]).view(torch.uint8)
    return ops.quantize(values, fmt.type_id)


def _sum_of_squares(values: torch.Tensor) -> float:
    """Of float32 [rows, cols]: norms of rows in float32, which is fast, and the rest in float64."""
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def _nbytes(shape: Sequence[int], fmt: Format) -> int:
    return math.prod(shape) // fmt.block_elems * fmt.block_bytes


# ------------------------------------------------------------------------------ the report


def _report(
    out: Console, args: argparse.Namespace, source: Source, steps: Sequence[Step], seconds: float
) -> None:
    out.print()
    if args.verbose:
        grid = Grid("", "tensor", "shape", "from", "to", ">rms error", "why")
        for s in steps:
            shape, types = list(s.tensor.shape), (s.tensor.format.name, s.format.name)
            grid.row(s.tensor.name, shape, *types, "" if s.why else _percent(s.error), s.why)
        grid.print(out)
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in sorted(steps, key=lambda s: s.why != ""):
        groups.setdefault((step.format.name, step.why), []).append(step)
    grid = Grid("", "type", "why", ">tensors", ">before", ">after")
    for (name, why), group in groups.items():
        before, after = (size(sum(getattr(s, k) for s in group)) for k in ("before", "after"))
        what = f"kept: {why}" if why else "converted" if name in PLAIN else "quantized"
        grid.row(name, what, f"{len(group):,}", before, after, style="" if why else "cyan")
    grid.line()
    before, after = (size(sum(getattr(s, k) for s in steps)) for k in ("before", "after"))
    grid.row("total", "", f"{len(steps):,}", before, after)
    grid.print(out)
    _print_errors(out, [s for s in steps if not s.why])
    if source.skipped:
        names = shorten(printable(", ".join(source.skipped)), 200)
        out.print(f"skipped, since they are no tensors: {names}")
    written = os.path.getsize(args.output)
    sizes = f"{size(source.nbytes)} -> {size(written)}, {written / source.nbytes:.1%}"
    out.print(f"OK: {printable(args.output)}: {sizes}, in {seconds:.1f} s", style="bold green")


def _print_errors(out: Console, quantized: Sequence[Step]) -> None:
    if not quantized:
        out.print("no tensor was quantized")
        return
    # NaN first: a tensor that holds NaN or infinities, or numbers too large for the type
    ranked = sorted(quantized, key=lambda s: (not math.isnan(s.error), -s.error))
    shown = [s for s in ranked if s.error != 0][:WORST_SHOWN] or ranked[:1]
    mean = math.fsum(s.error for s in quantized) / len(quantized)
    summary = f"relative rms error of {plural(len(quantized), 'tensor')}: mean {_percent(mean)}"
    out.print(f"{summary}; largest:")
    for step in shown:
        out.print(f"  {_percent(step.error):>9}  {printable(step.tensor.name)}")
    out.print()


def _percent(error: float) -> str:
    return f"{error:.3%}" if math.isfinite(error) else str(error)
