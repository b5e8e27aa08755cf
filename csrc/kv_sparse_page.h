// SPDX-License-Identifier: MIT
// Pages of the native key-value cache that hold some of a token's channels: any `keep` of them (bitmap)
// or 4 of each 8 neighbours (four of eight), the largest magnitudes.
//
//   page     elements, scale [n] half; n = channels for keys (of 64 tokens each), 64 tokens for values
//   value    level · scale, level 0 for what is not kept; 2 bits: ±1 ±2, 4 bits: -8 … 7
//   bitmap   one bit per element, then the codes of the set ones without a gap, both in the order of
//            lanes and of their elements: all of lane 0's, all of lane 1's ...
//   four of eight   bit planes: of 32 groups of 8 channels of one lane, a word has the same bit
//
// Elements belong to the lanes of a warp as tensor cores want them; all positions below follow from that.
#pragma once
#include "args.h"
#include "formats/portable.h"

namespace quantgemm {

inline constexpr int kPageTokens = 64;

// What a lane has: 2 · channels elements, in groups of 8 neighbouring channels of one token. Of a group's
// elements i = 0 … 7; groups are numbered by (x, j, even), x < 8, j < channels/64, even < 2.
struct SparseElement {
  int lane, i, x, j, even;
};
QG_HD SparseElement sparse_key_element(int token, int channel, int channels) {
  const int group = channel / 8, j = group / 4;
  return {token % 8 * 4 + group % 4, channel % 8, token / 8, j % (channels / 64), j / (channels / 64)};
}
QG_HD SparseElement sparse_value_element(int token, int channel) {
  const int group = channel / 8;
  return {group % 8 * 4 + token % 8 / 2, channel % 8, token / 8, group / 8, token % 2};
}
// The inverses.
struct SparseOrigin {
  int token, channel;
};
QG_HD SparseOrigin sparse_key_origin(SparseElement e, int channels) {
  return {8 * e.x + e.lane / 4, 8 * (4 * (e.j + e.even * (channels / 64)) + e.lane % 4) + e.i};
}
QG_HD SparseOrigin sparse_value_origin(SparseElement e) {
  return {8 * e.x + e.lane % 4 * 2 + e.even, 8 * (e.lane / 4 + 8 * e.j) + e.i};
}

// Words of a lane are stored in fours, those of all lanes side by side.
QG_HD int sparse_word(int lane, int word) { return (word / 4 * 32 + lane) * 4 + word % 4; }

// ---- bitmap: bit n of a lane is bit n % 32 of its word n / 32; 8 bits are its part of a tensor core's
// operand (two rows of four columns). The code of an element that is set is as many codes behind the
// bitmap (lowest bits first) as there are set elements before it: in lanes before its own, and in its own
// before n.
QG_HD int bitmap_key_bit(SparseElement e) {
  const int y = e.i + 8 * e.j;
  return y / 2 * 32 + e.x * 4 + y % 2 * 2 + e.even;
}
QG_HD int bitmap_value_bit(SparseElement e) {
  const int y = e.i + 8 * e.j;
  return y / 2 * 32 + (e.x / 4 * 2 + e.x % 2) * 8 + y % 2 * 4 + e.x / 2 % 2 * 2 + e.even;
}
// The element of a lane's bit.
QG_HD SparseElement bitmap_key_element(int lane, int bit) {
  const int y = bit / 32 * 2 + bit / 2 % 2;
  return {lane, y % 8, bit % 32 / 4, y / 8, bit % 2};
}
QG_HD SparseElement bitmap_value_element(int lane, int bit) {
  const int y = bit / 32 * 2 + bit / 4 % 2, step = bit / 8 % 4;
  return {lane, y % 8, step / 2 * 4 + bit / 2 % 2 * 2 + step % 2, y / 8, bit % 2};
}
QG_HD int64_t bitmap_bytes(int64_t channels) { return kPageTokens * channels / 8; }

// ---- four of eight: of each group 8 bits say which are set, then come the bits of the codes of the first
// to the fourth that is set. Planes of these bits:
//   plane i, i = 0 … 7                   element i is set
//   plane 8 + rank · bits + b            bit b of the code of rank 0 … 3
// A plane's bit of group (x, j, even) is in word (j/2) · planes + plane of the lane. With 64 channels only
// half of the bits are needed: the second half of the planes lies between the bits of the first.
QG_HD int four_of_eight_planes(int bits) { return 8 + 4 * bits; }
struct PlanePlace {
  int word, bit;
};
QG_HD PlanePlace four_of_eight_place(SparseElement e, int plane, int channels, int bits, bool is_value) {
  const int planes = four_of_eight_planes(bits);
  const int bit = 16 * e.even + (is_value ? e.x % 4 + 4 * (e.j % 2) + 8 * (e.x / 4) : e.x + 8 * (e.j % 2));
  if (channels > 64) return {e.j / 2 * planes + plane, bit};
  const int second = 2 * plane >= planes;
  return {plane - second * (planes / 2), bit + second * (is_value ? 4 : 8)};
}

// Everything but the scales.
QG_HD int64_t sparse_codes_bytes(int64_t channels, PageFormat format) {
  return format.kind == PageKind::kBitmap
             ? bitmap_bytes(channels) + kPageTokens * int64_t{format.keep} * format.bits / 8
             : kPageTokens * channels / 8 * four_of_eight_planes(format.bits) / 8;
}

// Where a channel's or a token's scale lies behind them: those that a lane needs of 8 columns are
// neighbours, and so are the four lanes' ones.
QG_HD int sparse_key_scale_place(int channel, int channels) {
  const SparseElement e = sparse_key_element(0, channel, channels);
  const int y = e.i + 8 * e.j;
  return ((y / 4 * 4 + e.lane) * 4 + y % 2 * 2 + y / 2 % 2) * 2 + e.even;
}
QG_HD int sparse_value_scale_place(int token) {
  return ((token / 32 * 4 + token % 8 / 2) * 4 + token / 8 % 4) * 2 + token % 2;
}

// ---- what is kept: magnitudes are compared as integers, NaN is the largest, of equals the first wins ----
QG_HD int sparse_magnitude(uint16_t x) { return x & 0x7fff; }

// ---- codes ----
// 2 bits: bit 0 is set for ±2, bit 1 for a negative level. 4 bits: two's complement.
QG_HD int sparse_level(int code, int bits) {
  if (bits == 4) return (code ^ 8) - 8;
  return (code & 2 ? -1 : 1) * ((code & 1) + 1);
}
QG_HD float sparse_value(int level, uint16_t scale) {
  return rounded_product(static_cast<float>(level), half_to_float(scale));
}
struct SparseCoder {
  float scale, inverse;
  int bits;

