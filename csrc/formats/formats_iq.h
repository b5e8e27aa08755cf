// SPDX-License-Identifier: MIT
// IQ1, IQ2 and IQ3: 8 (or 4) neighbouring weights are one point of a codebook, with separate signs.
// The integer q is the signed grid value, so these formats obey the same contract as all others.
#pragma once
#include "bit_fields.h"
#include "block_format.h"
#include "codebooks.h"

namespace quantgemm {

// Byte i of a block that lies, as those do whose tables are used, at a multiple of four.
QG_HD uint32_t aligned_byte(bytes_ptr b, int i) { return byte_of(load<uint32_t, 4>(b + (i & ~3)), i & 3); }

// Four magnitudes of an IQ2 grid point (levels 8, 25, 43); half selects its lower or upper four.
QG_HD uint32_t iq2_magnitudes(uint16_t entry, int half) {
  if constexpr (kPicksBytes) return pick_bytes(0x002b1908u, 0, pairs_to_nibbles(entry) >> (16 * half));
  const uint32_t level = spread_pairs(entry >> (8 * half));
  return level * 17 + ((level >> 1) & 0x01010101u) + 0x08080808u;
}

// Seven stored sign bits; the eighth makes their number even. Returns the four bits of one half.
QG_HD uint32_t even_signs(uint32_t seven, int half) {
  seven &= 127u;
  return (seven | static_cast<uint32_t>(popcount(seven) & 1) << 7) >> (4 * half);
}

// A sign is bit 2 of a nibble, the level bits 0 and 1: one selection gives the signed level.
QG_HD uint32_t iq2_point(uint32_t nibbles, int half) {
  return pick_bytes(0x002b1908u, 0x00d5e7f8u, nibbles >> (16 * half));
}

// Sign bits 0 … 7 -> bit 2 of nibbles 0 … 7
QG_HD constexpr uint32_t signs_to_nibbles(uint32_t signs) {
  signs = (signs | (signs << 12)) & 0x000f000fu;
  signs = (signs | (signs << 6)) & 0x03030303u;
  return ((signs << 2) | (signs << 5)) & 0x44444444u;
}
QG_HD constexpr uint32_t all_signs(uint32_t seven) {
  const uint32_t pairs = seven ^ (seven >> 4), halves = pairs ^ (pairs >> 2);
  return seven | ((halves ^ (halves >> 1)) & 1) << 7;
}

// | d f16 | 8 × (4 grid indexes u8 | u32: 4 × 7 sign bits, scale s in bits 28-31) |   groups of 32
// scale = d · (s + ½) / 4
struct IQ2_XXS {
  static constexpr int kType = 16, kElems = 256, kBytes = 66, kGroup = 32;
  static constexpr const char* kName = "IQ2_XXS";
  static constexpr bool kOffset = false;
  QG_HD static uint32_t signs_and_scale(bytes_ptr b, int g) { return load<uint32_t, 2>(b + 2 + 8 * g + 4); }
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const uint32_t s = signs_and_scale(b, g) >> 28;
    return {half_to_float(load<uint16_t, 2>(b)) * 0.25f * (0.5f + static_cast<float>(s & 15)), 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int g = i >> 3, point = (i >> 1) & 3, half = i & 1;
    const uint32_t magnitudes = iq2_magnitudes(kGridIQ2XXS[b[2 + 8 * g + point]], half);
    return negate_bytes(magnitudes, even_signs(signs_and_scale(b, g) >> (7 * point), half));
  }
  static constexpr int kTableWords = 256 + 128;
  QG_HD static constexpr uint32_t table_word(int i) {
    return i < 256 ? pairs_to_nibbles(kGridIQ2XXS[i]) : signs_to_nibbles(all_signs(i - 256));
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const int g = i >> 3, point = (i >> 1) & 3;
    const uint32_t signs = (signs_and_scale(b, g) >> (7 * point)) & 127;
    return iq2_point(table(aligned_byte(b, 2 + 8 * g + point)) | table(256, signs), i & 1);
  }
};

// | d f16 | 32 × u16: 9-bit grid index, 7 sign bits | 16 × 4-bit scale |   groups of 16
struct IQ2_XS {
  static constexpr int kType = 17, kElems = 256, kBytes = 74, kGroup = 16;
  static constexpr const char* kName = "IQ2_XS";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const uint32_t s = b[66 + (g >> 1)] >> (4 * (g & 1));
    return {half_to_float(load<uint16_t, 2>(b)) * 0.25f * (0.5f + static_cast<float>(s & 15)), 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const uint32_t point = load<uint16_t, 2>(b + 2 + 2 * (i >> 1));
    return negate_bytes(iq2_magnitudes(kGridIQ2XS[point & 511], i & 1), even_signs(point >> 9, i & 1));
  }
  static constexpr int kTableWords = 512 + 256;  // signs by whole bytes, of which bit 0 is the index's
  QG_HD static constexpr uint32_t table_word(int i) {
    return i < 512 ? pairs_to_nibbles(kGridIQ2XS[i]) : signs_to_nibbles(all_signs((i - 512) >> 1));
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const uint32_t point = load<uint16_t, 2>(b + 2 + 2 * (i >> 1));
    return iq2_point(table(point & 511) | table(512 + aligned_byte(b, 3 + 2 * (i >> 1))), i & 1);
  }
};

// | d f16 | 32 index low bytes | 32 sign bytes | 8 bytes: index bits 8-9 | 16 × 4-bit scale |   16
struct IQ2_S {
  static constexpr int kType = 22, kElems = 256, kBytes = 82, kGroup = 16;
  static constexpr const char* kName = "IQ2_S";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const uint32_t s = b[74 + (g >> 1)] >> (4 * (g & 1));
    return {half_to_float(load<uint16_t, 2>(b)) * 0.25f * (0.5f + static_cast<float>(s & 15)), 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int point = i >> 1;
    const int index = b[2 + point] | ((b[66 + (point >> 2)] >> (2 * (point & 3))) & 3) << 8;
    return negate_bytes(iq2_magnitudes(kGridIQ2S[index], i & 1), b[34 + point] >> (4 * (i & 1)));
  }
  static constexpr int kRowWords = 4, kTableWords = 256;
  QG_HD static constexpr uint32_t row_word(int row, int i) {
    return pairs_to_nibbles(kGridIQ2S[row + 256 * i]);
  }
  QG_HD static constexpr uint32_t table_word(int i) { return signs_to_nibbles(i); }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const int point = i >> 1, of_four = point & 3, up = of_four < 2 ? 0 : 8, at = 2 + point;
    // Index bits 8 and 9 of points 0 and 1 or 2 and 3 to where an entry's place has them.
    const uint32_t words = aligned_byte(b, 66 + (point >> 2)) * (of_four < 2 ? 0x00100040u : 0x01000400u);
    const uint32_t places = (words & (0x00c000c0u << up)) | table.copy() << up;
    const int k = 2 * (of_four & 1) + (of_four >> 1);
    const uint32_t levels = table.whole(load<uint32_t, 4>(b + (at & ~3)), at & 3, places, k);
    return iq2_point(levels | table(aligned_byte(b, 34 + point)), i & 1);
  }
};

