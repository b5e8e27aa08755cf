# SPDX-License-Identifier: MIT
"""Malformed GGUF files: each is refused with a clear GGUFError, in bounded memory and time."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHARED
from gguf_builder import ARR, BOOL, F32, STR, U8, U16, U32, U64, Builder, Packer, every_value

from quantgemm import GGUFError, GGUFFile, open_gguf
from quantgemm.formats import REMOVED_TYPE_IDS, QType
from quantgemm.gguf.rules import MAX_DEPTH, MAX_KEYS, MAX_TENSORS

BAD = SHARED / "gguf" / "bad"
VERDICTS_FILE = BAD / "verdicts.json"
VERDICTS = json.loads(VERDICTS_FILE.read_text()) if VERDICTS_FILE.exists() else {}

# Our choice where docs/gguf.md has one to make ("?" in the verdicts).
POLICY = {
    "arr_nested_1": "accept",
    "bool_ff": "reject",
    "key_utf8_bad": "reject",
    "off_gap": "accept",
    "ok_last_tensor_unpadded": "accept",
    "ok_zero_dim_tensor": "accept",
    "split_count_bad": "reject",
    "tname_empty": "accept",
    "tname_path": "accept",
    "val_str_utf8_bad": "accept",
}


def read_all(path: Path) -> GGUFFile:
    file = open_gguf(path)
    dict(file.metadata)
    for tensor in file.tensors.values():
        assert tensor.blocks.nbytes == tensor.nbytes
    return file


@pytest.mark.skipif(not VERDICTS, reason=f"no malformed files of other tools: {BAD}")
@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_verdicts(name: str) -> None:
    want = VERDICTS[name]["want"]
    path = BAD / f"{name}.gguf"
    if (POLICY[name] if want.endswith("?") else want) == "accept":
        read_all(path)
    else:
        with pytest.raises(GGUFError) as error:
            open_gguf(path)
        assert str(error.value).startswith(f"{path}: ")
        assert error.value.offset is not None


# ------------------------------------------------------------------------------ one fault each


def good() -> Builder:
    return Builder().key("general.name", STR, "x").tensor("w", (4, 8), QType.F32, bytes(128))


def with_key(name: str | bytes, kind: int, value: object) -> Callable[[], Builder]:
    return lambda: good().key(name, kind, value)


def with_tensor(*args: object, data: int = 4096, **more: object) -> Callable[[], Builder]:
    def make() -> Builder:
        file = Builder()
        file.info(*args, **more)  # type: ignore[arg-type]
        file.data = bytes(data)
        return file

    return make


def array(item: int, items: list[object], count: int | None = None) -> bytes:
    return Packer().array(item, items, count)


def alignment(kind: int, value: object) -> Callable[[], Builder]:
    return with_key("general.alignment", kind, value)


def nested(depth: int) -> bytes:
    packed = array(U8, [1])
    for _ in range(depth - 1):
        packed = array(ARR, [packed])
    return packed


F = QType.F32
HUGE = [2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
FAULTS: dict[str, tuple[Callable[[], Builder], str]] = {
    "magic": (lambda: Builder(magic=b"GGML"), "not a GGUF file: it begins with b'GGML', expected"),
    "whisper": (lambda: Builder(magic=b"lmgg"), "opens with open_whisper_bin"),
    "lfs pointer": (lambda: Builder(magic=b"vers"), "git lfs pull"),
    "version 0": (lambda: Builder(0), "at byte 4: GGUF version 0, expected one of 1, 2, 3"),
    "version 4": (lambda: Builder(4), "GGUF version 4.*newer version of quantgemm"),
    "version 4 swapped": (lambda: Builder(4, ">"), "GGUF version 4"),
    "key twice": (with_key("general.name", STR, "y"), "key 'general.name' at byte .* occurs twice"),
    "key empty": (with_key("", U8, 1), "the key is empty"),
    "key not ASCII": (with_key("schlüssel", U8, 1), "printable ASCII"),
    "key not UTF-8": (with_key(b"\xff\xfe", U8, 1), "printable ASCII"),
    "key with NUL": (with_key("a\0b", U8, 1), "printable ASCII"),
    "key with newline": (with_key("a\nb", U8, 1), "printable ASCII"),
    "key too long": (with_key("k" * 65536, U8, 1), "65536 bytes, expected at most 65535"),
    "value type": (with_key("k", 13, b""), "key 'k' at byte .*: value type 13, expected 0 to 12"),
    "item type": (
        with_key("k", ARR, array(U8, [1])[:0] + struct.pack("<IQB", 13, 1, 0)),
        "item type",
    ),
    "bool": (with_key("k", BOOL, b"\2"), "key 'k' at byte .*: bool with byte 2, expected 0 or 1"),
    "bool in an array": (
        with_key("k", ARR, struct.pack("<IQ3B", BOOL, 3, 1, 255, 0)),
        "bool with byte 255, expected 0 or 1",
    ),
    "bool in arrays": (
        with_key("k", ARR, array(ARR, [struct.pack("<IQB", BOOL, 1, 7)])),
        "bool with byte 7",
    ),
    "depth": (with_key("k", ARR, nested(MAX_DEPTH + 1)), "nested more than 8 deep"),
    "alignment 0": (alignment(U32, 0), "'general.alignment' at byte .*power of two from 8 .*got 0"),
    "alignment 4": (alignment(U32, 4), "got 4"),
    "alignment 24": (alignment(U32, 24), "got 24"),
    "alignment 2 MiB": (alignment(U32, 1 << 21), "got 2097152"),
    "alignment u64": (alignment(U64, 32), "expected a u32, got u64"),
    "alignment str": (alignment(STR, "32"), "expected a u32, got str"),
    "alignment array": (alignment(ARR, array(U32, [32])), r"expected a u32, got arr\[u32\]"),
    "tensor twice": (
        lambda: good().tensor("w", (1,), F, bytes(4)),
        "tensor 'w' at .* occurs twice",
    ),
    "name of 64 bytes": (with_tensor("n" * 64, (1,), F, 0), "64 bytes, expected at most 63"),
    "name not UTF-8": (with_tensor(b"\xff", (1,), F, 0), "not valid UTF-8"),
    "name a surrogate": (with_tensor(b"\xed\xa0\x80", (1,), F, 0), "not valid UTF-8"),
    "name with NUL": (with_tensor("a\0b", (1,), F, 0), "contains a NUL"),
    "5 dimensions": (with_tensor("w", (1,) * 5, F, 0), "5 dimensions, expected at most 4"),
    "2^32-1 dimensions": (with_tensor("w", (1,), F, 0, n_dims=2**32 - 1), "4294967295 dimensions"),
    "type 43": (with_tensor("w", (32,), 43, 0), "unknown tensor type 43, expected one of 0 F32"),
    "type 2^32-1": (with_tensor("w", (32,), 2**32 - 1, 0), "unknown tensor type 4294967295"),
    "half a block": (with_tensor("w", (128, 2), QType.Q4_K, 0), "row of 128 .* of 256 for Q4_K"),
    "block type, no dimension": (with_tensor("w", (), QType.Q4_0, 0), "row of 1 weights"),
    "block type, column": (with_tensor("w", (1, 32), QType.Q4_0, 0), "row of 1 weights"),
    "offset unaligned": (
        with_tensor("w", (4,), F, 16),
        "data offset 16, expected a multiple of 32",
    ),
    "offset past the end": (
        with_tensor("w", (4,), F, 4096),
        "ends at byte 4176, but the file has 4160",
    ),
    "offset that wraps": (with_tensor("w", (4,), F, 2**64 - 32), "but the file has 4160 bytes"),
    "data past the end": (with_tensor("w", (1025,), F, 0), "data of 4100 bytes ends at byte 4164"),
    "product wraps to 0": (with_tensor("w", (2**32, 2**32), F, 0), "too large to be addressed"),
    "product wraps": (with_tensor("w", (2**32 + 1, 2**32), F, 0), "too large to be addressed"),
    "bytes wrap": (with_tensor("w", (2**62,), F, 0), "too large to be addressed"),
    "negative dimension": (with_tensor("w", (4, 2**64 - 4), F, 0), "too large to be addressed"),
    "huge times zero": (
        with_tensor("w", (0, 2**61, 12), QType.Q1_0, 0),
        "too large to be addressed",
    ),
    "zero times huge": (with_tensor("w", (2**40, 2**40, 0), F, 0), "too large to be addressed"),
    "same place": (
        lambda: Builder(infos=[], data=bytes(64)).info("a", (8,), F, 0).info("b", (8,), F, 0),
        "tensor 'b' at byte .*: the data overlaps that of tensor 'a'",
    ),
    "overlap": (
        lambda: Builder(data=bytes(128)).info("b", (9,), F, 32).info("a", (9,), F, 0),
        "tensor 'b' at byte .*: the data overlaps that of tensor 'a'",
    ),
    "part without a part's name": (
        with_key("split.count", U16, 3),
        "key 'split.count' at .*one of 3 parts, expected a name like NAME-00001-of-00003.gguf",
    ),
    "split.count a string": (with_key("split.count", STR, "3"), "expected an integer from 0"),
    "split.count a bool": (with_key("split.count", BOOL, b"\1"), "expected an integer from 0"),
}
for removed in REMOVED_TYPE_IDS:
    text = f"tensor type {removed} was removed from GGUF"
    FAULTS[f"type {removed}"] = (with_tensor("w", (32,), removed, 0), text)
for huge in HUGE:
    FAULTS[f"dimension {huge}"] = (
        with_tensor("w", (huge,), QType.I8, 0),
        "too large to be addressed|but the file has 4160 bytes",
    )
    FAULTS[f"{huge} keys"] = (
        lambda n=huge: Builder(n_keys=n, data=bytes(64)),
        "metadata keys need",
    )
    FAULTS[f"{huge} tensors"] = (
        lambda n=huge: Builder(n_tensors=n, data=bytes(64)),
        "tensor infos",
    )
    FAULTS[f"key of {huge}"] = (
        lambda n=huge: Builder(keys=[Packer().string(b"key", n) + bytes(20)]),
        "a metadata key needs|the key has|a metadata key has",
    )
    FAULTS[f"name of {huge}"] = (
        lambda n=huge: Builder(infos=[Packer().string(b"name", n) + bytes(20)], data=bytes(64)),
        "a tensor's name needs",
    )
    FAULTS[f"string of {huge}"] = (
        lambda n=huge: Builder(keys=[Packer().key("k", STR, "")[:-8] + struct.pack("<Q", n)]),
        "key 'k' at byte .*: the string needs",
    )
    for item in (U8, F32, U64, STR, ARR, BOOL):
        FAULTS[f"array of {huge} times {item}"] = (
            with_key("k", ARR, array(item, [], huge)),
            "key 'k' at byte .*: .* items of type",
        )
    FAULTS[f"array with a string of {huge}"] = (
        with_key("k", ARR, struct.pack("<IQQ", STR, 1, huge)),
        "key 'k' at byte .*: an array of 1 strings",
    )
    FAULTS[f"array with, not last, a string of {huge}"] = (
        with_key("k", ARR, struct.pack("<IQQQ", STR, 2, huge, 0)),
        "key 'k' at byte .*: an array of 2 strings",
    )
    FAULTS[f"inner array of {huge}"] = (
        with_key("k", ARR, array(ARR, [array(U16, [], huge)])),
        "key 'k' at byte .*: .* items of type u16",
    )


@pytest.mark.parametrize("name", FAULTS)
def test_faults(tmp_path: Path, name: str) -> None:
    make, text = FAULTS[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(make().build())
    with pytest.raises(GGUFError, match=text) as error:
        open_gguf(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(")"), "no suggestion"
    assert len(message) < 1500
    assert error.value.path == str(path)
    assert error.value.offset is not None
    assert 0 <= error.value.offset <= path.stat().st_size
    assert error.value.where is None or repr(error.value.where)[1:10] in message


def test_the_file_the_faults_are_made_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(good().key("depth", ARR, nested(MAX_DEPTH)).build())
    assert read_all(path).metadata["depth"] == [[[[[[[[1]]]]]]]]


def test_a_gguf_error_tells_where() -> None:
    error = GGUFError("too short", path="m.gguf", offset=7, tensor="w", suggestion="fetch it again")
    assert str(error) == "m.gguf: tensor 'w' at byte 7: too short (fetch it again)"
    assert (error.path, error.offset, error.where) == ("m.gguf", 7, "w")
    assert isinstance(error, ValueError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.offset, copy.where) == (str(error), "m.gguf", 7, "w")
    assert str(GGUFError("odd", key="k" * 999)).startswith("key 'kkkk")
    assert len(str(GGUFError("odd", key="k" * 999))) < 100


@pytest.mark.parametrize("kind", [str, Path, os.fsencode])
def test_paths(tmp_path: Path, kind: Callable[[object], str]) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(good().build())
    if kind is os.fsencode:
        with pytest.raises(TypeError):
            open_gguf(kind(path))
    else:
        assert open_gguf(kind(path)).path == path


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GGUFError, match="not a regular file"):
        open_gguf(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    with pytest.raises(GGUFError, match="the file is empty"):
        open_gguf(tmp_path / "empty")


# ------------------------------------------------------------------------------ truncation


@pytest.mark.parametrize(("version", "endian"), [(1, "<"), (2, "<"), (3, "<"), (3, ">")])
def test_truncation_at_every_byte(tmp_path: Path, version: int, endian: str) -> None:
    file = every_value(version, endian)
    file.tensor("a", (4, 3), QType.F32, bytes(48)).tensor("b", (32,), QType.Q4_0, bytes(18))
    data = file.build()
    path = tmp_path / "cut.gguf"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(GGUFError) as error:
            open_gguf(path)
        assert 0 <= (error.value.offset or 0) <= size
    path.write_bytes(data)
    assert len(read_all(path).tensors) == 2


# ------------------------------------------------------------------------------ memory and time


def many(count: int, make: Callable[[int], bytes]) -> bytes:
    return b"".join(make(i) for i in range(count))


def arrays_of(item: bytes) -> Callable[[int], Builder]:
    """As many tiny arrays as fit into `size` bytes, in one array."""

    def make(size: int) -> Builder:
        count = size // len(item)
        packed = struct.pack("<II", ARR, count) + item * count
        return Builder(1).key("k", ARR, packed)

    return make


def keys(size: int) -> Builder:
    pack = Packer(1)
    names = range(min(MAX_KEYS, size // 13))
    return Builder(1, keys=[pack.key(f"{i:04x}", U8, 7) for i in names])


def tensors(dims: tuple[int, ...], nbytes: int) -> Callable[[int], Builder]:
    def make(size: int) -> Builder:
        pack, step = Packer(1), -(-nbytes // 32) * 32
        names = range(min(MAX_TENSORS, size // (24 + 4 * len(dims))))
        infos = [pack.info(f"{i:04x}", dims, QType.I8, i * step) for i in names]
        return Builder(1, infos=infos, data=bytes(len(infos) * step))

    return make


BURDENS: dict[str, Callable[[int], Builder]] = {
    "empty strings": lambda size: Builder(1).key(
        "k", ARR, struct.pack("<II", STR, size // 4) + bytes(size // 4 * 4)
    ),
    "bools": lambda size: Builder(1).key("k", ARR, struct.pack("<II", BOOL, size) + bytes(size)),
    "empty arrays": arrays_of(struct.pack("<II", U8, 0)),
    "arrays of a bool": arrays_of(struct.pack("<IIB", BOOL, 1, 1)),
    "arrays of a string": arrays_of(struct.pack("<III", STR, 1, 0)),
    "deep arrays": arrays_of(struct.pack("<II", ARR, 1) * (MAX_DEPTH - 2) + bytes(8)),
    "keys": keys,
    "numbers": tensors((), 1),
    "empty tensors": tensors((1, 1, 0, 1), 0),
    "long key": lambda size: Builder(1).key("k" * 65535, STR, "v" * (size - 65600)),
}


@pytest.mark.parametrize("name", BURDENS)
@pytest.mark.parametrize("spoilt", [False, True])
def test_opening_takes_bounded_memory_and_time(tmp_path: Path, name: str, spoilt: bool) -> None:
    """64 MB + 4 bytes per byte, and a second, or one per 10 MB of a larger file."""
    file = BURDENS[name](500_000)
    if spoilt:  # the last thing read is wrong
        last = file.infos or file.keys
        last.append(b"\1\0\0\0x" + b"\xff" * 20)
    data = file.build()
    path = tmp_path / "burden.gguf"
    path.write_bytes(data)

    def attempt() -> GGUFFile | None:
        try:
            return open_gguf(path)
        except GGUFError:
            return None

    start = time.process_time()
    opened = attempt()
    seconds = time.process_time() - start
    assert (opened is None) == spoilt
    del opened
    tracemalloc.start(1)
    attempt()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 64e6 + 4 * len(data)
    assert seconds <= max(1.0, len(data) / 1e7)


@pytest.mark.parametrize(("field", "limit"), [("n_keys", MAX_KEYS), ("n_tensors", MAX_TENSORS)])
def test_counts_are_limited(tmp_path: Path, field: str, limit: int) -> None:
    path = tmp_path / "counts.gguf"
    path.write_bytes(Builder(data=bytes(32 * limit), **{field: limit + 1}).build())
    with pytest.raises(GGUFError, match=rf"{limit + 1} .*, expected at most {limit}"):
        open_gguf(path)
