# SPDX-License-Identifier: MIT
"""Every GGUF tensor type: one class each, its block layout in the docstring, its decoder in numpy.

A row of weights is a sequence of equal blocks, and every block type is one sentence:

    weight = scale * code + offset      (code a small integer; scale, offset shared by a group)

so a class gives its sizes and `codes`, `scales` and, where there is one, `offsets`. Defining the
class registers it. Byte pictures name fields in order, with their bytes: [d 2] is a float16 in two
bytes. All numbers are little-endian. This module needs numpy only and shares nothing with the C++
decoders, so that each can check the other.
"""

from __future__ import annotations

from enum import EnumMeta, IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .codebooks import grid

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]
AnyInts = npt.NDArray[np.integer[Any]]  # all that numpy's stubs know about uint8 << 4

CHUNK_WEIGHTS = 1 << 18  # decoded at a time, so that temporaries stay small and in cache

FORMATS: dict[int, Format] = {}
REMOVED_TYPE_IDS = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}


class Format:
    """A GGUF type: name, sizes and decoder. Its only instance is in FORMATS, under its id."""

    name: str  # ggml's spelling: 'Q4_K'
    type_id: int
    block_elems: int
    block_bytes: int
    group: int  # consecutive weights sharing one scale
    has_offset: bool
    is_plain: bool = False  # one number per weight: no blocks, no scales
    d_at: int = 0  # byte offset of d, for formats with one scale per block, a float16

    def __init_subclass__(
        cls, type_id: int | None = None, elems: int = 1, nbytes: int = 0, group: int = 1
    ) -> None:
        if type_id is None:  # a shared base
            return
        cls.name, cls.type_id, cls.group = cls.__name__, type_id, group
        cls.block_elems, cls.block_bytes = elems, nbytes
        cls.has_offset = cls.offsets is not Format.offsets
        if type_id in FORMATS:
            raise ValueError(f"{cls.name}: type id {type_id} is {FORMATS[type_id].name}'s")
        FORMATS[type_id] = cls()

    def __repr__(self) -> str:
        return f"<{self.name}: {self.block_elems} weights in {self.block_bytes} bytes>"

    def __reduce__(self) -> tuple[Any, ...]:
        return format_by_id, (self.type_id,)  # copies and pickles are this same object

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_elems

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights."""
        if cols < 0 or cols % self.block_elems:
            raise ValueError(
                f"row of {cols} weights is not a multiple of "
                f"the {self.block_elems}-weight {self.name} block"
            )
        return cols // self.block_elems * self.block_bytes

    def cols(self, row_bytes: int) -> int:
        """Weights in a row of `row_bytes` bytes."""
        if row_bytes < 0 or row_bytes % self.block_bytes:
            raise ValueError(
                f"row of {row_bytes} bytes is not a multiple of "
                f"the {self.block_bytes}-byte {self.name} block"
            )
        return row_bytes // self.block_bytes * self.block_elems

    def decode(self, blocks: npt.NDArray[Any]) -> Floats:
        """Decode uint8 [..., row_bytes] to float32 [..., cols]."""
        if blocks.dtype != np.uint8:
            raise TypeError(f"blocks: expected uint8, got {blocks.dtype}")
        if blocks.ndim == 0:
            raise ValueError("blocks: expected at least one dimension, got a scalar")
        shape = (*blocks.shape[:-1], self.cols(blocks.shape[-1]))
        rows = np.ascontiguousarray(blocks).reshape(-1, self.block_bytes)
        out = np.empty((len(rows), self.block_elems), np.float32)
        step = max(1, CHUNK_WEIGHTS // self.block_elems)
        with np.errstate(over="ignore", invalid="ignore"):  # NaN and inf scales are legal
            for i in range(0, len(rows), step):
                out[i : i + step] = self.decode_blocks(rows[i : i + step])
        return out.reshape(shape)

    def decode_blocks(self, b: Bytes) -> Floats:
        """[n, block_bytes] -> [n, block_elems]"""
        groups = (len(b), self.block_elems // self.group, self.group)
        y = self.codes(b).astype(np.float32).reshape(groups)
        y *= self.scales(b)[:, :, None]
        if self.has_offset:
            y += self.offsets(b)[:, :, None]
        return y.reshape(len(b), self.block_elems)

    def codes(self, b: Bytes) -> Ints:
        """[n, block_bytes] -> the integers, in weight order, [n, block_elems]"""
        raise NotImplementedError(f"{self.name} has no codes")

    def scales(self, b: Bytes) -> Floats:
        """[n, block_bytes] -> [n, block_elems / group]"""
        return half(b, self.d_at)

    def offsets(self, b: Bytes) -> Floats:
        """[n, block_bytes] -> [n, block_elems / group]"""
        raise NotImplementedError(f"{self.name} has no offsets")


def format_by_id(type_id: int) -> Format:
    """The format with ggml id `type_id`."""
    if type_id in FORMATS:
        return FORMATS[type_id]
    if type_id in REMOVED_TYPE_IDS:
        what = f"GGUF type id {type_id} ({REMOVED_TYPE_IDS[type_id]}) was removed from GGUF"
    else:
        what = f"unknown GGUF type id {type_id}"
    raise ValueError(f"{what}; known: {', '.join(f'{i} {f.name}' for i, f in FORMATS.items())}")


def format_by_name(name: str) -> Format:
    """The format called `name`, in any case."""
    for fmt in FORMATS.values():
        if fmt.name.upper() == name.upper():
            return fmt
    removed = name.upper() in REMOVED_TYPE_IDS.values()
    what = f"GGUF type {name!r} was removed from GGUF" if removed else f"unknown GGUF type {name!r}"
    raise ValueError(f"{what}; known: {', '.join(f.name for f in FORMATS.values())}")


# ------------------------------------------------------------------------------ reading fields


def fields(b: Bytes, bits: int, run: int = 1) -> Bytes:
    """Split bytes into fields of `bits` bits: [n, bytes] -> [n, bytes * 8 / bits].

    A run of `run` bytes first gives the lowest field of each byte, then the next field of each,
    and so on; then comes the next run. So run=1 reads a little-endian bit string, and 4 bits with
    run=16 reads 16 low nibbles, then the 16 high ones.
    """
    if bits == run == 1:
        return np.unpackbits(b, axis=1, bitorder="little")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = b.reshape(len(b), -1, 1, run) >> shifts
    planes &= np.uint8((1 << bits) - 1)
    return planes.reshape(len(b), -1)


def half(b: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block, [n, 1]."""
    return b[:, at : at + 2].view("<f2").astype(np.float32)


