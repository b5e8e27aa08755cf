// SPDX-License-Identifier: MIT
// The law of a row of logits with its truncation, by one block, and what can be had of it on the way: a
// token drawn from it, or a list of what it keeps. A launch runs this once: short code, rolled loops.
#pragma once
#include "dependent_launch.cuh"
#include "row_few.cuh"
#include "row_kept.cuh"
#include "row_strips.cuh"

namespace quantgemm {

// select_slowly's answer where what reaches the bound has been gathered and fits, but is more than few: by
// every warp for itself, from how many keys are above each, and of what mass.
template <int Threads>
__device__ __noinline__ Selected select_from_list(uint32_t top, float max, Parameters s) {
  LawShared& shared = law_shared();
  constexpr int kSharing = Threads / 64;  // lanes that rank a key, so that 64 of them are one turn
  const uint32_t size = shared.count, lane = threadIdx.x % 32;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < size; i += Threads)
    shared.mass[i] = to_fixed(relative_weight(value_of_key(shared.key[i]), max, s.slope));
  __syncthreads();
#pragma unroll 1
  for (uint32_t first = threadIdx.x / 32 * (32 / kSharing); first < size; first += 64) {
    const uint32_t i = first + lane / kSharing, key = i < size ? shared.key[i] : ~0u;
    const uint32_t token = i < size ? shared.token[i] : 0;
    uint64_t above = 0, down_to = 0;
    uint32_t rank = 0;
#pragma unroll 4
    for (uint32_t j = lane % kSharing; j < size; j += kSharing) {
      const uint32_t other = shared.key[j];
      const uint64_t mass = shared.mass[j];
      down_to += other >= key ? mass : 0, above += other > key ? mass : 0;
      rank += (other > key) + (shared.token[j] < token ? 0x10000u : 0u);
    }
#pragma unroll 1
    for (int step = 1; step < kSharing; step *= 2) {
      above += __shfl_xor_sync(~0u, above, step), rank += __shfl_xor_sync(~0u, rank, step);
      down_to += __shfl_xor_sync(~0u, down_to, step);
    }
    if (lane % kSharing == 0 && i < size)
      shared.ranked.above[i] = above, shared.ranked.rank[i] = rank, shared.ranked.down_to[i] = down_to;
  }
  __syncthreads();
  // The least key of those that are wanted, and the mass down to it.
  const auto least_of = [&](auto wanted) {
    uint32_t low = ~0u, at = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < size; i += 32)
      if (wanted(i) && shared.key[i] < low) low = shared.key[i], at = i;
    const uint32_t least = __reduce_min_sync(~0u, low);
    at = __shfl_sync(~0u, at, __ffs(__ballot_sync(~0u, low == least)) - 1);
    return Selected{least, shared.ranked.down_to[at]};
  };
  const Selected of_top_k = least_of([&](uint32_t i) { return (shared.ranked.rank[i] & 0xffff) < s.top_k; });
  Selected out = of_top_k;
  if (s.top_p < 1.0f) {
    const uint64_t goal = mass_to_keep(s.top_p, of_top_k.mass);
    out =
        least_of([&](uint32_t i) { return shared.key[i] >= of_top_k.low && shared.ranked.above[i] < goal; });
  }
  const uint32_t low = raise_to_min_p(out.low, top, max, s);
  if (low != out.low) out = {low, least_of([&](uint32_t i) { return shared.key[i] >= low; }).mass};
  return out;
}

// From the values gathered, all that the law keeps.
template <int Threads>
__device__ __noinline__ Drawn draw_from_list(RowLaw law, uint64_t fraction) {
  LawShared& shared = law_shared();
  const uint32_t size = shared.count, lane = threadIdx.x % 32;
  // In the order of the tokens. Nobody looks at the masses any more.
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < size; i += Threads) {
    const uint32_t place = shared.ranked.rank[i] >> 16;
    shared.mass[place] = to_fixed(softmax_probability(value_of_key(shared.key[i]), law));
    shared.listed[place] = static_cast<uint16_t>(i);
  }
  __syncthreads();
  static_assert(kCapacity <= 32 * 32);
  const uint32_t each = (size + 31) / 32;
  uint64_t own = 0;