// Sign bit j (j + 4) -> bit 0 (4) of byte j, and four bytes negated by one half of them.
QG_HD constexpr uint32_t signs_to_bytes(uint32_t signs) {
  return spread_bits(signs) | spread_bits(signs >> 4) << 4;
}
QG_HD uint32_t negate_half(uint32_t x, uint32_t signs, int half) {
  const uint32_t ones = (signs >> (4 * half)) & 0x01010101u;
  return (x ^ (ones * 0xffu)) + ones;
}

// | d f16 | 64 grid indexes u8 | 8 × u32: 4 × 7 sign bits, scale s in bits 28-31 |   groups of 32
// scale = d · (s + ½) / 2; magnitudes 4, 12, 20, 28, 36, 44, 52, 62
struct IQ3_XXS {
  static constexpr int kType = 18, kElems = 256, kBytes = 98, kGroup = 32;
  static constexpr const char* kName = "IQ3_XXS";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const auto s = static_cast<float>(load<uint32_t, 2>(b + 66 + 4 * g) >> 28);
    return {half_to_float(load<uint16_t, 2>(b)) * (0.5f + s) * 0.5f, 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const uint32_t signs = load<uint32_t, 2>(b + 66 + 4 * (i >> 3)) >> (7 * ((i >> 1) & 3));
    return negate_bytes(magnitudes(kGridIQ3XXS[b[2 + i]]), even_signs(signs, i & 1));
  }
  QG_HD static uint32_t magnitudes(uint16_t entry) {
    if constexpr (kPicksBytes) return pick_bytes(0x1c140c04u, 0x3e342c24u, entry);
    const uint32_t level = spread_nibbles(entry);
    const uint32_t top = ((level + 0x01010101u) >> 3) & 0x01010101u;  // level 7 is 62, not 60
    return level * 8 + 0x04040404u + top * 2;
  }
  static constexpr int kTableWords = 256 + 128;
  QG_HD static constexpr uint32_t table_word(int i) {
    return i < 256 ? kGridIQ3XXS[i] : signs_to_bytes(all_signs(i - 256));
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const uint32_t signs = (load<uint32_t, 2>(b + 66 + 4 * (i >> 3)) >> (7 * ((i >> 1) & 3))) & 127;
    return negate_half(magnitudes(table(b[2 + i])), table(256, signs), i & 1);
  }
};