def centred(q: AnyInts, zero: int) -> Ints:
    """uint8 codes q as int8 q - zero."""
    signed: Ints = q.view(np.int8) - np.int8(zero)
    return signed


def lookup(table: Ints, idx: AnyInts) -> Ints:
    """table[idx] flattened per block: [points(, dims)] at [n, k] -> [n, k * dims]."""
    return table.take(idx, axis=0).reshape(len(idx), -1)


# ------------------------------------------------------------------------------ plain numbers


class Plain(Format):
    """One little-endian number of type `dtype` per weight, converted to float32."""

    is_plain = True
    dtype: str

    def decode_blocks(self, b: Bytes) -> Floats:
        return b.view(self.dtype).astype(np.float32)


class F32(Plain, type_id=0, nbytes=4):
    dtype = "<f4"


class F16(Plain, type_id=1, nbytes=2):
    dtype = "<f2"


class BF16(Plain, type_id=30, nbytes=2):
    """The upper half of a float32."""

    def decode_blocks(self, b: Bytes) -> Floats:
        return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


class F64(Plain, type_id=28, nbytes=8):
    dtype = "<f8"


class I8(Plain, type_id=24, nbytes=1):
    dtype = "<i1"


class I16(Plain, type_id=25, nbytes=2):
    dtype = "<i2"


