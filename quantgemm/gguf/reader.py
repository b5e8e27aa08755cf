# SPDX-License-Identifier: MIT
"""open_gguf: a GGUF file, of one part or of several, as metadata and tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from quantgemm.gguf.errors import GGUFError, shorten
from quantgemm.gguf.metadata import Metadata
from quantgemm.gguf.part import Part, read_part
from quantgemm.gguf.rules import MAX_KEYS, MAX_TENSORS
from quantgemm.gguf.tensor import GGUFTensor

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
PART_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFFile:
    """An open GGUF file; `open_gguf` makes it. Also a context manager, which closes it.

    paths: of all parts; version, byte_order ('little' or 'big') and alignment: of the first.
    """

    def __init__(self, parts: list[Part], metadata: Metadata) -> None:
        self.paths = tuple(Path(part.file.path) for part in parts)
        self.version, self.byte_order = parts[0].version, parts[0].byte_order
        self.alignment = parts[0].alignment
        tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
        self._metadata: Metadata | None = metadata
        self._tensors: Mapping[str, GGUFTensor] | None = MappingProxyType(tensors)

    @property
    def path(self) -> Path:
        """The first part."""
        return self.paths[0]

    @property
    def metadata(self) -> Metadata:
        """Keys and values in file order; of a file in parts without the `split.*` keys."""
        if self._metadata is None:
            raise ValueError(f"{self.path} was closed")
        return self._metadata

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """Tensors by name, in file order, part after part."""
        if self._tensors is None:
            raise ValueError(f"{self.path} was closed")
        return self._tensors

    def close(self) -> None:
        """Let go of the file. Tensors taken from it, and their blocks, stay valid."""
        self._metadata = self._tensors = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._tensors is None or self._metadata is None:
            return f"<GGUFFile {self.path}, closed>"
        counts = f"{len(self._metadata)} keys, {len(self._tensors)} tensors"
        return f"<GGUFFile {self.path}: version {self.version}, {self.byte_order}-endian, {counts}>"


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file (version 1, 2 or 3, either byte order), or any part of one in parts.

    Checks header, metadata and tensor infos against the file's size and decodes nothing. Raises
    GGUFError for a malformed file, and the usual OSError for one that cannot be opened. Must not be
    cut short while it is in use: like all mapped files it would then end the process.
    """
    part = read_part(path)
    count = _split_value(part, SPLIT_COUNT, 0xFFFF)
    if count is None or count < 2:  # merging tools leave a count of 0 behind
        return GGUFFile([part], part.metadata)
    parts = _read_siblings(part, count)
    return GGUFFile(parts, parts[0].metadata.without((SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS)))


def _read_siblings(given: Part, count: int) -> list[Part]:
    """All parts in order. Their names come from the name of the given one, never from contents."""
    path = Path(given.file.path)
    match = PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        expected = f"NAME-00001-of-{count:05}.gguf"
        raise _error(
            given,
            SPLIT_COUNT,
            f"the file says it is one of {count} parts, expected a name like {expected}",
            "give the parts back the names they were made with",
        )
    stem, number = match["stem"], int(match["no"])
    parts: list[Part] = []
    names: set[str] = set()
    keys = 0
    for no in range(count):
        sibling = path.with_name(f"{stem}-{no + 1:05}-of-{count:05}.gguf")
        part = given
        if no + 1 != number:
            try:
                part = read_part(sibling)
            except FileNotFoundError:
                raise _error(
                    given,
                    SPLIT_COUNT,
                    f"part {no + 1} of {count} is missing: expected {sibling}",
                    "download all parts into one folder",
                ) from None
        _check_part(part, no, count)
        for name in part.tensors:
            if name in names:
                raise GGUFError("the tensor occurs in two parts", path=part.file.path, tensor=name)
            names.add(name)
        parts.append(part)
        keys += len(part.metadata)
        if len(names) > MAX_TENSORS or keys > MAX_KEYS:
            limits = f"{MAX_TENSORS} tensors and {MAX_KEYS} metadata keys"
            raise _error(given, SPLIT_COUNT, f"the parts have more than {limits} together")
    for part in parts:
        total = _split_value(part, SPLIT_TENSORS, MAX_TENSORS)
        if total is not None and total != len(names):
            problem = f"expected {total} tensors, but all parts have {len(names)}"
            raise _error(part, SPLIT_TENSORS, problem)
    return parts


def _check_part(part: Part, no: int, count: int) -> None:
    for key, expected in ((SPLIT_COUNT, count), (SPLIT_NO, no)):
        value = _split_value(part, key, 0xFFFF)
        if value != expected:
            raise _error(part, key, f"expected {expected} in this part, got {value}")


def _split_value(part: Part, key: str, largest: int) -> int | None:
    """A `split.*` number, of any integer type; None where there is none."""
    if key not in part.metadata:
        return None
    value = part.metadata[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest:
        raise _error(part, key, f"expected an integer from 0 to {largest}, got {shorten(value)}")
    return value


def _error(part: Part, key: str, problem: str, suggestion: str | None = None) -> GGUFError:
    return GGUFError(
        problem,
        path=part.file.path,
        offset=part.metadata.offset_of(key) if key in part.metadata else None,
        key=key,
        suggestion=suggestion or "download all parts again, from one place",
    )
