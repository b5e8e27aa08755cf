# SPDX-License-Identifier: MIT
"""load_whisper: a quantized Whisper file as a model of transformers, and what it hears as text.

model = quantgemm.load_whisper("tiny.en-q5_0.gguf")
processor = quantgemm.whisper_processor("tiny.en-q5_0.gguf")
for text in quantgemm.transcribe(model, processor, pcm): ...  # float32 [samples], 16 kHz
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from tqdm import tqdm

from quantgemm.build import build_info
from quantgemm.gguf import GGUFTensor
from quantgemm.models.audio import SAMPLE_RATE, split_at_pauses
from quantgemm.models.whisper_file import WhisperFile, file_name, open_whisper
from quantgemm.nn import QuantEmbedding, QuantLinear

HEAD = "proj_out.weight"  # always the token embedding: files do not hold it
TABLE = "model.decoder.embed_tokens.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
BASE_VOCAB = 51765  # tokens of an English model that are neither languages nor multilingual
LANGUAGES = (99, 100)  # how many a vocabulary has
TIMESTAMPS = 1501
FILTER_BANK = 201  # frequencies of 400 samples' Fourier transform: what transformers computes
SILENCE = 1e-4  # of full scale; a model makes up words for chunks that are quieter throughout
TRANSFORMERS = "transformers>=5.17"


def load_whisper(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    algo: str = "auto",
    progress: bool | None = None,
) -> Any:
    """A Whisper GGUF or a legacy `.bin` as `transformers.WhisperForConditionalGeneration`.

    Linear layers whose weights the file has quantized are `QuantLinear`, such a token embedding is
    a `QuantEmbedding` whose bytes the output projection shares; all else is of `dtype` (default:
    float32 on the CPU, float16 on a GPU). On the CPU, quantized weights of a GGUF are the mapped
    file itself; a legacy file's, which are not aligned, are copied. device: default the GPU where
    there is one that can be used. algo: of `ops.gemm`. progress: a bar; None: on terminals.
    """
    transformers = import_transformers("load_whisper")
    file = open_whisper(path)
    device = _default_device() if device is None else torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(_config(transformers, file))
    tensors = _match(model, file)
    if device.type == "cuda":
        _check_memory(tensors, device, dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    hidden = None if progress is None else not progress
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        for name, tensor in tensors.items():
            _place(model, name, tensor, device, dtype, algo)
            bar.update(tensor.nbytes)
    _tie(model, algo)
    model.generation_config = _generation_config(transformers, file)
    return model.eval()


def import_transformers(who: str) -> Any:
    """The package, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        problem = f"{who} needs transformers, which cannot be imported ({error})"
        raise ImportError(f"{problem}: pip install '{TRANSFORMERS}'") from None
    return transformers


def _default_device() -> torch.device:
    usable = build_info().cuda is not None and torch.cuda.is_available()
    return torch.device("cuda" if usable else "cpu")


# ------------------------------------------------------------------------------ building


