// SPDX-License-Identifier: MIT
// The end of a truncated row where at most 64 values reach the bound, as usual: they are ranked once, by all
// threads; then each warp (or only the first, that draws) finds the cutoff and the token, by prefix sums over
// two values per lane.
#pragma once
#include "row_cutoff.cuh"

namespace quantgemm {

// Before there is a list, by the block's first kFew threads.
__device__ __forceinline__ void clear_few(LawShared& shared) {
  const uint32_t i = threadIdx.x;
  if (i >= kFew) return;
  shared.key[i] = 0, shared.token[i] = ~0u;  // below all keys, behind all tokens
  shared.few.key[i] = 0, shared.few.mass[i] = 0, shared.few.of_token[i] = make_uint2(0, 0);
}

// The list from the largest value down, the lowest token first on ties; and in the order of the tokens.
template <int Threads>
__device__ __forceinline__ void rank_few(LawShared& shared, float max, float slope) {
  constexpr int kSharing = 4;  // lanes that rank a value
  static_assert(Threads == kSharing * kFew);
  const uint32_t i = threadIdx.x / kSharing, part = threadIdx.x % kSharing;
  const uint32_t key = shared.key[i], token = shared.token[i];
  const uint64_t mass = to_fixed(relative_weight(value_of_key(key), max, slope));
  uint32_t before = 0, above = 0;
#pragma unroll
  for (uint32_t j = 0; j < kFew / (4 * kSharing); ++j) {
    const uint4 keys = reinterpret_cast<const uint4*>(shared.key)[kSharing * j + part];
    const uint4 tokens = reinterpret_cast<const uint4*>(shared.token)[kSharing * j + part];
    const auto count = [&](uint32_t other, uint32_t other_token) {
      const bool is_before = other_token < token;
      if (is_before) ++before;
      if (other > key || (other == key && is_before)) ++above;
    };
    count(keys.x, tokens.x), count(keys.y, tokens.y), count(keys.z, tokens.z), count(keys.w, tokens.w);
  }
  uint32_t places = before << 16 | above;
#pragma unroll
  for (int step = 1; step < kSharing; step *= 2) places += __shfl_xor_sync(~0u, places, step);
  if (part != 0 || key == 0) return;
  before = places >> 16, above = places & 0xffff;
  shared.few.key[above] = key, shared.few.mass[above] = mass;
  shared.few.of_token[before] = make_uint2(key, token);
}

// What select_slowly finds, of a list that has been ranked; k of its values at least are in the list.
__device__ __forceinline__ Selected select_few(const LawShared& shared, uint32_t top, float max,
                                               const Parameters& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint2 keys = reinterpret_cast<const uint2*>(shared.few.key)[lane];
  const ulonglong2 masses = reinterpret_cast<const ulonglong2*>(shared.few.mass)[lane];
  const uint64_t second = inclusive_prefix(masses.x + masses.y, lane), first = second - masses.y;
  const auto key_at = [&](uint32_t place) {
    return __shfl_sync(~0u, place % 2 != 0 ? keys.y : keys.x, static_cast<int>(place / 2));
  };
  // The mass of all keys from one up.
  const auto mass_down_to = [&](uint32_t low) {
    const uint32_t last =
        __popc(__ballot_sync(~0u, keys.x >= low)) + __popc(__ballot_sync(~0u, keys.y >= low)) - 1;
    return __shfl_sync(~0u, last % 2 != 0 ? second : first, static_cast<int>(last / 2));
  };
  Selected out;
  out.low = key_at(static_cast<uint32_t>(s.top_k) - 1);
  out.mass = mass_down_to(out.low);
  if (s.top_p < 1.0f) {
    const uint64_t goal = mass_to_keep(s.top_p, out.mass);
    const uint32_t above_first = __ballot_sync(~0u, first - masses.x < goal);
    const uint32_t above_second = __ballot_sync(~0u, first < goal);
    out.low = key_at(__popc(above_first) + __popc(above_second) - 1);
    out.mass = mass_down_to(out.low);
  }
  if (s.min_p > 0.0f) {
    const uint32_t low = raise_to_min_p_out_of_line(out.low, top, max, s);
    if (low != out.low) out = {low, mass_down_to(low)};
  }
  return out;
}

// Two neighbours per lane in the order of the tokens, with their weights relative to the largest value: these
// are found before the law is known.
struct FewWeights {
  uint4 own;  // two keys with their tokens
  float first, second;
};
__device__ __forceinline__ FewWeights few_weights(const LawShared& shared, float max, float slope) {
  FewWeights out;
  out.own = reinterpret_cast<const uint4*>(shared.few.of_token)[threadIdx.x % 32];
  out.first = relative_weight(clean_logit(value_of_key(out.own.x)), max, slope);
  out.second = relative_weight(clean_logit(value_of_key(out.own.z)), max, slope);
  return out;
}

// A token of that list by its law, by a warp. low: the key of the cutoff. The largest value is in the list,
// so there is always something to draw.
__device__ __forceinline__ Drawn draw_few(const FewWeights& few, uint32_t low, float scale,
                                          uint64_t fraction) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto p_of = [&](uint32_t key, float weight) {  // as softmax_probability has it
    return key >= low ? fminf(multiply(weight, scale), 1.0f) : 0.0f;
  };
  const float first_p = p_of(few.own.x, few.first), second_p = p_of(few.own.z, few.second);
  const uint64_t first = to_fixed(first_p), both = first + to_fixed(second_p);
  const uint64_t prefix = inclusive_prefix(both, lane);
  const uint64_t rest = draw(fraction, __shfl_sync(~0u, prefix, 31));
  const int which = __ffs(__ballot_sync(~0u, prefix > rest)) - 1;
  const bool is_first = rest < prefix - both + first;
  const uint32_t token = __shfl_sync(~0u, is_first ? few.own.y : few.own.w, which);
  return {static_cast<int>(token), __shfl_sync(~0u, is_first ? first_p : second_p, which)};
}

}  // namespace quantgemm
