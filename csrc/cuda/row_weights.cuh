// SPDX-License-Identifier: MIT
// The weights of a row to draw from, max(p - q, 0) in fixed point, and their sums over parts of it.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

// rint(x·2^44) in two parts, hi·2^22 + lo, with three float operations: far faster than a conversion
// to 64 bits. x in [0, 1]; adding 2^23 (1.5·2^23) leaves an integer in the low bits of the float.
struct FixedSum {
  uint32_t hi = 0, lo = 0;

  __device__ __forceinline__ void add(const float (&values)[8]) {
#pragma unroll
    for (const float x : values) {
      const float y = fmaf(x, 0x1p22f, 0x1p23f);
      const float rest = fmaf(y, -0x1p22f, 0x1.000006p45f);  // 1.5·2^23 less what y holds: exact
      const float z = fmaf(x, 0x1p44f, rest);
      hi += __float_as_uint(y), lo += __float_as_uint(z);
    }
    hi -= 8 * 0x4b000000u, lo -= 8 * 0x4b400000u;
  }
  __device__ __forceinline__ uint64_t value() const {
    return (uint64_t{hi} << 22) + static_cast<uint64_t>(int64_t{static_cast<int32_t>(lo)});
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
  int inside;                  // groups that end here or before are common

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
  __device__ __forceinline__ void finish(float (&r)[8], const float (&y)[8], const RowLaw& p_how,
                                         const RowLaw& q_how, int begin, int lane, bool& bad) const {
    if constexpr (!Logits) bad |= any_bad(r);
    if constexpr (!Logits && HasQ) bad |= any_bad(y);
    const auto law = [](float x, const RowLaw& how) {
      if constexpr (!Logits) return clean_probability(x);
      return __saturatef(multiply(relative_weight(x, how.max, how.slope), how.scale));
    };
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      r[e] = law(r[e], p_how);
      if constexpr (HasQ) r[e] = residual(r[e], law(y[e], q_how));
    }
    if constexpr (!HasQ) {
      if (static_cast<uint32_t>(one_hot - begin) < kGroup) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (begin + index_in_group<T>(lane, e) == one_hot) r[e] = 0.0f;
      }
    }
  }

  // Any group; out of the way of the common ones.
  struct Group {
    float values[8];
    bool bad;
  };
  static __device__ __noinline__ Group other_group(Weights w, int begin, int lane) {
    const bool p_is_logits = Logits && w.p_law.slope != 0.0f, q_is_logits = Logits && w.q_law.slope != 0.0f;
    const bool is_mapped = w.map != nullptr, has_q = w.q.data != nullptr;
    Group out;
    float (&r)[8] = out.values;
    float y[8];
    load_group(r, w.p, begin, lane, p_is_logits ? minus_infinity() : 0.0f);
    if (has_q && !is_mapped) load_group(y, w.q, begin, lane, q_is_logits ? minus_infinity() : 0.0f);
    out.bad = !p_is_logits && any_bad(r);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = begin + index_in_group<T>(lane, e);
      const float p_here = p_is_logits ? softmax_probability(r[e], w.p_law) : clean_probability(r[e]);
      r[e] = i == w.one_hot ? 0.0f : p_here;
      if (!has_q || i >= w.p.length) continue;
      if (is_mapped) {
        const int64_t j = w.map[i];
        if (j < 0 || j >= w.q.length) continue;
        y[e] = w.q.at(j);
      } else {
        out.bad |= !(p_is_logits && q_is_logits) && i < w.q.length && is_bad_value(y[e], q_is_logits);
      }
      r[e] = residual(r[e], q_is_logits ? softmax_probability(y[e], w.q_law) : clean_probability(y[e]));
    }
    return out;
  }

  __device__ __forceinline__ void group(float (&r)[8], int begin, int lane, bool& bad) const {
    if (begin + kGroup > inside) {
      const Group other = other_group(*this, begin, lane);
      bad |= other.bad;
#pragma unroll
      for (int e = 0; e < 8; ++e) r[e] = other.values[e];
      return;
    }
    // Both rows in one round trip: behind a branch the compiler would wait for p first.
    const bool has_q = q.data != nullptr;
    float y[8];
    Vectors<T> of_p = {}, of_q = {};
    of_p.load_now(p, begin, lane, true);
    of_q.load_now(q, begin, lane, has_q);
    of_p.keep_here(), of_q.keep_here();
    of_p.unpack(r);
    if (has_q) {
      of_q.unpack(y);
      finish<true>(r, y, p_law, q_law, begin, lane, bad);
    } else {
      finish<false>(r, y, p_law, q_law, begin, lane, bad);
    }
  }

  // Common groups; per warp Ahead of them are in flight, and as many being worked on.
  template <bool HasQ>
  __device__ __forceinline__ uint64_t sum_common(int& begin, int end, int lane, bool& bad) const {
    constexpr int kStep = Ahead * kGroup;
    constexpr bool kBuffered = Ahead > 1 || sizeof(T) == 2;  // else registers are short
    // Else the compiler loads the next groups of logits behind the sum.
    constexpr bool kEarly = kBuffered && Logits;
    const RowLaw p_how = p_law, q_how = q_law;
    const RowView<T> p_row = p, q_row = q;
    uint64_t total = 0;
    if (begin + kStep > end) return 0;
    Vectors<T> own[Ahead] = {}, own_q[Ahead] = {}, next[Ahead] = {}, next_q[Ahead] = {};
    const auto load = [&](Vectors<T>(&v)[Ahead], Vectors<T>(&v_q)[Ahead], int at, bool wanted) {
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        if constexpr (kEarly) {
          v[u].load_now(p_row, at + u * kGroup, lane, wanted);
          if constexpr (HasQ) v_q[u].load_now(q_row, at + u * kGroup, lane, wanted);
        } else if (wanted) {
          v[u].load(p, at + u * kGroup, lane);
          if constexpr (HasQ) v_q[u].load(q, at + u * kGroup, lane);
        }
      }
    };
    if constexpr (kBuffered) load(own, own_q, begin, true);
#pragma unroll 1
    for (bool more = true; more; begin += kStep) {
      more = begin + 2 * kStep <= end;
      if constexpr (!kBuffered) load(own, own_q, begin, true);
      if constexpr (kBuffered) load(next, next_q, begin + kStep, more);
      if constexpr (kEarly) {
#pragma unroll
        for (int u = 0; u < Ahead; ++u) {
          own[u].keep_here();
          if constexpr (HasQ) own_q[u].keep_here();
        }
      }
      FixedSum sum;
#pragma unroll
      for (int u = 0; u < Ahead; ++u) {
        float r[8], y[8];
        own[u].unpack(r);
        if constexpr (HasQ) own_q[u].unpack(y);
        finish<HasQ>(r, y, p_how, q_how, begin + u * kGroup, lane, bad);
        sum.add(r);
        if constexpr (kBuffered) own[u] = next[u], own_q[u] = next_q[u];
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
