// SPDX-License-Identifier: MIT
// The weights of a row to draw from, max(p - q, 0) in fixed point, and their sums over parts of it.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

// rint(x·2^44) in two parts, hi·2^23 + lo, with four float operations: far faster than a conversion
// to 64 bits. x in [0, 1]; adding 2^23 (1.5·2^23) leaves an integer in the low bits of the float.
struct FixedSum {
  uint32_t hi = 0, lo = 0;

  __device__ __forceinline__ void add(const float (&values)[8]) {
#pragma unroll
    for (const float x : values) {
      const float y = fmaf(x, 0x1p21f, 0x1p23f);
      const float rest = fmaf(y - 0x1p23f, -0x1p-21f, x);  // exact
      const float z = fmaf(rest, 0x1p44f, 0x1.8p23f);
      hi += __float_as_uint(y), lo += __float_as_uint(z);
    }
    hi -= 8 * 0x4b000000u, lo -= 8 * 0x4b400000u;
  }
  __device__ __forceinline__ uint64_t value() const {
    return (uint64_t{hi} << 23) + static_cast<uint64_t>(int64_t{static_cast<int32_t>(lo)});
  }
};

__device__ __forceinline__ uint64_t fixed_sum(const float (&r)[8]) {
  FixedSum sum;
  sum.add(r);
  return sum.value();
}

// NaN, +inf or a negative number among probabilities. All of [0, 2) have none of the top two bits.
__device__ __forceinline__ bool any_bad(const float (&x)[8]) {
  uint32_t bits = 0;
#pragma unroll
  for (const float f : x) bits |= __float_as_uint(f);
  bool bad = false;
  if (bits & 0xc0000000u) {
#pragma unroll
    for (const float f : x) bad |= is_bad_value(f, false);
  }
  return bad;
}

// The stopping row: weights of its tokens. A launch runs this code once, and fetching instructions is
// what takes long then: loops are rolled, and a common case is told apart from all others.
template <class T, bool Logits, int Ahead>
struct Weights {
  RowView<T> p, q;  // q.data null: the draft is one token, or there is none
  RowLaw p_law, q_law;
  const int64_t* map;          // target_to_draft or null
  int one_hot;                 // the drafted token if q is one-hot, else -1
  const uint32_t* group_keys;  // of a truncated p: groups below the cutoff weigh nothing; or null
  int inside = 0;              // groups that end here or before are common

  // Aligned rows of the same kind and vocabulary; of logits nothing truncated, no NaN or +inf.
  __device__ __forceinline__ void find_common(bool bad) {
    const auto plain = [&](const RowView<T>& row, const RowLaw& law) {
      if (!row.aligned) return false;
      return Logits ? law.slope != 0.0f && law.cutoff == minus_infinity() && law.scale > 0.0f
                    : law.slope == 0.0f;
    };
    inside = !bad && plain(p, p_law) ? p.length : 0;
    if (q.data != nullptr) inside = map == nullptr && plain(q, q_law) ? min(inside, q.length) : 0;
  }

  // max(p - q, 0) of a common group from what was loaded of p in r and of q in y. `bad` collects what
  // is no probability; of logits the laws know.
  template <bool HasQ>
  __device__ __forceinline__ void finish(float (&r)[8], const float (&y)[8], int begin, int lane,
                                         bool& bad) const {
    if constexpr (!Logits) bad |= any_bad(r);
    if constexpr (!Logits && HasQ) bad |= any_bad(y);
    const auto law = [](float x, const RowLaw& how) {
      if constexpr (!Logits) return clean_probability(x);
      return __saturatef(multiply(relative_weight(x, how.max, how.slope), how.scale));
    };
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      r[e] = law(r[e], p_law);
      if constexpr (HasQ) r[e] = residual(r[e], law(y[e], q_law));
    }
    if constexpr (!HasQ) {
      if (static_cast<uint32_t>(one_hot - begin) < kGroup) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (begin + index_in_group<T>(lane, e) == one_hot) r[e] = 0.0f;
      }
    }
  }

  // Any group.
  __device__ __forceinline__ void other_group(float (&r)[8], int begin, int lane, bool& bad) const {
    const bool p_is_logits = Logits && p_law.slope != 0.0f, q_is_logits = Logits && q_law.slope != 0.0f;
    load_group(r, p, begin, lane, p_is_logits ? minus_infinity() : 0.0f);
    if (!p_is_logits) bad |= any_bad(r);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = begin + index_in_group<T>(lane, e);
      r[e] = i == one_hot ? 0.0f : (p_is_logits ? softmax_probability(r[e], p_law) : clean_probability(r[e]));
      if (q.data == nullptr || i >= p.length) continue;
      const int64_t j = map ? map[i] : i;
      if (j < 0 || j >= q.length) continue;
      const float y = q.at(j);
      bad |= map == nullptr && !(p_is_logits && q_is_logits) && is_bad_value(y, q_is_logits);
      r[e] = residual(r[e], q_is_logits ? softmax_probability(y, q_law) : clean_probability(y));
    }
  }

  __device__ __forceinline__ void group(float (&r)[8], int begin, int lane, bool& bad) const {
    if (begin + kGroup > inside) return other_group(r, begin, lane, bad);
    float y[8];
    load_vectors(r, p, begin, lane);
    if (q.data != nullptr) {
      load_vectors(y, q, begin, lane);
      finish<true>(r, y, begin, lane, bad);
    } else {
      finish<false>(r, y, begin, lane, bad);
    }
  }

  // Common groups, Ahead of them in flight per warp.
  template <bool HasQ>
  __device__ __forceinline__ uint64_t sum_common(int& begin, int end, int lane, bool& bad) const {
    uint64_t total = 0;
#pragma unroll 1
    for (; begin + Ahead * kGroup <= end; begin += Ahead * kGroup) {
      float r[Ahead][8], y[Ahead][8];
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        load_vectors(r[u], p, begin + u * kGroup, lane);
        if constexpr (HasQ) load_vectors(y[u], q, begin + u * kGroup, lane);
      }
      FixedSum sum;
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        finish<HasQ>(r[u], y[u], begin + u * kGroup, lane, bad);
        sum.add(r[u]);
      }
      total += sum.value();
    }
    return total;
  }

  // By a warp, from one boundary of a group to another or the end of the row.
  __device__ __forceinline__ uint64_t sum(int begin, int end, int lane, bool& bad) const {
    uint64_t total = 0;
    if (begin < inside) {
      const int common = min(end, inside);
      total = q.data != nullptr ? sum_common<true>(begin, common, lane, bad)
                                : sum_common<false>(begin, common, lane, bad);
    }
    const uint32_t least = key_of(p_law.cutoff);
#pragma unroll 1
    while (begin < end) {
      // Of 32 groups those that reach the cutoff.
      const int own = begin + lane * kGroup;
      uint32_t wanted =
          __ballot_sync(~0u, own < end && (group_keys == nullptr || group_keys[own / kGroup] >= least));
#pragma unroll 1
      for (; wanted; wanted &= wanted - 1) {
        float r[8];
        group(r, begin + (__ffs(wanted) - 1) * kGroup, lane, bad);
        FixedSum sum;
        sum.add(r);
        total += sum.value();
      }
      begin += 32 * kGroup;
    }
    return warp_sum(total);
  }
};

}  // namespace quantgemm
