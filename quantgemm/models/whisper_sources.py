# SPDX-License-Identifier: MIT
"""Whisper models that others made, as the tensors and keys of our GGUF form.

A folder of transformers (config.json, *.safetensors), a folder of CTranslate2 (config.json,
model.bin, vocabulary.*) or a legacy whisper.cpp `.bin`. `quantgemm quantize` writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from quantgemm.gguf import GGUFError, GGUFTensor, GGUFValue
from quantgemm.models.ctranslate2 import read_ctranslate2
from quantgemm.models.whisper_file import (
    from_printable,
    metadata,
    open_whisper,
)

HEAD = "proj_out.weight"
_CTRANSLATE2_KIND = "WhisperSpec"


@dataclass(frozen=True)
class WhisperSource:
    """tensors: by OpenAI's names, mapped, so that nothing is read before it is used.

    Of safetensors there are none here: those of all `paths`, under the names that `file_name` makes
    of theirs, without `HEAD`.
    """

    kind: str
    paths: list[Path]
    keys: dict[str, GGUFValue]
    tensors: dict[str, torch.Tensor | GGUFTensor]

    @property
    def is_safetensors(self) -> bool:
        return not self.tensors


def is_whisper_folder(folder: Path) -> bool:
    """Whether `open_folder` can say what it holds, also if only in an error."""
    return (folder / "config.json").is_file()


def open_folder(folder: Path) -> WhisperSource:
    """Of transformers or of CTranslate2."""
    if (folder / "model.bin").is_file():
        return _open_ctranslate2(folder)
    return _open_transformers(folder)


def from_bin(path: str) -> WhisperSource:
    """A legacy file: the tensors as they are, the tokens, the mel filters."""
    file = open_whisper(path)
    keys = metadata(file.sizes, file.tokens, file.mel_filters, name=file.path.stem)
    return WhisperSource("whisper .bin", [file.path], keys, dict(file.tensors))


# ------------------------------------------------------------------------------ transformers


def _open_transformers(folder: Path) -> WhisperSource:
    config = _json(folder / "config.json")
    if config.get("model_type") != "whisper":
        problem = f"model_type {config.get('model_type')!r}, expected 'whisper'"
        raise GGUFError(problem, path=folder / "config.json")
    paths = _safetensors(folder)
    if not paths:
        raise GGUFError("no *.safetensors and no model.bin beside config.json", path=folder)
    names = {
        "n_vocab": "vocab_size",
        "n_audio_ctx": "max_source_positions",
        "n_audio_state": "d_model",
        "n_audio_head": "encoder_attention_heads",
        "n_audio_layer": "encoder_layers",
        "n_text_ctx": "max_target_positions",
        "n_text_state": "d_model",
        "n_text_head": "decoder_attention_heads",
        "n_text_layer": "decoder_layers",
        "n_mels": "num_mel_bins",
    }
    if absent := [name for name in names.values() if not isinstance(config.get(name), int)]:
        problem = f"expected an integer {absent[0]!r}, got {config.get(absent[0])!r}"
        raise GGUFError(problem, path=folder / "config.json")
    sizes = {size: int(config[name]) for size, name in names.items()}
    extra = folder / "generation_config.json"
    generation = _json(extra) if extra.is_file() else config
    keys = metadata(
        sizes,
        _tokens(folder),
        None,
        generation.get("suppress_tokens") or (),
        generation.get("begin_suppress_tokens") or (),
        folder.resolve().name,
    )
    return WhisperSource("transformers", paths, keys, {})


def _safetensors(folder: Path) -> list[Path]:
    """One file, or several that an index names; some folders have the model both ways."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = sorted({str(name) for name in dict(_json(index)["weight_map"]).values()})
        return [folder / Path(name).name for name in names]
    return sorted(folder.glob("*.safetensors"))


def _tokens(folder: Path) -> list[bytes]:
    """By id, up to the first id that has none, of whichever vocabulary a folder has."""
    whole, extra = folder / "tokenizer.json", folder / "added_tokens.json"
    by_id: dict[Any, str] = {}
    try:
        if whole.is_file():
            found = _json(whole)
            by_id = {i: token for token, i in found["model"]["vocab"].items()}
            by_id |= {token["id"]: token["content"] for token in found["added_tokens"]}
        elif (folder / "vocab.json").is_file():
            found = _json(folder / "vocab.json") | (_json(extra) if extra.is_file() else {})
            by_id = {i: token for token, i in found.items()}
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"not a vocabulary of GPT-2's kind: {type(error).__name__}: {error}"
        raise GGUFError(problem, path=whole if whole.is_file() else folder) from None
    return [from_printable(by_id[i]) for i in takewhile(by_id.__contains__, count())]


