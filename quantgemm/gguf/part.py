# SPDX-License-Identifier: MIT
"""One GGUF file: header, metadata, tensor infos, and where each tensor's data stands.

In the file: magic, u32 version, counts of tensors and keys, the metadata, the tensor infos, padding
to the alignment, then the data. Every number is checked before it is used; docs/gguf.md lists the
rules.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

from quantgemm.formats import FORMATS, Format
from quantgemm.gguf.cursor import Cursor
from quantgemm.gguf.errors import DAMAGED, TRUNCATED, UNREADABLE_TYPE, GGUFError
from quantgemm.gguf.mapping import MappedFile
from quantgemm.gguf.metadata import Metadata, read_entries
from quantgemm.gguf.rules import (
    DEFAULT_ALIGNMENT,
    MAX_DIMS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    alignment_problem,
    name_problem,
    shape_problem,
    tensor_bytes,
    type_problem,
)
from quantgemm.gguf.tensor import GGUFTensor

MAGIC = b"GGUF"
VERSIONS = (1, 2, 3)

# How files that are often taken for GGUF begin, and what to do with them.
_OTHERS = {
    b"lmgg": "this is an older ggml file: a whisper model opens with open_whisper_bin",
    b"tjgg": "this is a GGJT file, which is older than GGUF: convert it with llama.cpp's scripts",
    b"vers": "this looks like a Git LFS pointer: get the file itself with 'git lfs pull'",
    b"PK\3\4": "this is a zip archive, perhaps a torch checkpoint: convert it to GGUF",
    b"<!DO": "this is a web page: download the file itself",
    b"FUGG": "the magic is byte-swapped, which no version of GGUF does",
}


@dataclass(frozen=True)
class Part:
    """What one file says."""

    file: MappedFile
    version: int
    byte_order: str
    alignment: int
    metadata: Metadata
    tensors: dict[str, GGUFTensor]


class _Info(NamedTuple):
    """A tensor info. at: where it stands in the file; offset: of the data from the data's start."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int
    at: int


def read_part(path: str | os.PathLike[str]) -> Part:
    """Read and check everything but the tensors' data."""
    file = MappedFile(path)
    cursor, version = _read_start(file)
    n_tensors, n_keys = cursor.read(2 * cursor.count, "the counts of tensors and keys")
    metadata = Metadata(file, cursor.endian, cursor.count, read_entries(cursor, n_keys))
    alignment = _alignment(metadata, cursor)
    infos = _read_infos(cursor, n_tensors)
    byte_order = "big" if cursor.endian == ">" else "little"
    tensors = _place(cursor, infos, alignment, byte_order)
    return Part(file, version, byte_order, alignment, metadata, tensors)


def _read_start(file: MappedFile) -> tuple[Cursor, int]:
    """Magic and version. The version tells the byte order: its high half is zero the right way."""
    magic = bytes(file.view[:4])
    if magic != MAGIC:
        raise GGUFError(
            f"not a GGUF file: it begins with {magic!r}, expected {MAGIC!r}",
            path=file.path,
            offset=0,
            suggestion=_OTHERS.get(magic, DAMAGED),
        )
    cursor = Cursor(file, len(MAGIC))
    (version,) = cursor.read("I", "the version")
    if version and version & 0xFFFF == 0:
        cursor = Cursor(file, len(MAGIC), ">")
        (version,) = cursor.read("I", "the version")
    if version not in VERSIONS:
        raise cursor.error(
            f"GGUF version {version}, expected one of {', '.join(map(str, VERSIONS))}",
            len(MAGIC),
            "a newer version of quantgemm may know it" if 3 < version < 100 else DAMAGED,
        )
    if version == 1:
        cursor.count = "I"
    return cursor, version


def _alignment(metadata: Metadata, cursor: Cursor) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    kind = metadata.type_of(key)
    problem = alignment_problem(metadata[key]) if kind == "u32" else f"expected a u32, got {kind}"
    cursor.key = key
    cursor.refuse(problem, metadata.offset_of(key))
    cursor.key = None
    return int(metadata[key])


def _read_infos(cursor: Cursor, count: int) -> list[_Info]:
    """Name, dimensions (fastest first), type and offset of each tensor."""
    start = cursor.pos
    smallest = (4 if cursor.count == "I" else 8) + 4 + 4 + 8  # empty name, no dimensions
    if count > cursor.left // smallest:
        problem = f"{count} tensor infos need at least {count * smallest} bytes"
        raise cursor.truncated(problem, start)
    if count > MAX_TENSORS:
        raise cursor.error(f"{count} tensors, expected at most {MAX_TENSORS}", start)
    infos, seen = [], set()
    for _ in range(count):
        info = _read_info(cursor)
        if info.name in seen:
            raise cursor.error("the tensor occurs twice", info.at)
        seen.add(info.name)
        infos.append(info)
    cursor.tensor = None
    return infos


def _read_info(cursor: Cursor) -> _Info:
    cursor.tensor, at = None, cursor.pos
    raw = cursor.string("a tensor's name", MAX_NAME_BYTES)
    cursor.tensor = name = raw.decode("utf-8", "surrogateescape")
    cursor.refuse(name_problem(name), at)
    (n_dims,) = cursor.read("I", "the number of dimensions")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"{n_dims} dimensions, expected at most {MAX_DIMS}", at)
    dims = cursor.read(n_dims * cursor.count, "the dimensions")
    type_id, offset = cursor.read("IQ", "type and offset")
    cursor.refuse(type_problem(type_id), at, UNREADABLE_TYPE)
    fmt, shape = FORMATS[type_id], dims[::-1]
    cursor.refuse(shape_problem(shape, fmt), at)
    return _Info(name, fmt, shape, offset, at)


def _place(
    cursor: Cursor, infos: list[_Info], alignment: int, byte_order: str
) -> dict[str, GGUFTensor]:
    """Check that each tensor's data is aligned, inside the file, and its alone."""
    data_start = align_up(cursor.pos, alignment)
    tensors: dict[str, GGUFTensor] = {}
    for name, fmt, shape, offset, at in infos:
        cursor.tensor = name
        size, start = tensor_bytes(shape, fmt), data_start + offset
        if offset % alignment:
            raise cursor.error(f"data offset {offset}, expected a multiple of {alignment}", at)
        if size and start + size > cursor.size:
            problem = f"data of {size} bytes ends at byte {start + size}"
            problem += f", but the file has {cursor.size} bytes"
            raise cursor.error(problem, at, TRUNCATED)
        tensors[name] = GGUFTensor(name, fmt, shape, cursor.file, start, byte_order)
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: info.offset):
        size = tensors[info.name].nbytes
        if size and info.offset < end:
            cursor.tensor = info.name
            raise cursor.error(f"the data overlaps that of tensor {before!r}", info.at)
        if size:
            end, before = info.offset + size, info.name
    return tensors


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
