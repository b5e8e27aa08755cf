# SPDX-License-Identifier: MIT
"""A position in a mapped file, and reads that first check that the bytes are there."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

from quantgemm.gguf.errors import DAMAGED, TRUNCATED, GGUFError
from quantgemm.gguf.mapping import MappedFile


@lru_cache(maxsize=64)
def layout(code: str) -> struct.Struct:
    return struct.Struct(code)


class Cursor:
    """endian: '<' or '>'; count: the struct code of lengths and counts, 'Q', or 'I' in version 1.

    While a record is read, `tensor` or `key` holds its name for the text of errors.
    """

    def __init__(self, file: MappedFile, pos: int = 0, endian: str = "<", count: str = "Q") -> None:
        self.file, self.view, self.size = file, file.view, file.size
        self.pos, self.endian, self.count = pos, endian, count
        self.tensor: str | None = None
        self.key: str | None = None

    @property
    def left(self) -> int:
        return self.size - self.pos

    def read(self, code: str, what: str) -> tuple[Any, ...]:
        """The numbers that struct code `code` describes."""
        fmt, start = layout(self.endian + code), self.pos
        self.pos += fmt.size
        if self.pos > self.size:
            raise self.truncated(f"{what} needs {fmt.size} bytes", start)
        return fmt.unpack_from(self.view, start)

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes; returns where they start."""
        start = self.pos
        if size > self.size - start:
            raise self.truncated(f"{what} needs {size} bytes", start)
        self.pos = start + size
        return start

    def string(self, what: str, limit: int) -> bytes:
        """A length and as many bytes; `limit` is what the format allows."""
        start = self.pos
        (size,) = self.read(self.count, f"the length of {what}")
        if size > limit and size <= self.left:
            raise self.error(f"{what} has {size} bytes, expected at most {limit}", start)
        begin = self.take(size, what)
        return bytes(self.view[begin : self.pos])

    def truncated(self, problem: str, at: int) -> GGUFError:
        left = max(0, self.size - at)
        problem = f"{problem}, but only {left} are left of the file's {self.size} bytes"
        return self.error(problem, at, TRUNCATED)

    def refuse(self, problem: str | None, at: int, suggestion: str = DAMAGED) -> None:
        """Raise if there is a problem."""
        if problem:
            raise self.error(problem, at, suggestion)

    def error(self, problem: str, at: int, suggestion: str = DAMAGED) -> GGUFError:
        return GGUFError(
            problem,
            path=self.file.path,
            offset=at,
            tensor=self.tensor,
            key=self.key,
            suggestion=suggestion,
        )
