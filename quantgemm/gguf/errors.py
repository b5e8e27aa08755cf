# SPDX-License-Identifier: MIT
"""The one exception for files that cannot be read."""

from __future__ import annotations

import os

TRUNCATED = "the file looks truncated: download it again"
DAMAGED = "the file is damaged or not what its name says: download it again"
UNREADABLE_TYPE = "a newer quantgemm may read it, or quantize the model again to a listed type"


class GGUFError(ValueError):
    """A file is malformed, or says something this package does not support.

    path: the file; offset: the byte at which the offending field or record starts; where: the name
    of the tensor or metadata key concerned. Each is None where it does not apply. The text holds
    all of them, what was expected, what came, and one suggestion.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        tensor: str | None = None,
        key: str | None = None,
        suggestion: str | None = None,
    ) -> None:
        self.path = None if path is None else os.fspath(path)
        self.offset = offset
        self.where = tensor if tensor is not None else key
        place = [] if self.where is None else ["key" if tensor is None else "tensor"]
        place += [] if self.where is None else [shorten(self.where)]
        place += [] if offset is None else [f"at byte {offset}"]
        parts = [str(self.path) if self.path else "", " ".join(place), problem]
        text = ": ".join(part for part in parts if part)
        super().__init__(f"{text} ({suggestion})" if suggestion else text)


def shorten(name: object, limit: int = 80) -> str:
    """repr of a name from a file, safe to print and of bounded length."""
    text = ascii(name) if isinstance(name, bytes) else repr(name)
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-10:]}"
