# SPDX-License-Identifier: MIT
"""save_gguf and GGUFWriter: what they write reads back the same here and in PyPI gguf."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SHARED, random_blocks
from gguf_builder import every_value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantgemm import GGUFError, GGUFFile, GGUFWriter, open_gguf, save_gguf
from quantgemm.formats import FORMATS, Format, QType, format_by_name
from quantgemm.gguf import GGUFValue
from quantgemm.gguf.rules import MAX_DEPTH

FILES = SHARED / "gguf"
BIG_ENDIAN_FORMATS = ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"]
BIG_ENDIAN_FORMATS += ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4"]
TORCH_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


def assert_same_file(got: GGUFFile, want: GGUFFile) -> None:
    """Metadata with their types, and tensors with their bytes, in the same order."""
    assert list(got.metadata) == list(want.metadata)
    assert got.metadata.to_typed_dict() == want.metadata.to_typed_dict()
    assert list(got.tensors) == list(want.tensors)
    for name, tensor in want.tensors.items():
        assert got.tensors[name].qtype == tensor.qtype
        assert got.tensors[name].shape == tensor.shape
        assert torch.equal(got.tensors[name].blocks, tensor.blocks)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------ round trips


@pytest.mark.skipif(not FILES.exists(), reason=f"no files of other tools: {FILES}")
@pytest.mark.parametrize("path", sorted(FILES.glob("*.gguf")), ids=lambda path: path.name)
def test_files_of_other_tools(tmp_path: Path, path: Path) -> None:
    want = open_gguf(path)
    copy = tmp_path / "copy.gguf"
    save_gguf(copy, want.tensors, want.metadata)
    assert_same_file(open_gguf(copy), want)
    reader = gguf.GGUFReader(copy)
    assert [tensor.name for tensor in reader.tensors] == list(want.tensors)
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == want.tensors[tensor.name].blocks.numpy().tobytes()
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    if "nested" not in path.name:  # which PyPI gguf flattens
        assert fields == dict(want.metadata)


@pytest.mark.parametrize("byte_order", ["little", "big"])
def test_every_value_type(tmp_path: Path, byte_order: str) -> None:
    source = tmp_path / "source.gguf"
    source.write_bytes(every_value().build())
    want = open_gguf(source)
    copy = tmp_path / "copy.gguf"
    save_gguf(copy, {}, want.metadata, byte_order=byte_order)
    got = open_gguf(copy)
    assert (got.version, got.byte_order) == (3, byte_order)
    assert_same_file(got, want)


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_every_format(tmp_path: Path, fmt: Format, byte_order: str) -> None:
    blocks = torch.from_numpy(random_blocks(fmt, 6, fmt.block_elems * 2)).view(2, 3, -1)
    path = tmp_path / "f.gguf"

    def save() -> None:
        save_gguf(path, {"t": (blocks, fmt.type_id)}, byte_order=byte_order)

    if byte_order == "big" and fmt.name not in BIG_ENDIAN_FORMATS:
        with pytest.raises(ValueError, match=f"'t': the layout of {fmt.name} blocks in big-endian"):
            save()
        assert left_over(tmp_path) == []
        return
    save()
    tensor = open_gguf(path).tensors["t"]
    assert tensor.format is fmt
    assert tensor.shape == (2, 3, fmt.block_elems * 2)
    assert torch.equal(tensor.blocks, blocks)
    sizes = gguf.GGML_QUANT_SIZES.get(fmt.type_id)
    if sizes == (fmt.block_elems, fmt.block_bytes):  # not Q8_1, which PyPI gguf gives 40 bytes
        (other,) = gguf.GGUFReader(path).tensors
        assert other.tensor_type == fmt.type_id
        assert other.shape.tolist() == [fmt.block_elems * 2, 3, 2]
        if byte_order == "little":
            assert other.data.tobytes() == blocks.numpy().tobytes()


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 4, 5)])
def test_torch_tensors(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], byte_order: str
) -> None:
    values = (torch.arange(120)[: int(np.prod(shape))] - 40).reshape(shape).to(dtype)
    path = tmp_path / "t.gguf"
    save_gguf(path, {"t": values}, byte_order=byte_order)
    tensor = open_gguf(path).tensors["t"]
    assert tensor.format.name == TORCH_TYPES[dtype]
    assert tensor.shape == shape
    assert torch.equal(tensor.blocks.view(dtype).reshape(shape), values)


def test_tensors_that_are_not_contiguous_or_train(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    matrix = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(matrix.clone())
    save_gguf(path, {"t": matrix.T, "expanded": matrix[:1].expand(5, 4), "parameter": parameter})
    tensors = open_gguf(path).tensors
    assert torch.equal(tensors["t"].dequantize(), matrix.T)
    assert torch.equal(tensors["expanded"].dequantize(), matrix[:1].expand(5, 4))
    assert torch.equal(tensors["parameter"].dequantize(), matrix)


def test_a_file_onto_itself(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    save_gguf(path, {"a": torch.arange(4.0), "b": torch.ones(4)}, {"x": 1})
    file = open_gguf(path)
    save_gguf(path, {"b": file.tensors["b"]}, {**file.metadata.to_typed_dict(), "y": "new"})
    again = open_gguf(path)
    assert dict(again.metadata) == {"x": 1, "y": "new"}
    assert list(again.tensors) == ["b"]
    assert file.tensors["a"].dequantize().tolist() == [0, 1, 2, 3]  # the old file is still mapped


NUMBERS = {f"u{bits}": st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64)}
NUMBERS |= {f"i{b}": st.integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (8, 16, 32, 64)}
NUMBERS |= {"f32": st.floats(width=32, allow_nan=False), "f64": st.floats(allow_nan=False)}
ITEMS = {**NUMBERS, "bool": st.booleans(), "str": st.text(max_size=20)}
SCALAR_VALUES = st.one_of([st.builds(GGUFValue, st.just(t), s) for t, s in ITEMS.items()])
ARRAYS = st.one_of(
    [st.builds(GGUFValue, st.just(f"arr[{t}]"), st.lists(s, max_size=5)) for t, s in ITEMS.items()]
)
NESTED = st.recursive(
    ARRAYS,
    lambda inner: st.builds(GGUFValue, st.just("arr[arr]"), st.lists(inner, max_size=4)),
    max_leaves=8,
)
KEYS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=30)
RESERVED = ("general.alignment", "split.count")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    metadata=st.dictionaries(
        KEYS.filter(lambda key: key not in RESERVED), st.one_of(SCALAR_VALUES, NESTED), max_size=8
    ),
    byte_order=st.sampled_from(["little", "big"]),
)
def test_any_metadata(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, GGUFValue], byte_order: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    save_gguf(path, {}, metadata, byte_order=byte_order)
    got = open_gguf(path).metadata
    assert list(got) == list(metadata)
    assert got.to_typed_dict() == metadata
    assert gguf.GGUFReader(path).fields["GGUF.kv_count"].contents() == len(metadata)


# ------------------------------------------------------------------------------ types of values


def deep(depth: int) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "bool"),
        (0, "u32"),
        (2**32 - 1, "u32"),
        (-1, "i32"),
        (2**32, "u64"),
        (2**64 - 1, "u64"),
        (-(2**31) - 1, "i64"),
        (0.5, "f32"),
        ("x", "str"),
        (b"\xff", "str"),
        ([True, False], "arr[bool]"),
        ([1, -1], "arr[i32]"),
        ([2**31], "arr[u32]"),
        ([2**31, -1], "arr[i64]"),
        ([2**63], "arr[u64]"),
        ([0.5, 1.5], "arr[f32]"),
        ([1, 0.5], "arr[f32]"),
        (("a", "b"), "arr[str]"),
        ([[1], ["a"]], "arr[arr]"),
        (deep(MAX_DEPTH - 1), "arr[arr]"),
        (np.uint8(3), "u8"),
        (np.float64(0.1), "f64"),
        (np.arange(3, dtype=np.int16), "arr[i16]"),
        (np.zeros(0, np.float32), "arr[f32]"),
        (GGUFValue("i8", 5), "i8"),
        (GGUFValue("arr[u16]", []), "arr[u16]"),
    ],
)
def test_default_types(tmp_path: Path, value: Any, kind: str) -> None:
    path = tmp_path / "v.gguf"
    save_gguf(path, {}, {"k": value})
    metadata = open_gguf(path).metadata
    assert metadata.type_of("k") == kind
    plain = value.plain() if isinstance(value, GGUFValue) else value
    plain = plain.tolist() if isinstance(plain, (np.ndarray, np.generic)) else plain
    plain = list(plain) if isinstance(plain, tuple) else plain
    assert metadata["k"] == ("\udcff" if plain == b"\xff" else plain)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, TypeError, "metadata 'k': expected bool, int, float, str, a list .* got NoneType"),
        ({"a": 1}, TypeError, "got dict"),
        ([], ValueError, r"empty list has no item type.*GGUFValue\(\"arr\[str\]\", \[\]\)"),
        ([1, "a"], TypeError, "items of a list must have one type, got int, str"),
        ([True, 1], TypeError, "got bool, int"),
        ([[1], 2], TypeError, "got int, list"),
        (2**64, ValueError, "do not fit in 64 bits"),
        ([-1, 2**63], ValueError, "do not fit in 64 bits"),
        (1e39, ValueError, "does not fit f32"),
        (np.zeros((2, 2)), TypeError, "no metadata type for numpy float64 with 2 dimensions"),
        (np.complex64(1), TypeError, "no metadata type for numpy complex64"),
        (deep(MAX_DEPTH), ValueError, "nested more than 8 deep"),
        (GGUFValue("u8", 256), ValueError, "does not fit u8"),
        (GGUFValue("u8", -1), ValueError, "does not fit u8"),
        (GGUFValue("u8", 1.0), TypeError, "expected numbers that fit u8, got float"),
        (GGUFValue("u8", True), TypeError, "got bool"),
        (GGUFValue("bool", 1), TypeError, "expected bool, got int"),
        (GGUFValue("str", 1), TypeError, "expected str, got int"),
        (GGUFValue("arr[str]", "abc"), TypeError, r"expected a list for arr\[str\], got str"),
        (GGUFValue("arr[arr]", [GGUFValue("u8", 1)]), TypeError, "expected an array .* got u8"),
    ],
)
def test_values_that_cannot_be_written(
    tmp_path: Path, value: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        save_gguf(tmp_path / "v.gguf", {}, {"k": value})
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("kind", ["int", "arr", "arr[arr[u8]]", "U8"])
def test_types_that_do_not_exist(kind: str) -> None:
    with pytest.raises(ValueError, match=r"unknown metadata type .*; known: u8, i8"):
        GGUFValue(kind, 1)


# ------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize(
    ("metadata", "argument", "want", "stored"),
    [
        ({}, None, 32, None),
        ({}, 32, 32, None),
        ({}, 64, 64, 64),
        ({"general.alignment": 128}, None, 128, 128),
        ({"general.alignment": 128}, 128, 128, 128),
        ({"general.alignment": 32}, None, 32, 32),
    ],
)
def test_alignment(
    tmp_path: Path, metadata: dict[str, int], argument: int | None, want: int, stored: int | None
) -> None:
    path = tmp_path / "a.gguf"
    tensors = {"a": torch.ones(3), "b": torch.zeros(5)}
    save_gguf(path, tensors, metadata, alignment=argument)
    file = open_gguf(path)
    assert file.alignment == want
    assert file.metadata.get("general.alignment") == stored
    for name, tensor in tensors.items():
        assert file.tensors[name].offset % want == 0
        assert torch.equal(file.tensors[name].dequantize(), tensor)
    assert path.stat().st_size % want == 0  # ggml wants the last tensor padded too
    assert gguf.GGUFReader(path).alignment == want


@pytest.mark.parametrize(
    ("metadata", "argument", "text"),
    [
        ({}, 0, "alignment: expected a power of two from 8"),
        ({}, 48, "alignment: expected a power of two .* got 48"),
        ({"general.alignment": 4}, None, "alignment: expected a power of two .* got 4"),
        ({"general.alignment": 64}, 32, "got 32, but metadata 'general.alignment' is 64"),
        ({"general.alignment": "32"}, None, "expected a u32, got str"),
    ],
)
def test_alignments_that_are_refused(
    tmp_path: Path, metadata: dict[str, Any], argument: int | None, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        save_gguf(tmp_path / "a.gguf", {}, metadata, alignment=argument)


# ------------------------------------------------------------------------------ streaming


def test_chunks_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    fmt = format_by_name("Q4_0")
    blocks = torch.from_numpy(random_blocks(fmt, 8, 64))
    numbers = torch.arange(10, dtype=torch.int16)
    with GGUFWriter(path, {"k": 1}) as writer:
        writer.declare("blocks", (8, 64), "q4_0")
        writer.declare("numbers", (2, 5), QType.I16)
        writer.declare("raw", [3], FORMATS[QType.F32])
        writer.declare("nothing", (0,), "F32")
        writer.write("numbers", numbers[:3])
        writer.write("blocks", blocks[:5])
        writer.write("raw", np.arange(3, dtype="<f4").tobytes())
        writer.write("numbers", numbers[3:].view(torch.uint8))
        writer.write("blocks", memoryview(blocks[5:].numpy().tobytes()))
        assert left_over(tmp_path) != ["s.gguf"]  # not yet under its name
    assert left_over(tmp_path) == ["s.gguf"]
    tensors = open_gguf(path).tensors
    assert list(tensors) == ["blocks", "numbers", "raw", "nothing"]
    assert torch.equal(tensors["blocks"].blocks, blocks)
    assert torch.equal(tensors["numbers"].blocks.view(torch.int16), numbers.view(2, 5))
    assert tensors["raw"].dequantize().tolist() == [0, 1, 2]
    assert tensors["nothing"].shape == (0,)


@pytest.mark.parametrize("byte_order", ["little", "big"])
@pytest.mark.parametrize("name", ["Q6_K", "F64"])
def test_data_larger_than_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, byte_order: str
) -> None:
    monkeypatch.setattr("quantgemm.gguf.writer._CHUNK", 1000)
    fmt = format_by_name(name)
    blocks = torch.from_numpy(random_blocks(fmt, 7, 5 * fmt.block_elems))
    save_gguf(tmp_path / "f.gguf", {"t": (blocks, name)}, byte_order=byte_order)
    assert torch.equal(open_gguf(tmp_path / "f.gguf").tensors["t"].blocks, blocks)


def nothing(writer: GGUFWriter) -> None:
    pass


def write_half(writer: GGUFWriter) -> None:
    writer.write("w", torch.zeros(4))


def write_too_much(writer: GGUFWriter) -> None:
    writer.write("w", torch.zeros(9))


def write_part_of_a_block(writer: GGUFWriter) -> None:
    writer.write("q", bytes(17))


def write_undeclared(writer: GGUFWriter) -> None:
    writer.write("x", torch.zeros(4))


def write_wrong_dtype(writer: GGUFWriter) -> None:
    writer.write("w", torch.zeros(8, dtype=torch.float64))


def write_numbers_as_blocks(writer: GGUFWriter) -> None:
    writer.write("q", torch.zeros(32))


def write_a_list(writer: GGUFWriter) -> None:
    writer.write("w", [0.0] * 8)  # type: ignore[arg-type]


def declare_late(writer: GGUFWriter) -> None:
    writer.write("w", torch.zeros(8))
    writer.declare("late", (1,), "F32")


def declare_twice(writer: GGUFWriter) -> None:
    writer.declare("w", (1,), "F32")


def declare_long(writer: GGUFWriter) -> None:
    writer.declare("n" * 64, (1,), "F32")


def declare_five_dimensions(writer: GGUFWriter) -> None:
    writer.declare("n", (1,) * 5, "F32")


def declare_negative(writer: GGUFWriter) -> None:
    writer.declare("n", (-1,), "F32")


def declare_half_a_block(writer: GGUFWriter) -> None:
    writer.declare("n", (32, 16), "Q4_0")


def declare_unknown(writer: GGUFWriter) -> None:
    writer.declare("n", (32,), "Q9_9")


def declare_removed(writer: GGUFWriter) -> None:
    writer.declare("n", (32,), 4)


def declare_fraction(writer: GGUFWriter) -> None:
    writer.declare("n", (1.5,), "F32")  # type: ignore[arg-type]


MISUSE: list[tuple[Callable[[GGUFWriter], None], type[Exception], str]] = [
    (nothing, ValueError, "tensor 'w': 0 bytes were written, expected 32"),
    (write_half, ValueError, "tensor 'w': 16 bytes were written, expected 32"),
    (write_too_much, ValueError, r"tensor 'w': 36 bytes, expected 32 for F32 \[8\]"),
    (write_part_of_a_block, ValueError, "'q': 17 bytes, expected a multiple of the 18 of a Q4_0"),
    (write_undeclared, ValueError, "tensor 'x' was not declared"),
    (write_wrong_dtype, TypeError, "'w': expected a F32 tensor, got torch.float64"),
    (write_numbers_as_blocks, TypeError, "'q': expected uint8 blocks, got torch.float32"),
    (write_a_list, TypeError, "'w': expected a torch tensor or bytes, got list"),
    (declare_late, ValueError, "'late': declare every tensor before writing the first"),
    (declare_twice, ValueError, "'w': the tensor is declared twice"),
    (declare_long, ValueError, "64 bytes, expected at most 63"),
    (declare_five_dimensions, ValueError, "5 dimensions, expected at most 4"),
    (declare_negative, ValueError, "negative dimension"),
    (declare_half_a_block, ValueError, "row of 16 weights, expected a multiple of 32 for Q4_0"),
    (declare_unknown, ValueError, "unknown GGUF type 'Q9_9'; known: F32"),
    (declare_removed, ValueError, "was removed from GGUF"),
    (declare_fraction, TypeError, "float"),
]


@pytest.mark.parametrize(
    ("action", "error", "text"), MISUSE, ids=lambda p: getattr(p, "__name__", "")
)
def test_misuse_leaves_the_old_file(
    tmp_path: Path, action: Callable[[GGUFWriter], None], error: type[Exception], text: str
) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error, match=text), GGUFWriter(path) as writer:
        writer.declare("w", (8,), "F32")
        writer.declare("q", (32,), "Q4_0")
        action(writer)
    assert left_over(tmp_path) == ["f.gguf"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "text"),
    [
        (
            {"w": torch.zeros(2, dtype=torch.uint8)},
            {},
            TypeError,
            "'w': expected a GGUFTensor, .*uint8",
        ),
        ({"w": torch.zeros(2, dtype=torch.bool)}, {}, TypeError, "got a torch.bool tensor"),
        ({"w": [1.0]}, {}, TypeError, "got list"),
        ({"w": (torch.zeros(2), "Q4_0")}, {}, TypeError, "expected uint8 blocks .* torch.float32"),
        ({"w": (torch.zeros(17, dtype=torch.uint8), "Q4_0")}, {}, ValueError, "17 bytes"),
        ({}, {"": 1}, ValueError, "metadata '': the key is empty"),
        ({}, {"ü": 1}, ValueError, "metadata 'ü': the key must consist of printable ASCII"),
        ({}, {"split.count": 3}, ValueError, "leave out the split"),
    ],
)
def test_save_gguf_mistakes(
    tmp_path: Path, tensors: Any, metadata: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        save_gguf(tmp_path / "f.gguf", tensors, metadata)
    assert left_over(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        save_gguf(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="no such directory"):
        save_gguf(tmp_path / "none" / "f.gguf", {})
    with pytest.raises(ValueError, match="byte_order: expected 'little' or 'big', got 'native'"):
        save_gguf(tmp_path / "f.gguf", {}, byte_order="native")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_gguf(path, {"w": torch.zeros(4)})
    assert left_over(tmp_path) == ["f.gguf"]
    assert path.read_bytes() == b"old"


def test_an_exception_of_the_user_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), GGUFWriter(tmp_path / "f.gguf") as writer:
        writer.declare("w", (4,), "F32")
        writer.write("w", torch.zeros(2))
        raise KeyboardInterrupt
    assert left_over(tmp_path) == []


def test_close_and_abort(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    writer = GGUFWriter(path)
    writer.close()
    writer.close()
    assert len(open_gguf(path).tensors) == 0
    with pytest.raises(ValueError, match="declare every tensor before"):
        writer.declare("w", (1,), "F32")
    other = GGUFWriter(tmp_path / "g.gguf")
    other.declare("w", (1,), "F32")
    other.abort()
    with pytest.raises(ValueError, match="the writer was closed"):
        other.write("w", torch.zeros(1))
    assert left_over(tmp_path) == ["f.gguf"]


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    save_gguf(tmp_path / "f.gguf", {})
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("f.gguf", "plain")}
    assert len(modes) == 1


def test_what_is_written_is_what_opens(tmp_path: Path) -> None:
    """The writer refuses metadata and tensors in the reader's words, so nothing slips through."""
    path = tmp_path / "f.gguf"
    save_gguf(path, {"": torch.zeros(()), "n" * 63: torch.zeros(1)}, {"k" * 65535: "v"})
    assert len(open_gguf(path).tensors) == 2
    path.write_bytes(path.read_bytes().replace(b"n" * 63, b"n" * 62 + b"\0"))
    with pytest.raises(GGUFError, match="NUL"):
        open_gguf(path)
