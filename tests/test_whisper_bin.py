# SPDX-License-Identifier: MIT
"""open_whisper_bin: files of whisper.cpp, and ones packed by hand, valid and malformed."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, random_blocks
from gguf_builder import Builder, Whisper

from quantgemm import GGUFError, open_gguf, open_whisper_bin, save_gguf
from quantgemm.formats import QType, format_by_name

FILES = SHARED / "whisper"
EXPECTED_FILE = FILES / "expected.json"
EXPECTED = json.loads(EXPECTED_FILE.read_text()) if EXPECTED_FILE.exists() else {}
needs_shared = pytest.mark.skipif(not EXPECTED, reason=f"no files of whisper.cpp: {FILES}")


@needs_shared
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_files_of_whisper_cpp(name: str) -> None:
    want = EXPECTED[name]
    file = open_whisper_bin(FILES / name)
    assert file.hparams == want["hparams"]
    assert file.mel_filters.shape == (want["n_mel"], want["n_fft"])
    assert len(file.vocab) == want["n_vocab_in_file"]
    assert list(file.tensors) == list(want["tensors"])
    for key, tensor in want["tensors"].items():
        got = file.tensors[key]
        assert (got.qtype, got.offset, got.nbytes) == (
            tensor["type"],
            tensor["offset"],
            tensor["nbytes"],
        )
        assert list(got.shape) == tensor["ne"][::-1]
        assert hashlib.sha256(got.blocks.numpy().tobytes()).hexdigest() == tensor["sha256"]


@needs_shared
def test_a_real_header() -> None:
    file = open_whisper_bin(FILES / "for-tests-ggml-tiny.en.bin")
    assert file.hparams["n_audio_state"] == 384
    assert file.mel_filters.shape == (80, 201)
    assert float(file.mel_filters.min()) >= 0
    assert len(file.vocab) == 50257
    assert file.vocab[:3] == [b"!", b'"', b"#"]
    assert len(file.tensors) == 0


@needs_shared
def test_another_model_with_the_same_magic() -> None:
    with pytest.raises(GGUFError, match=r"at byte 48: mel filters .*\(other models, such as para"):
        open_whisper_bin(FILES / "for-tests-ggml-parakeet-tdt.bin")


Q4_0 = format_by_name("Q4_0")
BLOCKS = random_blocks(Q4_0, 3, 64)
BIAS = np.arange(5, dtype=np.float32)


def good() -> Whisper:
    """Odd sizes, so that nothing is aligned."""
    file = Whisper().record(b"bias", (5,), QType.F32, BIAS.tobytes())
    file.record(b"weight", (64, 3), Q4_0.type_id, BLOCKS.tobytes())
    return file.record(b"x", (), QType.I8, b"\x07").record(b"none", (0, 3), QType.F16, b"")


def save(tmp_path: Path, file: Whisper) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(file.build())
    return path


@pytest.mark.filterwarnings("error:.*not writable:UserWarning")
def test_everything_in_a_file(tmp_path: Path) -> None:
    path = save(tmp_path, good())
    file = open_whisper_bin(path)
    assert file.path == path
    assert file.hparams["n_vocab"] == 3
    assert file.hparams["n_mels"] == 2
    assert file.hparams["ftype"] == 2002
    assert file.mel_filters.dtype == torch.float32
    assert file.mel_filters.tolist() == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]
    assert file.vocab == [b"a", b"", b"\xff\xfe"]
    assert file.vocab is file.vocab
    assert list(file.tensors) == ["bias", "weight", "x", "none"]
    bias, weight = file.tensors["bias"], file.tensors["weight"]
    assert bias.dequantize().tolist() == BIAS.tolist()
    assert weight.shape == (3, 64)
    np.testing.assert_array_equal(weight.blocks.numpy(), BLOCKS)
    np.testing.assert_array_equal(weight.dequantize().numpy(), Q4_0.decode(BLOCKS))
    assert file.tensors["x"].dequantize().shape == ()
    assert file.tensors["none"].dequantize().shape == (3, 0)
    assert repr(file).endswith("model.bin: 4 tensors, 3 tokens>")


def test_tensors_can_be_saved_as_gguf(tmp_path: Path) -> None:
    file = open_whisper_bin(save(tmp_path, good()))
    save_gguf(tmp_path / "model.gguf", file.tensors, {"general.architecture": "whisper"})
    copy = open_gguf(tmp_path / "model.gguf")
    for name, tensor in file.tensors.items():
        assert torch.equal(copy.tensors[name].blocks, tensor.blocks)
        assert copy.tensors[name].shape == tensor.shape


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, good())
    blocks = open_whisper_bin(path).tensors["weight"].blocks
    path.unlink()
    np.testing.assert_array_equal(blocks.numpy(), BLOCKS)


def hparams(**changes: int) -> Callable[[], Whisper]:
    def make() -> Whisper:
        values = list(Whisper().hparams)
        for name, value in changes.items():
            values[{"n_vocab": 0, "n_text_state": 6, "n_mels": 9, "ftype": 10}[name]] = value
        file = good()
        file.hparams = values
        return file

    return make


def record(*args: object, **more: object) -> Callable[[], Whisper]:
    return lambda: good().record(*args, **more)  # type: ignore[arg-type]


BIG = 2**31 - 1
F32 = QType.F32
FAULTS: dict[str, tuple[Callable[[], Whisper], str]] = {
    "magic": (lambda: Whisper(magic=b"abcd"), "not a whisper .bin file: it begins with b'abcd'"),
    "GGUF": (lambda: Whisper(magic=b"GGUF"), "open it with open_gguf"),
    "negative hparam": (hparams(n_text_state=-1), "at byte 28: n_text_state is -1, expected 0 or"),
    "old quantization": (hparams(ftype=1002), "'weight' .*: quantization version 1, expected 2"),
    "n_mels differs": (hparams(n_mels=3), r"mel filters of 2 by 3, expected 3 \(n_mels\)"),
    "negative filters": (lambda: Whisper(mel=(2, -3)), "mel filters of 2 by -3"),
    "no filters": (lambda: Whisper(mel=(2, 0)), "mel filters of 2 by 0"),
    "huge filters": (lambda: Whisper(mel=(2, BIG)), "mel filters of 2 by 2147483647 needs"),
    "filters whose size wraps": (
        lambda: Whisper(hparams=(3, 16, 64, 4, 1, 8, 64, 4, 1, 2**30, 1), mel=(2**30, 4)),
        "needs 17179869184 bytes",
    ),
    "negative vocabulary": (lambda: Whisper(n_tokens=-1), "a vocabulary of -1 tokens, expected 0"),
    "huge vocabulary": (lambda: Whisper(n_tokens=BIG), "2147483647 tokens need at least"),
    "huge token": (
        lambda: Whisper(n_tokens=2, tokens=(struct.pack("<I", 2**32 - 1),)),
        "a vocabulary of 2 tokens",
    ),
    "negative n_dims": (record(b"w", (), F32, b"", n_dims=-1), "a tensor of -1 dimensions"),
    "5 dimensions": (
        record(b"w", (1,) * 5, F32, b"1234"),
        "a tensor of 5 dimensions, expected 0 to 4",
    ),
    "huge n_dims": (record(b"w", (), F32, b"", n_dims=BIG), "a tensor of 2147483647 dimensions"),
    "negative name": (record(b"w", (1,), F32, b"1234", name_len=-1), "name of -1 bytes"),
    "huge name": (record(b"w", (1,), F32, b"1234", name_len=BIG), "name of 2147483647 bytes"),
    "long name": (record(b"w" * 64, (1,), F32, b"1234"), "name of 64 bytes, expected 0 to 63"),
    "name not UTF-8": (record(b"\xff", (1,), F32, b"1234"), "not valid UTF-8"),
    "name with NUL": (record(b"a\0", (1,), F32, b"1234"), "contains a NUL"),
    "negative dimension": (
        record(b"w", (-1, 4), F32, b""),
        r"negative dimension in shape \(4, -1\)",
    ),
    "product wraps": (record(b"w", (2**30, 4, 2**30, 4), F32, b""), "too large to be addressed"),
    "product wraps to 0": (
        record(b"w", (2**16, 2**16), F32, b""),
        "data of 17179869184 bytes ends",
    ),
    "type 43": (record(b"w", (32,), 43, b""), "unknown tensor type 43"),
    "type -1": (record(b"w", (32,), -1, b""), "unknown tensor type -1"),
    "type removed": (record(b"w", (32,), 4, b""), "tensor type 4 was removed"),
    "half a block": (record(b"w", (16, 2), Q4_0.type_id, bytes(18)), "row of 16 weights"),
    "twice": (record(b"bias", (1,), F32, b"1234"), "tensor 'bias' at byte .* occurs twice"),
    "data missing": (record(b"w", (2,), F32, b"1234567"), "'w' at .*data of 8 bytes ends at byte"),
    "stray bytes": (lambda: Whisper(records=[b"\0" * 11]), "a tensor's head needs 12 bytes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(tmp_path: Path, name: str) -> None:
    make, text = FAULTS[name]
    path = save(tmp_path, make())
    with pytest.raises(GGUFError, match=text) as error:
        open_whisper_bin(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(")"), "no suggestion"
    assert error.value.offset is not None
    assert 0 <= error.value.offset <= path.stat().st_size


def test_plain_tensors_need_no_quantization_version(tmp_path: Path) -> None:
    file = Whisper(hparams=(3, 16, 64, 4, 1, 8, 64, 4, 1, 2, 1))
    path = save(tmp_path, file.record(b"w", (1,), F32, bytes(4)))
    assert len(open_whisper_bin(path).tensors) == 1


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    """A file may end between two tensors, as nothing in it counts them; nowhere else."""
    file = good()
    data = file.build()
    ends, size = set(), len(data)
    for packed in [*reversed(file.records), b""]:
        ends.add(size)
        size -= len(packed)
    path = tmp_path / "cut.bin"
    opened = set()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        try:
            open_whisper_bin(path)
            opened.add(size)
        except GGUFError as error:
            assert 0 <= (error.offset or 0) <= size
    assert opened == ends


@pytest.mark.parametrize("burden", ["tokens", "tensors"])
def test_opening_takes_bounded_memory_and_time(tmp_path: Path, burden: str) -> None:
    file = Whisper()
    if burden == "tokens":
        file.tokens = [b"ab"] * 200_000
    else:
        for i in range(20_000):
            file.record(b"%x" % i, (1, 1), QType.I8, b"1")
    path = save(tmp_path, file)
    size = path.stat().st_size
    start = time.process_time()
    opened = open_whisper_bin(path)
    assert time.process_time() - start <= max(1.0, size / 1e7)
    assert len(opened.tensors) == (0 if burden == "tokens" else 20_000)
    tracemalloc.start(1)
    open_whisper_bin(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 64e6 + 4 * size


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_whisper_bin(tmp_path / "none.bin")
    with pytest.raises(IsADirectoryError):
        open_whisper_bin(tmp_path)
    (tmp_path / "empty.bin").touch()
    with pytest.raises(GGUFError, match="the file is empty"):
        open_whisper_bin(tmp_path / "empty.bin")
    (tmp_path / "model.gguf").write_bytes(Builder().build())
    with pytest.raises(GGUFError, match="open it with open_gguf"):
        open_whisper_bin(tmp_path / "model.gguf")
