# SPDX-License-Identifier: MIT
"""save_gguf and GGUFWriter: version 3 files, complete or not there at all.

The file is written under another name in the same directory and renamed at the end, so a reader
never sees half of it, and a failure leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import secrets
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch

from quantgemm.formats import Bytes, Format, format_by_id, format_by_name
from quantgemm.gguf.errors import shorten
from quantgemm.gguf.metadata import Metadata
from quantgemm.gguf.rules import (
    DEFAULT_ALIGNMENT,
    MAX_TENSORS,
    alignment_problem,
    key_problem,
    name_problem,
    shape_problem,
    tensor_bytes,
)
from quantgemm.gguf.tensor import GGUFTensor, swap_bytes, swaps_bytes
from quantgemm.gguf.values import GGUFValue, encode, infer

VERSION = 3
ALIGNMENT_KEY = "general.alignment"
PLAIN_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
_CHUNK = 64 << 20  # bytes taken to the CPU, or byte-swapped, at a time

# A tensor to save: of a file; plain numbers; or its blocks, uint8 [..., row_bytes], and their type.
Saveable = GGUFTensor | torch.Tensor | tuple[torch.Tensor, int | str | Format]


@dataclass
class _Declared:
    """offset: of the data from the data's start; written: bytes so far."""

    format: Format
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    written: int = 0


def save_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Saveable],
    metadata: Mapping[str, Any] | None = None,
    *,
    alignment: int | None = None,
    byte_order: str = "little",
) -> None:
    """Write a GGUF file in one go; see `GGUFWriter` for the arguments.

    tensors: by name, each a GGUFTensor, a torch tensor of a plain type (float32, float16, bfloat16,
    float64, int8 to int64), or a pair (blocks, type): uint8 [..., row_bytes] and e.g. "Q4_0".
    """
    with GGUFWriter(path, metadata, alignment=alignment, byte_order=byte_order) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, *_describe(name, tensor))
        for name, tensor in tensors.items():
            if isinstance(tensor, GGUFTensor):
                writer.write(name, tensor.blocks)
            else:
                writer.write(name, tensor[0] if isinstance(tensor, tuple) else tensor)


