// SPDX-License-Identifier: MIT
// Encoders of the searched types: the K-quants and the IQ4 pair. The scales come from block_search.h;
// here the codes are chosen for them once more, by the same arithmetic, and bits are put in place.
// Types with an offset have it ≤ 0 and d, dmin ≥ 0; elsewhere d and s carry signs.
#pragma once
#include "block_search.h"
#include "encoder.h"
#include "formats_k.h"
#include "formats_legacy.h"

namespace quantgemm {

// How far each kind of level is searched.
constexpr Seeds kSeedsOf2Bits{0.85f, -0.3f, 8};     // scale and minimum
constexpr Seeds kSeedsOf3Bits{1.1f, -0.06f, 8};     // scale alone
constexpr Seeds kSeedsOf6Bits{1.04f, -0.015f, 12};  // scale alone
constexpr Seeds kSeedsOfIq4{1.1f, -0.03f, 14};
constexpr Landings kLandingsOfIq4{127, 1, 7};

// Stored codes of weights i … i+7, nearest to x under the chosen scales of their group.
template <class Levels, int N, int G>
struct SuperCodes {
  const SearchBlock& block;
  const SuperScales<G>& scales;
  QG_HD Ints operator()(int i) const {
    const Floats x = block.group<8>(i / 8).x[0] - scales.offset(i / N);
    return Levels::codes(x * inverse_or_zero(scales.scale(i / N)));
  }
};

// 128 two-bit codes to 32 bytes: weights 32p … 32p+31 in bits 2p and 2p+1.
template <int Align, class CodesFn>
QG_HD void write_planes_of_128(uint8_t* out, CodesFn codes) {
  for (int l = 0; l < 32; l += 8) {
    Ints bytes = codes(l) & 3;
    QG_UNROLL
    for (int p = 1; p < 4; ++p) bytes = bytes | ((codes(32 * p + l) & 3) << (2 * p));
    store<Align>(out + l, low_bytes(bytes));
  }
}

// Half codes to nibbles: weight j low, weight j + Half high in byte j.
template <int Align, int Half, class CodesFn>
QG_HD void write_nibbles(uint8_t* out, CodesFn codes) {
  for (int l = 0; l < Half; l += 8)
    store<Align>(out + l, low_bytes((codes(l) & 15) | ((codes(Half + l) & 15) << 4)));
}

template <>
struct Encoder<Q2_K> {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    using Levels = UniformLevels<0, 3>;
    const SearchBlock search = search_block<256>(x, importance);
    const auto scales = search_scales_and_minima<Levels, 16, 16>(
        search, {0, 15}, kSeedsOf2Bits, ReferenceAffine<Levels, Emphasis::kMagnitude>{{-0.5f, 16}});
    const SuperCodes<Levels, 16, 16> codes{search, scales};
    for (int g = 0; g < 16; ++g) block[g] = static_cast<uint8_t>(scales.s[g] | scales.m[g] << 4);
    for (int half = 0; half < 2; ++half)
      write_planes_of_128<4>(block + 16 + 32 * half, [&](int i) { return codes(128 * half + i); });
    store<2>(block + 80, scales.d.bits);
    store<2>(block + 82, scales.dmin.bits);
  }
};

template <>
struct Encoder<Q3_K> {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    using Levels = UniformLevels<-4, 3>;
    const SearchBlock search = search_block<256>(x, importance);
    const auto scales =
        search_scales<Levels, 16, 16>(search, {-32, 31}, kSeedsOf3Bits, ReferenceDescent<Levels>{});
    const SuperCodes<Levels, 16, 16> codes{search, scales};
    for (int l = 0; l < 32; l += 8) {
      Ints third = codes(l) >> 2;
      QG_UNROLL
      for (int g = 1; g < 8; ++g) third = third | ((codes(32 * g + l) >> 2) << g);
      store<2>(block + l, low_bytes(third));
    }
    for (int half = 0; half < 2; ++half)
      write_planes_of_128<2>(block + 32 + 32 * half, [&](int i) { return codes(128 * half + i); });
    for (int j = 0; j < 8; ++j)
      block[96 + j] = static_cast<uint8_t>((stored(scales, j) & 15) | (stored(scales, j + 8) & 15) << 4);
    for (int j = 0; j < 4; ++j) {
      int pairs = 0;
      for (int k = 0; k < 4; ++k) pairs |= (stored(scales, j + 4 * k) >> 4) << (2 * k);
      block[104 + j] = static_cast<uint8_t>(pairs);
    }
    store<2>(block + 108, scales.d.bits);
  }
  QG_HD static int stored(const SuperScales<16>& scales, int g) { return scales.s[g] + 32; }
};

