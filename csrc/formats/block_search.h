// SPDX-License-Identifier: MIT
// Scales of a whole block. A super-block of G groups stores one half d (and dmin) and per group a
// small integer s (and m):  weight = (d · s) · q − (dmin · m). Searched in three steps:
//   1. every group alone, with real scales (scale_search.h, reference_fits.h);
//   2. trials of d: some that suit the first fits, and the one that ggml takes for the second;
//   3. rounds: in each group try integers around the last ones with the best codes for each, then
//      regress d (and dmin) over all groups. The best round, by its true squared error, is kept.
#pragma once
#include "reference_fits.h"

namespace quantgemm {

// The integers that a group may store; the scale of largest magnitude is aimed at `aim`.
struct ScaleRange {
  float low, high;
  QG_HD float aim() const { return low < 0 ? low : high; }
  QG_HD float nearest(float scale, float inverse) const {
    return round_even(clamp(scale * inverse, low, high));
  }
};

template <int G>
struct SuperScales {
  HalfScale d, dmin;
  int8_t s[G], m[G];
  QG_HD float scale(int g) const { return d.value * static_cast<float>(s[g]); }
  QG_HD float offset(int g) const { return -(dmin.value * static_cast<float>(m[g])); }
};
template <int G>
QG_HD SuperScales<G> zero_scales() {
  SuperScales<G> scales;
  for (int g = 0; g < G; ++g) scales.s[g] = scales.m[g] = 0;
  return scales;
}

// Scales (or minima) of the groups before they become integers.
template <int G>
struct GroupScales {
  float of[G];
  QG_HD float extreme() const {  // the first of largest magnitude
    float result = 0;
    for (int g = 0; g < G; ++g)
      if (of[g] * of[g] > result * result) result = of[g];
    return result;
  }
};

constexpr float kNoError = 0x1p127f;  // larger than every squared error
constexpr int kRounds = 3;

// ---- weight = (d · s) · q ----
// reference(group): the scale of reference_fits.h.
template <class Levels, int N, int G, class Reference>
QG_HD SuperScales<G> search_scales(const SearchBlock& block, ScaleRange range, Seeds seeds,
                                   Reference reference) {
  SuperScales<G> best = zero_scales<G>(), now = best;
  if (block.vanishes) return best;
  GroupScales<G> own, other;
  for (int g = 0; g < G; ++g) {
    const Group<N> group = block.group<N>(g);
    own.of[g] = fit_scale<Levels>(group, seeds).scale;
    other.of[g] = reference(block.group_in_units<N>(g, 1)) * block.to_unit;
  }
  // Step 2 is done by trial: eight d that take the largest scale to aim, … three quarters of it.
  constexpr int kOwnTrials = 8, kTrials = kOwnTrials + 1;
  float least = kNoError;
  for (int trial = 0; trial < kTrials + kRounds; ++trial) {
    const int round = trial - kTrials;
    if (round < 0) {
      const bool is_own = trial < kOwnTrials;
      const GroupScales<G>& scales = is_own ? own : other;
      const int step = is_own ? static_cast<int>(range.aim()) / 24 * trial : 0;
      const float largest = scales.extreme(), aim = range.aim() - static_cast<float>(step);
      const float inverse = largest != 0 ? aim / largest : 0.0f;
      now.d = half_scale(inverse_or_zero(inverse), block);
      for (int g = 0; g < G; ++g) now.s[g] = static_cast<int8_t>(range.nearest(scales.of[g], inverse));
    } else if (round == 0) {
      now = best;
    }
    const int reach = round == 0 ? 8 : 1;
    float total = 0, xq = 0, qq = 0;
    bool moved = false;
    for (int g = 0; g < G; ++g) {
      const Group<N> group = block.group<N>(g);
      const float start = now.s[g];
      float least_here = kNoError, s = start;
      for (int k = -reach; k <= reach; ++k) {
        const float candidate = clamp(start + static_cast<float>(k), range.low, range.high);
        const float e = squared_error<Levels>(group, now.d.value * candidate, 0);
        if (e < least_here) least_here = e, s = candidate;
      }
      total += least_here;
      now.s[g] = static_cast<int8_t>(s);
      if (round < 0) continue;
      const CodeMoments m = code_moments<Levels>(group, inverse_or_zero(now.d.value * s), 0);
      xq += m.xq * s, qq += m.qq * s * s;
      moved |= s != start;
    }
    if (total < least) least = total, best = now;
    if (round < 0) continue;
    const HalfScale next = qq > 0 ? half_scale(xq / qq, block) : now.d;
    if (next.bits == now.d.bits && !moved) break;
    now.d = next;
  }
  return best;
}

// ---- weight = (d · s) · q − (dmin · m) ----

// A half d such that integers times d come nearest to the scales, weighted by their curvatures.
template <int G>
QG_HD HalfScale shared_scale(const GroupScales<G>& scales, const GroupScales<G>& curvatures,
                             const SearchBlock& block, ScaleRange range) {
  const float largest = scales.extreme();
  HalfScale best;
  float least = kNoError;
  for (float aim = range.high; aim >= 0.65f * range.high; aim -= 1) {
    const HalfScale d = half_scale(largest / aim, block);
    const float inverse = inverse_or_zero(d.value);
    float cost = 0;
    for (int g = 0; g < G; ++g) {
      const float e = scales.of[g] - d.value * range.nearest(scales.of[g], inverse);
      cost += e * e * curvatures.of[g];
    }
    if (cost < least) least = cost, best = d;
  }
  return best;
}

// reference(group): the scale and minimum of reference_fits.h.
template <class Levels, int N, int G, class Reference>
QG_HD SuperScales<G> search_scales_and_minima(const SearchBlock& block, ScaleRange range, Seeds seeds,
                                              Reference reference) {
  SuperScales<G> best = zero_scales<G>(), now = best;
  if (block.vanishes) return best;
  GroupScales<G> scales, minima, curvatures, weights, other_scales, other_minima;
  for (int g = 0; g < G; ++g) {
    const Group<N> group = block.group<N>(g);
    const PlainMoments plain = plain_moments(group);
    const AffineFit fit = fit_affine<Levels, N, false>(group, plain, seeds);
    scales.of[g] = fit.scale, curvatures.of[g] = fit.curvature;
    minima.of[g] = -fit.offset, weights.of[g] = plain.one;
    const ScaleAndMinimum other = reference(block.group_in_units<N>(g, 1));
    other_scales.of[g] = other.scale * block.to_unit, other_minima.of[g] = other.minimum * block.to_unit;
  }
  // Step 2: where rounding is fine the curvatures tell its cost. Where it is coarse (one group far
  // larger than the rest) they mislead, so pairs (d, dmin) that aim lower are tried as well.
  constexpr int kAimsOfD = 4, kOwnTrials = 1 + 2 * kAimsOfD, kTrials = kOwnTrials + 1;
  float least = kNoError;
  for (int trial = 0; trial < kTrials + kRounds; ++trial) {
    const int round = trial - kTrials;
    if (trial == kOwnTrials) scales = other_scales, minima = other_minima;
    float inverse = 0, inverse_min = 0;
    if (trial == 0) {
      now.d = shared_scale(scales, curvatures, block, range);
      now.dmin = shared_scale(minima, weights, block, range);
      inverse = inverse_or_zero(now.d.value), inverse_min = inverse_or_zero(now.dmin.value);
    } else if (round < 0) {
      const bool is_own = trial < kOwnTrials;
      const float aim = is_own ? 1 - 0.1f * static_cast<float>((trial - 1) % kAimsOfD) : 1.0f;
      const float aim_min = is_own && trial > kAimsOfD ? 0.85f : 1.0f;
      const float largest = scales.extreme(), largest_min = minima.extreme();
      now.d = half_scale(largest / (range.high * aim), block);
      now.dmin = half_scale(largest_min / (range.high * aim_min), block);
      inverse = largest > 0 ? range.high * aim / largest : 0.0f;
      inverse_min = largest_min > 0 ? range.high * aim_min / largest_min : 0.0f;
    } else if (round == 0) {
      now = best;
    }
    const float d = now.d.value, dmin = now.dmin.value;
    const int reach = round < 0 ? 0 : round == 0 ? 4 : 1;
    // Normal equations of x ≈ d · (s q) − dmin · m over the block.
    float total = 0, ss = 0, sm = 0, mm = 0, xs = 0, xm = 0;
    bool moved = false;
    for (int g = 0; g < G; ++g) {
      const Group<N> group = block.group<N>(g);
      const PlainMoments plain = plain_moments(group);
      if (round < 0) {
        now.s[g] = static_cast<int8_t>(range.nearest(scales.of[g], inverse));
        now.m[g] = static_cast<int8_t>(range.nearest(minima.of[g], inverse_min));
      }
      const float start = now.s[g], start_m = now.m[g];
      const float offset = round < 0 ? -minima.of[g] : -(dmin * start_m);
      float least_here = kNoError, s = start, m = start_m;
      for (int k = -reach; k <= reach; ++k) {
        const float s_try = clamp(start + static_cast<float>(k), range.low, range.high);
        // With these codes the best minimum is the mean of scale · q − x; its neighbours and the one
        // at the start, too.
        const CodeMoments codes = code_moments<Levels>(group, inverse_or_zero(d * s_try), offset);
        const float middle =
            range.nearest((codes.q * (d * s_try) - plain.x) / plain.one, inverse_or_zero(dmin));
        for (int j = -1; j <= 2; ++j) {
          const float m_try = j == 2 ? start_m : clamp(middle + static_cast<float>(j), range.low, range.high);
          const float e = squared_error<Levels>(group, d * s_try, -(dmin * m_try));
          if (e < least_here) least_here = e, s = s_try, m = m_try;
        }
      }
      total += least_here;
      now.s[g] = static_cast<int8_t>(s), now.m[g] = static_cast<int8_t>(m);
      if (round < 0) continue;
      const CodeMoments codes = code_moments<Levels>(group, inverse_or_zero(d * s), -(dmin * m));
      ss += codes.qq * s * s, sm += codes.q * s * m, mm += plain.one * m * m;
      xs += codes.xq * s, xm += plain.x * m;
      moved |= s != start || m != start_m;
    }
    if (total < least) least = total, best = now;
    if (round < 0) continue;
    // d first; dmin then makes up for what rounding d to a half has left.
    const float determinant = ss * mm - sm * sm;
    const HalfScale old_d = now.d, old_dmin = now.dmin;
    if (determinant > 0x1p-16f * ss * mm) {
      now.d = half_scale((xs * mm - xm * sm) / determinant, block);
      now.dmin = half_scale((now.d.value * sm - xm) / mm, block);
    } else if (ss > 0) {
      now.d = half_scale((xs + dmin * sm) / ss, block);
    } else if (mm > 0) {
      now.dmin = half_scale(-xm / mm, block);
    }
    if (now.d.value < 0 || now.dmin.value < 0) break;
    if (now.d.bits == old_d.bits && now.dmin.bits == old_dmin.bits && !moved) break;
  }
  return best;
}

// ---- a block that is one group: the scale itself is a half, and so is the offset ----
template <class Levels, int N, class Reference>
QG_HD HalfScale search_half_scale(const SearchBlock& block, Seeds seeds, Reference reference) {
  if (block.vanishes) return {};
  const Group<N> group = block.group<N>(0);
  const float extreme = group_extreme(group);
  HalfScale best = half_scale(reference(block.group_in_units<N>(0, 1)) * block.to_unit, block);
  float least = squared_error<Levels>(group, best.value, 0);
  for (int k = 0; k < 2 * seeds.count + kRounds; ++k) {
    const float inverse =
        k < 2 * seeds.count ? seeds.landing<Levels>(k) / extreme : inverse_or_zero(best.value);
    const CodeMoments m = code_moments<Levels>(group, inverse, 0);
    const HalfScale d = half_scale(m.xq / m.qq, block);
    const float e = squared_error<Levels>(group, d.value, 0);
    if (e < least) least = e, best = d;
  }
  return best;
}

struct HalfAffine {
  HalfScale scale, offset;
};
template <class Levels, int N>
QG_HD HalfAffine search_half_affine(const SearchBlock& block, Seeds seeds) {
  HalfAffine best;
  if (block.vanishes) return best;
  const Group<N> group = block.group<N>(0);
  const PlainMoments plain = plain_moments(group);
  const AffineFit fit = fit_affine<Levels, N, true>(group, plain, seeds);
  HalfAffine now{half_scale(fit.scale, block), half_scale(fit.offset, block)};
  float least = kNoError;
  for (int round = 0; round < kRounds; ++round) {
    const float e = squared_error<Levels>(group, now.scale.value, now.offset.value);
    if (e < least) least = e, best = now;
    const CodeMoments m = code_moments<Levels>(group, inverse_or_zero(now.scale.value), now.offset.value);
    const float variance = m.qq - m.q * m.q / plain.one;
    if (variance > 0x1p-20f * m.qq)
      now.scale = half_scale((m.xq - m.q * (plain.x / plain.one)) / variance, block);
    // The offset makes up for what rounding the scale to a half has left.
    now.offset = half_scale((plain.x - now.scale.value * m.q) / plain.one, block);
  }
  return best;
}

}  // namespace quantgemm
