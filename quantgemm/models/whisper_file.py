# SPDX-License-Identifier: MIT
"""What a Whisper file says: sizes, tensors, tokens, mel filters; from GGUF or a legacy `.bin`.

Tensors have the names that OpenAI gave them, which whisper.cpp's files have too. The keys of the
GGUF form are written down in docs/whisper.md; `metadata` makes them and `open_whisper` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantgemm.gguf import (
    GGUFError,
    GGUFFile,
    GGUFTensor,
    GGUFValue,
    WhisperBin,
    open_gguf,
    open_whisper_bin,
)

ARCHITECTURE = "whisper"
LEGACY_MAGIC = b"lmgg"
MAX_SIZE = 1 << 24  # of a hyperparameter: far above any model, far below what overflows

# whisper.cpp's names of the sizes, and the keys that hold them in a GGUF.
SIZES = {
    "n_vocab": "whisper.vocab_size",
    "n_audio_ctx": "whisper.encoder.context_length",
    "n_audio_state": "whisper.encoder.embedding_length",
    "n_audio_head": "whisper.encoder.attention.head_count",
    "n_audio_layer": "whisper.encoder.block_count",
    "n_text_ctx": "whisper.decoder.context_length",
    "n_text_state": "whisper.decoder.embedding_length",
    "n_text_head": "whisper.decoder.attention.head_count",
    "n_text_layer": "whisper.decoder.block_count",
    "n_mels": "whisper.mel_count",
}
TOKENIZER, TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.tokens"
MEL_FILTERS = "whisper.mel_filters"
SUPPRESS, SUPPRESS_FIRST = "whisper.suppress_tokens", "whisper.suppress_first_tokens"
KEEP_PLAIN = ("*positional_embedding", "*.conv?.weight")  # never quantized, as in whisper.cpp

# From a name in transformers' model to the name in a file, part by part.
_PARTS = {
    "model": "",
    "layers": "blocks",
    "self_attn": "attn",
    "encoder_attn": "cross_attn",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "embed_tokens": "token_embedding",
}


def file_name(name: str) -> str:
    """``model.encoder.layers.0.fc1.bias`` of transformers is ``encoder.blocks.0.mlp.0.bias``."""
    name = name.replace("embed_positions.weight", "positional_embedding")
    parts = [_PARTS.get(part, part) for part in name.split(".")]
    last_norm = "ln_post" if "encoder" in parts else "ln"
    return ".".join(last_norm if part == "layer_norm" else part for part in parts if part)


@dataclass(frozen=True)
class WhisperFile:
    """sizes: by whisper.cpp's names; tensors: by OpenAI's names; tokens: bytes by id.

    mel_filters: float32 ``[n_mels, n_fft]`` or None; suppress, suppress_first: ids that are never
    generated, and never as the first token of a text. A legacy file has the tokens of text only.
    """

    path: Path
    sizes: dict[str, int]
    tensors: Mapping[str, GGUFTensor]
    tokens: list[bytes]
    mel_filters: torch.Tensor | None
    suppress: list[int]
    suppress_first: list[int]

    def error(self, problem: str, suggestion: str | None = None, **where: Any) -> GGUFError:
        return GGUFError(problem, path=self.path, suggestion=suggestion, **where)


def open_whisper(path: str | os.PathLike[str]) -> WhisperFile:
    """A Whisper GGUF or a legacy whisper.cpp `.bin`; the first bytes tell which it is."""
    with open(path, "rb") as start:
        legacy = start.read(4) == LEGACY_MAGIC
    file = _from_bin(open_whisper_bin(path)) if legacy else _from_gguf(open_gguf(path))
    _check_sizes(file)
    return file


def _from_bin(file: WhisperBin) -> WhisperFile:
    sizes = {name: file.hparams[name] for name in SIZES}
    return WhisperFile(file.path, sizes, file.tensors, file.vocab, file.mel_filters, [], [])


def _from_gguf(file: GGUFFile) -> WhisperFile:
    keys = file.metadata
    found = keys.get("general.architecture")
    if found != ARCHITECTURE:
        raise GGUFError(
            f"architecture {found!r}, expected {ARCHITECTURE!r}",
            path=file.path,
            key="general.architecture",
            suggestion="load_whisper is for speech recognition models",
        )
    sizes = {name: _integer(file, key) for name, key in SIZES.items()}
    filters = _typed(file, MEL_FILTERS, "arr[f32]")
    mel = None
    if filters is not None:
        mel = torch.from_numpy(np.asarray(filters, np.float32).copy())
        if not sizes["n_mels"] or mel.numel() % sizes["n_mels"]:
            problem = f"{mel.numel()} numbers, expected a multiple of {sizes['n_mels']}"
            raise GGUFError(problem, path=file.path, key=MEL_FILTERS)
        mel = mel.view(sizes["n_mels"], -1)
    tokens = [from_printable(token) for token in _typed(file, TOKENS, "arr[str]") or []]
    suppress = [_typed(file, key, "arr[i32]") for key in (SUPPRESS, SUPPRESS_FIRST)]
    ids = [[int(i) for i in (() if found is None else found)] for found in suppress]
    return WhisperFile(file.path, sizes, file.tensors, tokens, mel, *ids)


def _integer(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        problem = "the key is missing" if value is None else f"expected an integer, got {value!r}"
        suggestion = "make the file with 'quantgemm quantize': docs/whisper.md has its keys"
        raise GGUFError(problem, path=file.path, key=key, suggestion=suggestion)
    return value


def _typed(file: GGUFFile, key: str, kind: str) -> Any:
    if key not in file.metadata:
        return None
    if file.metadata.type_of(key) != kind:
        problem = f"expected {kind}, got {file.metadata.type_of(key)}"
        raise GGUFError(problem, path=file.path, key=key)
    return file.metadata[key]


def _check_sizes(file: WhisperFile) -> None:
    """Before anything as large as the sizes say is made."""
    for name, value in file.sizes.items():
        limit = len(file.tensors) if name.endswith("_layer") else MAX_SIZE
        if not 0 < value <= max(limit, 1):
            raise file.error(f"{name} is {value}, expected 1 to {max(limit, 1)}")
    sizes = file.sizes
    if len(file.tokens) > sizes["n_vocab"]:
        raise file.error(
            f"{len(file.tokens)} tokens, expected at most {sizes['n_vocab']} (n_vocab)"
        )
    for key, ids in ((SUPPRESS, file.suppress), (SUPPRESS_FIRST, file.suppress_first)):
        if ids and not (min(ids) >= 0 and max(ids) < sizes["n_vocab"]):
            problem = f"ids from {min(ids)} to {max(ids)}, expected 0 to {sizes['n_vocab'] - 1}"
            raise file.error(problem, key=key)
    if sizes["n_audio_state"] != sizes["n_text_state"]:
        problem = f"n_audio_state {sizes['n_audio_state']} and n_text_state {sizes['n_text_state']}"
        raise file.error(f"{problem}, expected equal ones")
    for part in ("audio", "text"):
        state, heads = sizes[f"n_{part}_state"], sizes[f"n_{part}_head"]
        if state % heads:
            raise file.error(f"n_{part}_state {state} is not a multiple of {heads} heads")


# ------------------------------------------------------------------------------ making a file


def metadata(
    sizes: Mapping[str, int],
    tokens: Sequence[bytes],
    mel_filters: torch.Tensor | None,
    suppress: Sequence[int] = (),
    suppress_first: Sequence[int] = (),
    name: str = "whisper",
) -> dict[str, GGUFValue]:
    """The keys of a Whisper GGUF. mel_filters: ``[n_mels, n_fft]``.

    Tokens and ids beyond n_vocab, which the model cannot say, are left out.
    """
    n_vocab = sizes["n_vocab"]
    keys = {
        "general.architecture": GGUFValue("str", ARCHITECTURE),
        "general.name": GGUFValue("str", name),
    }
    keys |= {key: GGUFValue("u32", sizes[size]) for size, key in SIZES.items()}
    if mel_filters is not None:
        keys[MEL_FILTERS] = GGUFValue("arr[f32]", mel_filters.flatten().tolist())
    for key, ids in ((SUPPRESS, suppress), (SUPPRESS_FIRST, suppress_first)):
        if said := [i for i in ids if 0 <= i < n_vocab]:
            keys[key] = GGUFValue("arr[i32]", said)
    if tokens:
        keys[TOKENIZER] = GGUFValue("str", "gpt2")
        keys[TOKENS] = GGUFValue("arr[str]", [to_printable(t) for t in tokens[:n_vocab]])
    return keys


# ------------------------------------------------------------------------------ tokens as text


@lru_cache(maxsize=1)
def _printable() -> tuple[str, ...]:
    """The character that stands for each byte in GPT-2's vocabulary.

    Bytes that Latin-1 shows as a mark are that mark, the others 256, 257 ... in their order.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return tuple(chr(b if b in shown else 256 + hidden.index(b)) for b in range(256))


@lru_cache(maxsize=1)
def _bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_printable())}


def to_printable(token: bytes) -> str:
    """b" the" -> "Ġthe", the way vocabularies of GPT-2's kind are written."""
    table = _printable()
    return "".join(table[byte] for byte in token)


def from_printable(token: str) -> bytes:
    """The way back; characters that stand for no byte are themselves in UTF-8."""
    table = _bytes()
    parts = (bytes([table[c]]) if c in table else c.encode("utf-8", "replace") for c in token)
    return b"".join(parts)