// | d f16 | 64 index low bytes | 8 bytes: index bit 8 | 32 sign bytes | 8 × 4-bit scale |   32
// scale = d · (2 s + 1); magnitudes 1, 3, …, 15
struct IQ3_S {
  static constexpr int kType = 21, kElems = 256, kBytes = 110, kGroup = 32;
  static constexpr const char* kName = "IQ3_S";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const int s = (b[106 + (g >> 1)] >> (4 * (g & 1))) & 15;
    return {half_to_float(load<uint16_t, 2>(b)) * static_cast<float>(1 + 2 * s), 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int index = b[2 + i] | ((b[66 + (i >> 3)] >> (i & 7)) & 1) << 8;
    return negate_bytes(magnitudes(kGridIQ3S[index]), b[74 + (i >> 1)] >> (4 * (i & 1)));
  }
  QG_HD static uint32_t magnitudes(uint16_t entry) {
    if constexpr (kPicksBytes) return pick_bytes(0x07050301u, 0x0f0d0b09u, entry);
    return spread_nibbles(entry) * 2 + 0x01010101u;
  }
  static constexpr int kTableWords = 512 + 256;
  QG_HD static constexpr uint32_t table_word(int i) {
    return i < 512 ? kGridIQ3S[i] : signs_to_bytes(i - 512);
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const uint32_t high = ((b[66 + (i >> 3)] >> (i & 7)) & 1) << 8;
    return negate_half(magnitudes(table(b[2 + i], high)), table(512, b[74 + (i >> 1)]), i & 1);
  }
};

// IQ1: weight = d (2s + 1) (grid ± ⅛) with grid in {−1, 0, 1}, so q = 8 grid ± 1, scale = d (2s + 1) / 8.
QG_HD uint32_t iq1_codes(uint16_t entry, int half, bool minus) {
  if constexpr (kPicksBytes)
    return pick_bytes(minus ? 0x0007fff7u : 0x000901f9u, 0, pairs_to_nibbles(entry) >> (16 * half));
  const uint32_t level = spread_pairs(entry >> (8 * half));
  return sub_bytes(level * 8 + (minus ? 0u : 0x02020202u), 0x09090909u);
}

// For integer products a point's levels lie in 16 bits so that one shift makes room for all, four in bits 4
// and 5 of bytes and four in bits 6 and 7: from the top nibble down 3 7, 1 5 … (upper half, lower half of
// each). 8 · level = q + 7, or q + 9 with −⅛.
QG_HD constexpr uint32_t iq1_row_word(int row, int i) {
  const uint32_t two = kGridIQ1[row + 512 * i] | static_cast<uint32_t>(kGridIQ1[row + 512 * i + 256]) << 16;
  const uint32_t change = (two ^ (two >> 6)) & 0x00cc00ccu;  // levels 1 and 3 for 4 and 6
  const uint32_t point = two ^ change ^ (change << 6);
  return (point & 0x0f0f0f0fu) << 4 | ((point >> 4) & 0x0f0f0f0fu);
}
QG_HD uint32_t iq1_plane(uint32_t entry, int half) {
  return either_and(entry, entry << 20, half != 0 ? 0xc0c0c0c0u : 0x30303030u);
}

