// SPDX-License-Identifier: MIT
// Encoders of the types whose scale follows from the largest (or mean) magnitude alone: four-bit
// floats, ternary, one and two bits. Byte for byte the rule that GGUF files are made with.
//   MXFP4  2^e with max|x| in [4, 8) · 2^e      NVFP4  max|x| / 6 as e4m3, per 16
//   TQ1_0 TQ2_0 Q2_0  max|x|                    Q1_0   mean|x|
// NaN is skipped by the maximum, infinity makes the scale infinite; their codes are unspecified.
#pragma once
#include "encoder.h"
#include "formats_tiny.h"
#include "lanes.h"

namespace quantgemm {

// Indices of the nearest of ±{0, 1, 2, 3, 4, 6, 8, 12} · unit; a tie takes the smaller magnitude,
// and a zero is always +0. Multiples of a power of two or of an e4m3 number are exact.
QG_HD Ints fp4_codes(const Floats& x, float unit) {
  const Floats size = magnitude(x);
  const Ints index = above(size, 0.5f * unit) + above(size, 1.5f * unit) + above(size, 2.5f * unit) +
                     above(size, 3.5f * unit) + above(size, 5.0f * unit) + above(size, 7.0f * unit) +
                     above(size, 10.0f * unit);
  return index + (above(x * -1.0f, 0.5f * unit) << 3);
}

// The same where x may lie far above the last level: |x| less a level is rounded then, and the first
// of the levels that come equally near is taken, above 2^28 · unit and at infinity the zero.
QG_HD Ints saturated_fp4_codes(const Floats& x, float unit) {
  constexpr float kLevels[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  const Floats size = magnitude(x), least = size - 12 * unit;
  const auto is_worse = [&](int i) { return above(size - kLevels[i] * unit - least, 0); };
  Ints index{};
  QG_UNROLL
  for (int i = 0; i < 7; ++i)
    index = index + above(size, 0.5f * (kLevels[i] + kLevels[i + 1]) * unit) * is_worse(i);
  return index + ((above(x * -1.0f, 0.5f * unit) * is_worse(0)) << 3);
}

// floor(log2 x), where log2 is rounded to float32 first: a number a few units in the last place
// below a power of two counts as that power, which is what the makers of GGUF files compute.
QG_HD int floor_log2(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int exponent = static_cast<int>(bits >> 23) - 127;
  const float next = static_cast<float>(exponent + 1);
  const float missing = static_cast<float>(0x800000 - static_cast<int>(bits & 0x7fffff));
  const float log2_missing = missing * 0x1.715476p-24f;  // (2^E − x) / (2^E · ln 2)
  return next - log2_missing == next ? exponent + 1 : exponent;
}

template <>
struct Encoder<MXFP4> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float largest = largest_magnitude<32>(x);
    const int e = largest > 0 ? floor_log2(largest) - 2 + 127 : 0;
    block[0] = static_cast<uint8_t>(e > 0 ? e : 0);
    const float unit = MXFP4::affine(block, 0).scale;
    QG_UNROLL
    for (int i = 0; i < 16; i += 8) {
      const Ints low = fp4_codes(load8(x + i), unit), high = fp4_codes(load8(x + i + 16), unit);
      store<1>(block + 1 + i, low_bytes(low | (high << 4)));
    }
  }
};

// The e4m3 number nearest to x ≥ 0 (halves up), as GGUF files have it: 256 and above are 448.
constexpr uint8_t kLargestE4m3 = 0x7e;
QG_HD uint8_t e4m3_from(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int exponent = static_cast<int>(bits >> 23) - 120;
  if (!(x < 256.0f)) return kLargestE4m3;
  if (exponent <= 0) {
    const int steps = static_cast<int>(x * 512.0f + 0.5f);
    return static_cast<uint8_t>(steps < 7 ? steps : 7);
  }
  const uint32_t rounded = ((static_cast<uint32_t>(exponent) << 4 | ((bits >> 19) & 15)) + 1) >> 1;
  return static_cast<uint8_t>(rounded < 0x78 ? rounded : kLargestE4m3);
}

