# SPDX-License-Identifier: MIT
"""GGUF files and whisper.cpp's older `.bin` files; how-to and rules are in docs/gguf.md."""

from quantgemm.gguf.errors import GGUFError
from quantgemm.gguf.metadata import Metadata
from quantgemm.gguf.reader import GGUFFile, open_gguf
from quantgemm.gguf.tensor import GGUFTensor
from quantgemm.gguf.values import GGUFValue
from quantgemm.gguf.whisper_bin import WhisperBin, open_whisper_bin
from quantgemm.gguf.writer import GGUFWriter, save_gguf

__all__ = [
    "GGUFError",
    "GGUFFile",
    "GGUFTensor",
    "GGUFValue",
    "GGUFWriter",
    "Metadata",
    "WhisperBin",
    "open_gguf",
    "open_whisper_bin",
    "save_gguf",
]