#pragma unroll 1
  for (uint32_t at = lane * each; at < size && at < (lane + 1) * each; ++at) own += shared.mass[at];
  __syncwarp();
  const uint64_t prefix = inclusive_prefix(own, static_cast<int>(lane));
  const uint64_t total = __shfl_sync(~0u, prefix, 31);
  if (total == 0) return kNotDrawn;
  uint64_t rest = draw(fraction, total);
  const int which = __ffs(__ballot_sync(~0u, prefix > rest)) - 1;
  rest -= __shfl_sync(~0u, prefix - own, which);
  const uint32_t first = static_cast<uint32_t>(which) * each, at = first + lane;
  const uint64_t mass = lane < each && at < size ? shared.mass[at] : 0;
  const uint32_t beyond = __ballot_sync(~0u, inclusive_prefix(mass, static_cast<int>(lane)) > rest);
  const uint32_t i = shared.listed[first + static_cast<uint32_t>(__ffs(beyond)) - 1];
  return {static_cast<int>(shared.token[i]), softmax_probability(value_of_key(shared.key[i]), law)};
}

// A row's law; a token, if one was wanted and is cheap, else -1; how many tokens it keeps are listed. Where a
// token has been drawn, the first warp alone may know it and its law, and the others that there is one.
struct LawAndToken {
  RowLaw law;
  Drawn drawn;
  uint32_t num_kept;
};

// What has been kept of a row.
struct RowKeys {
  float2* strips;
  const uint32_t* groups;
  const uint16_t* lanes;
};
__device__ __forceinline__ RowKeys keys_of_slot(const RowScratch& scratch, int64_t slot) {
  return {scratch.strips + slot * kMaxStrips, scratch.group_keys + slot * scratch.num_groups,
          scratch.lane_keys + slot * scratch.num_lanes};
}

// A row that has been read for its maxima alone may be kept as a whole after all, for want of values: the
// sums of its strips, as they would have been, by a block.
template <int Threads, class T>
__device__ __noinline__ Joined sum_again(RowKeys keys, RowView<T> row, float slope) {
  const int thread = static_cast<int>(threadIdx.x);
  read_strips<false>(row, thread / 32, Threads / 32, slope, true, keys.strips, KeysInScratch{});
  __syncthreads();
  return join_strips(strips_of_lane(keys.strips, row.length, thread % 32), slope);
}

// The strips of a row whose law comes from a list: sum.y and the size of law.scale mean nothing.
__device__ __forceinline__ Joined join_maxima(const StripPair& strips, float slope) {
  const float2(&own)[2] = strips.own;
  const bool bad = __any_sync(~0u, signbit(own[0].y) || signbit(own[1].y));
  const float max = value_of_key(__reduce_max_sync(~0u, key_of(fmaxf(own[0].x, own[1].x))));
  const float scale = max != minus_infinity() ? 1.0f : 0.0f;
  return {{max, scale}, {scale != 0.0f ? max : 0.0f, slope, bad ? -scale : scale, minus_infinity()}};
}

