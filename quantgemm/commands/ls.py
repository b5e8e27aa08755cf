# SPDX-License-Identifier: MIT
"""`quantgemm ls`: the metadata and the tensors of a file."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from quantgemm.commands.files import open_model
from quantgemm.commands.output import Grid, console, plural, printable, shorten, size
from quantgemm.gguf import GGUFFile, GGUFTensor, WhisperBin

MAX_ITEMS = 8  # of an array, unless --full
MAX_TEXT = 70  # characters of a value in the table, unless --full

DESCRIPTION = """\
Print what a file holds: metadata, every tensor with its type, shape and size, and totals by
type. Reads GGUF (versions 1 to 3, either byte order, any part of a split file) and the older
whisper.cpp .bin files; which one it is, the first bytes tell. No tensor is decoded, so this is
quick for files of any size.
"""
EPILOG = f"""\
--json prints one object: format, version, byte_order, alignment, files, file_bytes; metadata, by
key {{type, value}}; tensors, a list of {{name, type, type_id, shape (slowest dimension first),
weights, bytes, bits_per_weight, offset}}; types, by type {{tensors, weights, bytes,
bits_per_weight}}; total, likewise. An array has a count too, and only its first {MAX_ITEMS} items
unless --full is given. Numbers that JSON has no form for are the strings "nan", "inf", "-inf".

examples:
  quantgemm ls model.gguf
  quantgemm ls model-00002-of-00005.gguf
  quantgemm ls --json model.gguf | jq '.types'
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "ls",
        help="metadata and tensors of a file",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="a GGUF file or a whisper .bin")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--full", action="store_true", help="do not shorten arrays and long texts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    listing = describe(open_model(args.file), None if args.full else MAX_ITEMS)
    if args.json:
        print(json.dumps(listing, indent=2, allow_nan=False))
    else:
        print_listing(listing, args.full, console())
    return 0


# ------------------------------------------------------------------------------ what is there


def describe(model: GGUFFile | WhisperBin, max_items: int | None = MAX_ITEMS) -> dict[str, Any]:
    """What `--json` prints."""
    tensors = list(model.tensors.values())
    types: dict[str, list[GGUFTensor]] = {}
    for tensor in tensors:
        types.setdefault(tensor.format.name, []).append(tensor)
    return {
        **_container(model, max_items),
        "tensors": [_tensor(tensor) for tensor in tensors],
        "types": {name: _total(group) for name, group in types.items()},
        "total": _total(tensors),
    }


def _container(model: GGUFFile | WhisperBin, max_items: int | None) -> dict[str, Any]:
    if isinstance(model, GGUFFile):
        values = [(k, model.metadata.typed(k)) for k in model.metadata]
        metadata = {k: _value(v.type, v.plain(), max_items) for k, v in values}
        head: dict[str, Any] = {"format": "gguf", "version": model.version}
        head |= {"byte_order": model.byte_order, "alignment": model.alignment}
        paths: tuple[Path, ...] = model.paths
    else:
        tokens = [token.decode("utf-8", "backslashreplace") for token in model.vocab]
        metadata = {k: {"type": "i32", "value": v} for k, v in model.hparams.items()}
        mel = _value("arr[f32]", model.mel_filters.flatten().tolist(), max_items)
        metadata["mel_filters"] = {**mel, "shape": list(model.mel_filters.shape)}
        metadata["vocab"] = _value("arr[str]", tokens, max_items)
        head = {"format": "whisper", "version": None, "byte_order": "little", "alignment": 1}
        paths = (model.path,)
    file_bytes = sum(path.stat().st_size for path in paths)
    return {**head, "files": list(map(str, paths)), "file_bytes": file_bytes, "metadata": metadata}


def _value(kind: str, value: Any, max_items: int | None) -> dict[str, Any]:
    if not isinstance(value, list):
        return {"type": kind, "value": _plain(value, max_items)}
    return {"type": kind, "count": len(value), "value": _plain(value, max_items)}


def _plain(value: Any, max_items: int | None) -> Any:
    """The value as JSON can have it."""
    if isinstance(value, list):
        return [_plain(item, max_items) for item in value[:max_items]]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _tensor(tensor: GGUFTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "type": tensor.format.name,
        "type_id": tensor.qtype,
        "shape": list(tensor.shape),
        "weights": math.prod(tensor.shape),
        "bytes": tensor.nbytes,
        "bits_per_weight": tensor.format.bits_per_weight,
        "offset": tensor.offset,
    }


def _total(tensors: Iterable[GGUFTensor]) -> dict[str, Any]:
    sizes = [(math.prod(tensor.shape), tensor.nbytes) for tensor in tensors]
    weights, nbytes = sum(w for w, _ in sizes), sum(b for _, b in sizes)
    bits = 8 * nbytes / weights if weights else 0.0
    total = {"tensors": len(sizes), "weights": weights, "bytes": nbytes}
    return {**total, "bits_per_weight": round(bits, 4)}


# ------------------------------------------------------------------------------ as tables


def print_listing(listing: dict[str, Any], full: bool, out: Console) -> None:
    """Print what `describe` found."""
    for path in listing["files"]:
        out.print(printable(path), style="bold")
    kind = "whisper .bin"
    if listing["format"] == "gguf":
        kind = f"GGUF version {listing['version']}, {listing['byte_order']}-endian"
        kind += f", aligned to {listing['alignment']} bytes"
    out.print(f"{kind}, {size(listing['file_bytes'])} in {plural(len(listing['files']), 'file')}\n")

    metadata = Grid(plural(len(listing["metadata"]), "metadata key"), "key", "type", "value")
    for key, entry in listing["metadata"].items():
        metadata.row(key, entry["type"], _shown(entry, None if full else MAX_TEXT))
    metadata.print(out)

    columns = ("name", "type", "shape", ">size", ">bits/weight")
    tensors = Grid(plural(len(listing["tensors"]), "tensor"), *columns)
    for t in listing["tensors"]:
        sizes = (size(t["bytes"]), f"{t['bits_per_weight']:.4g}")
        tensors.row(t["name"], t["type"], t["shape"], *sizes, style=_style(t["type"]))
    tensors.print(out)

    types = Grid("by type", "type", ">tensors", ">weights", ">size", ">bits/weight")
    for name, total in (*listing["types"].items(), ("total", listing["total"])):
        if name == "total":
            types.line()
        cells = (f"{total['tensors']:,}", f"{total['weights']:,}", size(total["bytes"]))
        types.row(name, *cells, f"{total['bits_per_weight']:.4g}", style=_style(name))
    types.print(out)


def _style(type_name: str) -> str:
    plain = type_name in ("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64", "total")
    return "" if plain else "cyan"


def _shown(entry: dict[str, Any], limit: int | None) -> str:
    value, kind = entry["value"], entry["type"]
    if kind.startswith("arr"):
        hidden = entry["count"] - len(value)
        text = json.dumps(value, ensure_ascii=False)
        if hidden:
            text = shorten(text[:-1], 50) + f", ...] ({entry['count']:,} items)"
    elif kind == "f32" and isinstance(value, float):
        return f"{value:.8g}"
    else:
        text = str(value)
    text = printable(text)
    return text if limit is None else shorten(text, limit)
