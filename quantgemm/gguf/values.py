# SPDX-License-Identifier: MIT
"""Metadata values: the types GGUF has, and how a value is written.

A type is a short string: 'u8' 'i8' 'u16' 'i16' 'u32' 'i32' 'f32' 'bool' 'str' 'u64' 'i64' 'f64', or
'arr[...]' of one of them, or 'arr[arr]': an array of arrays, each with an item type of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantgemm.gguf.rules import MAX_DEPTH

# Index = the number that stands for the type in a file.
TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")
BOOL, STR, ARR = 7, 8, 9
CODES = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # for struct
WIDTHS = tuple(struct.calcsize("<" + code) for code in CODES)  # bytes; 0 where lengths vary
VALUE_TYPES = frozenset(t for t in TYPES if t != "arr") | frozenset(f"arr[{t}]" for t in TYPES)

_INTEGERS = {"u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"}
_RANGES = {
    f"{'u' if low == 0 else 'i'}{bits}": (low, high)
    for bits in (8, 16, 32, 64)
    for low, high in ((0, 2**bits - 1), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))
}


@dataclass(frozen=True)
class GGUFValue:
    """A metadata value with its exact type, for example GGUFValue("u16", 3).

    For 'arr[arr]' the value is a list of GGUFValue, one for each inner array.
    """

    type: str
    value: Any

    def __post_init__(self) -> None:
        if self.type not in VALUE_TYPES:
            known = ", ".join(t for t in TYPES if t != "arr")
            raise ValueError(
                f"unknown metadata type {self.type!r}; known: {known}, and arr[...] of these or arr"
            )

    def plain(self) -> Any:
        """The value in ordinary Python types: nested arrays become lists of lists."""
        if self.type == "arr[arr]":
            return [inner.plain() for inner in self.value]
        return self.value


def infer(value: Any) -> GGUFValue:
    """Give a plain Python value the type that files usually have for it.

    int: u32, i32, u64 or i64 (the first that holds it); float: f32; bool; str (or its bytes).
    Lists: bool; str; i32, u32, i64 or u64 (the first that holds every item); f32 (also for ints
    mixed with floats); lists of lists. numpy scalars and one-dimensional arrays keep their type.
    """
    if isinstance(value, GGUFValue):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return _infer_numpy(value)
    if isinstance(value, bool):
        return GGUFValue("bool", value)
    if isinstance(value, int):
        return GGUFValue(_fitting([value], ("u32", "i32", "u64", "i64")), value)
    if isinstance(value, float):
        return GGUFValue("f32", value)
    if isinstance(value, (str, bytes)):
        return GGUFValue("str", value)
    if isinstance(value, (list, tuple)):
        return _infer_list(value)
    known = "bool, int, float, str, a list of these or a GGUFValue"
    raise TypeError(f"expected {known}, got {type(value).__name__}")


def _infer_list(items: Sequence[Any]) -> GGUFValue:
    kinds = {type(item) for item in items}
    if not kinds:
        example = 'GGUFValue("arr[str]", [])'
        raise ValueError(f"an empty list has no item type: give one, as in {example}")
    if kinds == {bool}:
        return GGUFValue("arr[bool]", items)
    if kinds == {int}:
        return GGUFValue(f"arr[{_fitting(items, ('i32', 'u32', 'i64', 'u64'))}]", items)
    if kinds <= {int, float}:
        return GGUFValue("arr[f32]", [float(item) for item in items])
    if kinds <= {str, bytes}:
        return GGUFValue("arr[str]", items)
    nested = [infer(item) for item in items]
    if all(inner.type.startswith("arr") for inner in nested):
        return GGUFValue("arr[arr]", nested)
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(f"the items of a list must have one type, got {names}")


def _infer_numpy(value: Any) -> GGUFValue:
    kind, width = value.dtype.kind, 8 * value.dtype.itemsize
    name = "bool" if kind == "b" else f"{kind}{width}"
    if name not in TYPES or value.ndim > 1:
        raise TypeError(f"no metadata type for numpy {value.dtype} with {value.ndim} dimensions")
    plain = value.tolist()
    return GGUFValue(f"arr[{name}]" if value.ndim else name, plain)


def _fitting(items: Sequence[int], candidates: Iterable[str]) -> str:
    smallest, largest = min(items), max(items)
    for name in candidates:
        low, high = _RANGES[name]
        if low <= smallest and largest <= high:
            return name
    raise ValueError(f"integers from {smallest} to {largest} do not fit in 64 bits")


def encode(value: GGUFValue, endian: str, depth: int = 0) -> bytes:
    """Type number and value as a version 3 file holds them; endian: '<' or '>'."""
    if not value.type.startswith("arr"):
        number = TYPES.index(value.type)
        return struct.pack(endian + "I", number) + _encode_item(value.type, value.value, endian)
    if depth == MAX_DEPTH:
        raise ValueError(f"arrays are nested more than {MAX_DEPTH} deep")
    if isinstance(value.value, (str, bytes)):
        raise TypeError(f"expected a list for {value.type}, got {type(value.value).__name__}")
    item_type = value.type[4:-1]
    items = list(value.value)
    header = struct.pack(endian + "IIQ", ARR, TYPES.index(item_type), len(items))
    if item_type == "arr":
        # An inner array is written without its own type number: that it is one is known.
        inner = (encode(_inner(item), endian, depth + 1)[4:] for item in items)
        return header + b"".join(inner)
    if item_type in ("str", "bool"):
        return header + b"".join(_encode_item(item_type, item, endian) for item in items)
    return header + _encode_numbers(item_type, items, endian)


def _inner(item: Any) -> GGUFValue:
    value = infer(item)
    if not value.type.startswith("arr"):
        raise TypeError(f"expected an array in an array of arrays, got {value.type}")
    return value


def _encode_item(kind: str, item: Any, endian: str) -> bytes:
    if kind == "str":
        if not isinstance(item, (str, bytes)):
            raise TypeError(f"expected str, got {type(item).__name__}")
        data = item.encode("utf-8", "surrogateescape") if isinstance(item, str) else item
        return struct.pack(endian + "Q", len(data)) + data
    if kind == "bool":
        if not isinstance(item, (bool, np.bool_)):
            raise TypeError(f"expected bool, got {type(item).__name__}")
        return b"\1" if item else b"\0"
    return _encode_numbers(kind, [item], endian)


def _encode_numbers(kind: str, items: list[Any], endian: str) -> bytes:
    expected: tuple[type, ...] = (int, np.integer)
    if kind not in _INTEGERS:
        expected = (float, np.floating, *expected)
    for item in items:
        if isinstance(item, bool) or not isinstance(item, expected):
            raise TypeError(f"expected numbers that fit {kind}, got {type(item).__name__}")
    code = CODES[TYPES.index(kind)]
    try:
        return struct.pack(f"{endian}{len(items)}{code}", *items)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"a number does not fit {kind}: {error}") from None
