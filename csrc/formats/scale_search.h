// SPDX-License-Identifier: MIT
// Least squares for the encoders that search: minimise  Σ w · (x − scale · q − offset)²  over codes
// q and a scale (and an offset). For fixed codes that is linear regression; for a fixed scale the
// best code is the nearest level. A seed guesses where the largest weight lands on the levels: each
// seed is rounded and regressed once, and the best is polished by repeating the two steps. Without
// importance w = 1: the plain squared error is what is minimised, no weight counts more.
// Only + − × / √ and comparisons, in a fixed order: CPU and GPU get the same bits.
#pragma once
#include "lanes.h"

namespace quantgemm {

// ---- levels: what the codes stand for ----
template <int Low, int High>
struct UniformLevels {
  static constexpr float kLow = Low, kHigh = High;
  QG_HD static Floats nearest(const Floats& t) { return round_even(at_least(at_most(t, kHigh), kLow)); }
  // Stored codes count from the lowest level.
  QG_HD static Ints codes(const Floats& t) { return truncate(nearest(t)) + -Low; }
};

// The levels of IQ4_NL and IQ4_XS (iq4_levels in formats_legacy.h).
struct Iq4Levels {
  static constexpr float kLow = -127, kHigh = 113;
  QG_HD static constexpr float level(int i) {
    constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    return kLevels[i];
  }
  QG_HD static constexpr float middle(int i) { return 0.5f * (level(i) + level(i + 1)); }
  QG_HD static Floats nearest(const Floats& t) {
    Floats result = broadcast(level(0));
    QG_UNROLL
    for (int i = 0; i < 15; ++i) result = add_above(result, t, middle(i), level(i + 1) - level(i));
    return result;
  }
  QG_HD static Ints codes(const Floats& t) {
    Ints result = above(t, middle(0));
    QG_UNROLL
    for (int i = 1; i < 15; ++i) result = result + above(t, middle(i));
    return result;
  }
};

// ---- a block in units in which its largest magnitude is 2 … 4 and its largest importance 1 … 2 ----
QG_HD float clamp(float x, float low, float high) {  // NaN becomes low
  return x > low ? (x < high ? x : high) : low;
}
QG_HD float power_of_two(int e) { return bit_cast<float>(static_cast<uint32_t>(e + 127) << 23); }
QG_HD int exponent_of(float x) { return static_cast<int>(bit_cast<uint32_t>(x) >> 23 & 255) - 127; }

constexpr float kLargestFloat = 0x1.fffffep127f;

template <int N>
struct Group {  // N neighbouring weights and their importance
  Floats x[N / 8], w[N / 8];
};

struct SearchBlock {
  const float* x;
  const float* importance;
  float to_unit, from_unit, importance_to_unit;
  bool vanishes;  // every weight is nearer to 0 than to the smallest half