  // As fitted or, before codes are stored, half_to_float of the stored scale.
  QG_HD SparseCoder(float s, int b) : scale(s), inverse(1.0f / s), bits(b) {}
  QG_HD int code(float x) const {
    if (bits == 2) {
      const bool is_negative = (x < 0.0f) != (scale < 0.0f);
      const float magnitude = x < 0.0f ? -x : x, unit = scale < 0.0f ? -scale : scale;
      return (is_negative ? 2 : 0) + (magnitude > rounded_product(1.5f, unit) ? 1 : 0);
    }
    constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: sums with it are rounded to integers
    const float q = (rounded_product(x, inverse) + kMagic) - kMagic;
    const float level = q >= -8.0f ? (q < 7.0f ? q : 7.0f) : -8.0f;  // -8 for NaN
    return static_cast<int>(level) & 15;
  }
};

// The scale (half) of those of x(0) … x(count - 1) that is_kept(i): the best one for the levels that the
// one before chooses, four times over. Sums are in order and nothing is fused: CPU and CUDA agree.
template <class X, class IsKept>
QG_HD uint16_t fit_sparse_scale(X&& x, IsKept&& is_kept, int count, int bits) {
  float total = 0.0f, extreme = 0.0f, kept = 0.0f;
  for (int i = 0; i < count; ++i) {
    if (!is_kept(i)) continue;
    const float v = x(i), magnitude = v < 0.0f ? -v : v, largest = extreme < 0.0f ? -extreme : extreme;
    total += magnitude, kept += 1.0f;
    if (magnitude > largest) extreme = v;
  }
  if (!(total < 3e38f)) return 0x7e00;  // NaN or infinity: the whole group is NaN
  if (total == 0.0f) return 0;
  float scale = bits == 2 ? rounded_product(0.8f, total / kept) : extreme * -0.125f;
  for (int step = 0; step < 4; ++step) {
    const SparseCoder coder(scale, bits);
    float products = 0.0f, squares = 0.0f;
    for (int i = 0; i < count; ++i) {
      if (!is_kept(i)) continue;
      const float v = x(i), level = static_cast<float>(sparse_level(coder.code(v), bits));
      products += rounded_product(level, v), squares += level * level;
    }
    if (!(squares > 0.0f)) break;
    scale = products / squares;
  }
  return float_to_half(scale);
}

}  // namespace quantgemm