// | d f16 | 32 index low bytes | 8 × u16: 4 × index bits 8-10, scale s, sign of ⅛ |   groups of 32
struct IQ1_S {
  static constexpr int kType = 19, kElems = 256, kBytes = 50, kGroup = 32;
  static constexpr const char* kName = "IQ1_S";
  static constexpr bool kOffset = false;
  // Where s lies, 4096's mantissa counts in twos: a quarter of what a conversion costs.
  QG_HD static float scale_of(bytes_ptr b, uint32_t high) {
    return half_to_float(load<uint16_t, 2>(b)) * 0.125f *
           (bit_cast<float>(and_or(high, 0x7000u, 0x45800000u)) - 4095.0f);
  }
  QG_HD static Affine affine(bytes_ptr b, int g) {
    return {scale_of(b, load<uint16_t, 2>(b + 34 + 2 * g)), 0};
  }
  // In its low half, of a block at a multiple of four.
  QG_HD static uint32_t aligned_high(bytes_ptr b, int g) {
    return load<uint32_t, 4>(b + ((34 + 2 * g) & ~3)) >> (g & 1 ? 0 : 16);
  }
  QG_HD static float planar_scale(bytes_ptr b, int g) { return scale_of(b, aligned_high(b, g)); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int point = i >> 1;
    const uint32_t high = load<uint16_t, 2>(b + 34 + 2 * (i >> 3));
    const uint32_t index = b[2 + point] | ((high >> (3 * (point & 3))) & 7) << 8;
    return iq1_codes(kGridIQ1[index], i & 1, (high & 0x8000u) != 0);
  }
  static constexpr int kRowWords = 4;
  static constexpr Planes kPlanes{2, 2, 8};
  QG_HD static constexpr uint32_t row_word(int row, int i) { return iq1_row_word(row, i); }
  template <class Table>
  QG_HD static uint32_t planar_codes(bytes_ptr b, int i, const Table& table) {
    const int g = i >> 3, point = (i >> 1) & 3;
    const uint32_t high = aligned_high(b, g) & 0x0fffu;
    // Index bits 9 and 10, and 8, of points 0 and 1 or 2 and 3 to where an entry's place has them.
    const uint32_t words = high * (point < 2 ? 0x00040020u : 0x00100080u),
                   halves = high * (point < 2 ? 0x00004002u : 0x00010008u);
    const int up = point < 2 ? 0 : 8;
    const uint32_t places =
        (words & (0x00c000c0u << up)) | (halves & (0x00020002u << up)) | table.copy() << up;
    const int k = 2 * (point & 1) + (point >> 1);
    const int at = 2 + 4 * g + point;
    return iq1_plane(table.entry(load<uint32_t, 4>(b + (at & ~3)), at & 3, places, k), i & 1);
  }
  static constexpr int kLeast = 7, kMore = 2;
  QG_HD static uint32_t more(bytes_ptr b, int g) {
    const int at = 35 + 2 * g;
    return signs_of_bytes(load<uint32_t, 4>(b + (at & ~3)), 0, (at & 3) * 0x1100u);
  }
};

// | 32 index low bytes | 16 bytes: per point a nibble (index bits 8-10, sign of ⅛) |
// | 4 × u16: 12 bits of 3-bit scales, top nibbles together the half d |   groups of 16
struct IQ1_M {
  static constexpr int kType = 29, kElems = 256, kBytes = 56, kGroup = 16;
  static constexpr const char* kName = "IQ1_M";
  static constexpr bool kOffset = false;
  QG_HD static float factor(bytes_ptr b) {
    constexpr int kAlign = kAlignOf<kBytes, 48>;
    const uint32_t low = load<uint32_t, kAlign>(b + 48), high = load<uint32_t, kAlign>(b + 52);
    const uint32_t d =
        ((low >> 12) & 0xfu) | ((low >> 24) & 0xf0u) | ((high >> 4) & 0xf00u) | ((high >> 16) & 0xf000u);
    return half_to_float(static_cast<uint16_t>(d)) * 0.125f;
  }
  QG_HD static int steps(bytes_ptr b, int g) {
    const uint32_t s = load<uint16_t, 2>(b + 48 + 2 * (g >> 2)), from = 3 * (g & 3);
    return static_cast<int>((from == 0 ? s << 1 : s >> (from - 1)) & 14);
  }
  QG_HD static Affine affine(bytes_ptr b, int g) {
    return {factor(b) * static_cast<float>(1 + steps(b, g)), 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int point = i >> 1;
    const int high = b[32 + (point >> 1)] >> (4 * (point & 1));
    return iq1_codes(kGridIQ1[b[point] | (high & 7) << 8], i & 1, (high & 8) != 0);
  }
  static constexpr int kRowWords = 4;
  static constexpr Planes kPlanes{2, 2, 8};
  QG_HD static constexpr uint32_t row_word(int row, int i) { return iq1_row_word(row, i); }
  template <class Table>
  QG_HD static uint32_t planar_codes(bytes_ptr b, int i, const Table& table) {
    const int point = i >> 1, k = (point >> 1) & 3, up = 8 * (k & 1);
    const uint32_t high = load<uint32_t, 4>(b + 32 + 4 * (point >> 3));
    const uint32_t words = point & 1 ? high << 1 : high << 5, halves = point & 1 ? high >> 3 : high << 1;
    const uint32_t places =
        (words & (0x00c000c0u << up)) | (halves & (0x00020002u << up)) | table.copy() << up;
    return iq1_plane(table.entry(load<uint32_t, 4>(b + 4 * (point >> 2)), point & 3, places, k), i & 1);
  }
  static constexpr int kLeast = 7, kMore = 2;
  QG_HD static uint32_t more(bytes_ptr b, int g) {
    const uint32_t signs = load<uint32_t, 4>(b + 32 + 4 * (g >> 2));
    return signs_of_bytes(signs << 4, signs, 0x4000 + (g & 3) * 0x1100);
  }
};

}  // namespace quantgemm