  // NaN counts as 0, infinity as the largest float; negative or NaN importance as 0. The floor
  // under importance keeps a group that nobody asked for well defined.
  template <int N>
  QG_HD Group<N> group(int g) const {
    return group_in_units<N>(g, to_unit);
  }
  template <int N>
  QG_HD Group<N> group_in_units(int g, float unit) const {
    Group<N> result;
    QG_UNROLL
    for (int i = 0; i < N / 8; ++i) {
      const Floats finite =
          at_least(at_most(not_nan(load8(x + N * g + 8 * i)), kLargestFloat), -kLargestFloat);
      result.x[i] = finite * unit;
      result.w[i] = broadcast(1);
      if (importance)
        result.w[i] =
            at_most(at_least(load8(importance + N * g + 8 * i), 0), kLargestFloat) * importance_to_unit +
            0x1p-30f;
    }
    return result;
  }
};

template <int Elems>
QG_HD SearchBlock search_block(const float* x, const float* importance) {
  const float largest = clamp(largest_magnitude<Elems>(x), 0, kLargestFloat);
  SearchBlock block{x, importance, 1, 1, 1, largest < 0x1p-25f};
  if (block.vanishes) return block;
  const int e = exponent_of(largest);
  block.to_unit = power_of_two(1 - e), block.from_unit = power_of_two(e - 1);
  if (importance) {
    const int w = exponent_of(largest_magnitude<Elems>(importance));
    block.importance_to_unit = power_of_two(w < -126 ? 126 : w > 126 ? -126 : -w);
  }
  return block;
}

// A scale as it will be stored, and what that is in the units of the block.
struct HalfScale {
  uint16_t bits = 0;
  float value = 0;
};
QG_HD HalfScale half_scale(float value, const SearchBlock& block) {
  HalfScale half;
  half.bits = float_to_half(clamp(value * block.from_unit, -65504.0f, 65504.0f));
  half.value = half_to_float(half.bits) * block.to_unit;
  return half;
}

// ---- one group ----
// Σ w · (x − scale · q − offset)² with the best codes q.
template <class Levels, int N>
QG_HD float squared_error(const Group<N>& group, float scale, float offset) {
  const float inverse = inverse_or_zero(scale);
  Floats total = broadcast(0);
  QG_UNROLL
  for (int i = 0; i < N / 8; ++i) {
    const Floats x = group.x[i] - offset;
    const Floats e = x - Levels::nearest(x * inverse) * scale;
    total = total + e * e * group.w[i];
  }
  return sum(total);
}

// Weighted sums over a group with the best codes q: of q, q² and x · q.
struct CodeMoments {
  float q, qq, xq;
};
template <class Levels, int N>
QG_HD CodeMoments code_moments(const Group<N>& group, float inverse, float offset) {
  Floats q = broadcast(0), qq = broadcast(0), xq = broadcast(0);
  QG_UNROLL
  for (int i = 0; i < N / 8; ++i) {
    const Floats code = Levels::nearest((group.x[i] - offset) * inverse);
    const Floats weighted = code * group.w[i];
    q = q + weighted;
    qq = qq + weighted * code;
    xq = xq + weighted * group.x[i];
  }
  return {sum(q), sum(qq), sum(xq)};
}

// Weighted sums over a group that no code changes: of 1 and x.
struct PlainMoments {
  float one, x;
};
template <int N>
QG_HD PlainMoments plain_moments(const Group<N>& group) {
  Floats one = group.w[0], x = group.w[0] * group.x[0];
  QG_UNROLL
  for (int i = 1; i < N / 8; ++i) {
    one = one + group.w[i];
    x = x + group.w[i] * group.x[i];
  }
  return {sum(one), sum(x)};
}

// A seed is preferred to a later one unless that is better by more than rounding noise.
constexpr float kNoise = 1.000001f;

// The guesses first, first + step, … : of fit_scale, where the largest weight lands as a multiple of
// the last level; of fit_affine, how many levels beyond the last one it lies.
struct Seeds {
  float first, step;
  int count;
  QG_HD float guess(int k) const { return first + step * static_cast<float>(k); }
  // Both ends of the levels in turn.
  template <class Levels>
  QG_HD float landing(int k) const {
    return (k & 1 ? Levels::kHigh : Levels::kLow) * guess(k >> 1);
  }
};

constexpr Seeds kAffineSeeds{0.7f, -0.35f, 6};  // for codes of 4 or 5 bits

struct Span {
  float low, high;
};
template <int N>
QG_HD Span group_span(const Group<N>& group) {
  Floats high = group.x[0], low = group.x[0];
  QG_UNROLL
  for (int i = 1; i < N / 8; ++i) {
    high = larger(high, group.x[i]);
    low = smaller(low, group.x[i]);
  }
  return {smallest(low), largest(high)};
}

// The number of largest magnitude, with its sign; the first of several.
template <int N>
QG_HD float group_extreme(const Group<N>& group) {
  const auto [low, high] = group_span(group);
  float result = high > -low ? high : low;
  if (high == -low) {
    QG_UNROLL
    for (int i = N - 1; i >= 0; --i) {
      const float x = group.x[i / 8].v[i % 8];
      if (x == high || x == low) result = x;
    }
  }
  return result;
}

// x ≈ scale · q. Curvature: what a small change of the scale adds to the error, over its square.
struct ScaleFit {
  float scale = 0, curvature = 0;
};
template <class Levels, int N>
QG_HD ScaleFit fit_scale(const Group<N>& group, Seeds seeds) {
  const float extreme = group_extreme(group);
  ScaleFit fit;
  if (extreme == 0) return fit;
  float best = 0;  // the squared error is Σ w x² less this
  for (int k = 0; k <= 2 * seeds.count; ++k) {
    const float inverse =
        k < 2 * seeds.count ? seeds.landing<Levels>(k) / extreme : inverse_or_zero(fit.scale);
    const CodeMoments m = code_moments<Levels>(group, inverse, 0);
    const float gain = m.xq * m.xq / m.qq;
    if (gain > best * kNoise) {
      best = gain;
      fit.scale = m.xq / m.qq, fit.curvature = m.qq;
    }
  }
  return fit;
}

// x ≈ scale · q + offset with q ≥ 0 and scale ≥ 0; offset ≤ 0 unless FreeOffset.
struct AffineFit {
  float scale = 0, offset = 0;
  float curvature = 0;  // of the error in scale, the offset following
};
template <class Levels, int N, bool FreeOffset>
QG_HD AffineFit fit_affine(const Group<N>& group, const PlainMoments& plain, Seeds seeds) {
  const auto [lowest, top] = group_span(group);
  const float bottom = FreeOffset || lowest < 0 ? lowest : 0.0f;
  AffineFit fit;
  fit.offset = bottom;
  if (!(top > bottom)) return fit;
  const float mean = plain.x / plain.one, range = top - bottom;
  // The error of the best constant is what gains are counted from: next to a large mean they would
  // drown in rounding.
  const bool can_be_mean = FreeOffset || mean < 0;
  const float mean_gain = can_be_mean ? 0 : plain.x * mean;
  if (can_be_mean) fit.offset = mean;
  // Seeds cut the range at both ends, by −0.4 … 0.5 levels at the bottom. A lower bottom fits as
  // well, but a large offset in one group makes the shared scale of the offsets coarse for all.
  constexpr int kBottomCuts = 4;
  const int num_seeds = seeds.count * kBottomCuts;
  float best = 0;
  for (int k = 0; k <= num_seeds; ++k) {
    float offset = fit.offset, inverse = inverse_or_zero(fit.scale);  // the last one polishes
    if (k < num_seeds) {
      const float level = range / Levels::kHigh;
      float top_cut = seeds.guess(k % seeds.count);
      if (!FreeOffset && bottom == 0) {
        top_cut = 1.2f - 0.15f * static_cast<float>(k);  // no bottom to cut: a finer grid at the top
        offset = 0;
      } else {
        offset = bottom + (-0.4f + 0.3f * static_cast<float>(k / seeds.count)) * level;
      }
      inverse = Levels::kHigh / (top - top_cut * level - offset);
    }
    const CodeMoments m = code_moments<Levels>(group, inverse, offset);
    const float variance = m.qq - m.q * m.q / plain.one, covariance = m.xq - m.q * mean;
    float scale = 0, curvature = variance, gain = mean_gain;
    offset = mean;
    if (variance > 0x1p-20f * m.qq) {
      scale = covariance / variance, offset = (plain.x - scale * m.q) / plain.one;
      gain = mean_gain + covariance * scale;
    }
    if (!FreeOffset && offset > 0 && m.qq > 0) {
      scale = m.xq / m.qq, offset = 0, curvature = m.qq;
      gain = m.xq * scale - (plain.x * mean - mean_gain);
    }
    if (scale < 0 || (!FreeOffset && offset > 0)) continue;
    if (gain > best * kNoise) {
      best = gain;
      fit.scale = scale, fit.offset = offset, fit.curvature = curvature;
    }
  }
  return fit;
}

}  // namespace quantgemm
