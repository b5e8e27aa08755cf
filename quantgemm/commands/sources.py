# SPDX-License-Identifier: MIT
"""What `quantize` reads, opened by content: name, type and shape of every tensor, data on demand.

Data always comes as GGUF rows, uint8 [..., row_bytes] of `format`: numbers are such rows too. Types
that GGUF does not have become the smallest one that holds them exactly (see WIDENED).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from quantgemm.commands.files import WHISPER_MAGIC, first_bytes
from quantgemm.commands.output import CommandError, one_line
from quantgemm.commands.output import shorten as shorten_text
from quantgemm.formats import Format, format_by_name
from quantgemm.gguf import GGUFTensor, GGUFValue, open_gguf
from quantgemm.gguf.errors import shorten
from quantgemm.models.whisper_file import ARCHITECTURE as WHISPER
from quantgemm.models.whisper_file import KEEP_PLAIN, file_name
from quantgemm.models.whisper_sources import (
    HEAD,
    WhisperSource,
    from_bin,
    is_whisper_folder,
    open_folder,
)

PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
WIDENED = {
    torch.bool: "I8",
    torch.uint8: "I16",
    torch.float8_e4m3fn: "F16",
    torch.float8_e5m2: "F16",
}
# safetensors' names, where they are not those of GGUF
SAFETENSORS_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NESTED = ("state_dict", "model")  # keys under which training scripts put the weights


@dataclass(frozen=True)
class SourceTensor:
    """shape: torch order; load: the data, uint8 [..., row_bytes] on the CPU."""

    name: str
    shape: tuple[int, ...]
    format: Format
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Source:
    """kind: for messages; nbytes: of the files; skipped: entries that are no tensors.

    needed: globs of tensors that the kind of model has as numbers whatever the others are.
    """

    kind: str
    nbytes: int
    tensors: list[SourceTensor]
    metadata: dict[str, GGUFValue] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    needed: tuple[str, ...] = ()


def open_source(path: str) -> Source:
    """A GGUF, a safetensors file or the index of several, a torch state dict, or a Whisper."""
    if is_whisper_folder(Path(path)):
        return _whisper(open_folder(Path(path)))
    start = first_bytes(path, 16)
    if start[:4] == b"GGUF":
        return _open_gguf(path)
    if start[:4] == WHISPER_MAGIC:
        return _whisper(from_bin(path))
    if path.endswith(".index.json"):
        return _open_index(path)
    if start[8:9] == b"{":
        return _source("safetensors", [path], _safetensors(path))
    if start[:4] == b"PK\3\4" or start[:1] == b"\x80":
        return _open_state_dict(path, mmap=start[:2] == b"PK")
    expected = "GGUF, safetensors (or its .index.json) or a torch state dict"
    raise CommandError(f"{path}: expected {expected}, got a file that begins with {start[:4]!r}")


def _source(kind: str, paths: list[str], tensors: list[SourceTensor]) -> Source:
    return Source(kind, sum(os.path.getsize(path) for path in paths), tensors)


def _open_gguf(path: str) -> Source:
    file = open_gguf(path)
    tensors = [
        SourceTensor(t.name, t.shape, t.format, partial(_blocks, t)) for t in file.tensors.values()
    ]
    nbytes = sum(part.stat().st_size for part in file.paths)
    keys = file.metadata.to_typed_dict()
    needed = KEEP_PLAIN if file.metadata.get("general.architecture") == WHISPER else ()
    return Source("GGUF", nbytes, tensors, keys, needed=needed)


def _whisper(source: WhisperSource) -> Source:
    tensors = []
    for name, tensor in source.tensors.items():
        if isinstance(tensor, GGUFTensor):
            fmt, load = tensor.format, partial(_blocks, tensor)
        else:
            fmt = _format(str(source.paths[0]), name, tensor.dtype, str(tensor.dtype))
            load = partial(_rows, tensor, fmt)
        tensors.append(SourceTensor(name, tuple(tensor.shape), fmt, load))
    if source.is_safetensors:
        found = [t for path in source.paths for t in _safetensors(str(path)) if t.name != HEAD]
        tensors = [replace(tensor, name=file_name(tensor.name)) for tensor in found]
    nbytes = sum(path.stat().st_size for path in source.paths)
    return Source(source.kind, nbytes, tensors, source.keys, needed=KEEP_PLAIN)


def _blocks(tensor: GGUFTensor) -> torch.Tensor:
    return tensor.blocks


# ------------------------------------------------------------------------------ safetensors


def _safetensors(path: str) -> list[SourceTensor]:
    try:
        file: Any = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise CommandError(f"{path}: not a sound safetensors file: {one_line(error)}") from None
    tensors = []
    for name, part in slices.items():
        stored = part.get_dtype()
        dtype = PLAIN.get(stored) or SAFETENSORS_TYPES.get(stored)
        fmt = _format(path, name, dtype, stored)
        load = partial(_load_safetensor, file, name, fmt)
        tensors.append(SourceTensor(name, tuple(part.get_shape()), fmt, load))
    return tensors


def _load_safetensor(file: Any, name: str, fmt: Format) -> torch.Tensor:
    return _rows(file.get_tensor(name), fmt)


def _open_index(path: str) -> Source:
    """`model.safetensors.index.json`: {"weight_map": {tensor: file in the same folder}}."""
    try:
        with open(path, encoding="utf-8") as text:
            names = list(dict.fromkeys(json.load(text)["weight_map"].values()))
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("a file name of the weight_map is not a plain name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise CommandError(f"{path}: not an index of safetensors files: {reason}") from None
    paths = [str(Path(path).with_name(name)) for name in names]
    tensors = [tensor for part in paths for tensor in _safetensors(part)]
    return _source("safetensors", paths, tensors)


# ------------------------------------------------------------------------------ torch


def _open_state_dict(path: str, mmap: bool) -> Source:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise CommandError(
            f"{path}: expected a state dict of tensors and plain values, got other objects, "
            "which are not loaded since that could run code"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = shorten_text(one_line(error), 120)
        raise CommandError(f"{path}: not a sound torch file: {reason}") from None
    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CommandError(f"{path}: expected a state dict, got a {type(loaded).__name__}")
    tensors, skipped = [], []
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            skipped.append(f"{name} ({type(value).__name__})")
            continue
        if value.layout != torch.strided:
            problem = f"expected a dense tensor, got {value.layout}"
            raise CommandError(f"{path}: tensor {shorten(name)}: {problem}")
        fmt = _format(path, name, value.dtype, str(value.dtype).removeprefix("torch."))
        load = partial(_rows, value, fmt)
        tensors.append(SourceTensor(name, tuple(value.shape), fmt, load))
    return Source("torch", os.path.getsize(path), tensors, skipped=skipped)


# ------------------------------------------------------------------------------ numbers as rows


def _format(path: str, name: str, dtype: torch.dtype | None, shown: str) -> Format:
    for plain, known in PLAIN.items():
        if dtype == known:
            return format_by_name(plain)
    if dtype is not None and dtype in WIDENED:
        return format_by_name(WIDENED[dtype])
    accepted = ", ".join(str(d).removeprefix("torch.") for d in (*PLAIN.values(), *WIDENED))
    problem = f"expected one of {accepted}, got {shown}"
    raise CommandError(f"{path}: tensor {shorten(name)}: {problem}")


def _rows(values: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Numbers of a plain type as uint8 [..., row_bytes]; a scalar is a row of one."""
    exact = values.detach().to(PLAIN[fmt.name]).contiguous()
    return (exact if exact.ndim else exact.reshape(1)).view(torch.uint8)