class I32(Plain, type_id=26, nbytes=4):
    dtype = "<i4"


class I64(Plain, type_id=27, nbytes=8):
    dtype = "<i8"


# ------------------------------------------------------------------------------ blocks of 32 .. 128


class Q4_0(Format, type_id=2, elems=32, nbytes=18, group=32):
    """[d 2][qs 16]: y = d * (q - 8).

    Byte j of qs holds weight j in its low nibble and weight j + 16 in its high one.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 2:], 4, run=16), 8)


class Q4_1(Format, type_id=3, elems=32, nbytes=20, group=32):
    """[d 2][m 2][qs 16]: y = d * q + m, nibbles as in Q4_0."""

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 4:], 4, run=16), 0)

    def offsets(self, b: Bytes) -> Floats:
        return half(b, 2)


class Q5_0(Format, type_id=6, elems=32, nbytes=22, group=32):
    """[d 2][qh 4][qs 16]: y = d * (q - 16).

    The low four bits of q are nibbles as in Q4_0; the fifth is bit j of qh for weight j.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 6:], 4, run=16) | fields(b[:, 2:6], 1) << 4, 16)


class Q5_1(Format, type_id=7, elems=32, nbytes=24, group=32):
    """[d 2][m 2][qh 4][qs 16]: y = d * q + m, with the bits of Q5_0."""

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 8:], 4, run=16) | fields(b[:, 4:8], 1) << 4, 0)

    def offsets(self, b: Bytes) -> Floats:
        return half(b, 2)


class Q8_0(Format, type_id=8, elems=32, nbytes=34, group=32):
    """[d 2][qs 32]: y = d * q, q int8."""

    def codes(self, b: Bytes) -> Ints:
        return centred(b[:, 2:], 0)


class Q8_1(Format, type_id=9, elems=32, nbytes=36, group=32):
    """[d 2][s 2][qs 32]: y = d * q, q int8. An activation type.

    s is d times the sum of q, the term that a product with an offset format needs.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(b[:, 4:], 0)


class Q1_0(Format, type_id=41, elems=128, nbytes=18, group=128):
    """[d 2][qs 16]: y = d * (2 q - 1): bit j of qs is the sign of weight j, 1 for plus."""

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 2:], 1) << 1, 1)


class Q2_0(Format, type_id=42, elems=64, nbytes=18, group=64):
    """[d 2][qs 16]: y = d * (q - 1), a byte holding four consecutive weights, lowest bits first."""

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 2:], 2), 1)


# ------------------------------------------------------------------------------ K: blocks of 256


class Q2_K(Format, type_id=10, elems=256, nbytes=84, group=16):
    """[sc 16][qs 64][d 2][dmin 2]: y = d * low(sc) * q - dmin * high(sc), nibbles of sc.

    Each half block of 128 has 32 bytes of qs: byte l holds weights l, l+32, l+64, l+96 of the
    half, lowest bits first.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 16:80], 2, run=32), 0)

    def scales(self, b: Bytes) -> Floats:
        return half(b, 80) * (b[:, :16] & 15)

    def offsets(self, b: Bytes) -> Floats:
        return -half(b, 82) * (b[:, :16] >> 4)


