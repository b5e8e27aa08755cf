// SPDX-License-Identifier: MIT
// Four-bit floats (MXFP4, NVFP4), ternary (TQ1_0, TQ2_0), and the one- and two-bit types.
#pragma once
#include "bit_fields.h"
#include "block_format.h"

namespace quantgemm {

// Twice the e2m1 values: 0 1 2 3 4 6 8 12 and their negatives.
QG_HD uint32_t fp4_levels_doubled(uint32_t nibbles) {
  return lookup_nibbles<0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu>(nibbles);
}

// | e u8: exponent | 16 bytes of nibbles as Q4_0 |   scale = 2^(e − 128): the doubling undone
struct MXFP4 : Packs<4> {
  static constexpr int kType = 39, kElems = 32, kBytes = 17, kGroup = 32, kLargest = 12;
  static constexpr const char* kName = "MXFP4";
  static constexpr bool kOffset = false, kMiniFloat = true;
  QG_HD static Affine affine(bytes_ptr b, int) {
    const uint32_t e = b[0];  // e < 2 would be exponent fields −1 and 0: float32 subnormals
    return {bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0};
  }
  QG_HD static uint32_t nibbles(bytes_ptr b, int i) { return nibbles_of_32<1>(b + 1, i); }
  QG_HD static uint32_t levels(uint32_t four) { return fp4_levels_doubled(four); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return levels(nibbles(b, i)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_nibbles_of_32<1>(b + 1, i, four); }
};

// | 4 × e4m3 scale | 4 × 8 bytes: weight j low nibble of byte j, weight j+8 high nibble |
// Unsigned scales: the sign bit is ignored, byte 0x7f means 0.                     groups of 16
struct NVFP4 : Packs<4> {
  static constexpr int kType = 40, kElems = 64, kBytes = 36, kGroup = 16, kLargest = 12;
  static constexpr const char* kName = "NVFP4";
  static constexpr bool kOffset = false, kMiniFloat = true;
  QG_HD static Affine affine(bytes_ptr b, int g) {
    const uint32_t e4m3 = b[g], magnitude = e4m3 & 0x7f;
    // In float position the byte is the value times 2^-120; half of it undoes the doubled levels.
    const float scale = bit_cast<float>(magnitude << 20) * 0x1p119f;
    return {e4m3 == 0x7f ? 0.0f : scale, 0};
  }
  QG_HD static uint32_t nibbles(bytes_ptr b, int i) {
    return (load<uint32_t, 4>(b + 4 + 8 * (i >> 2) + 4 * (i & 1)) >> (2 * (i & 2))) & 0x0f0f0f0fu;
  }
  QG_HD static uint32_t levels(uint32_t four) { return fp4_levels_doubled(four); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return levels(nibbles(b, i)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    or_into<4>(b + 4 + 8 * (i >> 2) + 4 * (i & 1), (four & 0x0f0f0f0fu) << (2 * (i & 2)));
  }
};

// Base-3 digits, five to a byte: | 32 bytes: weights 0-159 | 16 bytes: 160-239 | 4 bytes, four
// digits each: 240-255 | d f16 |   digit n of byte l is weight n·(32, 16, 4) + l of its part
struct TQ1_0 {
  static constexpr int kType = 34, kElems = 256, kBytes = 54, kGroup = 256, kZero = 1;
  static constexpr const char* kName = "TQ1_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b + 52)), 0}; }
  QG_HD static uint32_t codes(bytes_ptr b, int i) {
    const int part = i < 40 ? 0 : i < 60 ? 1 : 2;
    const int within = part == 0 ? i : part == 1 ? i - 40 : i - 60;
    const int shift = 3 - part - (part == 2);  // 8, 4 or 1 quads per digit
    const int offset = part == 0 ? 0 : part == 1 ? 32 : 48;
    const uint32_t bytes = load<uint32_t, 2>(b + offset + 4 * (within & ((1 << shift) - 1)));
    return base3_digits(bytes, within >> shift);
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
};

// | 64 bytes of 2-bit planes | d f16 |
struct TQ2_0 : Packs<2, 64> {
  static constexpr int kType = 35, kElems = 256, kBytes = 66, kGroup = 256, kZero = 1;
  static constexpr const char* kName = "TQ2_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b + 64)), 0}; }
  QG_HD static uint32_t codes(bytes_ptr b, int i) { return planes_of_128<2>(b, i); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_planes_of_128<2>(b, i, four); }
};

// | d f16 | 128 bits: weight j is bit j, one +d, zero −d |
struct Q1_0 {
  static constexpr int kType = 41, kElems = 128, kBytes = 18, kGroup = 128, kZero = 1;
  static constexpr const char* kName = "Q1_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t codes(bytes_ptr b, int i) {
    return spread_bits(b[2 + (i >> 1)] >> (4 * (i & 1))) * 2;
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  static constexpr Planes kPlanes{4, 1, 4};  // 8 · bit = 4 · (q + 1)
  QG_HD static uint32_t strided_codes(bytes_ptr b, int i) {
    return (load<uint32_t, 2>(b + 2 + 4 * (i >> 3)) >> (i & 4)) & (0x01010101u << (i & 3));
  }
};

// | d f16 | 16 bytes of four neighbouring 2-bit codes |   weight = d · (code − 1)
struct Q2_0 : Packs<2> {
  static constexpr int kType = 42, kElems = 64, kBytes = 18, kGroup = 64, kZero = 1;
  static constexpr const char* kName = "Q2_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t codes(bytes_ptr b, int i) { return spread_pairs(b[2 + i]); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  QG_HD static uint32_t strided_codes(bytes_ptr b, int i) {
    bytes_ptr pairs = b + 2 + 8 * (i >> 3);  // every second byte of eight
    const uint32_t bytes =
        pick_bytes(load<uint32_t, 2>(pairs), load<uint32_t, 2>(pairs + 4), i & 4 ? 0x7531 : 0x6420);
    return (bytes >> (2 * (i & 3))) & 0x03030303u;
  }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    b[2 + i] |= static_cast<uint8_t>(gather_pairs(four));
  }
};

}  // namespace quantgemm
