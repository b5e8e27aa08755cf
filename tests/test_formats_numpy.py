# SPDX-License-Identifier: MIT
"""The numpy decoders against ggml's vectors, PyPI gguf and plain loops: bit for bit."""

from __future__ import annotations

import copy
import pickle
import re
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from quantgemm import formats
from quantgemm.codebooks import GRID_NAMES, grid
from quantgemm.formats import (
    FORMATS,
    REMOVED_TYPE_IDS,
    Format,
    QType,
    format_by_id,
    format_by_name,
)

gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.filterwarnings("error")  # decoding NaN and inf scales is silent

Floats = npt.NDArray[np.float32]

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

# name, id, weights per block, bytes per block, weights per scale
TABLE_TEXT = """
    F32      0 1 4 1        F16      1 1 2 1        Q4_0     2 32 18 32
    Q4_1     3 32 20 32     Q5_0     6 32 22 32     Q5_1     7 32 24 32
    Q8_0     8 32 34 32     Q8_1     9 32 36 32     Q2_K    10 256 84 16
    Q3_K    11 256 110 16   Q4_K    12 256 144 32   Q5_K    13 256 176 32
    Q6_K    14 256 210 16   Q8_K    15 256 292 256  IQ2_XXS 16 256 66 32
    IQ2_XS  17 256 74 16    IQ3_XXS 18 256 98 32    IQ1_S   19 256 50 32
    IQ4_NL  20 32 18 32     IQ3_S   21 256 110 32   IQ2_S   22 256 82 16
    IQ4_XS  23 256 136 32   I8      24 1 1 1        I16     25 1 2 1
    I32     26 1 4 1        I64     27 1 8 1        F64     28 1 8 1
    IQ1_M   29 256 56 16    BF16    30 1 2 1        TQ1_0   34 256 54 256
    TQ2_0   35 256 66 256   MXFP4   39 32 17 32     NVFP4   40 64 36 16
    Q1_0    41 128 18 128   Q2_0    42 64 18 64
"""
TABLE = [
    (name, *map(int, numbers.split()))
    for name, numbers in re.findall(r"([A-Z]\S*) +([\d ]*\d)", TABLE_TEXT)
]
PLAIN = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
WITH_OFFSET = {"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"}

# byte offsets of the float16 scales of a block (IQ1_M has its own test)
HALVES: dict[str, tuple[int, ...]] = {
    name: (0,)
    for name, *_ in TABLE
    if name not in PLAIN and name not in ("Q8_K", "IQ1_M", "MXFP4", "NVFP4")
}
HALVES |= {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82)}
HALVES |= {"Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}
# +-0, smallest and largest subnormal, 1, largest, +-inf, quiet and signalling NaN
SPECIAL_HALVES = (0, 0x8000, 1, 0x83FF, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7D01)


def assert_same(got: Floats, want: Floats) -> None:
    """Equal values, NaN only where NaN is wanted. The sign of zero is free."""
    assert got.dtype == want.dtype == np.float32
    assert got.shape == want.shape
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} weights differ"