class Q3_K(Format, type_id=11, elems=256, nbytes=110, group=16):
    """[hmask 32][qs 64][sc 12][d 2]: y = d * (s - 32) * (q - 4).

    q: two bits in qs as in Q2_K, the third in bit g of hmask[l] for weight 32 g + l.
    s: sixteen 6-bit scales; the low four bits are 8 low nibbles, then 8 high ones, of sc[0:8];
    the upper two are the 2-bit fields of sc[8:12], lowest of all four bytes first.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 32:96], 2, run=32) | fields(b[:, :32], 1, run=32) << 2, 4)

    def scales(self, b: Bytes) -> Floats:
        s = fields(b[:, 96:104], 4, run=8) | fields(b[:, 104:108], 2, run=4) << 4
        return half(b, 108) * centred(s, 32)


class ScaleMinK(Format):
    """[d 2][dmin 2][sc 12] ...: y = d * s * q - dmin * m, s and m 6-bit numbers per 32 weights.

    sc[0:4] and sc[4:8] hold s and m of groups 0-3 in their low six bits; sc[8:12] the low four
    bits of s (low nibble) and m (high nibble) of groups 4-7, whose upper two bits are the spare
    ones of sc[0:4] and sc[4:8].
    """

    def scales(self, b: Bytes) -> Floats:
        first, low = b[:, 4:8], b[:, 12:16] & 15
        return half(b, 0) * np.hstack((first & 63, first >> 6 << 4 | low))

    def offsets(self, b: Bytes) -> Floats:
        first, low = b[:, 8:12], b[:, 12:16] >> 4
        return -half(b, 2) * np.hstack((first & 63, first >> 6 << 4 | low))


class Q4_K(ScaleMinK, type_id=12, elems=256, nbytes=144, group=32):
    """[d 2][dmin 2][sc 12][qs 128]: y = d * s * q - dmin * m.

    Each 32 bytes of qs hold 64 weights: the first 32 in the low nibbles, the rest in the high.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 16:], 4, run=32), 0)


