# SPDX-License-Identifier: MIT
"""Opening a model by what its first bytes say, not by its name."""

from __future__ import annotations

import os

from quantgemm.commands.output import CommandError
from quantgemm.gguf import GGUFFile, WhisperBin, open_gguf, open_whisper_bin

WHISPER_MAGIC = b"lmgg"


def open_model(path: str) -> GGUFFile | WhisperBin:
    """A GGUF file (any part of one in parts), or a legacy whisper `.bin`."""
    if first_bytes(path, 4) == WHISPER_MAGIC:
        return open_whisper_bin(path)
    return open_gguf(path)


def first_bytes(path: str, count: int) -> bytes:
    if os.path.isdir(path):
        raise CommandError(f"{path}: expected a file, got a directory")
    if not os.path.isfile(path) and os.path.exists(path):
        raise CommandError(f"{path}: not a regular file")
    with open(path, "rb") as file:
        return file.read(count)
