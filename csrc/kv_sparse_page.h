// SPDX-License-Identifier: MIT
// Pages of the native key-value cache that hold some of a token's channels: any `keep` of them (bitmap)
// or 4 of each 8 neighbours (four of eight), the largest magnitudes.
//
//   page     elements, scale [n] half; n = channels for keys (of 64 tokens each), 64 tokens for values
//   value    level · scale, level 0 for what is not kept; 2 bits: ±1 ±2, 4 bits: -8 … 7
//   bitmap   64 · channels bits, then the codes of those that are set without a gap, in their order
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

// ---- bitmap: bit p is bit p % 32 of word p / 32, and its element's code, if it is set, as many codes behind
// the bitmap (lowest bits first) as bits are set before it. A lane has 64 bits in a row, the 32 lanes one
// after the other, and so on; 8 bits are a lane's part of a tensor core's operand, two rows of four columns.
QG_HD int bitmap_place(int lane, int bit) { return (bit / 64 * 32 + lane) * 64 + bit % 64; }
QG_HD int bitmap_key_place(SparseElement e) {
  const int y = e.i + 8 * e.j;
  return bitmap_place(e.lane, y / 2 * 32 + e.x * 4 + y % 2 * 2 + e.even);
}
QG_HD int bitmap_value_place(SparseElement e) {
  const int y = e.i + 8 * e.j, step = e.x / 4 * 2 + e.x % 2;
  return bitmap_place(e.lane, y / 2 * 32 + step * 8 + y % 2 * 4 + e.x / 2 % 2 * 2 + e.even);
}
// The element of a bit.
QG_HD SparseElement bitmap_key_element(int place) {
  const int lane = place / 64 % 32, bit = place / 2048 * 64 + place % 64, y = bit / 32 * 2 + bit / 2 % 2;
  return {lane, y % 8, bit % 32 / 4, y / 8, bit % 2};
}
QG_HD SparseElement bitmap_value_element(int place) {
  const int lane = place / 64 % 32, bit = place / 2048 * 64 + place % 64, y = bit / 32 * 2 + bit / 4 % 2;
  const int step = bit / 8 % 4;
  return {lane, y % 8, step / 2 * 4 + bit / 2 % 2 * 2 + step % 2, y / 8, bit % 2};
}
QG_HD constexpr int64_t bitmap_bytes(int64_t channels) { return kPageTokens * channels / 8; }

// ---- four of eight: of each group 8 bits say which are set, then come the bits of the codes of the first
// to the fourth that is set. Planes of these bits:
//   plane i, i = 0 … 7                   element i is set
//   plane 8 + rank · bits + b            bit b of the code of rank 0 … 3 (four_of_eight_rank)
// A plane's bit of group (x, j, even) is in word (j/2) · planes + plane of the lane. With 64 channels only
// half of the bits are needed: the second half of the planes lies between the bits of the first.
QG_HD constexpr int four_of_eight_planes(int bits) { return 8 + 4 * bits; }
// The rank of element i of those that are set: from the beginning in the first half of a group, from the
// end in the second, so that each half needs to know only itself even where less than four are kept.
QG_HD int four_of_eight_rank(uint32_t set, int i) {
  int rank = i < 4 ? 0 : 3;
  for (int other = 0; other < 8; ++other)
    if (set >> other & 1) rank += i < 4 ? (other < i ? 1 : 0) : (other > i ? -1 : 0);
  return rank;
}
struct PlanePlace {
  int word, bit;  // of the page
};
// Words of a lane are stored in fours, those of all lanes side by side.
QG_HD int four_of_eight_word(int lane, int word) { return (word / 4 * 32 + lane) * 4 + word % 4; }
QG_HD PlanePlace four_of_eight_place(SparseElement e, int plane, int channels, int bits, bool is_value) {
  const int planes = four_of_eight_planes(bits);
  const int bit = 16 * e.even + (is_value ? e.x % 4 + 4 * (e.j % 2) + 8 * (e.x / 4) : e.x + 8 * (e.j % 2));
  if (channels > 64) return {four_of_eight_word(e.lane, e.j / 2 * planes + plane), bit};
  const int second = 2 * plane >= planes;
  return {four_of_eight_word(e.lane, plane - second * (planes / 2)), bit + second * (is_value ? 4 : 8)};
}

// Everything but the scales.
QG_HD constexpr int64_t sparse_codes_bytes(int64_t channels, PageFormat format) {
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

// ---- what is kept: magnitudes are compared as integers, NaN is the largest, of equals the first wins.
// Zeros are not kept: what belongs to a token is the same for all, but some of it may stay unused.
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
  float factor;  // 2 bits: where level 2 begins; 4 bits: 1 / scale

  QG_HD SparseCoder(uint16_t scale, int bits)
      : factor(bits == 2 ? 1.5f * half_to_float(scale) : 1.0f / half_to_float(scale)) {}
  QG_HD uint32_t code(float x, int bits) const {
    if (bits == 2) return ((x < 0.0f ? -x : x) > factor ? 1u : 0u) + (x < 0.0f ? 2u : 0u);  // 0 for NaN
    constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: sums with it are whole, their lowest bits a code
    float shifted = rounded_product(x, factor) + kMagic;
    shifted = shifted > kMagic - 8.0f ? shifted : kMagic - 8.0f;  // NaN too
    shifted = shifted < kMagic + 7.0f ? shifted : kMagic + 7.0f;
    return bit_cast<uint32_t>(shifted) & 15u;
  }
};

// What a scale follows from: the smallest and the largest magnitude of what a channel or a token keeps, their
// sum and number. Sums are taken of halves (first and last 32 tokens of a channel; a token's even and odd
// eights of channels), each in order, then added. Nothing is fused: CPU and CUDA agree.
struct SparseGroup {
  float lo, hi, sum[2];
  int count;
};
// 2 bits: a level 1 close to the mean costs attention less than the least squared error does. A group of one
// magnitude, or of one and its double, is exact; so what was packed before has the same codes again.
QG_HD uint16_t fit_sparse_group(const SparseGroup& g, int bits) {
  if (g.count == 0) return 0;
  float scale;
  if (bits == 4)
    scale = g.lo == g.hi ? g.lo : g.hi / 7.0f;
  else if (g.hi <= 2.0f * g.lo)
    scale = g.lo;
  else
    scale = rounded_product(0.875f, (g.sum[0] + g.sum[1]) / static_cast<float>(g.count));
  // NaN, infinity, or more than a half can be: all of the group is NaN.
  return g.hi <= 3.4028235e38f && scale < 65520.0f ? float_to_half(scale) : uint16_t{0x7e00};
}

}  // namespace quantgemm
