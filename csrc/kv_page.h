// SPDX-License-Identifier: MIT
// The native key-value cache: pages of 64 tokens of one head, quantised where tensor cores want them.
//
//   sequence   sinks | pages of 64 tokens ... | the recent ones, in a ring of ring() slots
//   values     codes, scale [64 tokens] half, shift [64] half
//   keys       codes, then [channels] half: two neighbouring pages, whose places have nothing to do with each
//              other, share a fit; the even one has the scales, the odd one the shifts
//   value      (code/2^bits + shift) · scale
//
// Those are dense pages; sparse ones are in kv_sparse_page.h. Codes of a key page are rows = tokens, columns
// k = channels; of a value page the other way round.
#pragma once
#include <cmath>

#include "args.h"
#include "formats/portable.h"
#include "kv_sparse_page.h"

namespace quantgemm {

QG_HD constexpr int64_t page_codes_bytes(int64_t channels, int bits) {
  return kPageTokens * channels * bits / 8;
}
QG_HD constexpr int64_t codes_bytes(int64_t channels, PageFormat format) {
  return format.kind == PageKind::kDense ? page_codes_bytes(channels, format.bits)
                                         : sparse_codes_bytes(channels, format);
}
QG_HD constexpr int64_t key_page_bytes(int64_t channels, PageFormat format) {
  return codes_bytes(channels, format) + 2 * channels;
}
QG_HD constexpr int64_t value_page_bytes(int64_t channels, PageFormat format) {
  return codes_bytes(channels, format) + (format.kind == PageKind::kDense ? 4 : 2) * kPageTokens;
}
// So many pages leave the ring at a time, those whose keys share a fit; and how many of so many pages do.
QG_HD constexpr int pages_together(PageFormat keys) { return keys.kind == PageKind::kDense ? 2 : 1; }
QG_HD constexpr int64_t whole_pages(int64_t pages, PageFormat keys) {
  return pages & ~int64_t{pages_together(keys) - 1};
}
// Of a page of keys with all that belongs to it.
QG_HD constexpr int64_t whole_keys_bytes(int64_t channels, PageFormat format) {
  return key_page_bytes(channels, format) + 2 * channels * (pages_together(format) - 1);
}

// Where the code of (row, k) lies: lane 4r + c of a warp holds rows r + 8i of columns 2c, 2c + 1 of
// every 8, eight codes i of an even column in the lower half of its words, of the odd one in the upper.
struct CodePlace {
  int word, shift;
};
QG_HD CodePlace code_place(int row, int k, int num_k, int bits) {
  const int per_half = 16 / bits, i = row / 8 % 8;
  const int own = ((row / 64 * (num_k / 16) + k / 16) * 2 + k / 8 % 2) * (8 / per_half) + i / per_half;
  const int lane = row % 8 * 4 + k % 8 / 2;
  return {(own / 4 * 32 + lane) * 4 + own % 4, i % per_half * bits + 16 * (k % 2)};
}

// The inverse: row and column of code 0 of a word's lower half; the others are 8 rows further each.
struct CodeOrigin {
  int row, k;
};
QG_HD CodeOrigin code_origin(int word, int num_k, int bits) {
  const int per_half = 16 / bits, own = word / 128 * 4 + word % 4, lane = word / 4 % 32;
  const int pair = own / (8 / per_half), half = pair % 2, step = pair / 2 % (num_k / 16);
  const int row = pair / 2 / (num_k / 16) * 64 + own % (8 / per_half) * per_half * 8 + lane / 4;
  return {row, 16 * step + 8 * half + 2 * (lane % 4)};
}

// Where the fit of column k lies: those that lane 4r + c needs of 32 columns are neighbours, and so are
// the four lanes' ones.
QG_HD int fit_place(int k) { return ((k / 32 * 4 + k % 8 / 2) * 4 + k / 8 % 4) * 2 + k % 2; }

struct PageFit {
  uint16_t scale, shift;  // half
};
// Codes and values of a fit. Nothing is divided and nothing fused: CPU and CUDA agree.
struct PageCoder {
  float scale, shift, step, inverse, lift, top;  // lift: shift in steps