def random_rows(fmt: Format, rows: int, blocks: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng([fmt.type_id, seed])
    return rng.integers(0, 256, (rows, blocks * fmt.block_bytes), dtype=np.uint8)


# ------------------------------------------------------------------------------ oracles


def f16(block: bytes, at: int = 0) -> float:
    (value,) = struct.unpack_from("<e", block, at)
    return float(value)


def loop_q8_k(block: bytes) -> list[float]:
    (d,) = struct.unpack_from("<f", block)
    return [float(np.float32(d) * np.float32(q)) for q in struct.unpack_from("256b", block, 4)]


def loop_q8_1(block: bytes) -> list[float]:
    return [f16(block) * q for q in struct.unpack_from("32b", block, 4)]


def loop_q1_0(block: bytes) -> list[float]:
    return [f16(block) * (1 if block[2 + j // 8] >> j % 8 & 1 else -1) for j in range(128)]


def loop_q2_0(block: bytes) -> list[float]:
    return [f16(block) * ((block[2 + j // 4] >> 2 * (j % 4) & 3) - 1) for j in range(64)]


LOOPS: dict[str, Callable[[bytes], list[float]]] = {
    "Q8_1": loop_q8_1,
    "Q8_K": loop_q8_k,
    "Q1_0": loop_q1_0,
    "Q2_0": loop_q2_0,
    **{
        name: lambda block, code=code: list(struct.unpack("<" + code, block))  # type: ignore[misc]
        for name, code in {"F64": "d", "I8": "b", "I16": "h", "I32": "i", "I64": "q"}.items()
    },
}


def oracle(fmt: Format, rows: npt.NDArray[np.uint8]) -> Floats:
    """Decode [rows, row_bytes] with PyPI gguf where it can, else block by block in Python."""
    with np.errstate(all="ignore"):
        if fmt.name not in LOOPS:
            qtype = gguf.GGMLQuantizationType[fmt.name]
            theirs: Floats = gguf.quants.dequantize(rows, qtype)
            return theirs
        blocks = rows.reshape(-1, fmt.block_bytes)
        y = np.array([LOOPS[fmt.name](b.tobytes()) for b in blocks]).astype(np.float32)
        return y.reshape(len(rows), -1)


ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)


# ------------------------------------------------------------------------------ the table


def test_table() -> None:
    got = [(f.name, i, f.block_elems, f.block_bytes, f.group) for i, f in FORMATS.items()]
    assert got == TABLE  # in order of id
    assert {f.name for f in FORMATS.values() if f.has_offset} == WITH_OFFSET
    assert {f.name for f in FORMATS.values() if f.is_plain} == PLAIN
    assert all(f.type_id == i for i, f in FORMATS.items())


def test_sizes_are_those_of_gguf() -> None:
    theirs = dict(gguf.GGML_QUANT_SIZES)
    del theirs[gguf.GGMLQuantizationType.Q8_1]  # 40 there: d and s were once float32
    for qtype, sizes in theirs.items():
        fmt = format_by_id(qtype.value)
        assert (fmt.name, fmt.block_elems, fmt.block_bytes) == (qtype.name, *sizes)


def test_bits_per_weight() -> None:
    assert format_by_name("F32").bits_per_weight == 32
    assert format_by_name("Q4_0").bits_per_weight == 4.5
    assert format_by_name("Q1_0").bits_per_weight == 1.125


@ALL
def test_row_sizes(fmt: Format) -> None:
    for blocks in (0, 1, 3, 1 << 40):
        assert fmt.row_bytes(blocks * fmt.block_elems) == blocks * fmt.block_bytes
        assert fmt.cols(blocks * fmt.block_bytes) == blocks * fmt.block_elems


def test_row_size_errors() -> None:
    q4_0 = format_by_name("Q4_0")
    with pytest.raises(ValueError, match=r"row of 33 weights .* 32-weight Q4_0 block"):
        q4_0.row_bytes(33)
    with pytest.raises(ValueError, match="row of -32 weights"):
        q4_0.row_bytes(-32)
    with pytest.raises(ValueError, match=r"row of 35 bytes .* 18-byte Q4_0 block"):
        q4_0.cols(35)
    with pytest.raises(ValueError, match="row of -18 bytes"):
        q4_0.cols(-18)


def test_lookup() -> None:
    for type_id, fmt in FORMATS.items():
        assert format_by_id(type_id) is format_by_id(QType(type_id)) is fmt
        assert format_by_name(fmt.name) is format_by_name(fmt.name.lower()) is fmt


def test_lookup_errors() -> None:
    with pytest.raises(ValueError, match=r"unknown GGUF type id 99; known: 0 F32, .*, 42 Q2_0$"):
        format_by_id(99)
    with pytest.raises(ValueError, match=r"unknown GGUF type id -1;"):
        format_by_id(-1)
    with pytest.raises(ValueError, match=r"unknown GGUF type 'Q9_K'; known: F32, .*, Q2_0$"):
        format_by_name("Q9_K")


def test_removed_types() -> None:
    assert set(REMOVED_TYPE_IDS) == {4, 5, 31, 32, 33, 36, 37, 38}
    for type_id, name in REMOVED_TYPE_IDS.items():
        with pytest.raises(
            ValueError, match=rf"id {type_id} \({name}\) was removed .*; known: 0 F"
        ):
            format_by_id(type_id)
        with pytest.raises(ValueError, match=rf"'{name.lower()}' was removed .*; known: F32"):
            format_by_name(name.lower())


def test_qtype() -> None:
    assert issubclass(QType, IntEnum)
    assert QType.Q4_K == 12
    assert {q.name: q.value for q in QType} == {f.name: i for i, f in FORMATS.items()}
    assert pickle.loads(pickle.dumps(QType.Q4_K)) is QType.Q4_K


def test_copies_are_the_same_format() -> None:
    fmt = format_by_name("Q6_K")
    assert copy.deepcopy(fmt) is pickle.loads(pickle.dumps(fmt)) is fmt


def test_a_taken_id_is_refused() -> None:
    with pytest.raises(ValueError, match="Mine: type id 12 is Q4_K's"):
        type("Mine", (Format,), {}, type_id=12, elems=1, nbytes=1)
    assert format_by_id(12).name == "Q4_K"


# ------------------------------------------------------------------------------ codebooks


@pytest.mark.parametrize("name", GRID_NAMES)
def test_grids_are_those_of_gguf(name: str) -> None:
    theirs = getattr(gguf.quants, {"IQ1": "IQ1_S"}.get(name, name))
    theirs.init_grid()
    ours = grid(name)
    assert ours.dtype == np.int8
    assert ours.shape == theirs.grid_shape
    assert np.array_equal(ours, theirs.grid.reshape(theirs.grid_shape))
    assert not ours.flags.writeable


def test_sign_tables() -> None:
    for row, signs in enumerate(formats.SIGNS):
        assert signs.tolist() == [-1 if row >> j & 1 else 1 for j in range(8)]
    for row, signs in enumerate(formats.EVEN_SIGNS):
        assert signs[:7].tolist() == [-1 if row >> j & 1 else 1 for j in range(7)]
        assert signs.prod() == 1
    ksigns = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    assert np.array_equal(formats.EVEN_SIGNS, formats.SIGNS[ksigns])


# ------------------------------------------------------------------------------ decoding


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no ggml vectors at {GOLDEN}")
@pytest.mark.parametrize(
    "name", [name for name, *_ in TABLE if name not in PLAIN] + ["F16", "BF16"]
)
def test_ggml_vectors(name: str) -> None:
    file = name.lower().removesuffix("_k") + ("_K" if name.endswith("_K") else "")
    compared = []
    with np.load(GOLDEN / f"{file}.npz") as vectors:
        for blocks, want in (
            ("rand_blocks", "rand_deq"),
            ("q_chunk", "deq_chunk"),
            ("q_ref", "deq_ref"),
        ):
            if blocks in vectors:
                assert_same(format_by_name(name).decode(vectors[blocks]), vectors[want])
                compared.append(blocks)
    assert "rand_blocks" in compared
    assert len(compared) >= 2


@ALL
@pytest.mark.parametrize("seed", range(3))
def test_random_bytes(fmt: Format, seed: int) -> None:
    """Any bytes at all, so scales of every size, NaN and inf."""
    rows = random_rows(fmt, rows=64, blocks=16, seed=seed)
    assert_same(fmt.decode(rows), oracle(fmt, rows))


@pytest.mark.parametrize("name", HALVES)
def test_special_scales(name: str) -> None:
    fmt = format_by_name(name)
    pairs = [(d, m) for d in SPECIAL_HALVES for m in SPECIAL_HALVES]
    rows = random_rows(fmt, rows=len(pairs), blocks=1)
    for row, values in zip(rows, pairs, strict=True):
        for at, value in zip(HALVES[name], values, strict=False):
            row[at : at + 2] = value & 255, value >> 8
    assert_same(fmt.decode(rows), oracle(fmt, rows))


def test_iq1_m_special_scales() -> None:
    """d is spread over the top nibbles of four u16."""
    fmt = format_by_name("IQ1_M")
    rows = random_rows(fmt, rows=len(SPECIAL_HALVES), blocks=1)
    for row, value in zip(rows, SPECIAL_HALVES, strict=True):
        for piece in range(4):
            top = row[48 + 2 * piece + 1 :][:1]
            top[:] = top & 15 | (value >> 4 * piece & 15) << 4
    y = fmt.decode(rows)
    assert_same(y, oracle(fmt, rows))
    assert (y[:2] == 0).all()
    assert np.isinf(y[7:9]).all()
    assert np.isnan(y[9:]).all()


def test_mxfp4_exponents() -> None:
    fmt = format_by_name("MXFP4")
    rows = random_rows(fmt, rows=256, blocks=1)
    rows[:, 0] = range(256)
    rows[:, 1] = 0x21  # weights 0 and 16 are code 1 and 2: the scale and twice the scale
    y = fmt.decode(rows)
    assert_same(y, oracle(fmt, rows))
    assert [float(v) for v in y[:, 0]] == [2.0 ** (e - 128) for e in range(256)]
    assert y[255, 16] == np.inf  # 2^128 overflows, but 2^127 is a number


def test_nvfp4_scale_bytes() -> None:
    fmt = format_by_name("NVFP4")
    rows = random_rows(fmt, rows=256, blocks=1)
    rows[:, 1] = range(256)
    rows[:, 12] = 0x01  # weight 16 is code 1: half the scale
    y = fmt.decode(rows)
    assert_same(y, oracle(fmt, rows))
    scales = {byte: float(y[byte, 16]) * 2 for byte in (0, 1, 8, 0x38, 0x7E, 0x7F, 0x80, 0xFF)}
    assert list(scales.values()) == [0, 2**-9, 2**-6, 1, 448, 0, 0, 480]


def test_tq1_0_every_byte() -> None:
    """All 256 bytes decode, the 13 that stand for no five digits too."""
    fmt = format_by_name("TQ1_0")
    rows = np.zeros((256, fmt.block_bytes), np.uint8)
    rows[:, :52] = np.arange(256)[:, None]
    rows[:, 52:] = 0x00, 0x3C  # d = 1
    y = fmt.decode(rows)
    for byte in range(256):
        digits = [((byte * 3**n & 255) * 3 >> 8) - 1 for n in range(5)]
        want = np.concatenate(
            [np.repeat(digits, 32), np.repeat(digits, 16), np.repeat(digits[:4], 4)]
        )
        assert np.array_equal(y[byte], want)


def test_floats_keep_their_special_values() -> None:
    bf16 = np.array([0x3F80, 0x0001, 0x7F80, 0xFF80, 0x7FC0, 0x8000], "<u2").view(np.uint8)
    want = np.array([1, 2.0**-133, np.inf, -np.inf, np.nan, 0], np.float32)
    assert_same(format_by_name("BF16").decode(bf16), want)
    f64 = np.array([1e300, -1e300, 1e-300, 1 / 3, np.nan], "<f8").view(np.uint8)
    want = np.array([np.inf, -np.inf, 0, 1 / 3, np.nan], np.float32)
    assert_same(format_by_name("F64").decode(f64), want)


@ALL
def test_decode_is_scale_times_code_plus_offset(fmt: Format) -> None:
    if fmt.is_plain:
        with pytest.raises(NotImplementedError, match=f"{fmt.name} has no codes"):
            fmt.codes(random_rows(fmt, 1, 1))
        return
    blocks = random_rows(fmt, rows=50, blocks=1)
    codes = fmt.codes(blocks)
    assert codes.dtype == np.int8
    assert codes.shape == (50, fmt.block_elems)
    with np.errstate(all="ignore"):
        scales = fmt.scales(blocks)
        assert scales.dtype == np.float32
        assert scales.shape == (50, fmt.block_elems // fmt.group)
        y = codes.astype(np.float32) * np.repeat(scales, fmt.group, axis=1)
        if fmt.has_offset:
            y = y + np.repeat(fmt.offsets(blocks), fmt.group, axis=1)
    assert_same(fmt.decode(blocks), y)


# ------------------------------------------------------------------------------ shapes


@ALL
def test_shapes(fmt: Format) -> None:
    rows = random_rows(fmt, rows=6, blocks=3)
    want, cols = oracle(fmt, rows), 3 * fmt.block_elems
    assert_same(fmt.decode(rows[0]), want[0])
    assert_same(fmt.decode(rows.reshape(2, 3, -1)), want.reshape(2, 3, cols))
    assert_same(fmt.decode(rows.reshape(1, 2, 3, 1, -1)), want.reshape(1, 2, 3, 1, cols))
    assert_same(fmt.decode(rows[:0]), want[:0])
    assert_same(fmt.decode(np.zeros((4, 0, rows.shape[1]), np.uint8)), want[:0].reshape(4, 0, cols))
    assert_same(fmt.decode(rows[:, :0]), want[:, :0])


@ALL
def test_strided_and_read_only_input(fmt: Format) -> None:
    rows = random_rows(fmt, rows=6, blocks=4)
    half = 2 * fmt.block_bytes
    assert_same(fmt.decode(rows[::-2, half:]), oracle(fmt, rows[::-2, half:].copy()))
    rows.flags.writeable = False
    before = rows.tobytes()
    out = fmt.decode(rows)
    assert_same(out, oracle(fmt, rows))
    assert out.flags.writeable
    assert not np.shares_memory(out, rows)
    assert rows.tobytes() == before


@ALL
def test_chunks_do_not_show(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(fmt, rows=7, blocks=5)
    want = fmt.decode(rows)
    for chunk in (1, 3 * fmt.block_elems):
        monkeypatch.setattr(formats, "CHUNK_WEIGHTS", chunk)
        assert_same(fmt.decode(rows), want)


def test_decode_errors() -> None:
    fmt = format_by_name("Q4_0")
    with pytest.raises(TypeError, match="blocks: expected uint8, got int8"):
        fmt.decode(np.zeros((2, 18), np.int8))
    with pytest.raises(ValueError, match="blocks: expected at least one dimension"):
        fmt.decode(np.array(0, np.uint8))
    with pytest.raises(ValueError, match=r"row of 35 bytes .* 18-byte Q4_0 block"):
        fmt.decode(np.zeros((18, 35), np.uint8))
