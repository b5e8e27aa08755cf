// SPDX-License-Identifier: MIT
// How ggml's reference encoders fit one group: errors of large weights count more, and the guesses
// are its own. scale_search.h mostly does better, but not always: the searches of block_search.h try
// these fits as well and keep what has the smallest true error, so that no block gets worse than
// ggml's. For that the guesses, their order and the weighting must stay what they are.
#pragma once
#include <cmath>

#include "scale_search.h"

namespace quantgemm {

// The importance of each weight, times |x|, |x| + root mean square, or x².
enum class Emphasis { kMagnitude, kMagnitudeAndMean, kSquare };
template <Emphasis Kind, int N>
QG_HD Group<N> emphasise(const Group<N>& plain) {
  Group<N> group = plain;
  float mean = 0;
  if constexpr (Kind == Emphasis::kMagnitudeAndMean) {
    Floats squares = broadcast(0);
    QG_UNROLL
    for (int i = 0; i < N / 8; ++i) squares = squares + group.x[i] * group.x[i];
    mean = std::sqrt(sum(squares) / N);
  }
  QG_UNROLL
  for (int i = 0; i < N / 8; ++i) {
    const Floats factor = Kind == Emphasis::kSquare ? group.x[i] * group.x[i] : magnitude(group.x[i]) + mean;
    group.w[i] = group.w[i] * factor;
  }
  return group;
}

// ---- x ≈ scale · q ----
// Where the extreme weight lands on the levels: first, then around the lowest level.
struct Landings {
  float first, step;
  int reach;
};
template <class Levels>
struct ReferenceScale {
  Landings landings;
  template <int N>
  QG_HD float operator()(const Group<N>& plain) const {
    const float extreme = group_extreme(plain);
    if (extreme == 0) return 0;
    const Group<N> group = emphasise<Emphasis::kSquare>(plain);
    float scale = 0, best = 0;
    for (int k = -1; k <= 2 * landings.reach; ++k) {
      const float near_low = Levels::kLow + landings.step * static_cast<float>(k - landings.reach);
      const CodeMoments m = code_moments<Levels>(group, (k < 0 ? landings.first : near_low) / extreme, 0);
      if (m.qq > 0 && m.xq * m.xq > best * m.qq) scale = m.xq / m.qq, best = scale * m.xq;
    }
    return scale;
  }
};

// One code after the other is changed while that lowers the error.
template <class Levels>
struct ReferenceDescent {
  template <int N>
  QG_HD float operator()(const Group<N>& plain) const {
    const float extreme = group_extreme(plain);
    if (extreme == 0) return 0;
    const Group<N> group = emphasise<Emphasis::kSquare>(plain);
    const float inverse = Levels::kLow / extreme;
    const CodeMoments start = code_moments<Levels>(group, inverse, 0);
    float xq = start.xq, qq = start.qq;
    float x[N], w[N], q[N];
    QG_UNROLL
    for (int i = 0; i < N; ++i) {
      x[i] = group.x[i / 8].v[i % 8], w[i] = group.w[i / 8].v[i % 8];
      q[i] = Levels::nearest(group.x[i / 8] * inverse).v[i % 8];
    }
    bool changed = true;
    for (int sweep = 0; sweep < 5 && changed; ++sweep) {
      changed = false;
      QG_UNROLL
      for (int i = 0; i < N; ++i) {
        const float wx = w[i] * x[i], other_xq = xq - wx * q[i], other_qq = qq - w[i] * q[i] * q[i];
        if (!(other_xq > 0)) continue;
        const float code = round_even(clamp(x[i] * other_qq / other_xq, Levels::kLow, Levels::kHigh));
        const float new_xq = other_xq + wx * code, new_qq = other_qq + w[i] * code * code;
        if (code != q[i] && new_qq > 0 && new_xq * new_xq * qq > xq * xq * new_qq) {
          q[i] = code, xq = new_xq, qq = new_qq;
          changed = true;
        }
      }
    }
    return qq > 0 ? xq / qq : 0.0f;
  }
};

// ---- x ≈ scale · q − minimum ----
struct Guesses {  // levels beyond the last one: first, first + 0.1, …
  float first;
  int count;
};
// Codes by one scale and offset, the error by others.
template <class Levels, bool Absolute, int N>
QG_HD float emphasised_error(const Group<N>& group, float inverse, float offset, float scale, float at) {
  Floats total = broadcast(0);
  QG_UNROLL
  for (int i = 0; i < N / 8; ++i) {
    const Floats q = Levels::nearest((group.x[i] - offset) * inverse);
    const Floats e = q * scale + at - group.x[i];
    total = total + group.w[i] * (Absolute ? magnitude(e) : e * e);
  }
  return sum(total);
}

struct ScaleAndMinimum {
  float scale, minimum;
};
// Every guess is a regression; the next one starts at the minimum of the best so far.
template <class Levels, Emphasis Kind>
struct ReferenceAffine {
  Guesses guesses;
  template <int N>
  QG_HD ScaleAndMinimum operator()(const Group<N>& plain) const {
    constexpr bool kAbsolute = Kind == Emphasis::kMagnitude;
    const Span span = group_span(plain);
    const float top = span.high;
    float offset = span.low < 0 ? span.low : 0.0f;
    if (!(top > offset)) return {0, -offset};
    const Group<N> group = emphasise<Kind>(plain);
    const PlainMoments sums = plain_moments(group);
    float inverse = Levels::kHigh / (top - offset), scale = 1 / inverse;
    float least = emphasised_error<Levels, kAbsolute>(group, inverse, offset, scale, offset);
    for (int k = 0; k < guesses.count; ++k) {
      inverse = (guesses.first + 0.1f * static_cast<float>(k) + Levels::kHigh) / (top - offset);
      const CodeMoments m = code_moments<Levels>(group, inverse, offset);
      const float determinant = sums.one * m.qq - m.q * m.q;
      if (!(determinant > 0)) continue;
      float slope = (sums.one * m.xq - sums.x * m.q) / determinant;
      float at = (m.qq * sums.x - m.q * m.xq) / determinant;
      if (at > 0) at = 0, slope = m.xq / m.qq;
      const float e = emphasised_error<Levels, kAbsolute>(group, inverse, offset, slope, at);
      if (e < least) least = e, scale = slope, offset = at;
    }
    return {scale, -offset};
  }
};

}  // namespace quantgemm
