# SPDX-License-Identifier: MIT
"""read_ctranslate2: the numbers of a CTranslate2 `model.bin`, as views of the mapped file.

In the file, all little-endian: u32 binary version; the model's kind, a string; u32 revision; u32
count and as many variables: name, a string; u8 rank and u32 dimensions, slowest first; u8 type; u32
bytes; the data. Then u32 count and as many aliases: two strings, the other name and the name. A
string is a u16 length and as many bytes, the last of which is NUL. Nothing is aligned.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from quantgemm.gguf.cursor import Cursor
from quantgemm.gguf.mapping import MappedFile

BINARY_VERSION = 6
MAX_VARIABLES = 65_536
MAX_DIMS = 4
DTYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}


@dataclass(frozen=True)
class CTranslate2File:
    """kind: such as ``WhisperSpec``; variables: by name, aliases included, on the CPU."""

    kind: str
    variables: dict[str, torch.Tensor]


def read_ctranslate2(path: str | os.PathLike[str]) -> CTranslate2File:
    """Raises GGUFError, as all readers here do, for a malformed file."""
    file = MappedFile(path)
    cursor = Cursor(file, count="H")
    (version,) = cursor.read("I", "the binary version")
    if version != BINARY_VERSION:
        problem = f"not a CTranslate2 model of binary version {BINARY_VERSION}: it begins with"
        raise cursor.error(f"{problem} {version}", 0, "convert the model again")
    kind = _string(cursor, "the kind of the model")
    _, count = cursor.read("2I", "revision and count of variables")
    if count > MAX_VARIABLES:
        raise cursor.error(f"{count} variables, expected at most {MAX_VARIABLES}", cursor.pos - 4)
    variables: dict[str, torch.Tensor] = {}
    for _ in range(count):
        at = cursor.pos
        name = _string(cursor, "a variable's name")
        cursor.tensor = name
        if name in variables:
            raise cursor.error("the variable occurs twice", at)
        variables[name] = _variable(cursor)
        cursor.tensor = None
    for _ in range(cursor.read("I", "the count of aliases")[0]):
        at = cursor.pos
        alias, name = (_string(cursor, "an alias") for _ in range(2))
        if name not in variables:
            raise cursor.error(f"an alias of {name!r}, which does not exist", at)
        variables[alias] = variables[name]
    return CTranslate2File(kind, variables)


def _string(cursor: Cursor, what: str) -> str:
    return cursor.string(what, 0xFFFF).rstrip(b"\0").decode("utf-8", "surrogateescape")


def _variable(cursor: Cursor) -> torch.Tensor:
    at = cursor.pos
    (rank,) = cursor.read("B", "a variable's rank")
    if rank > MAX_DIMS:
        raise cursor.error(f"{rank} dimensions, expected at most {MAX_DIMS}", at)
    shape = cursor.read(f"{rank}I", "a variable's dimensions")
    type_id, size = cursor.read("BI", "a variable's type and size")
    if type_id not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise cursor.error(f"type {type_id}, expected one of {known}", cursor.pos - 5)
    dtype = DTYPES[type_id]
    if size != math.prod(shape) * dtype.itemsize:
        problem = f"{size} bytes, expected {math.prod(shape) * dtype.itemsize} for {dtype}"
        raise cursor.error(f"{problem} {list(shape)}", cursor.pos - 4)
    start = cursor.take(size, "data")
    data: np.ndarray[tuple[int], np.dtype[np.uint8]] = cursor.file.array[start : start + size]
    if start % dtype.itemsize:  # torch reads numbers at multiples of their size only
        data = data.copy()
    return torch.from_numpy(data).view(dtype).reshape(shape)