template <>
struct Encoder<NVFP4> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    QG_UNROLL
    for (int g = 0; g < 4; ++g) {
      const float* group = x + 16 * g;
      block[g] = e4m3_from(largest_magnitude<16>(group) / 6.0f);
      const float scale = NVFP4::affine(block, g).scale;
      const float unit = scale > 0 ? scale : 0x1p127f;  // a group that vanished: codes 0
      const auto codes = [&](const float* x8) {
        return block[g] == kLargestE4m3 ? saturated_fp4_codes(load8(x8), unit) : fp4_codes(load8(x8), unit);
      };
      const Ints low = codes(group), high = codes(group + 8);
      store<4>(block + 4 + 8 * g, low_bytes(low | (high << 4)));
    }
  }
};

// Codes 0, 1, 2 for −d, 0, +d of eight weights.
QG_HD Ints ternary_codes(const float* x, float inverse) {
  return round_away(at_most(at_least(load8(x) * inverse, -1.0f), 1.0f)) + 1;
}

// Numbers n of five base-3 digits as bytes b of which b · 3^k mod 256 gives digit k: ⌈n · 256 / 243⌉.
QG_HD Ints base3_bytes(const Ints& n) { return n + (((n * 13 + 242) * 1079) >> 18); }

// Eight bytes of five digits each: digit k of byte l is the weight at k · Stride + l.
template <int Stride>
QG_HD uint64_t base3_column(const float* x, float inverse) {
  Ints n = ternary_codes(x, inverse);
  QG_UNROLL
  for (int k = 1; k < 5; ++k) n = n * 3 + ternary_codes(x + k * Stride, inverse);
  return low_bytes(base3_bytes(n));
}

template <>
struct Encoder<TQ1_0> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float d = largest_magnitude<256>(x), inverse = inverse_or_zero(d);
    for (int l = 0; l < 32; l += 8) store<2>(block + l, base3_column<32>(x + l, inverse));
    for (int l = 0; l < 16; l += 8) store<2>(block + 32 + l, base3_column<16>(x + 160 + l, inverse));
    // Weights 240-255: four bytes with the four leading digits, weight 240 + 4k + l in byte l.
    const uint64_t digits01 = low_bytes(ternary_codes(x + 240, inverse));
    const uint64_t digits23 = low_bytes(ternary_codes(x + 248, inverse));
    const auto n = static_cast<uint32_t>(digits01 * 81 + (digits01 >> 32) * 27 + digits23 * 9 +
                                         (digits23 >> 32) * 3);  // bytes of at most 240: no carries
    QG_UNROLL
    for (int l = 0; l < 4; ++l)
      block[48 + l] = static_cast<uint8_t>((((n >> (8 * l)) & 255) * 256 + 242) / 243);
    store<2>(block + 52, float_to_half(d));
  }
};

template <>
struct Encoder<TQ2_0> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float d = largest_magnitude<256>(x), inverse = inverse_or_zero(d);
    for (int l = 0; l < 64; l += 8) {
      const float* plane = x + 4 * (l & 32) + (l & 31);
      Ints codes = ternary_codes(plane, inverse);
      QG_UNROLL
      for (int p = 1; p < 4; ++p) codes = codes | (ternary_codes(plane + 32 * p, inverse) << (2 * p));
      store<2>(block + l, low_bytes(codes));
    }
    store<2>(block + 64, float_to_half(d));
  }
};

template <>
struct Encoder<Q2_0> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float d = largest_magnitude<64>(x), inverse = inverse_or_zero(d);
    store<2>(block, float_to_half(d));
    for (int i = 0; i < 8; ++i) {
      // Eight bytes of one code each to two bytes of four: fields at bits 0, 8, 16, 24 -> 0, 2, 4, 6.
      const uint64_t codes = low_bytes(ternary_codes(x + 8 * i, inverse));
      const uint64_t packed = codes | (codes >> 6) | (codes >> 12) | (codes >> 18);
      block[2 + 2 * i] = static_cast<uint8_t>(packed);
      block[3 + 2 * i] = static_cast<uint8_t>(packed >> 32);
    }
  }
};

template <>
struct Encoder<Q1_0> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    float total = 0;  // one weight after the other: the rounding of this sum is part of the rule
    for (int i = 0; i < 128; ++i) total += x[i] < 0 ? -x[i] : x[i];
    store<2>(block, float_to_half(total / 128.0f));
    for (int i = 0; i < 16; ++i)
      block[2 + i] = static_cast<uint8_t>(low_bits(not_below_zero(load8(x + 8 * i))));
  }
};

}  // namespace quantgemm