// Q4_K and Q5_K: d, dmin and 8 scales and minima of 6 bits (k_scale_min in formats_k.h).
QG_HD void write_scales_and_minima(uint8_t* block, const SuperScales<8>& scales) {
  store<4>(block, scales.d.bits | static_cast<uint32_t>(scales.dmin.bits) << 16);
  for (int j = 0; j < 4; ++j) {
    const int s = scales.s[j + 4], m = scales.m[j + 4];
    block[4 + j] = static_cast<uint8_t>(scales.s[j] | s >> 4 << 6);
    block[8 + j] = static_cast<uint8_t>(scales.m[j] | m >> 4 << 6);
    block[12 + j] = static_cast<uint8_t>((s & 15) | (m & 15) << 4);
  }
}

template <int Bits>
struct EncoderOf32Groups {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    using Levels = UniformLevels<0, (1 << Bits) - 1>;
    constexpr Guesses kGuesses = Bits == 4 ? Guesses{-1, 21} : Guesses{-0.5f, 16};
    const SearchBlock search = search_block<256>(x, importance);
    const auto scales = search_scales_and_minima<Levels, 32, 8>(
        search, {0, 63}, kAffineSeeds, ReferenceAffine<Levels, Emphasis::kMagnitudeAndMean>{kGuesses});
    const SuperCodes<Levels, 32, 8> codes{search, scales};
    write_scales_and_minima(block, scales);
    uint8_t* nibbles = block + 16;
    if constexpr (Bits == 5) {  // 32 bytes of fifth bits first: weight 32g + l in bit g of byte l
      for (int l = 0; l < 32; l += 8) {
        Ints fifth = codes(l) >> 4;
        QG_UNROLL
        for (int g = 1; g < 8; ++g) fifth = fifth | ((codes(32 * g + l) >> 4) << g);
        store<8>(nibbles + l, low_bytes(fifth));
      }
      nibbles += 32;
    }
    for (int i = 0; i < 256; i += 64)
      write_nibbles<8, 32>(nibbles + i / 2, [&](int j) { return codes(i + j); });
  }
};
template <>
struct Encoder<Q4_K> : EncoderOf32Groups<4> {};
template <>
struct Encoder<Q5_K> : EncoderOf32Groups<5> {};

template <>
struct Encoder<Q6_K> {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    using Levels = UniformLevels<-32, 31>;
    const SearchBlock search = search_block<256>(x, importance);
    const auto scales = search_scales<Levels, 16, 16>(search, {-128, 127}, kSeedsOf6Bits,
                                                      ReferenceScale<Levels, false>{{-32, -0.1f, 9}});
    const SuperCodes<Levels, 16, 16> codes{search, scales};
    for (int half = 0; half < 2; ++half) {
      const auto of_half = [&](int i) { return codes(128 * half + i); };
      write_nibbles<2, 64>(block + 64 * half, of_half);
      write_planes_of_128<2>(block + 128 + 32 * half, [&](int i) { return of_half(i) >> 4; });
    }
    for (int g = 0; g < 16; ++g) block[192 + g] = static_cast<uint8_t>(scales.s[g]);
    store<2>(block + 208, scales.d.bits);
  }
};

template <>
struct Encoder<IQ4_XS> {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    const SearchBlock search = search_block<256>(x, importance);
    const auto scales = search_scales<Iq4Levels, 32, 8>(search, {-32, 31}, kSeedsOfIq4,
                                                        ReferenceScale<Iq4Levels, true>{kLandingsOfIq4});
    const SuperCodes<Iq4Levels, 32, 8> codes{search, scales};
    uint32_t low = 0, high = 0;
    for (int g = 0; g < 8; ++g) {
      const auto stored = static_cast<uint32_t>(scales.s[g] + 32);
      low |= (stored & 15) << (4 * g);
      high |= (stored >> 4) << (2 * g);
    }
    store<8>(block, scales.d.bits | static_cast<uint64_t>(high) << 16 | static_cast<uint64_t>(low) << 32);
    for (int i = 0; i < 256; i += 32)
      write_nibbles<8, 16>(block + 8 + i / 2, [&](int j) { return codes(i + j); });
  }
};

template <>
struct Encoder<IQ4_NL> {
  static constexpr bool kUsesImportance = true;
  QG_HD static void encode(const float* x, const float* importance, uint8_t* block) {
    const SearchBlock search = search_block<32>(x, importance);
    const HalfScale d = search_half_scale<Iq4Levels, 32>(search, kSeedsOfIq4,
                                                         ReferenceScale<Iq4Levels, true>{kLandingsOfIq4});
    store<2>(block, d.bits);
    write_nibbles<2, 16>(block + 2, [&](int j) {
      return Iq4Levels::codes(search.group<8>(j / 8).x[0] * inverse_or_zero(d.value));
    });
  }
};

}  // namespace quantgemm
