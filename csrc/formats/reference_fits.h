// SPDX-License-Identifier: MIT
// How ggml's reference encoders fit one group: errors of large weights count more, and the guesses
// are its own. scale_search.h mostly does better, but not always: the searches of block_search.h try
// these fits as well and keep what has the smallest true error, so that no block gets worse than
// ggml's. For that the weighting, the guesses and even the order of sums and products stay what they
// are there, and groups come in units of their own: among equally good fits, of a constant group say,
// rounding decides, and above 1e5 overflow.
#pragma once
#include <cmath>

#include "scale_search.h"

namespace quantgemm {

template <int N>
QG_HD float sum_in_order(const Floats (&terms)[N]) {
  float total = 0;
  QG_UNROLL
  for (int i = 0; i < 8 * N; ++i) total += terms[i / 8].v[i % 8];
  return total;
}

// The importance of each weight, times |x|, |x| + root mean square, or x².
enum class Emphasis { kMagnitude, kMagnitudeAndMean, kSquare };
template <Emphasis Kind, int N>
QG_HD Group<N> emphasise(const Group<N>& plain) {
  Group<N> group = plain;
  Floats squares[N / 8];
  QG_UNROLL
  for (int i = 0; i < N / 8; ++i) squares[i] = plain.x[i] * plain.x[i];
  const float mean = Kind == Emphasis::kMagnitudeAndMean ? std::sqrt(sum_in_order(squares) / N) : 0.0f;
  QG_UNROLL
  for (int i = 0; i < N / 8; ++i)
    group.w[i] = group.w[i] * (Kind == Emphasis::kSquare ? squares[i] : magnitude(plain.x[i]) + mean);
  return group;
}

// ---- x ≈ scale · q ----
// Where the extreme weight lands on the levels: first, then around the lowest level.
struct Landings {
  float first, step;
  int reach;
  template <class Levels>
  QG_HD float landing(int k) const {
    return k == 0 ? first : Levels::kLow + step * static_cast<float>(k - 1 - reach);
  }
  QG_HD int count() const { return 2 * reach + 2; }
};
template <class Levels, bool CodeFirst>  // products as (w · q) · x or (w · x) · q
struct ReferenceScale {
  Landings landings;
  template <int N>
  QG_HD float operator()(const Group<N>& plain) const {
    const float extreme = group_extreme(plain);
    if (extreme == 0) return 0;
    const Group<N> group = emphasise<Emphasis::kSquare>(plain);
    float scale = 0, best = 0;
    for (int first = 0; first < landings.count(); first += 8) {  // a guess per lane
      Floats inverse, xq = broadcast(0), qq = broadcast(0);
      QG_UNROLL
      for (int k = 0; k < 8; ++k) inverse.v[k] = landings.landing<Levels>(first + k) / extreme;
      QG_UNROLL
      for (int i = 0; i < N; ++i) {
        const float x = group.x[i / 8].v[i % 8], w = group.w[i / 8].v[i % 8];
        const Floats q = Levels::nearest(inverse * x), wq = q * w;
        xq = xq + (CodeFirst ? wq * x : q * (w * x));
        qq = qq + wq * q;
      }
      for (int k = 0; k < 8 && first + k < landings.count(); ++k)
        if (qq.v[k] > 0 && xq.v[k] * xq.v[k] > best * qq.v[k])
          scale = xq.v[k] / qq.v[k], best = scale * xq.v[k];
    }
    return scale;
  }
};

// For types that ggml has a closed form for.
struct NoReference {
  template <int N>
  QG_HD float operator()(const Group<N>&) const {
    return 0;
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
    float wx[N], x[N], w[N], q[N], xq = 0, qq = 0;
    QG_UNROLL
    for (int i = 0; i < N; ++i) {
      x[i] = group.x[i / 8].v[i % 8], w[i] = group.w[i / 8].v[i % 8], wx[i] = w[i] * x[i];
      q[i] = Levels::nearest(group.x[i / 8] * (Levels::kLow / extreme)).v[i % 8];
      xq += wx[i] * q[i], qq += w[i] * q[i] * q[i];
    }
    bool changed = true;
    for (int sweep = 0; sweep < 5 && changed; ++sweep) {
      changed = false;
      QG_UNROLL
      for (int i = 0; i < N; ++i) {
        const float other_xq = xq - wx[i] * q[i], other_qq = qq - w[i] * q[i] * q[i];
        if (!(other_xq > 0)) continue;
        const float code = round_even(clamp(x[i] * other_qq / other_xq, Levels::kLow, Levels::kHigh));
        const float new_xq = other_xq + wx[i] * code, new_qq = other_qq + w[i] * code * code;
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
struct ScaleAndMinimum {
  float scale, minimum;
};
// Every guess is a regression; the next one starts at the minimum of the best so far.
template <class Levels, Emphasis Kind>
struct ReferenceAffine {
  Guesses guesses;
  template <int N>
  QG_HD ScaleAndMinimum operator()(const Group<N>& plain) const {
    const auto [lowest, top] = group_span(plain);
    float offset = lowest < 0 ? lowest : 0.0f;
    if (!(top > offset)) return {0, -offset};
    const Group<N> group = emphasise<Kind>(plain);
    Floats wx[N / 8];
    QG_UNROLL
    for (int i = 0; i < N / 8; ++i) wx[i] = group.w[i] * group.x[i];
    const float sum_w = sum_in_order(group.w), sum_x = sum_in_order(wx);
    float scale = 0, least = 0;
    for (int k = -1; k < guesses.count; ++k) {  // k = −1: the whole range on all levels, no regression
      const float beyond = k < 0 ? 0 : guesses.first + 0.1f * static_cast<float>(k);
      const float inverse = (beyond + Levels::kHigh) / (top - offset);
      Floats q[N / 8], wq[N / 8], wqq[N / 8], wqx[N / 8];
      QG_UNROLL
      for (int i = 0; i < N / 8; ++i) {
        q[i] = Levels::nearest((group.x[i] - offset) * inverse);
        wq[i] = group.w[i] * q[i], wqq[i] = wq[i] * q[i], wqx[i] = wq[i] * group.x[i];
      }
      float slope = 1 / inverse, at = offset;
      if (k >= 0) {
        const float sum_q = sum_in_order(wq), sum_qq = sum_in_order(wqq), sum_xq = sum_in_order(wqx);
        const float determinant = sum_w * sum_qq - sum_q * sum_q;
        if (!(determinant > 0)) continue;
        slope = (sum_w * sum_xq - sum_x * sum_q) / determinant;
        at = (sum_qq * sum_x - sum_q * sum_xq) / determinant;
        if (at > 0) at = 0, slope = sum_xq / sum_qq;
      }
      Floats errors[N / 8];
      QG_UNROLL
      for (int i = 0; i < N / 8; ++i) {
        const Floats e = q[i] * slope + at - group.x[i];
        errors[i] = group.w[i] * (Kind == Emphasis::kMagnitude ? magnitude(e) : e * e);
      }
      const float e = sum_in_order(errors);
      if (k < 0 || e < least) least = e, scale = slope, offset = at;
    }
    return {scale, -offset};
  }
};

}  // namespace quantgemm
