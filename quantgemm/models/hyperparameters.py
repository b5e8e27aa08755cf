# SPDX-License-Identifier: MIT
"""The numbers of a GGUF file's metadata, looked up by the part of the key after "llama." and
checked: a missing or strange one is a GGUFError that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quantgemm.gguf import GGUFError, GGUFFile, GGUFTensor
from quantgemm.gguf.errors import shorten

LARGEST = 2**31 - 1
AGAIN = "convert the model again with a current converter"


class Hyperparameters:
    """What a file says about its model. `integer("block_count")` reads "llama.block_count"."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = self.text("general.architecture")

    def key(self, name: str) -> str:
        return (
            name if name.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{name}"
        )

    def has(self, name: str) -> bool:
        return self.key(name) in self.file.metadata

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"expected a text, got {shorten(value)}")
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # some converters write one number for each layer
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, f"expected an integer of at least {least}, got {shorten(value)}")
        if value > LARGEST:
            raise self.error(name, f"expected at most {LARGEST}, got {value}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"expected a number, got {shorten(value)}")
        if not math.isfinite(value):
            raise self.error(name, f"expected a finite number, got {value}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false, got {shorten(value)}")
        return value

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        return self.file.tensors

    def vocab_size(self) -> int:
        """Rows of the embedding: the one count that the tensors themselves must agree with."""
        table = self.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise GGUFError(
                "expected a tensor 'token_embd.weight' with two dimensions",
                path=self.file.path,
                suggestion="is this a language model, and the first part of it?",
            )
        return table.shape[0]

    def error(self, name: str, problem: str, suggestion: str = AGAIN) -> GGUFError:
        key = self.key(name)
        offset = self.file.metadata.offset_of(key) if self.has(name) else None
        path = self.file.path
        return GGUFError(problem, path=path, offset=offset, key=key, suggestion=suggestion)

    def _value(self, name: str, default: object) -> object:
        key = self.key(name)
        if key in self.file.metadata:
            return self.file.metadata[key]
        if default is None:
            raise self.error(name, "the key is missing")
        return default