  QG_HD PageCoder(PageFit fit, int bits)
      : scale(half_to_float(fit.scale)),
        shift(half_to_float(fit.shift)),
        step(1.0f / static_cast<float>(1 << bits)) {
    const float steps = static_cast<float>(1 << bits);
    inverse = 1.0f / scale * steps, lift = shift * steps, top = steps - 1.0f;
  }
  QG_HD float code(float x) const {
    constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: sums with it are rounded to integers
    const float rounded = (rounded_product(x, inverse) - lift + kMagic) - kMagic;
    return rounded >= 0.0f ? (rounded < top ? rounded : top) : 0.0f;  // 0 for NaN
  }
  QG_HD float value(float code) const { return rounded_product(code * step + shift, scale); }
};

// lo is code 0 and hi the largest one.
QG_HD PageFit fit_page_range(float lo, float hi, int bits) {
  const float levels = static_cast<float>((1 << bits) - 1), steps = levels + 1.0f;
  if (lo == hi) return {float_to_half(lo), 0x3c00};  // exactly: code 0, shift 1
  uint16_t scale = float_to_half((hi - lo) / levels * steps);
  if (scale == 0) scale = 1;
  return {scale, float_to_half(lo / half_to_float(scale))};
}

// With four levels the extremes are worth less than the middle: the range is narrowed step by step while the
// squared error falls. That is measured with distances from the middle in whole 1024ths of half the range,
// q = 0 … 1024, and levels at ±s/2 and ±3/2 s. Then all sums are whole numbers and no order of them matters.
inline constexpr int kRanges = 6, kRangeUnits = 1024;
QG_HD constexpr int range_step(int n) { return (2048 * (100 - 9 * n) + 150) / 300; }
QG_HD float range_cut(int n, float lo, float hi) {
  return rounded_product(0.045f * static_cast<float>(n), hi - lo);
}
// Values to distances: |x · inverse - middle|, a half, rounded. There is something to narrow if inverse > 0.
struct RangeGrid {
  float inverse, middle;

  QG_HD RangeGrid(float lo, float hi)
      : inverse(hi - lo >= 1e-30f && hi - lo <= 1e30f ? 2 * kRangeUnits / (hi - lo) : 0.0f),
        middle(rounded_product(0.5f * lo + 0.5f * hi, inverse)) {}
};
// Four times the squared error of `count` values, less what all ranges have; sum of all q, and of what is
// beyond s of those that are.
QG_HD int range_error(int n, int count, int sum, int beyond) {
  const int s = range_step(n);
  return count * s * s - 4 * s * (sum + 2 * beyond);
}

// The fit of x(0) … x(count - 1).
template <class X>
QG_HD PageFit fit_page_group(X&& x, int count, int bits) {
  float lo = x(0), hi = lo;
  for (int i = 1; i < count; ++i) {
    const float v = x(i);
    lo = v < lo || v != v ? v : lo, hi = v > hi || v != v ? v : hi;
  }
  if (lo != lo || hi != hi) lo = hi = bit_cast<float>(0x7fc00000u);
  const RangeGrid grid(lo, hi);
  if (bits > 2 || !(grid.inverse > 0.0f)) return fit_page_range(lo, hi, bits);
  int sum = 0, beyond[kRanges] = {}, best = 0;
  for (int i = 0; i < count; ++i) {
    const float units = half_to_float(float_to_half(fmaf(x(i), grid.inverse, -grid.middle)));
    const int q = static_cast<int>(rintf(units < 0.0f ? -units : units));
    sum += q;
    for (int n = 0; n < kRanges; ++n) beyond[n] += q > range_step(n) ? q - range_step(n) : 0;
  }
  const auto error = [&](int n) { return range_error(n, count, sum, beyond[n]); };
  while (best + 1 < kRanges && error(best + 1) < error(best)) ++best;
  const float cut = range_cut(best, lo, hi);
  return fit_page_range(lo + cut, hi - cut, bits);
}

// What a sequence of so many tokens consists of; pages leave the ring as soon as they may.
struct SequenceParts {
  int64_t sinks, pages, ring_first, ring_end;  // positions of the ring's tokens, counted after the sinks
};
QG_HD int64_t ring_slots(const KvCacheArgs& c) { return c.recent - c.sinks; }
QG_HD SequenceParts parts_of(const KvCacheArgs& c, int64_t tokens) {
  if (tokens < 0) tokens = 0;
  const int64_t sinks = tokens < c.sinks ? tokens : c.sinks, rest = tokens - sinks;
  int64_t pages = rest > c.window ? (rest - c.window) / kPageTokens : 0;
  if (pages > c.max_pages) pages = c.max_pages;
  pages = whole_pages(pages, c.key_format);
  // A length that the cache cannot have, not yet written perhaps, must not become a loop without end.
  const int64_t first = pages * kPageTokens, most = first + ring_slots(c);
  return {sinks, pages, first, rest < most ? rest : most};
}
// How many tokens at the end of a sequence come after the one that group g asks for.
QG_HD int hidden_tokens(const KvAttentionArgs& args, int g) {
  const int tokens = static_cast<int>(args.tokens);
  return tokens == 1 ? 0 : tokens - 1 - g % tokens;
}
// The slot of a token's position.
QG_HD int64_t recent_slot(const KvCacheArgs& c, int64_t position) {
  return position < c.sinks ? position : c.sinks + (position - c.sinks) % ring_slots(c);
}

}  // namespace quantgemm
