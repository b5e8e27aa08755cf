// SPDX-License-Identifier: MIT
// IQ1, IQ2 and IQ3: 8 (or 4) neighbouring weights are one point of a codebook, with separate signs.
// The integer q is the signed grid value, so these formats obey the same contract as all others.
#pragma once
#include "bit_fields.h"
#include "block_format.h"
#include "codebooks.h"

namespace quantgemm {

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
QG_HD uint32_t signs_to_nibbles(uint32_t signs) {
  signs = (signs | (signs << 12)) & 0x000f000fu;
  signs = (signs | (signs << 6)) & 0x03030303u;
  return ((signs << 2) | (signs << 5)) & 0x44444444u;
}
QG_HD uint32_t all_signs(uint32_t seven) { return seven | static_cast<uint32_t>(popcount(seven) & 1) << 7; }

// | d f16 | 8 × (4 grid indexes u8 | u32: 4 × 7 sign bits, scale s in bits 28-31) |   groups of 32
// scale = d · (s + ½) / 4
struct IQ2_XXS {
  static constexpr int kType = 16, kElems = 256, kBytes = 66, kGroup = 32;
  static constexpr const char* kName = "IQ2_XXS";
  static constexpr bool kOffset = false;
  QG_HD static uint32_t signs_and_scale(bytes_ptr b, int g) { return load<uint32_t, 2>(b + 2 + 8 * g + 4); }
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const auto s = static_cast<float>(signs_and_scale(b, g) >> 28);
    return {half_to_float(load<uint16_t, 2>(b)) * (0.5f + s) * 0.25f, 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int g = i >> 3, point = (i >> 1) & 3, half = i & 1;
    const uint32_t magnitudes = iq2_magnitudes(kGridIQ2XXS[b[2 + 8 * g + point]], half);
    return negate_bytes(magnitudes, even_signs(signs_and_scale(b, g) >> (7 * point), half));
  }
  static constexpr int kTableWords = 256 + 128;
  QG_HD static uint32_t table_word(int i) {
    return i < 256 ? pairs_to_nibbles(kGridIQ2XXS[i]) : signs_to_nibbles(all_signs(i - 256));
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const int g = i >> 3, point = (i >> 1) & 3;
    const uint32_t signs = (signs_and_scale(b, g) >> (7 * point)) & 127;
    return iq2_point(table(byte_of(load<uint32_t, 2>(b + 2 + 8 * g), point)) | table(256, signs), i & 1);
  }
};

// | d f16 | 32 × u16: 9-bit grid index, 7 sign bits | 16 × 4-bit scale |   groups of 16
struct IQ2_XS {
  static constexpr int kType = 17, kElems = 256, kBytes = 74, kGroup = 16;
  static constexpr const char* kName = "IQ2_XS";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const auto s = static_cast<float>((b[66 + (g >> 1)] >> (4 * (g & 1))) & 15);
    return {half_to_float(load<uint16_t, 2>(b)) * (0.5f + s) * 0.25f, 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const uint32_t point = load<uint16_t, 2>(b + 2 + 2 * (i >> 1));
    return negate_bytes(iq2_magnitudes(kGridIQ2XS[point & 511], i & 1), even_signs(point >> 9, i & 1));
  }
  static constexpr int kTableWords = 512 + 128;
  QG_HD static uint32_t table_word(int i) {
    return i < 512 ? pairs_to_nibbles(kGridIQ2XS[i]) : signs_to_nibbles(all_signs(i - 512));
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const uint32_t point = load<uint16_t, 2>(b + 2 + 2 * (i >> 1));
    return iq2_point(table(point & 511) | table(512, point >> 9), i & 1);
  }
};

// | d f16 | 32 index low bytes | 32 sign bytes | 8 bytes: index bits 8-9 | 16 × 4-bit scale |   16
struct IQ2_S {
  static constexpr int kType = 22, kElems = 256, kBytes = 82, kGroup = 16;
  static constexpr const char* kName = "IQ2_S";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const auto s = static_cast<float>((b[74 + (g >> 1)] >> (4 * (g & 1))) & 15);
    return {half_to_float(load<uint16_t, 2>(b)) * (0.5f + s) * 0.25f, 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int point = i >> 1;
    const int index = b[2 + point] | ((b[66 + (point >> 2)] >> (2 * (point & 3))) & 3) << 8;
    return negate_bytes(iq2_magnitudes(kGridIQ2S[index], i & 1), b[34 + point] >> (4 * (i & 1)));
  }
  static constexpr int kTableWords = 1024 + 256;
  QG_HD static uint32_t table_word(int i) {
    return i < 1024 ? pairs_to_nibbles(kGridIQ2S[i]) : signs_to_nibbles(i - 1024);
  }
  template <class Table>
  QG_HD static uint32_t quad(bytes_ptr b, int i, const Table& table) {
    const int point = i >> 1;
    const uint32_t high = ((b[66 + (point >> 2)] >> (2 * (point & 3))) & 3) << 8;
    return iq2_point(table(b[2 + point], high) | table(1024, b[34 + point]), i & 1);
  }
};

// Sign bit j (j + 4) -> bit 0 (4) of byte j, and four bytes negated by one half of them.
QG_HD uint32_t signs_to_bytes(uint32_t signs) { return spread_bits(signs) | spread_bits(signs >> 4) << 4; }
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
  QG_HD static uint32_t table_word(int i) {
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
  QG_HD static uint32_t table_word(int i) { return i < 512 ? kGridIQ3S[i] : signs_to_bytes(i - 512); }
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

// The levels of a point for integer products: of its first four weights in low nibbles, of the others in high
// ones. In planes: 16 · level = 2 · (q + 7) or, of a negative ⅛, 2 · (q + 9).
QG_HD uint32_t iq1_levels(int i) { return spread_pairs(kGridIQ1[i]) | spread_pairs(kGridIQ1[i] >> 8) << 4; }
QG_HD uint32_t iq1_plane(uint32_t levels, int half) {
  return levels & (half != 0 ? 0xf0f0f0f0u : 0x0f0f0f0fu);
}

// | d f16 | 32 index low bytes | 8 × u16: 4 × index bits 8-10, scale s, sign of ⅛ |   groups of 32
struct IQ1_S {
  static constexpr int kType = 19, kElems = 256, kBytes = 50, kGroup = 32;
  static constexpr const char* kName = "IQ1_S";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const int s = (load<uint16_t, 2>(b + 34 + 2 * g) >> 12) & 7;
    return {half_to_float(load<uint16_t, 2>(b)) * static_cast<float>(2 * s + 1) * 0.125f, 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int point = i >> 1;
    const uint32_t high = load<uint16_t, 2>(b + 34 + 2 * (i >> 3));
    const uint32_t index = b[2 + point] | ((high >> (3 * (point & 3))) & 7) << 8;
    return iq1_codes(kGridIQ1[index], i & 1, (high & 0x8000u) != 0);
  }
  static constexpr int kTableWords = 2048;
  static constexpr Planes kPlanes{2, 4, 2};
  QG_HD static uint32_t table_word(int i) { return iq1_levels(i); }
  template <class Table>
  QG_HD static uint32_t planar_codes(bytes_ptr b, int i, const Table& table) {
    const int g = i >> 3, point = (i >> 1) & 3;
    const uint32_t high = load<uint16_t, 2>(b + 34 + 2 * g);
    const uint32_t pairs = (high & 0x003fu) | ((high << 10) & 0x003f0000u);
    const uint32_t top =
        (pairs & 0x00070007u) | ((pairs << 5) & 0x07000700u);  // index bits 8-10 of four points
    return iq1_plane(table(two_bytes_of(load<uint32_t, 2>(b + 2 + 4 * g), point, top, point)), i & 1);
  }
  QG_HD static uint32_t zeros(bytes_ptr b, int g) {
    return 0xf2f2u - ((load<uint16_t, 2>(b + 34 + 2 * g) >> 13) & 4) * 0x0101u;
  }
};

// | 32 index low bytes | 16 bytes: per point a nibble (index bits 8-10, sign of ⅛) |
// | 4 × u16: 12 bits of 3-bit scales, top nibbles together the half d |   groups of 16
struct IQ1_M {
  static constexpr int kType = 29, kElems = 256, kBytes = 56, kGroup = 16;
  static constexpr const char* kName = "IQ1_M";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i)
      d |= static_cast<uint32_t>(load<uint16_t, 2>(b + 48 + 2 * i) >> 12) << (4 * i);
    const int s = (load<uint16_t, 2>(b + 48 + 2 * (g >> 2)) >> (3 * (g & 3))) & 7;
    return {half_to_float(static_cast<uint16_t>(d)) * static_cast<float>(2 * s + 1) * 0.125f, 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const int point = i >> 1;
    const int high = b[32 + (point >> 1)] >> (4 * (point & 1));
    return iq1_codes(kGridIQ1[b[point] | (high & 7) << 8], i & 1, (high & 8) != 0);
  }
  static constexpr int kTableWords = 2048;
  static constexpr Planes kPlanes{2, 4, 2};
  QG_HD static uint32_t table_word(int i) { return iq1_levels(i); }
  template <class Table>
  QG_HD static uint32_t planar_codes(bytes_ptr b, int i, const Table& table) {
    const int point = i >> 1;
    const uint32_t high = load<uint32_t, 4>(b + 32 + 4 * (point >> 3)) >> (4 * (point & 1));
    const uint32_t low = load<uint32_t, 4>(b + 4 * (point >> 2));
    return iq1_plane(table(two_bytes_of(low, point & 3, high & 0x07070707u, (point >> 1) & 3)), i & 1);
  }
  QG_HD static uint32_t zeros(bytes_ptr b, int g) {
    const uint32_t signs = load<uint32_t, 4>(b + 32 + 4 * (g >> 2));
    const uint32_t even = 0xf2f2f2f2u - ((signs >> 1) & 0x04040404u);
    const uint32_t odd = 0xf2f2f2f2u - ((signs >> 5) & 0x04040404u);
    return pick_bytes(even, odd, 0x0040u + (g & 3) * 0x0011u);
  }
};

}  // namespace quantgemm