def _json(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:
        raise GGUFError(f"not sound JSON: {error}", path=path) from None
    if not isinstance(found, dict):
        raise GGUFError(f"expected an object, got a {type(found).__name__}", path=path)
    return found


# ------------------------------------------------------------------------------ CTranslate2


@dataclass(frozen=True)
class _Variables:
    """Of a CTranslate2 file; asking for one that is missing or no number is an error."""

    path: Path
    found: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.found:
            raise GGUFError("the variable is missing", path=self.path, tensor=name)
        value = self.found[name]
        if value.dim() and not value.is_floating_point():
            problem = f"expected floating-point numbers, got {value.dtype}"
            suggestion = "convert the model again with --quantization float16"
            raise GGUFError(problem, path=self.path, tensor=name, suggestion=suggestion)
        return value

    def layers(self, part: str) -> int:
        """How many layers follow each other from 0."""
        count = 0
        while f"{part}/layer_{count}/ffn/linear_0/weight" in self.found:
            count += 1
        return count

    def linear(self, theirs: str, ours: str) -> dict[str, torch.Tensor]:
        return {f"{ours}.{leaf}": self[f"{theirs}/{leaf}"] for leaf in ("weight", "bias")}

    def norm(self, theirs: str, ours: str) -> dict[str, torch.Tensor]:
        return {f"{ours}.weight": self[f"{theirs}/gamma"], f"{ours}.bias": self[f"{theirs}/beta"]}

    def fused(self, theirs: str, ours: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Layers that were made one: the parts of its rows. Keys have no bias in Whisper."""
        both = self.linear(theirs, "")
        rows = both[".weight"].shape[0] // len(names)
        return {
            f"{ours}.{name}{leaf}": value[i * rows : (i + 1) * rows]
            for leaf, value in both.items()
            for i, name in enumerate(names)
            if (name, leaf) != ("key", ".bias")
        }

    def block(self, part: str, i: int) -> dict[str, torch.Tensor]:
        """All tensors of a layer."""
        theirs, ours = f"{part}/layer_{i}", f"{part}.blocks.{i}"
        own = f"{theirs}/self_attention"
        found = self.fused(f"{own}/linear_0", f"{ours}.attn", ("query", "key", "value"))
        found |= self.linear(f"{own}/linear_1", f"{ours}.attn.out")
        found |= self.norm(f"{own}/layer_norm", f"{ours}.attn_ln")
        if part == "decoder":
            cross = f"{theirs}/attention"
            found |= self.linear(f"{cross}/linear_0", f"{ours}.cross_attn.query")
            found |= self.fused(f"{cross}/linear_1", f"{ours}.cross_attn", ("key", "value"))
            found |= self.linear(f"{cross}/linear_2", f"{ours}.cross_attn.out")
            found |= self.norm(f"{cross}/layer_norm", f"{ours}.cross_attn_ln")
        found |= self.linear(f"{theirs}/ffn/linear_0", f"{ours}.mlp.0")
        found |= self.linear(f"{theirs}/ffn/linear_1", f"{ours}.mlp.2")
        return found | self.norm(f"{theirs}/ffn/layer_norm", f"{ours}.mlp_ln")


def _open_ctranslate2(folder: Path) -> WhisperSource:
    path = folder / "model.bin"
    file = read_ctranslate2(path)
    if file.kind != _CTRANSLATE2_KIND:
        raise GGUFError(f"a {file.kind}, expected a {_CTRANSLATE2_KIND}", path=path)
    found = _Variables(path, file.variables)
    tensors: dict[str, torch.Tensor] = {}
    for conv in ("conv1", "conv2"):
        tensors |= found.linear(f"encoder/{conv}", f"encoder.{conv}")
    for part, last in (("encoder", "ln_post"), ("decoder", "ln")):
        positions = found[f"{part}/position_encodings/encodings"]
        tensors[f"{part}.positional_embedding"] = positions
        for i in range(found.layers(part)):
            tensors |= found.block(part, i)
        tensors |= found.norm(f"{part}/layer_norm", f"{part}.{last}")
    table = tensors["decoder.token_embedding.weight"] = found["decoder/embeddings/weight"]
    heard, said = (tensors[f"{part}.positional_embedding"] for part in ("encoder", "decoder"))
    sizes = {
        "n_vocab": table.shape[0],
        "n_audio_ctx": heard.shape[0],
        "n_audio_state": heard.shape[1],
        "n_audio_head": int(found["encoder/num_heads"]),
        "n_audio_layer": found.layers("encoder"),
        "n_text_ctx": said.shape[0],
        "n_text_state": said.shape[1],
        "n_text_head": int(found["decoder/num_heads"]),
        "n_text_layer": found.layers("decoder"),
        "n_mels": found["encoder/conv1/weight"].shape[1],
    }
    config = _json(folder / "config.json")
    keys = metadata(
        sizes,
        _vocabulary(folder) or _tokens(folder),
        None,
        config.get("suppress_ids") or (),
        config.get("suppress_ids_begin") or (),
        folder.resolve().name,
    )
    return WhisperSource("CTranslate2", [path], keys, {**tensors})


def _vocabulary(folder: Path) -> list[bytes]:
    """One token a line, or a JSON list of them; none if there is no such file."""
    if (folder / "vocabulary.json").is_file():
        with open(folder / "vocabulary.json", encoding="utf-8") as file:
            return [from_printable(str(token)) for token in json.load(file)]
    if (folder / "vocabulary.txt").is_file():
        with open(folder / "vocabulary.txt", encoding="utf-8", newline="\n") as file:
            return [from_printable(line.rstrip("\n")) for line in file]
    return []
