// SPDX-License-Identifier: MIT
// Encoders of the 32-weight types and of the two int8 activation types. Without importance the
// scale is a closed form, byte for byte the rule that GGUF files are made with:
//   Q4_0 Q5_0   d = extreme / −2^(bits−1): the extreme weight gets the lowest code
//   Q4_1 Q5_1   m = min, d = (max − m) / (2^bits − 1)        Q8_0 Q8_1 Q8_K   d = max|x| / 127
// With importance the first four minimise the weighted squared error (block_search.h) instead.
// NaN is skipped by the extremes, infinity makes the scale infinite; their codes are unspecified.
#pragma once
#include "block_search.h"
#include "encoder.h"
#include "formats_k.h"
#include "formats_legacy.h"

namespace quantgemm {

// 32 codes as GGUF packs them: weight j in the low, weight j + 16 in the high nibble of byte j;
// five-bit codes first have their top bits as one word. codes(i) gives codes i … i+7.
template <int Align, int Bits, class CodesFn>
QG_HD void write_codes_of_32(uint8_t* out, CodesFn codes) {
  uint32_t fifth = 0;
  QG_UNROLL
  for (int i = 0; i < 16; i += 8) {
    const Ints low = codes(i), high = codes(i + 16);
    store<Align>(out + (Bits == 5 ? 4 : 0) + i, low_bytes((low & 15) | ((high & 15) << 4)));
    if constexpr (Bits == 5) fifth |= low_bits(low >> 4) << i | low_bits(high >> 4) << (i + 16);
  }
  if constexpr (Bits == 5) store<Align>(out, fifth);
}

// Codes of x · inverse + bias, truncated: the bias holds the half of the rounding.
template <int Bits>
QG_HD Ints unsigned_codes(const Floats& x, float inverse, float bias) {
  constexpr float kLargest = (1 << Bits) - 1;
  return truncate(at_least(at_most(x * inverse + bias, kLargest), 0.0f));
}

template <int Bits>
struct SymmetricEncoder {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    constexpr int kHalf = 1 << (Bits - 1);
    constexpr float kMiddle = kHalf;
    if (importance) {
      using Levels = UniformLevels<-kHalf, kHalf - 1>;
      const SearchBlock search = search_block<32>(x, importance);
      const HalfScale d = search_half_scale<Levels, 32>(search, {1.1f, -0.03f, 10}, NoReference{});
      store<2>(block, d.bits);
      return write_codes_of_32<2, Bits>(block + 2, [&](int i) {
        return Levels::codes(search.group<8>(i / 8).x[0] * inverse_or_zero(d.value));
      });
    }
    const float d = extreme<32>(x) / -kMiddle, inverse = inverse_or_zero(d);
    store<2>(block, float_to_half(d));
    write_codes_of_32<2, Bits>(
        block + 2, [&](int i) { return unsigned_codes<Bits>(load8(x + i), inverse, kMiddle + 0.5f); });
  }
};
template <>
struct Encoder<Q4_0> : SymmetricEncoder<4> {};
template <>
struct Encoder<Q5_0> : SymmetricEncoder<5> {};

template <int Bits>
struct AffineEncoder {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    constexpr int kLast = (1 << Bits) - 1;
    if (importance) {
      using Levels = UniformLevels<0, kLast>;
      const SearchBlock search = search_block<32>(x, importance);
      const HalfAffine fit = search_half_affine<Levels, 32>(search, kAffineSeeds);
      store<4>(block, fit.scale.bits | static_cast<uint32_t>(fit.offset.bits) << 16);
      return write_codes_of_32<4, Bits>(block + 4, [&](int i) {
        const Floats above_offset = search.group<8>(i / 8).x[0] - fit.offset.value;
        return Levels::codes(above_offset * inverse_or_zero(fit.scale.value));
      });
    }
    Floats high = broadcast(-kLargestFloat), low = broadcast(kLargestFloat);
    QG_UNROLL
    for (int i = 0; i < 32; i += 8) {
      high = larger(high, load8(x + i));
      low = smaller(low, load8(x + i));
    }
    float min = smallest(low);
    if (min == 0) {  // the sign of zero shows in m: it is that of the first zero
      QG_UNROLL
      for (int i = 31; i >= 0; --i)
        if (x[i] == 0) min = x[i];
    }
    const float d = (largest(high) - min) / static_cast<float>(kLast) + 0.0f;  // never −0
    const float inverse = inverse_or_zero(d);
    store<4>(block, float_to_half(d) | static_cast<uint32_t>(float_to_half(min)) << 16);
    write_codes_of_32<4, Bits>(
        block + 4, [&](int i) { return unsigned_codes<Bits>(load8(x + i) - min, inverse, 0.5f); });
  }
};
template <>
struct Encoder<Q4_1> : AffineEncoder<4> {};
template <>
struct Encoder<Q5_1> : AffineEncoder<5> {};

// Eight int8 codes, halves away from zero.
QG_HD Ints int8_codes(const float* x, float inverse) {
  return round_away(at_least(at_most(load8(x) * inverse, 127.0f), -127.0f));
}

template <>
struct Encoder<Q8_0> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float d = largest_magnitude<32>(x) / 127.0f, inverse = inverse_or_zero(d);
    store<2>(block, float_to_half(d));
    QG_UNROLL
    for (int i = 0; i < 32; i += 8) store<2>(block + 2 + i, low_bytes(int8_codes(x + i, inverse)));
  }
};

template <>
struct Encoder<Q8_1> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float d = largest_magnitude<32>(x) / 127.0f, inverse = inverse_or_zero(d);
    Ints total{};
    QG_UNROLL
    for (int i = 0; i < 32; i += 8) {
      const Ints codes = int8_codes(x + i, inverse);
      total = total + codes;
      store<4>(block + 4 + i, low_bytes(codes));
    }
    store<2>(block, float_to_half(d));
    store<2>(block + 2, float_to_half(d * static_cast<float>(sum(total))));
  }
};

// The extreme weight gets −127; halves go to even. Every 16 codes have their sum behind the codes.
template <>
struct Encoder<Q8_K> {
  static constexpr bool kUsesImportance = false;
  QG_HD static void encode(const float* x, const float*, uint8_t* block) {
    const float largest = extreme<256>(x);
    const float inverse = largest != 0 ? -127.0f / largest : 0.0f;
    store<4>(block, bit_cast<uint32_t>(inverse_or_zero(inverse)));
    for (int i = 0; i < 256; i += 16) {
      Ints total{};
      QG_UNROLL
      for (int j = i; j < i + 16; j += 8) {
        const Floats scaled = at_least(at_most(load8(x + j) * inverse, 127.0f), -127.0f);
        const Ints codes = truncate(round_even(scaled));
        total = total + codes;
        store<4>(block + 4 + j, low_bytes(codes));
      }
      store<2>(block + 260 + i / 8, static_cast<uint16_t>(sum(total)));
    }
  }
};

}  // namespace quantgemm