class GGUFWriter:
    """Declare every tensor, then write their data, whole or in pieces, in any order.

        with GGUFWriter("out.gguf", {"general.architecture": "llama"}) as writer:
            writer.declare("a", (4096, 4096), "Q4_0")
            writer.declare("b", (4096,), "F32")
            writer.write("b", bias)
            for rows in quantized_rows:
                writer.write("a", rows)

    metadata: plain values, whose types `values.infer` chooses, or GGUFValue for an exact type; the
    `metadata` of an open file keeps its types. alignment: of the data, default that of metadata or
    32. byte_order: 'little' or 'big'. Leaving the `with` block finishes the file; an exception in
    it leaves no file, and one that was there before untouched.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any] | None = None,
        *,
        alignment: int | None = None,
        byte_order: str = "little",
    ) -> None:
        if byte_order not in ("little", "big"):
            raise ValueError(f"byte_order: expected 'little' or 'big', got {byte_order!r}")
        self.path = Path(path)
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(self.path.parent))
        self.byte_order = byte_order
        self._endian = "<" if byte_order == "little" else ">"
        values = _typed(metadata or {})
        self.alignment = _settle_alignment(values, alignment)
        self._keys = len(values)
        self._metadata = b"".join(_encode_key(*item, self._endian) for item in values.items())
        self._tensors: dict[str, _Declared] = {}
        self._data_bytes = 0
        self._data_start = 0
        self._temporary = self.path.with_name(f".{secrets.token_hex(8)}.gguf.tmp")
        self._file: BinaryIO | None = None
        self._closed = False

    def declare(self, name: str, shape: Sequence[int], qtype: int | str | Format) -> None:
        """Announce a tensor. shape: torch order; qtype: a type's id or name."""
        if self._file is not None or self._closed:
            raise ValueError(f"{shorten(name)}: declare every tensor before writing the first")
        fmt, dims = _as_format(qtype), tuple(map(operator.index, shape))
        problem = name_problem(name) or shape_problem(dims, fmt)
        if name in self._tensors:
            problem = "the tensor is declared twice"
        if len(self._tensors) == MAX_TENSORS:
            problem = f"more than {MAX_TENSORS} tensors"
        if self.byte_order == "big" and not swaps_bytes(fmt):
            problem = f"the layout of {fmt.name} blocks in big-endian files is not defined"
        if problem:
            raise ValueError(f"tensor {shorten(name)}: {problem}")
        declared = _Declared(fmt, dims, tensor_bytes(dims, fmt), self._data_bytes)
        self._tensors[name] = declared
        self._data_bytes = _align(self._data_bytes + declared.nbytes, self.alignment)

    def write(self, name: str, data: torch.Tensor | bytes | bytearray | memoryview) -> None:
        """Append data to a tensor: all of it, or whole blocks that continue what came before.

        data: a torch tensor of the plain type that was declared, or the bytes of blocks as a uint8
        tensor or a bytes-like object, always in little-endian order.
        """
        declared = self._tensors.get(name)
        if declared is None:
            raise ValueError(f"tensor {shorten(name)} was not declared")
        fmt = declared.format
        flat = _flat(name, data, fmt)
        if flat.nbytes % fmt.block_bytes:
            raise ValueError(
                f"tensor {shorten(name)}: {flat.nbytes} bytes, "
                f"expected a multiple of the {fmt.block_bytes} of a {fmt.name} block"
            )
        if declared.written + flat.nbytes > declared.nbytes:
            raise ValueError(
                f"tensor {shorten(name)}: {declared.written + flat.nbytes} bytes, "
                f"expected {declared.nbytes} for {fmt.name} {list(declared.shape)}"
            )
        file = self._begin()
        file.seek(self._data_start + declared.offset + declared.written)
        for piece in _pieces(flat, fmt):
            file.write((swap_bytes(piece, fmt) if self._endian == ">" else piece).data)
            declared.written += piece.nbytes

    def close(self) -> None:
        """Finish the file and give it its name. Every tensor must have been written."""
        if self._closed:
            return
        try:
            for name, declared in self._tensors.items():
                if declared.written != declared.nbytes:
                    raise ValueError(
                        f"tensor {shorten(name)}: {declared.written} bytes were written, "
                        f"expected {declared.nbytes}"
                    )
            file = self._begin()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self.abort()
            raise
        self._closed = True
        _sync_directory(self.path.parent)

    def abort(self) -> None:
        """Drop what was written."""
        self._closed = True
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _begin(self) -> BinaryIO:
        """The temporary file, at first use made at its full size, with all but the data in it."""
        if self._closed:
            raise ValueError(f"{self.path}: the writer was closed")
        if self._file is None:
            head = self._head()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "wb")
            self._file.write(head)
            self._data_start = _align(len(head), self.alignment)
            self._file.truncate(self._data_start + self._data_bytes)
        return self._file

    def _head(self) -> bytes:
        """Header, metadata and tensor infos."""
        head = struct.pack(self._endian + "IQQ", VERSION, len(self._tensors), self._keys)
        infos = [
            _string(name, self._endian)
            + struct.pack(
                f"{self._endian}I{len(declared.shape)}QIQ",
                len(declared.shape),
                *reversed(declared.shape),
                declared.format.type_id,
                declared.offset,
            )
            for name, declared in self._tensors.items()
        ]
        return b"".join([b"GGUF", head, self._metadata, *infos])


def _typed(metadata: Mapping[str, Any]) -> dict[str, GGUFValue]:
    if isinstance(metadata, Metadata):
        return metadata.to_typed_dict()
    values = {}
    for key, value in metadata.items():
        try:
            values[key] = infer(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"metadata {shorten(key)}: {error}") from None
    return values


