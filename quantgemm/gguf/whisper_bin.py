# SPDX-License-Identifier: MIT
"""open_whisper_bin: whisper.cpp's own container, older than GGUF.

In the file, all little-endian: magic; 11 i32 hyperparameters; i32 n_mel, n_fft and as many float32
filters; i32 n_vocab and as many strings, each a u32 length and its bytes; then until the end of the
file one record per tensor: i32 n_dims, name length and type, i32 dimensions (fastest first), the
name, the data. Nothing is aligned.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from quantgemm.formats import FORMATS
from quantgemm.gguf.cursor import Cursor, layout
from quantgemm.gguf.errors import DAMAGED, TRUNCATED, UNREADABLE_TYPE, GGUFError
from quantgemm.gguf.mapping import MappedFile
from quantgemm.gguf.metadata import after_strings, strings
from quantgemm.gguf.rules import (
    MAX_DIMS,
    MAX_NAME_BYTES,
    MAX_TENSORS,
    name_problem,
    shape_problem,
    tensor_bytes,
    type_problem,
)
from quantgemm.gguf.tensor import GGUFTensor

MAGIC = b"lmgg"  # 0x67676d6c
HPARAMS = (
    "n_vocab",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
    "n_mels",
    "ftype",
)
QUANT_VERSION = 2  # thousands of ftype; older versions laid blocks out in another way

_OTHERS = {
    b"GGUF": "this is a GGUF file: open it with open_gguf",
    b"vers": "this looks like a Git LFS pointer: get the file itself with 'git lfs pull'",
}
_NOT_WHISPER = "other models, such as parakeet, use the same magic: only whisper files can be read"


class WhisperBin:
    """An open whisper `.bin` file; `open_whisper_bin` makes it.

    hparams: the 11 numbers by name, as they are in the file; tensors: by name, in file order.
    """

    def __init__(self, file: MappedFile) -> None:
        self.path = Path(file.path)
        self._file = file
        cursor = Cursor(file, count="I")
        self.hparams = _read_hparams(cursor)
        self._mel_shape, self._mel_offset = _read_mel_filters(cursor, self.hparams["n_mels"])
        self._vocab_count, self._vocab_offset = _walk_vocab(cursor)
        self._vocab: list[bytes] | None = None
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(_read_tensors(cursor))
        self._check_quantization()

    @property
    def mel_filters(self) -> torch.Tensor:
        """float32 [n_mel, n_fft], a view of the file."""
        count = self._mel_shape[0] * self._mel_shape[1]
        data = np.frombuffer(self._file.view, "<f4", count, self._mel_offset)
        return torch.from_numpy(data).view(self._mel_shape)

    @property
    def vocab(self) -> list[bytes]:
        """The tokens in order; not all are UTF-8. May have fewer than hparams["n_vocab"]."""
        if self._vocab is None:
            found = strings(self._file.view, self._vocab_offset, self._vocab_count, layout("<I"))
            self._vocab = found[0]
        return self._vocab

    def _check_quantization(self) -> None:
        version = self.hparams["ftype"] // 1000
        for tensor in self.tensors.values():
            if not tensor.format.is_plain and version != QUANT_VERSION:
                raise GGUFError(
                    f"quantization version {version}, expected {QUANT_VERSION} for {tensor!r}",
                    path=self.path,
                    offset=tensor.offset,
                    tensor=tensor.name,
                    suggestion="quantize the model again with a current whisper.cpp",
                )

    def __repr__(self) -> str:
        return f"<WhisperBin {self.path}: {len(self.tensors)} tensors, {self._vocab_count} tokens>"


def open_whisper_bin(path: str | os.PathLike[str]) -> WhisperBin:
    """Open a whisper.cpp model. Raises GGUFError for a malformed file."""
    return WhisperBin(MappedFile(path))


def _read_hparams(cursor: Cursor) -> dict[str, int]:
    magic = bytes(cursor.view[: len(MAGIC)])
    if magic != MAGIC:
        problem = f"not a whisper .bin file: it begins with {magic!r}, expected {MAGIC!r}"
        raise cursor.error(problem, 0, _OTHERS.get(magic, DAMAGED))
    cursor.pos = len(MAGIC)
    start = cursor.pos
    hparams = dict(zip(HPARAMS, cursor.read(f"{len(HPARAMS)}i", "hyperparameters"), strict=True))
    for i, (name, value) in enumerate(hparams.items()):
        if value < 0:
            raise cursor.error(f"{name} is {value}, expected 0 or more", start + 4 * i)
    return hparams


def _read_mel_filters(cursor: Cursor, n_mels: int) -> tuple[tuple[int, int], int]:
    start = cursor.pos
    n_mel, n_fft = cursor.read("2i", "the size of the mel filters")
    if n_mel != n_mels or n_fft < 1:
        problem = f"mel filters of {n_mel} by {n_fft}, expected {n_mels} (n_mels) by 1 or more"
        raise cursor.error(problem, start, _NOT_WHISPER)
    return (n_mel, n_fft), cursor.take(4 * n_mel * n_fft, f"mel filters of {n_mel} by {n_fft}")


def _walk_vocab(cursor: Cursor) -> tuple[int, int]:
    start = cursor.pos
    (count,) = cursor.read("i", "the vocabulary's size")
    if count < 0:
        raise cursor.error(f"a vocabulary of {count} tokens, expected 0 or more", start)
    first = cursor.pos
    if 4 * count > cursor.left:
        raise cursor.truncated(f"{count} tokens need at least {4 * count} bytes", first)
    end = after_strings(cursor.view, first, count, layout("<I"))
    if end is None:
        raise cursor.truncated(f"a vocabulary of {count} tokens", first)
    cursor.pos = end
    return count, first


def _read_tensors(cursor: Cursor) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    while cursor.left:
        at = cursor.pos
        if len(tensors) == MAX_TENSORS:
            raise cursor.error(f"more than {MAX_TENSORS} tensors", at)
        tensor = _read_tensor(cursor)
        if tensor.name in tensors:
            raise cursor.error("the tensor occurs twice", at)
        tensors[tensor.name] = tensor
        cursor.tensor = None
    return tensors


def _read_tensor(cursor: Cursor) -> GGUFTensor:
    at = cursor.pos
    n_dims, name_bytes, type_id = cursor.read("3i", "a tensor's head")
    if not 0 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"a tensor of {n_dims} dimensions, expected 0 to {MAX_DIMS}", at)
    if not 0 <= name_bytes <= MAX_NAME_BYTES:
        problem = f"a tensor's name of {name_bytes} bytes, expected 0 to {MAX_NAME_BYTES}"
        raise cursor.error(problem, at)
    shape = cursor.read(f"{n_dims}i", "a tensor's dimensions")[::-1]
    begin = cursor.take(name_bytes, "a tensor's name")
    raw = bytes(cursor.view[begin : cursor.pos])
    cursor.tensor = name = raw.decode("utf-8", "surrogateescape")
    cursor.refuse(name_problem(name), at)
    cursor.refuse(type_problem(type_id), at, UNREADABLE_TYPE)
    fmt = FORMATS[type_id]
    cursor.refuse(shape_problem(shape, fmt), at)
    size = tensor_bytes(shape, fmt)
    if size > cursor.left:
        problem = f"data of {size} bytes ends at byte {cursor.pos + size}"
        raise cursor.error(f"{problem}, but the file has {cursor.size} bytes", at, TRUNCATED)
    offset = cursor.take(size, "data")
    return GGUFTensor(name, fmt, shape, cursor.file, offset)