class Q5_K(ScaleMinK, type_id=13, elems=256, nbytes=176, group=32):
    """[d 2][dmin 2][sc 12][qh 32][qs 128]: y = d * s * q - dmin * m.

    q: nibbles as in Q4_K, the fifth bit in bit g of qh[l] for weight 32 g + l.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, 48:], 4, run=32) | fields(b[:, 16:48], 1, run=32) << 4, 0)


class Q6_K(Format, type_id=14, elems=256, nbytes=210, group=16):
    """[ql 128][qh 64][sc 16][d 2]: y = d * sc * (q - 32), sc int8.

    Each half block of 128: nibbles in 64 bytes of ql (64 low, then 64 high), the upper two bits
    in 32 bytes of qh, arranged like qs of Q2_K.
    """

    def codes(self, b: Bytes) -> Ints:
        q = fields(b[:, :128], 4, run=64) | fields(b[:, 128:192], 2, run=32) << 4
        return centred(q, 32)

    def scales(self, b: Bytes) -> Floats:
        return half(b, 208) * b[:, 192:208].view(np.int8)


class Q8_K(Format, type_id=15, elems=256, nbytes=292, group=256):
    """[d 4][qs 256][bsums 32]: y = d * q, d float32, q int8. An activation type.

    bsums are the int16 sums of each 16 codes.
    """

    def codes(self, b: Bytes) -> Ints:
        return centred(b[:, 4:260], 0)

    def scales(self, b: Bytes) -> Floats:
        return b[:, :4].view("<f4").astype(np.float32)


# ------------------------------------------------------------------------------ IQ: codebooks

# 16 values, denser around zero; the index is a nibble
NONLINEAR = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8
)
# SIGNS[byte]: eight factors, -1 where the byte has a one, lowest bit first
SIGNS: Ints = 1 - 2 * fields(np.arange(256, dtype=np.uint8)[:, None], 1).view(np.int8)
# EVEN_SIGNS[seven bits]: the eighth factor makes the number of minus signs even
EVEN_SIGNS = SIGNS[:128].copy()
EVEN_SIGNS[:, 7] = EVEN_SIGNS.prod(axis=1)


def odd_scales(d: Floats, s: AnyInts, unit: float) -> Floats:
    """d * (2 s + 1) * unit"""
    scale: Floats = d * (2 * s.astype(np.float32) + 1) * np.float32(unit)
    return scale


class SignedGrid32(Format):
    """Per 32 weights a u32 `word`: four 7-bit sign fields, lowest first, then a 4-bit scale s."""

    def words(self, b: Bytes) -> npt.NDArray[np.uint32]:
        """[n, block_bytes] -> [n, 8]"""
        raise NotImplementedError

    def signs(self, b: Bytes) -> Ints:
        shifts = np.array((0, 7, 14, 21), np.uint32)
        idx = self.words(b)[:, :, None] >> shifts & 127
        return lookup(EVEN_SIGNS, idx.reshape(len(b), 32))


class IQ2_XXS(SignedGrid32, type_id=16, elems=256, nbytes=66, group=32):
    """[d 2] then 8 times [idx 4][word 4]: y = d * (2 s + 1) / 8 * sign * grid[idx].

    An index picks eight weights; signs and s come from the word (see SignedGrid32).
    """

    def words(self, b: Bytes) -> npt.NDArray[np.uint32]:
        return b[:, 2:].view("<u4")[:, 1::2]

    def codes(self, b: Bytes) -> Ints:
        idx = b[:, 2:].reshape(-1, 8, 8)[:, :, :4].reshape(-1, 32)
        return lookup(grid("IQ2_XXS"), idx) * self.signs(b)

    def scales(self, b: Bytes) -> Floats:
        return odd_scales(half(b, 0), self.words(b) >> 28, 1 / 8)


class IQ3_XXS(SignedGrid32, type_id=18, elems=256, nbytes=98, group=32):
    """[d 2][idx 64][word 32]: y = d * (2 s + 1) / 4 * sign * grid[idx].

    An index picks four weights; signs and s come from the words (see SignedGrid32).
    """

    def words(self, b: Bytes) -> npt.NDArray[np.uint32]:
        return b[:, 66:].view("<u4")

    def codes(self, b: Bytes) -> Ints:
        return lookup(grid("IQ3_XXS"), b[:, 2:66]) * self.signs(b)

    def scales(self, b: Bytes) -> Floats:
        return odd_scales(half(b, 0), self.words(b) >> 28, 1 / 4)


class IQ2_XS(Format, type_id=17, elems=256, nbytes=74, group=16):
    """[d 2][qs 64][sc 8]: y = d * (2 s + 1) / 8 * sign * grid[idx].

    qs: a u16 per eight weights, 9-bit index, then 7 sign bits (the eighth sign makes the number
    of minus signs even). sc: the 4-bit s, low nibble first.
    """

    def codes(self, b: Bytes) -> Ints:
        q = b[:, 2:66].view("<u2")
        return lookup(grid("IQ2_XS"), q & 511) * lookup(EVEN_SIGNS, q >> 9)

    def scales(self, b: Bytes) -> Floats:
        return odd_scales(half(b, 0), fields(b[:, 66:], 4), 1 / 8)


class IQ2_S(Format, type_id=22, elems=256, nbytes=82, group=16):
    """[d 2][qs 32][signs 32][qh 8][sc 8]: y = d * (2 s + 1) / 8 * sign * grid[idx].

    A 10-bit index per eight weights: a byte of qs below a 2-bit field of qh; a byte of eight sign
    bits (1 for minus). sc: the 4-bit s, low nibble first.
    """

    def codes(self, b: Bytes) -> Ints:
        idx = b[:, 2:34] | fields(b[:, 66:74], 2).astype(np.uint16) << 8
        return lookup(grid("IQ2_S"), idx) * lookup(SIGNS, b[:, 34:66])

    def scales(self, b: Bytes) -> Floats:
        return odd_scales(half(b, 0), fields(b[:, 74:], 4), 1 / 8)


class IQ3_S(Format, type_id=21, elems=256, nbytes=110, group=32):
    """[d 2][qs 64][qh 8][signs 32][sc 4]: y = d * (2 s + 1) * sign * grid[idx].

    A 9-bit index per four weights: a byte of qs below a bit of qh; a byte of eight sign bits per
    eight weights (1 for minus). sc: the 4-bit s, low nibble first.
    """

    def codes(self, b: Bytes) -> Ints:
        idx = b[:, 2:66] | fields(b[:, 66:74], 1).astype(np.uint16) << 8
        return lookup(grid("IQ3_S"), idx) * lookup(SIGNS, b[:, 74:106])

    def scales(self, b: Bytes) -> Floats:
        return odd_scales(half(b, 0), fields(b[:, 106:], 4), 1)


def ternary_codes(idx: AnyInts, minus: AnyInts) -> Ints:
    """8 * grid[idx] + 1, or - 1 where minus: the IQ1 shift of an eighth, kept an integer.

    idx is [n, 32]; minus is 0 or 1 per index, [n, 32].
    """
    points: Ints = grid("IQ1").take(idx, axis=0) * np.int8(8)
    points += (1 - 2 * minus.astype(np.int8))[:, :, None]
    return points.reshape(len(idx), 256)


class IQ1_S(Format, type_id=19, elems=256, nbytes=50, group=32):
    """[d 2][qs 32][qh 16]: y = d * (2 s + 1) * (grid[idx] + 1/8 or - 1/8), grid of -1, 0, 1.

    qh: a u16 per 32 weights: four 3-bit fields that go above the bytes of qs to make 11-bit
    indices of eight weights, then the 3-bit s, then the sign of the eighth (1 for minus).
    """

    def codes(self, b: Bytes) -> Ints:
        qh = b[:, 34:].view("<u2")[:, :, None]
        high = qh >> np.array((0, 3, 6, 9), np.uint16) & 7
        minus = np.broadcast_to(qh >> 15, high.shape)
        return ternary_codes(b[:, 2:34] | high.reshape(-1, 32) << 8, minus.reshape(-1, 32))

    def scales(self, b: Bytes) -> Floats:
        return odd_scales(half(b, 0), b[:, 34:].view("<u2") >> 12 & 7, 1 / 8)


class IQ1_M(Format, type_id=29, elems=256, nbytes=56, group=16):
    """[qs 32][qh 16][sc 8]: y = d * (2 s + 1) * (grid[idx] + 1/8 or - 1/8), as in IQ1_S.

    qh: a nibble per eight weights: three bits above the byte of qs, then the sign of the eighth.
    sc: four u16, each four 3-bit s, lowest first, and in its top nibble four bits of d, a float16
    in pieces, lowest first.
    """

    def codes(self, b: Bytes) -> Ints:
        high = fields(b[:, 32:48], 4)
        return ternary_codes(b[:, :32] | (high & 7).astype(np.uint16) << 8, high >> 3)

    def scales(self, b: Bytes) -> Floats:
        sc = b[:, 48:].view("<u2")
        pieces = (sc >> 12) << np.array((0, 4, 8, 12), np.uint16)
        d = np.bitwise_or.reduce(pieces, axis=1, keepdims=True).view(np.float16)
        s = sc[:, :, None] >> np.array((0, 3, 6, 9), np.uint16) & 7
        return odd_scales(d.astype(np.float32), s.reshape(-1, 16), 1 / 8)


class IQ4_NL(Format, type_id=20, elems=32, nbytes=18, group=32):
    """[d 2][qs 16]: y = d * NONLINEAR[q], nibbles as in Q4_0."""

    def codes(self, b: Bytes) -> Ints:
        return lookup(NONLINEAR, fields(b[:, 2:], 4, run=16))


class IQ4_XS(Format, type_id=23, elems=256, nbytes=136, group=32):
    """[d 2][sh 2][sl 4][qs 128]: y = d * (s - 32) * NONLINEAR[q].

    Each 32 weights: 16 bytes of nibbles as in Q4_0, and a 6-bit s: a nibble of sl below a 2-bit
    field of sh, both lowest first.
    """

    def codes(self, b: Bytes) -> Ints:
        return lookup(NONLINEAR, fields(b[:, 8:], 4, run=16))

    def scales(self, b: Bytes) -> Floats:
        return half(b, 0) * centred(fields(b[:, 4:8], 4) | fields(b[:, 2:4], 2) << 4, 32)


# ------------------------------------------------------------------------------ ternary


def trits(b: Bytes, count: int, run: int) -> Bytes:
    """`count` base-3 digits, highest first, of bytes that hold a fraction of 256.

    Multiplying by 3 carries the next digit out of the byte. Order as in `fields`.
    """
    shifted = b.reshape(len(b), -1, 1, run) * (3 ** np.arange(count)).astype(np.uint8)[:, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(b), -1)


class TQ1_0(Format, type_id=34, elems=256, nbytes=54, group=256):
    """[qs 48][qh 4][d 2]: y = d * (trit - 1).

    A byte of qs holds five trits, of qh four: qs[0:32] planes of 32 weights, qs[32:48] planes of
    16, qh planes of 4.
    """

    d_at = 52

    def codes(self, b: Bytes) -> Ints:
        parts = trits(b[:, :32], 5, 32), trits(b[:, 32:48], 5, 16), trits(b[:, 48:52], 4, 4)
        return centred(np.hstack(parts), 1)


class TQ2_0(Format, type_id=35, elems=256, nbytes=66, group=256):
    """[qs 64][d 2]: y = d * (q - 1), qs arranged as in Q2_K."""

    d_at = 64

    def codes(self, b: Bytes) -> Ints:
        return centred(fields(b[:, :64], 2, run=32), 1)


# ------------------------------------------------------------------------------ 4-bit floats

# twice the value of every E2M1 float (sign, 2 exponent bits, 1 mantissa bit)
E2M1_DOUBLED = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.int8)


def ue4m3(x: Bytes) -> Floats:
    """Floats of 4 exponent and 3 mantissa bits, bias 7; the sign bit does not count.

    0x7F, which would be NaN, is 0, but 0xFF is 480.
    """
    exponent, mantissa = (x >> 3 & 15).astype(np.int32), (x & 7).astype(np.float32)
    value = np.ldexp(mantissa + np.where(exponent > 0, 8, 0), np.maximum(exponent, 1) - 10)
    return np.where(x == 0x7F, 0, value).astype(np.float32)


class MXFP4(Format, type_id=39, elems=32, nbytes=17, group=32):
    """[e 1][qs 16]: y = 2^(e - 128) * E2M1_DOUBLED[q], nibbles as in Q4_0.

    e = 0 and 1 give denormal float32 scales; e = 255 is the number 2^127, not NaN.
    """

    def codes(self, b: Bytes) -> Ints:
        return lookup(E2M1_DOUBLED, fields(b[:, 1:], 4, run=16))

    def scales(self, b: Bytes) -> Floats:
        one = np.ones((len(b), 1), np.float32)
        scale: Floats = np.ldexp(one, b[:, :1].astype(np.int32) - 128)
        return scale


class NVFP4(Format, type_id=40, elems=64, nbytes=36, group=16):
    """[d 4][qs 32]: y = ue4m3(d) / 2 * E2M1_DOUBLED[q], one d per 16 weights.

    Each 16 weights: eight bytes, low nibbles first, then the high ones. The model multiplies by
    one more scale per tensor, which is a tensor of its own.
    """

    def codes(self, b: Bytes) -> Ints:
        return lookup(E2M1_DOUBLED, fields(b[:, 4:], 4, run=8))

    def scales(self, b: Bytes) -> Floats:
        scale: Floats = ue4m3(b[:, :4]) * np.float32(0.5)
        return scale


# ------------------------------------------------------------------------------ the id enum

FORMATS = dict(sorted(FORMATS.items()))

if TYPE_CHECKING:

    class _MemberPerFormat(EnumMeta):
        def __getattr__(cls, name: str) -> QType: ...

    class QType(IntEnum, metaclass=_MemberPerFormat): ...
else:
    QType = IntEnum("QType", {f.name: i for i, f in FORMATS.items()}, module=__name__)
    QType.__doc__ = "The ggml id of every format: QType.Q4_K == 12."
