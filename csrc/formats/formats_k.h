// SPDX-License-Identifier: MIT
// K-quants: 256 weights whose groups have small integer scales s (and minima m), themselves scaled
// by one half d (and dmin) per block:  weight = (d · s) · code − (dmin · m).
#pragma once
#include "bit_fields.h"
#include "block_format.h"
#include "formats_legacy.h"  // iq4_levels

namespace quantgemm {

// | 16 × (m << 4 | s) | 64 bytes of 2-bit planes | d f16 | dmin f16 |      groups of 16
struct Q2_K : Packs<2> {
  static constexpr int kType = 10, kElems = 256, kBytes = 84, kGroup = 16;
  static constexpr const char* kName = "Q2_K";
  static constexpr bool kOffset = true;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const float d = half_to_float(load<uint16_t, 2>(b + 80)), dmin = half_to_float(load<uint16_t, 2>(b + 82));
    return {d * static_cast<float>(b[g] & 15), -(dmin * static_cast<float>(b[g] >> 4))};
  }
  QG_HD static Affine factors(bytes_ptr b) {
    return {half_to_float(load<uint16_t, 2>(b + 80)), -half_to_float(load<uint16_t, 2>(b + 82))};
  }
  QG_HD static uint64_t scale_codes(bytes_ptr b, int i) {
    return load<uint64_t, 4>(b + 8 * i) & 0x0f0f0f0f0f0f0f0fu;
  }
  QG_HD static uint64_t offset_codes(bytes_ptr b, int i) {
    return (load<uint64_t, 4>(b + 8 * i) >> 4) & 0x0f0f0f0f0f0f0f0fu;
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return planes_of_128<4>(b + 16, i); }
  QG_HD static constexpr int head_at(int i) { return i < 16 ? i : 64 + i; }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_planes_of_128<4>(b + 16, i, four); }
};

// | 32 bytes of third bits: bit g of byte l is weight 32g + l | 64 bytes of 2-bit planes |
// | 12 bytes: 16 6-bit scales, low nibbles in bytes 0-7, high pairs in 8-11 | d f16 |   groups of 16
// code = low two bits − (third bit ? 0 : 4), scale = d · (s − 32)
struct Q3_K : Packs<3, 96> {
  static constexpr int kType = 11, kElems = 256, kBytes = 110, kGroup = 16, kZero = 4;
  static constexpr const char* kName = "Q3_K";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    bytes_ptr scales = b + 96;
    const int low = (scales[g & 7] >> (4 * (g >> 3))) & 15,
              high = (scales[8 + (g & 3)] >> (2 * (g >> 2))) & 3;
    return {half_to_float(load<uint16_t, 2>(b + 108)) * static_cast<float>((low | high << 4) - 32), 0};
  }
  QG_HD static Affine factors(bytes_ptr b) { return {half_to_float(load<uint16_t, 2>(b + 108)), 0}; }
  QG_HD static uint64_t scale_bytes(bytes_ptr b, int i) {
    const uint32_t pairs = load<uint32_t, 2>(b + 104) >> (4 * i);
    const auto scale = [&](int word) {
      const uint32_t low = (load<uint32_t, 2>(b + 96 + 4 * word) >> (4 * i)) & 0x0f0f0f0fu;
      return sub_bytes(low | ((pairs >> (2 * word)) & 0x03030303u) << 4, broadcast_byte(32));
    };
    return scale(0) | static_cast<uint64_t>(scale(1)) << 32;
  }
  QG_HD static uint32_t codes(bytes_ptr b, int i) {
    const uint32_t third = (load<uint32_t, 2>(b + 4 * (i & 7)) >> (i >> 3)) & 0x01010101u;
    return planes_of_128<2>(b + 32, i) | (third << 2);
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    put_planes_of_128<2>(b + 32, i, four);
    or_into<2>(b + 4 * (i & 7), ((four >> 2) & 0x01010101u) << (i >> 3));
  }
};

// Q4_K and Q5_K: 8 scales and 8 minima of 6 bits in 12 bytes.
//   byte 0-3  scale 0-3 | high pair of scale 4-7 << 6
//   byte 4-7  min 0-3   | high pair of min 4-7 << 6
//   byte 8-11 low nibble of scale 4-7 | low nibble of min 4-7 << 4
QG_HD Affine k_scale_min(bytes_ptr b, int g) {
  const float d = half_to_float(load<uint16_t, 4>(b)), dmin = half_to_float(load<uint16_t, 2>(b + 2));
  bytes_ptr packed = b + 4;
  const int j = g & 3;
  const bool upper = g >= 4;
  const int s = upper ? (packed[8 + j] & 15) | (packed[j] >> 6 << 4) : packed[j] & 63;
  const int m = upper ? (packed[8 + j] >> 4) | (packed[4 + j] >> 6 << 4) : packed[4 + j] & 63;
  return {d * static_cast<float>(s), -(dmin * static_cast<float>(m))};
}

// The same for all groups at once, a byte each.
struct KScalesMins {
  QG_HD static Affine factors(bytes_ptr b) {
    return {half_to_float(load<uint16_t, 4>(b)), -half_to_float(load<uint16_t, 2>(b + 2))};
  }
  QG_HD static uint64_t scale_codes(bytes_ptr b, int) {
    const auto low = load<uint32_t, 4>(b + 4), high = load<uint32_t, 4>(b + 12);
    const uint32_t upper = (high & 0x0f0f0f0fu) | ((low >> 2) & 0x30303030u);
    return (low & 0x3f3f3f3fu) | static_cast<uint64_t>(upper) << 32;
  }
  QG_HD static uint64_t offset_codes(bytes_ptr b, int) {
    const auto low = load<uint32_t, 4>(b + 8), high = load<uint32_t, 4>(b + 12);
    const uint32_t upper = ((high >> 4) & 0x0f0f0f0fu) | ((low >> 2) & 0x30303030u);
    return (low & 0x3f3f3f3fu) | static_cast<uint64_t>(upper) << 32;
  }
};

