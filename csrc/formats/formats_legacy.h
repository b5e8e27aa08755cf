// SPDX-License-Identifier: MIT
// The first generation of GGUF types: 32 weights, one half scale d, perhaps a half minimum m.
//   symmetric  weight = d · (code − 2^(bits−1))        Q4_0 Q5_0 Q8_0 Q8_1
//   affine     weight = d · code + m                   Q4_1 Q5_1
//   table      weight = d · kValues[code]              IQ4_NL
#pragma once
#include "bit_fields.h"
#include "block_format.h"

namespace quantgemm {

// | d f16 | 16 bytes: weight j low nibble of byte j, weight j+16 high nibble |
struct Q4_0 : Packs<4> {
  static constexpr int kType = 2, kElems = 32, kBytes = 18, kGroup = 32, kZero = 8;
  static constexpr const char* kName = "Q4_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t codes(bytes_ptr b, int i) { return nibbles_of_32<2>(b + 2, i); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_nibbles_of_32<2>(b + 2, i, four); }
};

// | d f16 | m f16 | 16 bytes of nibbles as Q4_0 |
struct Q4_1 : Packs<4> {
  static constexpr int kType = 3, kElems = 32, kBytes = 20, kGroup = 32;
  static constexpr const char* kName = "Q4_1";
  static constexpr bool kOffset = true;
  QG_HD static Affine affine(bytes_ptr b, int) {
    return {half_to_float(load<uint16_t, 2>(b)), half_to_float(load<uint16_t, 2>(b + 2))};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return nibbles_of_32<4>(b + 4, i); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_nibbles_of_32<4>(b + 4, i, four); }
};

// | d f16 | fifth bits u32: bit j is weight j | 16 bytes of nibbles |
struct Q5_0 : Packs<5> {
  static constexpr int kType = 6, kElems = 32, kBytes = 22, kGroup = 32, kZero = 16;
  static constexpr const char* kName = "Q5_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t codes(bytes_ptr b, int i) {
    const uint32_t fifth = spread_bits(load<uint32_t, 2>(b + 2) >> (4 * i));
    return nibbles_of_32<2>(b + 6, i) | (fifth << 4);
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return sub_bytes(codes(b, i), broadcast_byte(kZero)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    put_nibbles_of_32<2>(b + 6, i, four);
    or_into<2>(b + 2, gather_bits(four >> 4) << (4 * i));
  }
};

// | d f16 | m f16 | fifth bits u32 | 16 bytes of nibbles |
struct Q5_1 : Packs<5> {
  static constexpr int kType = 7, kElems = 32, kBytes = 24, kGroup = 32;
  static constexpr const char* kName = "Q5_1";
  static constexpr bool kOffset = true;
  QG_HD static Affine affine(bytes_ptr b, int) {
    return {half_to_float(load<uint16_t, 2>(b)), half_to_float(load<uint16_t, 2>(b + 2))};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) {
    const uint32_t fifth = spread_bits(load<uint32_t, 4>(b + 4) >> (4 * i));
    return nibbles_of_32<4>(b + 8, i) | (fifth << 4);
  }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) {
    put_nibbles_of_32<4>(b + 8, i, four);
    or_into<4>(b + 4, gather_bits(four >> 4) << (4 * i));
  }
};

// | d f16 | 32 × int8 |
struct Q8_0 : Packs<8> {
  static constexpr int kType = 8, kElems = 32, kBytes = 34, kGroup = 32;
  static constexpr const char* kName = "Q8_0";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return load<uint32_t, 2>(b + 2 + 4 * i); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { or_into<2>(b + 2 + 4 * i, four); }
};

// | d f16 | s f16 = d · Σ code | 32 × int8 |   an activation format; s does not enter the decoding
struct Q8_1 {
  static constexpr int kType = 9, kElems = 32, kBytes = 36, kGroup = 32;
  static constexpr const char* kName = "Q8_1";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return load<uint32_t, 4>(b + 4 + 4 * i); }
};

// The 16 levels of IQ4_NL and IQ4_XS, denser near zero:
// −127 −104 −83 −65 −49 −35 −22 −10 1 13 25 38 53 69 89 113
QG_HD uint32_t iq4_levels(uint32_t nibbles) {
  return lookup_nibbles<0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u>(nibbles);
}

// | d f16 | 16 bytes of nibbles as Q4_0, each an index into the 16 levels |
struct IQ4_NL : Packs<4> {
  static constexpr int kType = 20, kElems = 32, kBytes = 18, kGroup = 32;
  static constexpr const char* kName = "IQ4_NL";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) { return {half_to_float(load<uint16_t, 2>(b)), 0}; }
  QG_HD static uint32_t nibbles(bytes_ptr b, int i) { return nibbles_of_32<2>(b + 2, i); }
  QG_HD static uint32_t levels(uint32_t four) { return iq4_levels(four); }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return levels(nibbles(b, i)); }
  QG_HD static void place(uint8_t* b, int i, uint32_t four) { put_nibbles_of_32<2>(b + 2, i, four); }
};

}  // namespace quantgemm