// From that, by a block: to draw with the fraction, which is there behind the first barrier, or for the list
// `kept`, if it is not null. Follows: what has been kept is there behind the wait for the previous kernel,
// and all that can be done before is. Not inlined: the shared memory is its own, so that it is known to be
// that.
template <int Threads, bool Draws, bool Follows, class T>
__device__ __noinline__ LawAndToken law_of_row(RowKeys keys, RowView<T> row, Parameters s,
                                               const uint64_t* fraction, Kept* kept) {
  LawShared& shared = law_shared();
  const int num_groups = (row.length + kGroup - 1) / kGroup;
  const bool truncates = s.truncates(), sums = needs_sums(s.top_k, row.length);
  const int thread = static_cast<int>(threadIdx.x);
  const auto clear = [&] {
    if (thread < kBins) shared.bins[thread] = 0;
    if (thread == 0) shared.count = 0, shared.num_listed = 0;
    clear_few(shared);
    __syncthreads();
  };
  // All loads in one round trip, of most vocabularies: where they are, and how many of two.
  const int lane = thread % 32, strip = strip_length(row.length);
  const auto loads = [](bool first, bool second) { return first ? 1 + second : 0; };
  const float2* own_strips = keys.strips + lane;
  const uint32_t* own_groups = keys.groups + thread;
  const uint16_t* own_lanes = keys.lanes + thread * 8;
  int num_strips = loads(lane * strip < row.length, (lane + 32) * strip < row.length);
  int num_own = loads(truncates && thread < num_groups, thread + Threads < num_groups);
  int num_vectors = loads(truncates && thread * 8 < lanes_of<T>(row.length),
                          (thread + Threads) * 8 < lanes_of<T>(row.length));
  if constexpr (Follows) {
    clear();
    keep_here(own_strips), keep_here(own_groups), keep_here(own_lanes);
    keep_here(num_strips), keep_here(num_own), keep_here(num_vectors);
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  StripPair strips;
  uint4 lane_keys[2];
  uint32_t group_keys[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    strips.own[j] = j < num_strips ? own_strips[32 * j] : float2{minus_infinity(), 0.0f};
    group_keys[j] = j < num_own ? own_groups[j * Threads] : 0;
    lane_keys[j] = j < num_vectors ? *reinterpret_cast<const uint4*>(own_lanes + j * Threads * 8) : uint4{};
  }
  if constexpr (!Follows) clear();  // while the loads are under way
  Joined joined = sums ? join_strips(strips, s.slope) : join_maxima(strips, s.slope);
  if (!truncates || joined.sum.x == minus_infinity()) return {joined.law, kNotDrawn, 0};
  Selection<Threads, T> select{row, num_groups, joined.sum.x, s.slope, shared};
  const uint32_t top = key_of(joined.sum.x) + 1, lowest = key_of(minus_infinity()) + 1;
#pragma unroll 1
  for (int g = thread; g < (num_groups + 7) / 8 * 8; g += Threads) {  // behind the last ones 0
    shared.group_keys[g] = group_keys[0];
    select.count_group(group_keys[0], top, select.kFirstShift);
    group_keys[0] = group_keys[1];
    group_keys[1] = g + 2 * Threads < num_groups ? keys.groups[g + 2 * Threads] : 0;
  }
  __syncthreads();
  const uint32_t bound = s.top_k > 0 ? select.bound_of_top_k(top, s.top_k) : 0;
  if (bound <= lowest && !sums) joined = sum_again<Threads>(keys, row, s.slope);
  const bool listed =
      bound >= lowest && select.gather_few(keys.lanes, lane_keys[0], lane_keys[1], bound, top);
  const bool few = listed && bound > lowest && shared.count <= kFew;
  Selected selected;
  FewWeights weights;
  uint64_t noise = 0;
  if (few) {
    rank_few<Threads>(shared, joined.sum.x, s.slope);
    __syncthreads();
    if constexpr (Draws) {
      if (thread >= 32) return {joined.law, {0, 0.0f}, 0};  // one warp's answer is enough
      weights = few_weights(shared, joined.sum.x, s.slope), noise = *fraction;
    }
    selected = select_few(shared, top, joined.sum.x, s);
  } else if (listed) {
    selected = select_from_list<Threads>(top, joined.sum.x, s);
  } else {
    selected = select_out_of_line<Threads>(row, joined.sum, s, bound);
  }
  const auto [low, mass] = selected;
  RowLaw law = joined.law;
  if (low == lowest) return {law, kNotDrawn, 0};
  law.cutoff = value_of_key(low);
  law.scale = copysignf(static_cast<float>(0x1p44 / static_cast<double>(mass)), law.scale);
  RowLaw plain = law;
  plain.scale = fabsf(law.scale);
  if constexpr (Draws) {
    if (few) return {law, draw_few(weights, low, plain.scale, noise), 0};
    return {law, listed ? draw_from_list<Threads>(plain, *fraction) : kNotDrawn, 0};
  } else {
    static_assert(Threads >= kMaxKept);
    const uint32_t num_kept = kept != nullptr && listed && shared.count <= kMaxKept ? shared.count : 0;
    if (threadIdx.x < num_kept)
      kept[threadIdx.x] = {shared.token[threadIdx.x],
                           softmax_probability(value_of_key(shared.key[threadIdx.x]), plain)};
    return {law, kNotDrawn, num_kept};
  }
}

}  // namespace quantgemm