// | d f16 | dmin f16 | 12 bytes of 6-bit scales and minima | 128 bytes of nibbles |   groups of 32
struct Q4_K : KScalesMins, Packs<4> {
  static constexpr int kType = 12, kElems = 256, kBytes = 144, kGroup = 32;
  static constexpr const char* kName = "Q4_K";
  static constexpr bool kOffset = true;
  QG_HD static Affine affine(bytes_ptr b, int g) { return k_scale_min(b, g); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return nibbles_of_64<16>(b + 16, i); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_nibbles_of_64<16>(b + 16, i, four); }
};

// | d f16 | dmin f16 | 12 bytes as Q4_K | 32 bytes: fifth bit of weight 32g + l is bit g of byte l |
// | 128 bytes of nibbles |   groups of 32
struct Q5_K : KScalesMins, Packs<5> {
  static constexpr int kType = 13, kElems = 256, kBytes = 176, kGroup = 32;
  static constexpr const char* kName = "Q5_K";
  static constexpr bool kOffset = true;
  QG_HD static Affine affine(bytes_ptr b, int g) { return k_scale_min(b, g); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const uint32_t fifth = (load<uint32_t, 16>(b + 16 + 4 * (i & 7)) >> (i >> 3)) & 0x01010101u;
    return nibbles_of_64<16>(b + 48, i) | (fifth << 4);
  }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    put_nibbles_of_64<16>(b + 48, i, four);
    or_into<16>(b + 16 + 4 * (i & 7), ((four >> 4) & 0x01010101u) << (i >> 3));
  }
};

// | 128 bytes: low nibbles | 64 bytes: high pairs in 2-bit planes | 16 × int8 scale | d f16 |
// Per 128 weights, 64 low-nibble bytes hold weights 0-63 low, 64-127 high.   groups of 16
struct Q6_K : Packs<6, 192> {
  static constexpr int kType = 14, kElems = 256, kBytes = 210, kGroup = 16, kZero = 32;
  static constexpr const char* kName = "Q6_K";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const auto s = static_cast<int8_t>(b[192 + g]);
    return {half_to_float(load<uint16_t, 2>(b + 208)) * static_cast<float>(s), 0};
  }
  QG_HD static Affine factors(bytes_ptr b) { return {half_to_float(load<uint16_t, 2>(b + 208)), 0}; }
  QG_HD static uint64_t scale_codes(bytes_ptr b, int i) { return load<uint64_t, 2>(b + 192 + 8 * i); }
  QG_HD static uint32_t codes(bytes_ptr b, int i) {
    const uint32_t low = load<uint32_t, 2>(b + 64 * (i >> 5) + 4 * (i & 15)) >> ((i & 16) >> 2);
    return (low & 0x0f0f0f0fu) | (planes_of_128<2>(b + 128, i) << 4);
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    or_into<2>(b + 64 * (i >> 5) + 4 * (i & 15), (four & 0x0f0f0f0fu) << ((i & 16) >> 2));
    put_planes_of_128<2>(b + 128, i, four >> 4);
  }
};

// | d f32 | 256 × int8 | 16 × i16 sum of 16 codes |   an activation format; sums do not enter
struct Q8_K {
  static constexpr int kType = 15, kElems = 256, kBytes = 292, kGroup = 256;
  static constexpr const char* kName = "Q8_K";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {bit_cast<float>(load<uint32_t, 4>(b)), 0}; }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return load<uint32_t, 4>(b + 4 + 4 * i); }
};

// | d f16 | u16: high pairs of 8 scales | 4 bytes: their low nibbles | 128 bytes of nibbles |
// 32 weights in 16 bytes as IQ4_NL, scale = d · (s − 32)                            groups of 32
struct IQ4_XS : Packs<4> {
  static constexpr int kType = 23, kElems = 256, kBytes = 136, kGroup = 32;
  static constexpr const char* kName = "IQ4_XS";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const int low = (b[4 + (g >> 1)] >> (4 * (g & 1))) & 15, high = (load<uint16_t, 2>(b + 2) >> (2 * g)) & 3;
    return {half_to_float(load<uint16_t, 2>(b)) * static_cast<float>((low | high << 4) - 32), 0};
  }
  QG_HD static Affine factors(bytes_ptr b) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint64_t scale_bytes(bytes_ptr b, int) {
    const uint32_t pairs = load<uint16_t, 2>(b + 2);
    const auto scale = [&](int word) {  // nibbles of two bytes, and pairs of bits, to a byte each
      const uint32_t two = load<uint16_t, 2>(b + 4 + 2 * word), apart = (two & 0xffu) | (two & 0xff00u) << 8;
      const uint32_t low = (apart & 0x000f000fu) | (apart & 0x00f000f0u) << 4;
      const uint32_t four = pairs >> (8 * word), spread = (four & 15u) | (four & 0xf0u) << 12;
      const uint32_t high = (spread & 0x00030003u) | (spread & 0x000c000cu) << 6;
      return sub_bytes(low | high << 4, broadcast_byte(32));
    };
    return scale(0) | static_cast<uint64_t>(scale(1)) << 32;
  }
  QG_HD static uint32_t nibbles(bytes_ptr b, int i) { return nibbles_of_32<8>(b + 8 + 16 * (i >> 3), i & 7); }
  QG_HD static uint32_t levels(uint32_t four) { return iq4_levels(four); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return levels(nibbles(b, i)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    put_nibbles_of_32<8>(b + 8 + 16 * (i >> 3), i & 7, four);
  }
};

}  // namespace quantgemm