def _config(transformers: Any, file: WhisperFile) -> Any:
    sizes = file.sizes
    special = special_tokens(file)
    end = special.get("<|endoftext|>", 0)
    hidden = {
        part: file.tensors.get(f"{part}.blocks.0.mlp.0.bias") for part in ("encoder", "decoder")
    }
    for part, bias in hidden.items():
        if bias is None:
            name = f"{part}.blocks.0.mlp.0.bias"
            raise file.error("the tensor is missing", "convert the model again", tensor=name)
    return transformers.WhisperConfig(
        vocab_size=sizes["n_vocab"],
        num_mel_bins=sizes["n_mels"],
        d_model=sizes["n_audio_state"],
        encoder_layers=sizes["n_audio_layer"],
        encoder_attention_heads=sizes["n_audio_head"],
        encoder_ffn_dim=_numel(hidden["encoder"]),
        max_source_positions=sizes["n_audio_ctx"],
        decoder_layers=sizes["n_text_layer"],
        decoder_attention_heads=sizes["n_text_head"],
        decoder_ffn_dim=_numel(hidden["decoder"]),
        max_target_positions=sizes["n_text_ctx"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=special.get("<|startoftranscript|>", end),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _numel(tensor: GGUFTensor | None) -> int:
    return torch.Size(tensor.shape).numel() if tensor is not None else 0


def _match(model: Any, file: WhisperFile) -> dict[str, GGUFTensor]:
    """The tensor of each of the model's weights, all checked before the first is loaded."""
    wanted = {name: p for name, p in model.named_parameters() if name != HEAD}
    tensors, missing = {}, []
    for name, weight in wanted.items():
        tensor = file.tensors.get(file_name(name))
        if tensor is None:
            missing.append(file_name(name))
            continue
        # Biases of convolutions are [channels, 1] in legacy files.
        if [d for d in tensor.shape if d != 1] != [d for d in weight.shape if d != 1]:
            problem = f"shape {list(tensor.shape)}, expected {list(weight.shape)}"
            raise file.error(problem, "the sizes in the file do not fit it", tensor=tensor.name)
        if tensor.format.is_plain and tensor.format.name not in FLOATS:
            expected = "expected floating-point numbers or quantized blocks"
            raise file.error(f"type {tensor.format.name}, {expected}", tensor=tensor.name)
        tensors[name] = tensor
    if missing:
        others = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
        problem = f"the tensor is missing{others}"
        raise file.error(problem, "the file is cut short or damaged", tensor=missing[0])
    known = {tensor.name for tensor in tensors.values()}
    if unknown := [name for name in file.tensors if name not in known]:
        problem = f"the model has no such weight ({len(unknown)} tensors like this)"
        raise file.error(problem, "the sizes in the file do not fit it", tensor=unknown[0])
    return tensors


def _check_memory(tensors: dict[str, GGUFTensor], device: torch.device, dtype: torch.dtype) -> None:
    """Before anything is loaded, so that a model that does not fit leaves nothing behind."""
    needed = 0
    for tensor in tensors.values():
        plain = tensor.format.is_plain or len(tensor.shape) != 2
        needed += _numel(tensor) * dtype.itemsize if plain else tensor.nbytes
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        problem = f"the weights need {needed:_} bytes, {free:_} are free on {device}"
        raise torch.OutOfMemoryError(f"{problem}: quantize to a smaller type, or use the CPU")


def _place(
    model: Any,
    name: str,
    tensor: GGUFTensor,
    device: torch.device,
    dtype: torch.dtype,
    algo: str,
) -> None:
    """Puts one weight into the model: blocks where the layer can use them, else numbers."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    packed = not tensor.format.is_plain and leaf == "weight" and len(tensor.shape) == 2
    if packed and isinstance(owner, torch.nn.Linear):
        layer = QuantLinear.from_blocks(_blocks(tensor, device), tensor.qtype, None, algo)
        layer.bias = owner.bias  # on the meta device if its turn has not come
        model.set_submodule(owner_name, layer.train(owner.training))
    elif packed and name == TABLE:
        blocks = _blocks(tensor, device)
        table = QuantEmbedding.from_blocks(blocks, tensor.qtype, owner.padding_idx, dtype)
        model.set_submodule(owner_name, table.train(owner.training))
    else:
        old = getattr(owner, leaf)
        numbers = tensor.dequantize(dtype, device).reshape(old.shape)
        setattr(owner, leaf, Parameter(numbers, requires_grad=old.requires_grad))


def _blocks(tensor: GGUFTensor, device: torch.device) -> torch.Tensor:
    """uint8 ``[rows, row_bytes]`` on the device; on the CPU without a copy if it is aligned.

    The ops would copy rows that do not start at a multiple of 16 bytes at every call.
    """
    blocks = tensor.blocks.to(device)
    return blocks if blocks.data_ptr() % 16 == 0 else blocks.clone()


def _tie(model: Any, algo: str) -> None:
    table = model.model.decoder.embed_tokens
    if isinstance(table, QuantEmbedding):
        model.proj_out = table.as_linear(algo=algo)
    else:
        model.proj_out.weight = table.weight


# ------------------------------------------------------------------------------ tokens


def special_tokens(file: WhisperFile) -> dict[str, int]:
    """Ids by name, such as ``<|en|>``. Those that a file does not spell out follow from n_vocab.

    A vocabulary is the text, its end, the start of a transcript, the languages, six more, and the
    time stamps, in this order; one with several languages has one more token of text.
    """
    found = {
        token.decode(): i
        for i, token in enumerate(file.tokens)
        if token.startswith(b"<|") and token.endswith(b"|>")
    }
    if "<|startoftranscript|>" in found:
        return found
    n_vocab = file.sizes["n_vocab"]
    multilingual = n_vocab > BASE_VOCAB + LANGUAGES[0]
    count = n_vocab - BASE_VOCAB - multilingual
    if count not in LANGUAGES:
        return found
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as CODES

    names = ["endoftext", "startoftranscript", *list(CODES)[:count], "translate", "transcribe"]
    names += ["startoflm", "startofprev", "nospeech", "notimestamps"]
    first = n_vocab - TIMESTAMPS - len(names)
    return {f"<|{name}|>": first + i for i, name in enumerate(names)}


def _languages(special: dict[str, int]) -> dict[str, int]:
    """``<|en|>`` and so on: what stands between the start and the tasks."""
    start, end = special["<|startoftranscript|>"], special.get("<|translate|>", 0)
    return {name: i for name, i in special.items() if start < i < end}


def _generation_config(transformers: Any, file: WhisperFile) -> Any:
    special = special_tokens(file)
    if "<|startoftranscript|>" not in special:  # not a vocabulary to generate with
        return transformers.GenerationConfig()
    languages, end = _languages(special), special["<|endoftext|>"]
    # Text comes before the end, time stamps after the last of these: all between is never said.
    silent = [i for i in special.values() if end < i <= special["<|notimestamps|>"]]
    suppress = file.suppress or sorted(silent)
    space = [i for i, token in enumerate(file.tokens) if token == b" "]
    config = transformers.GenerationConfig(
        max_length=file.sizes["n_text_ctx"],
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=special["<|startoftranscript|>"],
        suppress_tokens=suppress,
        begin_suppress_tokens=file.suppress_first or [*space, end],
        return_timestamps=False,
    )
    config.no_timestamps_token_id = special["<|notimestamps|>"]
    config.prev_sot_token_id = special.get("<|startofprev|>")
    config.max_initial_timestamp_index = 50
    config.is_multilingual = file.sizes["n_vocab"] > BASE_VOCAB + LANGUAGES[0]
    if config.is_multilingual:
        config.lang_to_id = languages
        tasks = ("transcribe", "translate")
        config.task_to_id = {task: special[f"<|{task}|>"] for task in tasks}
    return config


# ------------------------------------------------------------------------------ processor


@dataclass(frozen=True)
class WhisperProcessor:
    """PCM to features, ids to text. extractor: transformers' WhisperFeatureExtractor."""

    extractor: Any
    tokens: list[bytes]
    end: int  # ids from here on are not text

    @property
    def chunk_samples(self) -> int:
        """How much of 16 kHz PCM the model hears at a time: 30 s of it."""
        return int(self.extractor.n_samples)

    def features(self, pcm: torch.Tensor) -> torch.Tensor:
        """float32 ``[samples]`` of 16 kHz, at most a chunk, to log-mel ``[1, n_mels, frames]``."""
        if pcm.dim() != 1 or len(pcm) > self.chunk_samples:
            problem = f"expected shape [at most {self.chunk_samples}], got {list(pcm.shape)}"
            raise ValueError(f"pcm: {problem}")
        found = self.extractor(
            pcm.float().cpu().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt"
        )
        features: torch.Tensor = found.input_features
        return features

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """Ids ``[length]`` to text, without special tokens and time stamps."""
        listed = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        return b"".join(self.tokens[i] for i in listed if i < self.end).decode("utf-8", "replace")


def whisper_processor(path: str | os.PathLike[str]) -> WhisperProcessor:
    """The processor of a Whisper file: its tokens, and its mel filters where it has them."""
    transformers = import_transformers("whisper_processor")
    file = open_whisper(path)
    end = special_tokens(file).get("<|endoftext|>", len(file.tokens))
    if len(file.tokens) < end or not file.tokens:
        problem = f"a vocabulary of {len(file.tokens)} tokens, expected at least {max(end, 1)}"
        raise file.error(problem, "convert the model again together with its tokenizer")
    extractor = transformers.WhisperFeatureExtractor(feature_size=file.sizes["n_mels"])
    extractor.n_samples = 2 * file.sizes["n_audio_ctx"] * extractor.hop_length
    extractor.nb_max_frames = 2 * file.sizes["n_audio_ctx"]
    if file.mel_filters is not None and file.mel_filters.shape[1] == FILTER_BANK:
        extractor.mel_filters = file.mel_filters.T.double().numpy()
    return WhisperProcessor(extractor, file.tokens, end)


def transcribe(
    model: Any,
    processor: WhisperProcessor,
    pcm: torch.Tensor,
    language: str | None = None,
    task: str = "transcribe",
) -> Iterator[str]:
    """What is said in 16 kHz PCM, float32 ``[samples]`` of any length, chunk by chunk.

    Chunks are at most 30 s and end where it is quiet; each is transcribed by itself, greedily.
    language: ``"en"``; None: each chunk's is found out; models for English alone take no other.
    task: or ``"translate"``, into English.
    """
    config, options = model.generation_config, {}
    if getattr(config, "is_multilingual", False):
        options = {"task": task} | ({} if language is None else {"language": language})
        if language is not None and f"<|{language}|>" not in config.lang_to_id:
            known = ", ".join(name.strip("<|>") for name in config.lang_to_id)
            raise ValueError(f"language: expected one of {known}, got {language!r}")
    elif language not in (None, "en") or task != "transcribe":
        raise ValueError("language: this model hears English and writes English only")
    for chunk in split_at_pauses(pcm, processor.chunk_samples):
        if chunk.abs().max() < SILENCE:
            continue
        features = processor.features(chunk).to(model.device, model.dtype)
        # Frames of padding are heard, too: Whisper was trained that way.
        ids = model.generate(features, **options)
        if text := processor.decode(ids[0]).strip():
            yield text
