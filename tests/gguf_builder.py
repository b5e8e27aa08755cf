# SPDX-License-Identifier: MIT
"""GGUF and whisper files packed by hand, valid or not: every count and offset can be overridden."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
CODES |= {U64: "Q", I64: "q", F64: "d"}


@dataclass
class Packer:
    """The bytes of values in one version and byte order."""

    version: int = 3
    endian: str = "<"

    @property
    def count(self) -> str:
        return "I" if self.version == 1 else "Q"

    def pack(self, code: str, *values: Any) -> bytes:
        return struct.pack(self.endian + code, *values)

    def string(self, text: str | bytes, size: int | None = None) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return self.pack(self.count, len(data) if size is None else size) + data

    def value(self, kind: int, value: Any) -> bytes:
        return self.string(value) if kind == STR else self.pack(CODES[kind], value)

    def array(self, item: int, items: Sequence[Any], count: int | None = None) -> bytes:
        """items: values, or for ARR the packed inner arrays."""
        packed = items if item == ARR else [self.value(item, i) for i in items]
        return self.pack("I" + self.count, item, len(items) if count is None else count) + (
            b"".join(packed)
        )

    def key(self, name: str | bytes, kind: int, value: Any) -> bytes:
        """value: a number or str; for ARR and kinds that do not exist, bytes."""
        packed = value if isinstance(value, bytes) and kind != STR else self.value(kind, value)
        return self.string(name) + self.pack("I", kind) + packed

    def info(
        self, name: str | bytes, dims: Sequence[int], kind: int, offset: int, n_dims: int = -1
    ) -> bytes:
        """dims: as in the file, fastest first."""
        n_dims = len(dims) if n_dims < 0 else n_dims
        head = self.string(name) + self.pack("I", n_dims)
        return head + self.pack(f"{len(dims)}{self.count}IQ", *dims, kind, offset)


@dataclass
class Builder:
    """A file from its parts: `keys` and `infos` are packed, `data` is what follows the padding."""

    version: int = 3
    endian: str = "<"
    alignment: int = 32
    keys: list[bytes] = field(default_factory=list)
    infos: list[bytes] = field(default_factory=list)
    data: bytes = b""
    n_keys: int | None = None
    n_tensors: int | None = None
    magic: bytes = b"GGUF"

    @property
    def pack(self) -> Packer:
        return Packer(self.version, self.endian)

    def key(self, name: str | bytes, kind: int, value: Any) -> Builder:
        self.keys.append(self.pack.key(name, kind, value))
        return self

    def tensor(self, name: str | bytes, dims: Sequence[int], kind: int, data: bytes) -> Builder:
        """A tensor at the next aligned place; the last one's padding is left out."""
        self.data += bytes(-len(self.data) % self.alignment)
        self.infos.append(self.pack.info(name, dims, kind, len(self.data)))
        self.data += data
        return self

    def info(
        self, name: str | bytes, dims: Sequence[int], kind: int, offset: int, n_dims: int = -1
    ) -> Builder:
        self.infos.append(self.pack.info(name, dims, kind, offset, n_dims))
        return self

    def build(self) -> bytes:
        n_tensors = len(self.infos) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        head = self.magic + self.pack.pack(f"I2{self.pack.count}", self.version, n_tensors, n_keys)
        head += b"".join(self.keys + self.infos)
        if not self.infos and not self.data:
            return head
        return head + bytes(-len(head) % self.alignment) + self.data


# One of each value type: key, type number, value, the name quantgemm gives the type.
SCALARS = [
    ("t.u8", U8, 200, "u8"),
    ("t.i8", I8, -100, "i8"),
    ("t.u16", U16, 60000, "u16"),
    ("t.i16", I16, -30000, "i16"),
    ("t.u32", U32, 4_000_000_000, "u32"),
    ("t.i32", I32, -2_000_000_000, "i32"),
    ("t.f32", F32, -1.5, "f32"),
    ("t.bool", BOOL, True, "bool"),
    ("t.str", STR, "héllo ✓\0", "str"),
    ("t.u64", U64, 2**63 + 5, "u64"),
    ("t.i64", I64, -(2**62), "i64"),
    ("t.f64", F64, 3.141592653589793, "f64"),
]


def every_value(version: int = 3, endian: str = "<") -> Builder:
    """A file with a scalar, an array and an empty array of every type, and nested arrays."""
    file = Builder(version, endian)
    pack = file.pack
    for name, kind, value, _ in SCALARS:
        file.key(name, kind, value)
        file.key(f"{name}.arr", ARR, pack.array(kind, [value, value, value]))
        file.key(f"{name}.empty", ARR, pack.array(kind, []))
    inner = [pack.array(I32, [1, 2]), pack.array(STR, ["a", ""]), pack.array(ARR, [])]
    file.key("t.nested", ARR, pack.array(ARR, [*inner, pack.array(ARR, inner)]))
    return file


@dataclass
class Whisper:
    """A whisper .bin from its parts."""

    hparams: Sequence[int] = (3, 16, 64, 4, 1, 8, 64, 4, 1, 2, 2002)
    mel: tuple[int, int] = (2, 3)
    filters: Sequence[float] = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    tokens: Sequence[bytes] = (b"a", b"", b"\xff\xfe")
    n_tokens: int | None = None
    records: list[bytes] = field(default_factory=list)
    magic: bytes = b"lmgg"

    def record(
        self,
        name: bytes,
        dims: Sequence[int],
        kind: int,
        data: bytes,
        n_dims: int | None = None,
        name_len: int | None = None,
    ) -> Whisper:
        n_dims = len(dims) if n_dims is None else n_dims
        name_len = len(name) if name_len is None else name_len
        head = struct.pack(f"<{3 + len(dims)}i", n_dims, name_len, kind, *dims)
        self.records.append(head + name + data)
        return self

    def build(self) -> bytes:
        n_tokens = len(self.tokens) if self.n_tokens is None else self.n_tokens
        return b"".join(
            [
                self.magic,
                struct.pack("<11i", *self.hparams),
                struct.pack("<2i", *self.mel),
                struct.pack(f"<{len(self.filters)}f", *self.filters),
                struct.pack("<i", n_tokens),
                *(struct.pack("<I", len(token)) + token for token in self.tokens),
                *self.records,
            ]
        )
