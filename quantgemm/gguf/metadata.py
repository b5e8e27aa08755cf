# SPDX-License-Identifier: MIT
"""The key-value part of a GGUF file: every length checked when opened, values decoded when asked.

In the file: key (string), u32 type number, value. A string is a count and its bytes, an array a u32
item type, a count and its items; counts have 8 bytes, or 4 in version 1.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from quantgemm.gguf.cursor import Cursor, layout
from quantgemm.gguf.mapping import MappedFile
from quantgemm.gguf.rules import MAX_DEPTH, MAX_KEY_BYTES, MAX_KEYS, key_problem
from quantgemm.gguf.values import ARR, BOOL, CODES, STR, TYPES, WIDTHS, GGUFValue


class Entry(NamedTuple):
    """Where a value stands; item, size and offset of an array are those of its items."""

    type: int
    item: int
    size: int
    offset: int


def read_entries(cursor: Cursor, count: int) -> dict[str, Entry]:
    """Walk over `count` keys and values without decoding the values."""
    start = cursor.pos
    smallest = layout(cursor.endian + cursor.count).size + 4 + 1  # key length, type, a byte
    if count > cursor.left // smallest:
        problem = f"{count} metadata keys need at least {count * smallest} bytes"
        raise cursor.truncated(problem, start)
    if count > MAX_KEYS:
        raise cursor.error(f"{count} metadata keys, expected at most {MAX_KEYS}", start)
    entries: dict[str, Entry] = {}
    for _ in range(count):
        cursor.key, at = None, cursor.pos
        key = cursor.string("a metadata key", MAX_KEY_BYTES).decode("latin-1")
        cursor.key = key
        cursor.refuse("the key occurs twice" if key in entries else key_problem(key), at)
        entries[key] = _read_entry(cursor)
    cursor.key = None
    return entries


def _read_entry(cursor: Cursor) -> Entry:
    at = cursor.pos
    (kind,) = cursor.read("I", "the value's type")
    if kind >= len(TYPES):
        raise cursor.error(f"value type {kind}, expected 0 to {len(TYPES) - 1}", at)
    if kind == ARR:
        item, count = cursor.read("I" + cursor.count, "the array's item type and count")
        offset = cursor.pos
        _skip_items(cursor, item, count)
        return Entry(kind, item, count, offset)
    offset = cursor.pos
    if kind == STR:
        (size,) = cursor.read(cursor.count, "the string's length")
        cursor.take(size, "the string")
    else:
        cursor.take(WIDTHS[kind], f"a {TYPES[kind]}")
    if kind == BOOL:
        _check_bools(cursor, offset, 1)
    return Entry(kind, 0, 0, offset)


def _skip_items(cursor: Cursor, item: int, count: int) -> None:
    """Step over the `count` items of an array, by a loop also where they are arrays themselves.

    A file may hold a million strings or tiny arrays, so this loop is all that opening it costs.
    """
    view, size, pos = cursor.view, cursor.size, cursor.pos
    header = layout(cursor.endian + "I" + cursor.count)
    length = layout(cursor.endian + cursor.count)
    least = [*WIDTHS]  # bytes of an item, at least
    least[STR], least[ARR] = length.size, header.size
    pending: list[int] = []  # at each depth, the arrays still to come
    while True:
        if item >= len(TYPES):
            raise cursor.error(f"array item type {item}, expected 0 to {len(TYPES) - 1}", pos)
        needed = count * least[item]
        if needed > size - pos:
            raise cursor.truncated(f"{count} items of type {TYPES[item]} need {needed} bytes", pos)
        if item == STR:
            end = after_strings(view, pos, count, length)
            if end is None:
                raise cursor.truncated(f"an array of {count} strings", pos)
            pos = end
        elif item == ARR:
            if count and len(pending) + 1 == MAX_DEPTH:
                raise cursor.error(f"arrays nested more than {MAX_DEPTH} deep", pos)
            pending.append(count)
        else:
            if item == BOOL:
                _check_bools(cursor, pos, needed)
            pos += needed
        while pending and not pending[-1]:
            pending.pop()
        if not pending:
            break
        pending[-1] -= 1
        if header.size > size - pos:
            raise cursor.truncated("an inner array's item type and count", pos)
        item, count = header.unpack_from(view, pos)
        pos += header.size
    cursor.pos = pos


def _check_bools(cursor: Cursor, pos: int, count: int) -> None:
    wrong = bytes(cursor.view[pos : pos + count]).strip(b"\0\1")
    if wrong:
        raise cursor.error(f"bool with byte {wrong[0]}, expected 0 or 1", pos)


def after_strings(view: memoryview, pos: int, count: int, length: struct.Struct) -> int | None:
    """Where `count` strings that start at `pos` end; None if that is past the end of the file."""
    read, step = length.unpack_from, length.size
    try:
        for _ in range(count):
            pos += step + read(view, pos)[0]
    except (struct.error, OverflowError):  # the next length would stand past the end
        return None
    return pos if pos <= len(view) else None


def strings(
    view: memoryview, pos: int, count: int, length: struct.Struct
) -> tuple[list[bytes], int]:
    """`count` strings that `after_strings` has walked over, and where they end."""
    read, step = length.unpack_from, length.size
    found = []
    for _ in range(count):
        start = pos + step
        pos = start + read(view, pos)[0]
        found.append(bytes(view[start:pos]))
    return found, pos


class Metadata(Mapping[str, Any]):
    """Keys and values of a GGUF file, in file order.

    Numbers, bools and strings come as Python's, arrays as lists, arrays of arrays as lists of
    lists. Bytes of a string that are not UTF-8 come as surrogate escapes (as in `os.fsdecode`), so
    that saving writes the same bytes again. A value is decoded when first asked for, and kept.
    """

    def __init__(
        self, file: MappedFile, endian: str, count: str, entries: dict[str, Entry]
    ) -> None:
        """endian and count: as in `Cursor`."""
        self._file, self._endian, self._count, self._entries = file, endian, count, entries
        self._decoded: dict[str, GGUFValue] = {}

    def __getitem__(self, key: str) -> Any:
        return self.typed(key).plain()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        return f"<Metadata: {len(self)} keys of {self._file.path}>"

    def type_of(self, key: str) -> str:
        """'u32', 'str', 'arr[f32]' ..., without decoding the value."""
        entry = self._entries[key]
        return f"arr[{TYPES[entry.item]}]" if entry.type == ARR else TYPES[entry.type]

    def len_of(self, key: str) -> int | None:
        """The number of items of an array, without decoding it; None for other types."""
        entry = self._entries[key]
        return entry.size if entry.type == ARR else None

    def typed(self, key: str) -> GGUFValue:
        """The value with its exact type, for writing it again."""
        if key not in self._decoded:
            entry, cursor = self._entries[key], self._cursor(key)
            if entry.type == ARR:
                value = _decode_array(cursor, entry.item, entry.size)
            else:
                value = GGUFValue(TYPES[entry.type], _decode_items(cursor, entry.type, 1)[0])
            self._decoded[key] = value
        return self._decoded[key]

    def offset_of(self, key: str) -> int:
        """Where in the file the value stands; of an array, its first item."""
        return self._entries[key].offset

    def without(self, keys: Collection[str]) -> Metadata:
        """The same but for these keys."""
        entries = {key: entry for key, entry in self._entries.items() if key not in keys}
        return Metadata(self._file, self._endian, self._count, entries)

    def to_typed_dict(self) -> dict[str, GGUFValue]:
        """All values with their types: a copy to change and give to `save_gguf`."""
        return {key: self.typed(key) for key in self}

    def _cursor(self, key: str) -> Cursor:
        cursor = Cursor(self._file, self._entries[key].offset, self._endian, self._count)
        cursor.key = key
        return cursor


def _decode_array(cursor: Cursor, item: int, count: int) -> GGUFValue:
    if item != ARR:
        return GGUFValue(f"arr[{TYPES[item]}]", _decode_items(cursor, item, count))
    arrays = []
    for _ in range(count):
        inner, size = cursor.read("I" + cursor.count, "the array's item type and count")
        arrays.append(_decode_array(cursor, inner, size))
    return GGUFValue("arr[arr]", arrays)


def _decode_items(cursor: Cursor, item: int, count: int) -> list[Any]:
    if item == STR:
        length = layout(cursor.endian + cursor.count)
        found, cursor.pos = strings(cursor.view, cursor.pos, count, length)
        return [string.decode("utf-8", "surrogateescape") for string in found]
    start = cursor.take(count * WIDTHS[item], f"{count} items of type {TYPES[item]}")
    dtype = np.dtype(cursor.endian + CODES[item])
    items: list[Any] = np.frombuffer(cursor.view, dtype, count, start).tolist()
    return items