def _settle_alignment(values: dict[str, GGUFValue], alignment: int | None) -> int:
    """The alignment that argument and metadata agree on; an unusual one goes into the metadata."""
    stored = values.get(ALIGNMENT_KEY)
    if stored is not None and stored.type != "u32":
        raise ValueError(f"metadata {ALIGNMENT_KEY!r}: expected a u32, got {stored.type}")
    if alignment is None:
        alignment = DEFAULT_ALIGNMENT if stored is None else stored.value
    problem = alignment_problem(alignment)
    if problem is None and stored is not None and stored.value != alignment:
        problem = f"got {alignment}, but metadata {ALIGNMENT_KEY!r} is {stored.value}"
    if problem:
        raise ValueError(f"alignment: {problem}")
    if stored is None and alignment != DEFAULT_ALIGNMENT:
        values[ALIGNMENT_KEY] = GGUFValue("u32", alignment)
    return alignment


def _encode_key(key: str, value: GGUFValue, endian: str) -> bytes:
    problem = key_problem(key)
    if key == "split.count" and not (isinstance(value.value, int) and value.value in (0, 1)):
        problem = "files are written in one part: leave out the split.* keys"
    if problem:
        raise ValueError(f"metadata {shorten(key)}: {problem}")
    try:
        return _string(key, endian) + encode(value, endian)
    except (TypeError, ValueError) as error:
        raise type(error)(f"metadata {shorten(key)}: {error}") from None


def _string(text: str, endian: str) -> bytes:
    data = text.encode()
    return struct.pack(endian + "Q", len(data)) + data


def _describe(name: str, tensor: Any) -> tuple[tuple[int, ...], Format]:
    """Shape and type of something to save."""
    if isinstance(tensor, GGUFTensor):
        return tensor.shape, tensor.format
    if isinstance(tensor, tuple) and len(tensor) == 2 and isinstance(tensor[0], torch.Tensor):
        blocks, fmt = tensor[0], _as_format(tensor[1])
        if blocks.dtype != torch.uint8 or blocks.ndim == 0:
            raise TypeError(
                f"tensor {shorten(name)}: expected uint8 blocks [..., row_bytes], "
                f"got {blocks.dtype} {list(blocks.shape)}"
            )
        return (*blocks.shape[:-1], fmt.cols(blocks.shape[-1])), fmt
    if isinstance(tensor, torch.Tensor) and tensor.dtype in PLAIN_DTYPES:
        return tuple(tensor.shape), format_by_name(PLAIN_DTYPES[tensor.dtype])
    what = f"a {tensor.dtype} tensor" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    known = ", ".join(str(dtype).removeprefix("torch.") for dtype in PLAIN_DTYPES)
    raise TypeError(
        f"tensor {shorten(name)}: expected a GGUFTensor, a torch tensor of {known}, "
        f"or a pair (uint8 blocks, type), got {what}"
    )


def _as_format(qtype: int | str | Format) -> Format:
    if isinstance(qtype, Format):
        return qtype
    return format_by_name(qtype) if isinstance(qtype, str) else format_by_id(int(qtype))


def _flat(name: str, data: Any, fmt: Format) -> torch.Tensor | Bytes:
    """data with one dimension: a tensor as it is, anything else as bytes."""
    if isinstance(data, torch.Tensor):
        if data.dtype != torch.uint8 and PLAIN_DTYPES.get(data.dtype) != fmt.name:
            expected = f"a {fmt.name} tensor" if fmt.is_plain else "uint8 blocks"
            raise TypeError(f"tensor {shorten(name)}: expected {expected}, got {data.dtype}")
        return data.detach().reshape(-1)
    if isinstance(data, (bytes, bytearray, memoryview)):
        return np.frombuffer(data, np.uint8)
    raise TypeError(
        f"tensor {shorten(name)}: expected a torch tensor or bytes, got {type(data).__name__}"
    )


def _pieces(flat: torch.Tensor | Bytes, fmt: Format) -> Iterator[Bytes]:
    """The bytes of `flat` on the CPU, a bounded number of whole blocks at a time."""
    step = _CHUNK // fmt.block_bytes * fmt.block_bytes // flat.itemsize
    for start in range(0, len(flat), step):
        piece = flat[start : start + step]
        if isinstance(piece, torch.Tensor):
            piece = piece.cpu().contiguous().view(torch.uint8).numpy()
        yield piece


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _sync_directory(directory: Path) -> None:
    """Make the new name last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
