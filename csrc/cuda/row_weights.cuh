// SPDX-License-Identifier: MIT
// The weights of a row to draw from, max(p - q, 0) in fixed point, and their sums over parts of it.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

// rint(x·2^44) in two parts, hi·2^23 + lo, with four float operations: far faster than a conversion
// to 64 bits. x in [0, 1]; adding 2^23 (1.5·2^23) leaves an integer in the low bits of the float.
struct FixedSum {
  uint32_t hi = 0;
  int32_t lo = 0;

  __device__ __forceinline__ void add(float x) {
    const float y = fmaf(x, 0x1p21f, 0x1p23f);
    const float rest = fmaf(y - 0x1p23f, -0x1p-21f, x);  // exact
    const float z = fmaf(rest, 0x1p44f, 0x1.8p23f);
    hi += __float_as_uint(y) - 0x4b000000u;
    lo += __float_as_int(z) - 0x4b400000;
  }
  __device__ __forceinline__ uint64_t value() const {
    return (uint64_t{hi} << 23) + static_cast<uint64_t>(static_cast<int64_t>(lo));
  }
};

__device__ __forceinline__ uint64_t fixed_sum(const float (&r)[8]) {
  FixedSum sum;
#pragma unroll
  for (const float x : r) sum.add(x);
  return sum.value();
}

enum class Subtract { kNothing, kProbabilities, kLogits, kMapped };

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

// The stopping row: weights of its tokens.
template <class T, int Ahead>
struct Weights {
  RowView<T> p, q;  // q.data null: the draft is one token, or there is none
  RowLaw p_law, q_law;
  const int64_t* map;          // target_to_draft or null
  int one_hot;                 // the drafted token if q is one-hot, else -1
  const uint32_t* group_keys;  // of a truncated p: groups below the cutoff weigh nothing; or null

  // Calls f with what is known when the kernel is compiled about p and q.
  template <class Fn>
  __device__ __forceinline__ auto visit(Fn f) const {
    using enum Subtract;
    if (p_law.slope == 0.0f) {
      if (q.data == nullptr) return f.template operator()<false, kNothing>();
      if (map == nullptr && q_law.slope == 0.0f) return f.template operator()<false, kProbabilities>();
      return f.template operator()<false, kMapped>();
    }
    if (q.data == nullptr) return f.template operator()<true, kNothing>();
    if (map == nullptr && q_law.slope != 0.0f) return f.template operator()<true, kLogits>();
    return f.template operator()<true, kMapped>();
  }

  __device__ float mapped_q(int i, bool& bad) const {
    const int64_t j = map ? map[i] : i;
    if (j < 0 || j >= q.length) return 0.0f;
    const float y = q.at(j);
    bad |= map == nullptr && is_bad_value(y, q_law.slope != 0.0f);
    return probability(y, q_law);
  }

  // max(p - q, 0) from loaded groups p in r and q in y. `bad` collects what is no probability; of
  // logits the row statistics know.
  template <bool Logits, Subtract Q>
  __device__ __forceinline__ void finish(float (&r)[8], const float (&y)[8], int begin, int lane,
                                         bool& bad) const {
    if constexpr (!Logits) bad |= any_bad(r);
    if constexpr (Q == Subtract::kProbabilities) bad |= any_bad(y);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      r[e] = Logits ? softmax_probability(r[e], p_law) : clean_probability(r[e]);
      if constexpr (Q == Subtract::kProbabilities) r[e] = residual(r[e], clean_probability(y[e]));
      if constexpr (Q == Subtract::kLogits) r[e] = residual(r[e], softmax_probability(y[e], q_law));
      if constexpr (Q == Subtract::kMapped) {
        const int i = begin + index_in_group<T>(lane, e);
        if (i < p.length) r[e] = residual(r[e], mapped_q(i, bad));
      }
    }
    if constexpr (Q == Subtract::kNothing) {
      if (one_hot >= begin && one_hot < begin + kGroup) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (begin + index_in_group<T>(lane, e) == one_hot) r[e] = 0.0f;
      }
    }
  }

  template <Subtract Q>
  static constexpr bool kReadsQ = Q == Subtract::kProbabilities || Q == Subtract::kLogits;

  template <bool Logits, Subtract Q>
  __device__ __forceinline__ void of_group(float (&r)[8], int begin, int lane, bool& bad) const {
    float y[8] = {};
    load_group(r, p, begin, lane, Logits ? minus_infinity() : 0.0f);
    if constexpr (kReadsQ<Q>) load_group(y, q, begin, lane, Q == Subtract::kLogits ? minus_infinity() : 0.0f);
    finish<Logits, Q>(r, y, begin, lane, bad);
  }

  __device__ __forceinline__ void group(float (&r)[8], int begin, int lane, bool& bad) const {
    visit([&]<bool Logits, Subtract Q>() {
      of_group<Logits, Q>(r, begin, lane, bad);
      return 0;
    });
  }

  // Ahead groups in flight per warp as long as both lie inside aligned rows.
  template <bool Logits, Subtract Q>
  __device__ __forceinline__ uint64_t sum_all(int begin, int end, int lane, bool& bad) const {
    uint64_t total = 0;
    int inside = p.aligned && (!kReadsQ<Q> || q.aligned) ? min(end, p.length) : 0;
    if (kReadsQ<Q>) inside = min(inside, q.length);
    for (; begin + Ahead * kGroup <= inside; begin += Ahead * kGroup) {
      float r[Ahead][8], y[Ahead][8] = {};
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        load_vectors(r[u], p, begin + u * kGroup, lane);
        if constexpr (kReadsQ<Q>) load_vectors(y[u], q, begin + u * kGroup, lane);
      }
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        finish<Logits, Q>(r[u], y[u], begin + u * kGroup, lane, bad);
        total += fixed_sum(r[u]);
      }
    }
    for (; begin < end; begin += kGroup) {
      float r[8];
      of_group<Logits, Q>(r, begin, lane, bad);
      total += fixed_sum(r);
    }
    return total;
  }

  // The same, visiting only groups that reach the cutoff.
  template <bool Logits, Subtract Q>
  __device__ __forceinline__ uint64_t sum_kept(int begin, int end, int lane, bool& bad) const {
    uint64_t total = 0;
    const uint32_t least = key_of(p_law.cutoff);
    for (; begin < end; begin += 32 * kGroup) {
      const int own = begin + lane * kGroup;
      uint32_t wanted = __ballot_sync(~0u, own < end && group_keys[own / kGroup] >= least);
      for (; wanted; wanted &= wanted - 1) {
        float r[8];
        of_group<Logits, Q>(r, begin + (__ffs(wanted) - 1) * kGroup, lane, bad);
        total += fixed_sum(r);
      }
    }
    return total;
  }

  __device__ __forceinline__ uint64_t sum(int begin, int end, int lane, bool& bad) const {  // by a warp
    return warp_sum(visit([&]<bool Logits, Subtract Q>() -> uint64_t {
      if (Logits && group_keys != nullptr) return sum_kept<Logits, Q>(begin, end, lane, bad);
      return sum_all<Logits, Q>(begin, end, lane, bad);
    }));
  }
};

}  // namespace quantgemm
