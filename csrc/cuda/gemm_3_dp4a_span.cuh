// SPDX-License-Identifier: MIT
// What both kernels for few tokens do with a span of weights once a lane has it in registers.
#pragma once
#include "gemm_3_dp4a_staging.cuh"

namespace quantgemm::dp4a {

// A row's lanes, each with a span of it, have a slice between them: as many as leave fewest without weights.
struct Slices {
  int lanes, count;
};
template <class P>
Slices slices_of(int64_t k) {
  const int64_t spans = (k + P::kSpan - 1) / P::kSpan;
  Slices best{0, 0};
  for (int lanes = P::kMostLanes; lanes >= P::kFewestLanes; lanes /= 2) {
    const int64_t count = (spans + lanes - 1) / lanes;
    if (best.lanes == 0 || count * lanes < int64_t{best.count} * best.lanes)
      best = {lanes, static_cast<int>(count)};
  }
  return best;
}

// sums[r][t] += weights of window r · token t, for the span's first `groups` groups.
template <BlockFormat F, int Tokens, bool Tabled>
__device__ __forceinline__ void multiply_span(
    float (&sums)[Plan<F, Tokens, Tabled>::kDepth][Tokens],
    const Window<Plan<F, Tokens, Tabled>::kSpanBytes> (&windows)[Plan<F, Tokens, Tabled>::kDepth],
    const uint8_t* x, int groups, const LaneTable<F, Tabled>& table) {
  using P = Plan<F, Tokens, Tabled>;
  constexpr bool kWhole = F::kElems == P::kSpan;  // spans are inside the row or outside
#pragma unroll
  for (int g = 0; g < P::kGroups; ++g) {
    uint32_t records[Tokens][P::kRecord / 4];
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
      memcpy(records[t],
             __builtin_assume_aligned(x + t * P::kTokenBytes + P::kSpan + g * P::kRecord, P::kRecord),
             P::kRecord);
    float added[P::kDepth][Tokens] = {};
    int totals[P::kDepth][Tokens];
#pragma unroll
    for (int i = 0; i < P::kDepth * Tokens; ++i) totals[i / Tokens][i % Tokens] = 0;
#pragma unroll
    for (int p = 0; p < P::kGroupParts; ++p) {
      const int e = g * kGroup + p * kPart<F>, within = e % F::kElems, at = e / F::kElems * F::kBytes;
      constexpr int kPlanes = P::kPlanes.count, kLast = kPlanes - 1;
      int dots[P::kDepth][Tokens][kPlanes] = {};
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          int& start = dots[r][t][kLast];
          start =
              P::kStarts > 0 ? static_cast<int>(records[t][1 + P::kStarts / P::kGroupParts * p]) : kMagicBits;
          if constexpr (P::kHalves)
            start = __dp2a_hi(static_cast<int>(records[t][2 + 2 * p]),
                              static_cast<int>(F::more(windows[r].bytes + at, within / kPart<F>)), start);
        }
#pragma unroll
      for (int v = 0; v < kPart<F>; v += 16) {
        uint32_t codes[P::kDepth][4];
#pragma unroll
        for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            codes[r][j] =
                few_codes<F, P::kStrided, Tabled>(windows[r].bytes + at, (within + v) / 4 + j, table);
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          const uint4 a = *reinterpret_cast<const uint4*>(x + t * P::kTokenBytes + e + v);
#pragma unroll
          for (int r = 0; r < P::kDepth; ++r) {
            int (&planes)[kPlanes] = dots[r][t];
            const uint32_t four[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              int& plane = planes[j % kPlanes];
              plane = kPlanes > 1 ? dot4_unsigned(codes[r][j], four[j], plane)
                                  : dot4(codes[r][j], four[j], plane);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r) {
        Affine affine = F::affine(windows[r].bytes + at, within / F::kGroup);
        if constexpr (P::kHalves && !P::kIntegers)
          affine.scale = F::planar_scale(windows[r].bytes + at, within / F::kGroup);
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          int dot = dots[r][t][0];
#pragma unroll
          for (int plane = 1; plane < kPlanes; ++plane) dot = (dot << P::kPlanes.bits) + dots[r][t][plane];
          if constexpr (P::kIntegers) {
            bytes_ptr block = windows[r].bytes + at;
            int& total = totals[r][t];
            total += dot + dot * F::steps(block, within / F::kGroup);
            if (p == P::kGroupParts - 1)
              added[r][t] = F::factor(block) * __uint_as_float(records[t][0]) * static_cast<float>(total);
            continue;
          }
          added[r][t] += affine.scale * __uint_as_float(records[t][0]) * (__int_as_float(dot) - kMagic);
          if constexpr (F::kOffset)
            added[r][t] += affine.offset * __uint_as_float(records[t][1 + P::kStarts + p]);
        }
      }
    }
    const bool inside = kWhole || g < groups;  // bytes behind the row's end may decode to NaN
#pragma unroll
    for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
      for (int t = 0; t < Tokens; ++t) sums[r][t] = inside ? sums[r][t] + added[r][t] : sums[r][t];
  }
#pragma unroll
  for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
    for (int t = 0; t < Tokens; ++t) sums[r][t] = groups > 0 ? sums[r][t] : 0.0f;
}

}  // namespace quantgemm::dp4a
