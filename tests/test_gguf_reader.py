# SPDX-License-Identifier: MIT
"""open_gguf on good files: those of other tools, of PyPI gguf, and packed by hand."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import mmap
import os
import pickle
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import SHARED, random_blocks
from gguf_builder import ARR, I32, SCALARS, STR, U16, U32, Builder, every_value

from quantgemm import GGUFError, GGUFFile, formats, open_gguf
from quantgemm.formats import FORMATS, QType, format_by_name
from quantgemm.gguf import GGUFValue

# What torch says of tensors made from a read-only mapping.
pytestmark = pytest.mark.filterwarnings("error:.*not writable:UserWarning")

FILES = SHARED / "gguf"
EXPECTED = FILES / "expected.json"
needs_shared = pytest.mark.skipif(not EXPECTED.exists(), reason=f"no files of other tools: {FILES}")
PYPI_CANNOT = {"mixed_v1_le.gguf", "nested_array.gguf"}  # no version 1; flattens nested arrays
EXPECTED_FILES = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}

LAYOUTS = [(1, "<"), (2, "<"), (3, "<"), (1, ">"), (2, ">"), (3, ">")]
BIG_ENDIAN_BLOCKS = ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "NVFP4"]


def save(tmp_path: Path, data: bytes, name: str = "file.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------ other tools' files


@needs_shared
@pytest.mark.parametrize("name", sorted(EXPECTED_FILES))
def test_files_of_other_tools(name: str) -> None:
    want = EXPECTED_FILES[name]
    file = open_gguf(FILES / name)
    assert (file.version, file.byte_order) == (want.get("version", 3), want.get("endian", "little"))
    assert file.alignment == want.get("alignment", 32)
    if "-of-" not in name:
        assert list(file.tensors) == list(want.get("tensors", {}))
    for key, tensor in want.get("tensors", {}).items():
        got = file.tensors[key]
        fmt = format_by_name(PLAIN.get(tensor["type"], tensor["type"]))
        assert got.format is fmt
        shape = tensor["np_shape_bytes"]
        if tensor["type"] in PLAIN:
            assert list(got.shape) == shape
            shape = [*shape[:-1], shape[-1] * fmt.block_bytes]
        assert list(got.blocks.shape) == shape
        assert hashlib.sha256(got.blocks.numpy().tobytes()).hexdigest() == tensor["sha256"]


PLAIN = {"float32": "F32", "float16": "F16", "float64": "F64"} | {
    f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)
}


@needs_shared
@pytest.mark.parametrize("name", sorted(set(EXPECTED_FILES) - PYPI_CANNOT))
def test_metadata_equals_that_of_pypi_gguf(name: str) -> None:
    file = open_gguf(FILES / name)
    fields = gguf.GGUFReader(file.path).fields
    want = {k: v for k, v in fields.items() if not k.startswith(("GGUF.", "split."))}
    assert list(file.metadata) == list(want)
    for key, reader_field in want.items():
        assert file.metadata[key] == reader_field.contents()
        assert file.metadata.type_of(key) == type_name(reader_field.types)


def type_name(types: list[gguf.GGUFValueType]) -> str:
    names = {"STRING": "str", "BOOL": "bool"} | {
        f"{long}{bits}": f"{long[0].lower()}{bits}"
        for long in ("UINT", "INT", "FLOAT")
        for bits in (8, 16, 32, 64)
    }
    return names[types[0].name] if len(types) == 1 else f"arr[{names[types[1].name]}]"


@needs_shared
def test_version_1_of_the_real_writer() -> None:
    file = open_gguf(FILES / "mixed_v1_le.gguf")
    assert file.metadata["general.name"] == "v1 golden"
    assert file.metadata["t.u16"] == 60000
    assert file.metadata.type_of("t.u16") == "u16"


@needs_shared
def test_nested_arrays_of_another_tool() -> None:
    metadata = open_gguf(FILES / "nested_array.gguf").metadata
    assert [i for inner in metadata["t.nested"] for i in inner] == [1, 2, 3, 4, 5]
    assert [s for inner in metadata["t.nested.str"] for s in inner] == ["a", "b", "c"]
    assert metadata.type_of("t.nested") == "arr[arr]"


def test_file_of_pypi_gguf(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 5, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    writer.add_token_list(["a", "ü", "漢字"])
    writer.add_token_scores([0.5, 1.5, -2.0])
    writer.add_uint16("x.u16", 7)
    writer.add_tensor("plain", values)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quantized", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(path)
    assert (file.version, file.byte_order, file.alignment) == (3, "little", 128)
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ü", "漢字"]
    assert file.metadata["tokenizer.ggml.scores"] == [0.5, 1.5, -2.0]
    assert file.metadata.type_of("x.u16") == "u16"
    assert file.tensors["plain"].shape == (3, 5, 64)
    np.testing.assert_array_equal(file.tensors["plain"].dequantize().numpy(), values)
    quantized = file.tensors["quantized"]
    assert quantized.shape == (3, 5, 64)
    assert quantized.qtype == QType.Q8_0
    np.testing.assert_array_equal(quantized.blocks.numpy(), blocks)
    want = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(quantized.dequantize().numpy(), want)


# ------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize(("version", "endian"), LAYOUTS)
def test_every_value_type(tmp_path: Path, version: int, endian: str) -> None:
    file = open_gguf(save(tmp_path, every_value(version, endian).build()))
    assert file.version == version
    assert file.byte_order == {"<": "little", ">": "big"}[endian]
    metadata = file.metadata
    for key, _, value, kind in SCALARS:
        assert metadata[key] == value
        assert type(metadata[key]) is type(value)
        assert metadata[f"{key}.arr"] == [value] * 3
        assert metadata[f"{key}.empty"] == []
        assert metadata.type_of(key) == kind
        assert metadata.type_of(f"{key}.arr") == metadata.type_of(f"{key}.empty") == f"arr[{kind}]"
        assert metadata.typed(f"{key}.arr") == GGUFValue(f"arr[{kind}]", [value] * 3)
        sizes = [metadata.len_of(f"{key}{suffix}") for suffix in ("", ".arr", ".empty")]
        assert sizes == [None, 3, 0]
    inner = [[1, 2], ["a", ""], []]
    assert metadata["t.nested"] == [*inner, inner]
    assert metadata.type_of("t.nested") == "arr[arr]"
    kinds = [value.type for value in metadata.typed("t.nested").value]
    assert kinds == ["arr[i32]", "arr[str]", "arr[arr]", "arr[arr]"]


def test_metadata_is_a_mapping(tmp_path: Path) -> None:
    data = Builder().key("b", U32, 1).key("a", ARR, Builder().pack.array(STR, ["x"])).build()
    metadata = open_gguf(save(tmp_path, data)).metadata
    assert list(metadata) == ["b", "a"]
    assert dict(metadata) == {"b": 1, "a": ["x"]} == metadata
    assert len(metadata) == 2
    assert "a" in metadata
    assert "c" not in metadata
    assert metadata.get("c", 5) == 5
    assert metadata["a"] is metadata["a"]  # decoded once
    assert metadata.to_typed_dict() == {"b": GGUFValue("u32", 1), "a": GGUFValue("arr[str]", ["x"])}
    with pytest.raises(KeyError, match="c"):
        metadata["c"]


def test_strings_that_are_not_utf8_lose_nothing(tmp_path: Path) -> None:
    file = open_gguf(save(tmp_path, Builder().key("k", STR, b"a\xff\xfeb").build()))
    value = file.metadata["k"]
    assert value == "a\udcff\udcfeb"
    assert value.encode("utf-8", "surrogateescape") == b"a\xff\xfeb"


def test_a_large_vocabulary_opens_20_times_faster_than_pypi_gguf(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    words = [f"word{i}" for i in range(15_000)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(words)
    writer.add_token_scores([float(i) for i in range(len(words))])
    writer.add_token_merges([f"{a} {b}" for a, b in pairwise(words)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    def seconds(opener: Any) -> float:
        start = time.process_time()
        opener(path)
        return time.process_time() - start

    ours = min(seconds(open_gguf) for _ in range(5))
    assert ours * 20 < seconds(gguf.GGUFReader)
    file = open_gguf(path)
    assert file.metadata.len_of("tokenizer.ggml.tokens") == len(words)
    assert file.metadata["tokenizer.ggml.tokens"] == words


# ------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_every_format(tmp_path: Path, fmt: formats.Format) -> None:
    cols = 2 * fmt.block_elems
    blocks = random_blocks(fmt, 6, cols)
    data = Builder().tensor("w", (cols, 3, 2), fmt.type_id, blocks.tobytes()).build()
    tensor = open_gguf(save(tmp_path, data)).tensors["w"]
    assert tensor.name == "w"
    assert tensor.qtype == fmt.type_id
    assert tensor.format is fmt
    assert tensor.shape == (2, 3, cols)
    assert tensor.nbytes == blocks.nbytes
    assert tensor.blocks.dtype == torch.uint8
    assert tensor.blocks.shape == (2, 3, fmt.row_bytes(cols))
    np.testing.assert_array_equal(tensor.blocks.numpy().reshape(blocks.shape), blocks)
    want = fmt.decode(blocks).reshape(2, 3, cols)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), want)
    half = tensor.dequantize(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.shape == (2, 3, cols)


@pytest.mark.cuda
def test_dequantize_on_the_gpu(tmp_path: Path) -> None:
    fmt = format_by_name("Q4_K")
    blocks = random_blocks(fmt, 4, 512)
    data = Builder().tensor("w", (512, 4), fmt.type_id, blocks.tobytes()).build()
    got = open_gguf(save(tmp_path, data)).tensors["w"].dequantize(device="cuda")
    assert got.is_cuda
    np.testing.assert_array_equal(got.cpu().numpy(), fmt.decode(blocks))


def test_blocks_are_the_mapped_file_itself(tmp_path: Path) -> None:
    data = (
        Builder()
        .tensor("a", (8,), QType.I8, bytes(range(8)))
        .tensor("b", (8,), QType.I8, bytes(8))
        .build()
    )
    path = save(tmp_path, data)
    file = open_gguf(path)
    a, b = file.tensors["a"], file.tensors["b"]
    assert b.blocks.data_ptr() - a.blocks.data_ptr() == b.offset - a.offset == 32
    assert data[a.offset : a.offset + 8] == bytes(range(8))
    a.blocks[0] = 77  # seen by every view, not by the file
    assert a.blocks[0] == 77
    assert path.read_bytes() == data
    assert open_gguf(path).tensors["a"].blocks[0] == 0


@pytest.mark.parametrize(
    ("dims", "shape", "blocks_shape"),
    [
        ((), (), (4,)),
        ((1,), (1,), (4,)),
        ((0,), (0,), (0,)),
        ((0, 3), (3, 0), (3, 0)),
        ((5, 0), (0, 5), (0, 20)),
        ((5, 0, 2), (2, 0, 5), (2, 0, 20)),
        ((3, 2, 1, 2), (2, 1, 2, 3), (2, 1, 2, 12)),
    ],
)
def test_shapes(
    tmp_path: Path, dims: tuple[int, ...], shape: tuple[int, ...], blocks_shape: tuple[int, ...]
) -> None:
    count = int(np.prod(shape))
    numbers = np.arange(count, dtype=np.float32)
    tensor = open_gguf(
        save(tmp_path, Builder().tensor("t", dims, 0, numbers.tobytes()).build())
    ).tensors["t"]
    assert tensor.shape == shape
    assert tensor.blocks.shape == blocks_shape
    for dtype in (torch.float32, torch.float16):
        values = tensor.dequantize(dtype)
        assert values.dtype == dtype
        assert values.shape == shape
        np.testing.assert_array_equal(values.float().numpy(), numbers.reshape(shape))


def test_data_in_any_order_with_gaps_and_something_behind(tmp_path: Path) -> None:
    file = Builder().info("second", (8,), QType.I8, 64).info("first", (8,), QType.I8, 0)
    file.info("empty", (0,), QType.I8, 32 * 10**9)
    file.data = b"1" * 8 + b"." * 56 + b"2" * 8 + b"trailing"
    tensors = open_gguf(save(tmp_path, file.build())).tensors
    assert list(tensors) == ["second", "first", "empty"]
    assert bytes(tensors["first"].blocks.tolist()) == b"1" * 8
    assert bytes(tensors["second"].blocks.tolist()) == b"2" * 8
    assert tensors["empty"].dequantize().shape == (0,)


@pytest.mark.parametrize("alignment", [8, 64, 4096, 1 << 20])
def test_custom_alignment(tmp_path: Path, alignment: int) -> None:
    file = Builder(alignment=alignment).key("general.alignment", U32, alignment)
    file.tensor("a", (3,), QType.I8, b"abc").tensor("b", (3,), QType.I8, b"def")
    opened = open_gguf(save(tmp_path, file.build()))
    assert opened.alignment == alignment
    assert bytes(opened.tensors["b"].blocks.tolist()) == b"def"
    assert opened.tensors["b"].offset % alignment == 0


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a b", "漢字", "\x1b[31m", "x" * 63])
def test_unusual_names(tmp_path: Path, name: str) -> None:
    file = open_gguf(save(tmp_path, Builder().tensor(name, (1,), QType.I8, b"x").build()))
    assert list(file.tensors) == [name]
    assert "\x1b" not in repr(file.tensors[name])


# ------------------------------------------------------------------------------ byte order


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i1", "i2", "i4", "i8"])
def test_big_endian_numbers(tmp_path: Path, version: int, dtype: str) -> None:
    numbers = np.arange(-12, 12).reshape(4, 6).astype(dtype)
    kind = format_by_name(dtype.upper()[0] + str(8 * int(dtype[1]))).type_id
    file = Builder(version, ">").tensor("t", (6, 4), kind, numbers.astype(f">{dtype}").tobytes())
    tensor = open_gguf(save(tmp_path, file.build())).tensors["t"]
    np.testing.assert_array_equal(tensor.blocks.numpy().view(f"<{dtype}"), numbers)
    np.testing.assert_array_equal(tensor.dequantize().numpy(), numbers.astype(np.float32))


@pytest.mark.parametrize("name", BIG_ENDIAN_BLOCKS)
def test_big_endian_blocks(tmp_path: Path, name: str) -> None:
    """Against the in-place converter that comes with PyPI gguf."""
    convert = pytest.importorskip("gguf.scripts.gguf_convert_endian").byteswap_tensors
    fmt = format_by_name(name)
    blocks = random_blocks(fmt, 3, 2 * fmt.block_elems)

    class Flat:
        data = blocks.reshape(-1).copy()

    for start in range(0, blocks.size, fmt.block_bytes):
        convert[gguf.GGMLQuantizationType[name]](Flat, start)
    file = Builder(3, ">").tensor("t", (2 * fmt.block_elems, 3), fmt.type_id, Flat.data.tobytes())
    tensor = open_gguf(save(tmp_path, file.build())).tensors["t"]
    np.testing.assert_array_equal(tensor.blocks.numpy(), blocks)


def test_big_endian_blocks_nobody_defined(tmp_path: Path) -> None:
    fmt = format_by_name("Q5_K")
    file = Builder(3, ">").tensor("t", (256,), fmt.type_id, bytes(fmt.block_bytes))
    tensor = open_gguf(save(tmp_path, file.build())).tensors["t"]
    with pytest.raises(GGUFError, match="tensor 't' at byte 64: the layout of Q5_K blocks"):
        _ = tensor.blocks
    with pytest.raises(GGUFError, match="little-endian file"):
        tensor.dequantize()


# ------------------------------------------------------------------------------ lifetime and size


def test_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, Builder().tensor("t", (4096,), QType.I8, b"\x05" * 4096).build())
    with open_gguf(path) as file:
        tensor = file.tensors["t"]
        blocks = tensor.blocks
        mapping: mmap.mmap = tensor._file.view.obj
    path.unlink()
    for member in ("metadata", "tensors"):
        with pytest.raises(ValueError, match="closed"):
            getattr(file, member)
    assert repr(file).endswith("closed>")
    with pytest.raises(BufferError):  # nobody can unmap what a view still shows
        mapping.close()
    del file, tensor, mapping
    gc.collect()
    assert int(blocks.sum()) == 5 * 4096


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = 4 * memory // (1 << 20)
    head = Builder().info("big", (1 << 20, rows), QType.I8, 0)
    data = head.info("end", (4,), QType.I8, rows << 20).build()
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as sparse:
        sparse.write(data + bytes(-len(data) % 32))
        start = sparse.tell()
        try:
            sparse.truncate(start + (rows << 20))
        except OSError as error:
            pytest.skip(f"this file system has no sparse files of {rows} MB: {error}")
        sparse.seek(0, os.SEEK_END)
        sparse.write(b"\1\2\3\4")
    file = open_gguf(path)
    assert file.tensors["big"].blocks.shape == (rows, 1 << 20)
    assert int(file.tensors["big"].blocks[rows // 2].sum()) == 0
    assert file.tensors["end"].blocks.tolist() == [1, 2, 3, 4]


def test_a_system_that_never_overcommits_maps_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Builder().tensor("t", (4,), QType.I8, b"1234").build())
    real = mmap.mmap

    def refusing(fd: int, length: int, **how: Any) -> mmap.mmap:
        if how.get("access") != mmap.ACCESS_READ:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(fd, length, **how)

    monkeypatch.setattr("quantgemm.gguf.mapping.mmap.mmap", refusing)
    with pytest.warns(UserWarning, match="not writable"):
        blocks = open_gguf(path).tensors["t"].blocks
    assert bytes(blocks.tolist()) == b"1234"


def test_reprs_and_pickling(tmp_path: Path) -> None:
    file = open_gguf(
        save(tmp_path, Builder().key("k", I32, 1).tensor("t", (4,), 0, bytes(16)).build())
    )
    assert repr(file).endswith("file.gguf: version 3, little-endian, 1 keys, 1 tensors>")
    assert repr(file.tensors["t"]) == "<GGUFTensor 't' F32 [4], 16 bytes>"
    assert "1 keys" in repr(file.metadata)
    with pytest.raises(TypeError, match="pickle its blocks"):
        pickle.dumps(file.tensors["t"])
    with pytest.raises(TypeError):
        file.tensors["new"] = file.tensors["t"]  # type: ignore[index]


# ------------------------------------------------------------------------------ files in parts


def part(names: str, no: int, count: int, total: int) -> bytes:
    """A part with float32 tensors of one-letter names; the first part has a key of its own."""
    file = Builder()
    if no == 0:
        file.key("general.name", STR, "whole")
    file.key("split.no", U16, no).key("split.count", U16, count)
    file.key("split.tensors.count", I32, total)
    for name in names:
        file.tensor(name, (4,), QType.F32, np.full(4, ord(name), np.float32).tobytes())
    return file.build()


def write_parts(tmp_path: Path, **second: Any) -> list[Path]:
    """Three parts; `second` changes what the second one says."""
    paths = [tmp_path / f"m-{no + 1:05}-of-00003.gguf" for no in range(3)]
    for no, (path, names) in enumerate(zip(paths, ("ab", "c", ""), strict=True)):
        says: dict[str, Any] = {"names": names, "no": no, "count": 3, "total": 3}
        path.write_bytes(part(**(says | second if no == 1 else says)))
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_parts_open_through_any_of_them(tmp_path: Path, given: int) -> None:
    paths = write_parts(tmp_path)
    file = open_gguf(paths[given])
    assert isinstance(file, GGUFFile)
    assert list(file.paths) == paths
    assert file.path == paths[0]
    assert dict(file.metadata) == {"general.name": "whole"}
    assert list(file.tensors) == ["a", "b", "c"]
    assert [float(t.dequantize()[0]) for t in file.tensors.values()] == [97, 98, 99]


@needs_shared
@pytest.mark.parametrize("given", [1, 2, 3])
def test_parts_of_another_tool(given: int) -> None:
    file = open_gguf(FILES / f"split-0000{given}-of-00003.gguf")
    whole = open_gguf(FILES / "mixed_v3_le.gguf")
    assert len(file.tensors) == 12
    assert dict(file.metadata) == dict(whole.metadata)
    for name, tensor in file.tensors.items():
        assert torch.equal(tensor.blocks, whole.tensors[name].blocks)


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ({"no": 2}, "key 'split.no' at byte .*: expected 1 in this part, got 2"),
        ({"count": 4}, "'split.count' at byte .*: expected 3 in this part, got 4"),
        ({"count": 0}, "'split.count' at byte .*: expected 3 in this part, got 0"),
        (
            {"total": 9},
            "'split.tensors.count' at byte .*: expected 9 tensors, but all parts have 3",
        ),
        ({"total": -1}, "'split.tensors.count' at byte .*: expected an integer from 0 .* got -1"),
        ({"names": "a"}, "tensor 'a': the tensor occurs in two parts"),
    ],
)
def test_parts_that_disagree(tmp_path: Path, over: dict[str, Any], text: str) -> None:
    paths = write_parts(tmp_path, **over)
    with pytest.raises(GGUFError, match=text) as error:
        open_gguf(paths[0])
    assert error.value.path == str(paths[1])


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(
        GGUFError, match=r"part 2 of 3 is missing.*download all parts into one folder"
    ):
        open_gguf(paths[2])
    with pytest.raises(FileNotFoundError):
        open_gguf(paths[1])


@pytest.mark.parametrize("name", ["renamed.gguf", "m-00001-of-00004.gguf", "m-00002-of-00003.gguf"])
def test_a_part_under_another_name(tmp_path: Path, name: str) -> None:
    paths = write_parts(tmp_path)
    data = paths[0].read_bytes()
    paths[0].unlink()
    with pytest.raises(GGUFError, match=r"expected a name like|is missing|expected 1 in this part"):
        open_gguf(save(tmp_path, data, name))


def test_parts_that_lack_their_keys(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[1].write_bytes(Builder().build())
    with pytest.raises(GGUFError, match=r"'split.count': expected 3 in this part, got None"):
        open_gguf(paths[0])


@pytest.mark.parametrize("count", [0, 1])
def test_one_part_is_an_ordinary_file(tmp_path: Path, count: int) -> None:
    file = Builder().key("split.no", U16, 0).key("split.count", U16, count)
    opened = open_gguf(save(tmp_path, file.build(), "any name.gguf"))
    assert dict(opened.metadata) == {"split.no": 0, "split.count": count}


def test_the_names_of_parts_never_come_from_a_file(tmp_path: Path) -> None:
    """Nor are they patterns: a strangely named part in a strangely named folder opens."""
    folder = tmp_path / "..-00001-of-00002.gguf"
    folder.mkdir()
    for no, names in enumerate("ab"):
        data = part(names, no, 2, 2)
        save(folder, data, f"*[?]%s\n-0000{no + 1}-of-00002.gguf")
    file = open_gguf(folder / "*[?]%s\n-00002-of-00002.gguf")
    assert list(file.tensors) == ["a", "b"]
