// SPDX-License-Identifier: MIT
// The sparse key-value container: where a tile lies and how its values become codes, for CPU and CUDA.
//
//   x [tokens, channels] of one head, blocks of 64 tokens, channels tiles of 64 elements in each
//   key    tile = one channel of 64 tokens           tile = block·channels + channel
//   value  tile = one token of 64 channels           tile = block·channels + (channel/64)·64 + token%64
//
// bitmap: bit 63 is element 0; codes of the set elements, lowest bits first, from a word boundary.
#pragma once
#include <cmath>

#include "args.h"
#include "formats/portable.h"

namespace quantgemm {

inline constexpr int kTile = 64;     // elements of a tile, tokens of a block
inline constexpr int kRawBits = 16;  // "codes" that are the values themselves

// A sparse matrix as the product sees it: tiles stand upright in groups of 64 rows, one per column k.
struct TileGrid {
  int64_t block_stride;  // from column k to k + 64
  int64_t group_stride;  // from rows m to m + 64
  QG_HD int64_t tile(int64_t group, int64_t k) const {
    return (k / kTile) * block_stride + group * group_stride + k % kTile;
  }
};
QG_HD TileGrid key_grid(int64_t channels) { return {kTile, channels}; }    // m = token, k = channel
QG_HD TileGrid value_grid(int64_t channels) { return {channels, kTile}; }  // m = channel, k = token

QG_HD int64_t tile_words(int count, int bits) { return (static_cast<int64_t>(count) * bits + 31) / 32; }

QG_HD float value_of(Half x) { return half_to_float(x.bits); }
QG_HD float value_of(BFloat16 x) { return bfloat16_to_float(x.bits); }
QG_HD Half rounded(float x, Half) { return {float_to_half(x)}; }
QG_HD BFloat16 rounded(float x, BFloat16) { return {float_to_bfloat16(x)}; }

// Larger magnitudes have larger keys, and NaN the largest: the bits without the sign.
QG_HD uint32_t magnitude_key(uint16_t bits) { return bits & 0x7fffu; }

// value = (code - zero) · scale, both in x's type, zero an integer.
template <class Real16>
struct TileFit {
  Real16 scale, zero;
};

// lo and hi: the extremes of a tile's non-zero values, NaN if one of them is.
template <class Real16>
QG_HD TileFit<Real16> fit_tile(float lo, float hi, int bits) {
  const float half_levels = 0.5f * static_cast<float>((1 << bits) - 1);
  // Halves first: the difference of two bfloat16 may be too large for a float.
  const float scale = (0.5f * hi - 0.5f * lo) / half_levels;
  if (!(scale <= 3.4028235e38f)) return {rounded(bit_cast<float>(0x7fc00000u), Real16{}), Real16{0}};
  // One value alone is kept exactly: code 1 of scale = value.
  if (lo == hi) return {rounded(lo, Real16{}), Real16{0}};
  Real16 stored = rounded(scale, Real16{});
  if (stored.bits == 0) stored.bits = 1;  // the smallest there is
  return {stored, rounded(rintf(-lo / value_of(stored)), Real16{})};
}

QG_HD uint32_t code_of(float x, float scale, float zero, int bits) {
  const float code = rintf(x / scale) + zero, top = static_cast<float>((1 << bits) - 1);
  return static_cast<uint32_t>(code >= 0.0f ? (code < top ? code : top) : 0.0f);  // 0 for NaN
}

template <class Real16>
QG_HD Real16 decode(uint32_t code, float scale, float zero) {
  return rounded((static_cast<float>(code) - zero) * scale, Real16{});
}

}  // namespace quantgemm
