// SPDX-License-Identifier: MIT
// A cluster of 1…8 blocks working on one row: the draw from its integer weights, and its argmax.
// Each warp sums a contiguous piece, the cluster shares the sums, and the first block walks into the
// piece that holds the draw. The sums are integers, so the number of blocks cannot change a token.
#pragma once
#include <cooperative_groups.h>

#include "row_laws.cuh"

namespace quantgemm {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMaxRanks = 8;
constexpr int kPublished = kWarps + 1;  // per block: a number of each warp, and status bits

struct Verdict {
  RowLaw p_law, q_law;
  float p_token;
  uint32_t status;
  bool stops, has_draft;
};

struct Shared {
  uint64_t mine[kPublished], all[kMaxRanks][kPublished];
  uint64_t pieces[kMaxRanks * kWarps];
  uint64_t found[2];
  Verdict verdicts[kWarps];
  uint32_t status;
};

// A sequence and the blocks that share it.
struct Team {
  int64_t sequence;
  int rank, ranks, lane, warp;
};

__device__ __forceinline__ void cluster_barrier(const Team& team) {
#if __CUDA_ARCH__ >= 900
  if (team.ranks > 1) return cooperative_groups::this_cluster().sync();
#endif
  __syncthreads();
}

// Every block's shared.mine to every block's shared.all.
__device__ void exchange(Shared& shared, const Team& team) {
  cluster_barrier(team);
  if (static_cast<int>(threadIdx.x) < team.ranks * kPublished) {
    const int rank = threadIdx.x / kPublished, i = threadIdx.x % kPublished;
    const uint64_t* theirs = &shared.mine[i];
#if __CUDA_ARCH__ >= 900
    if (team.ranks > 1) theirs = cooperative_groups::this_cluster().map_shared_rank(theirs, rank);
#endif
    shared.all[rank][i] = *theirs;
  }
  cluster_barrier(team);
}

// The stopping row: weights of its tokens.
template <class T>
struct Weights {
  RowView<T> p, q;  // q.data null: the draft is one token, or there is none
  RowLaw p_law, q_law;
  const int64_t* map;  // target_to_draft or null
  int64_t one_hot;     // the drafted token if q is one-hot, else -1

  __device__ float q_at(int64_t i) const {
    if (q.data == nullptr) return i == one_hot ? 1.0f : 0.0f;
    const int64_t j = map ? map[i] : i;
    return j >= 0 && j < q.length ? probability(q.at(j), q_law) : 0.0f;
  }

  // Weights of a group; `bad` collects values that are no numbers.
  __device__ __forceinline__ void of_group(uint64_t (&w)[8], int64_t begin, int lane, bool& bad) const {
    float x[8], y[8];
    const bool is_logit = p_law.slope != 0.0f;
    const bool plain_q = q.data != nullptr && map == nullptr;
    load_group(x, p, begin, lane, is_logit ? minus_infinity() : 0.0f);
    const bool q_is_logit = q_law.slope != 0.0f;
    if (plain_q) load_group(y, q, begin, lane, q_is_logit ? minus_infinity() : 0.0f);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t i = begin + index_in_group<T>(lane, e);
      bad |= is_bad_value(x[e], is_logit) || (plain_q && is_bad_value(y[e], q_is_logit));
      const float q_i = plain_q ? probability(y[e], q_law) : (i < p.length ? q_at(i) : 0.0f);
      w[e] = residual_weight(probability(x[e], p_law), q_i);
    }
  }

  __device__ uint64_t sum(int64_t begin, int64_t end, int lane, bool& bad) const {  // by a warp
    uint64_t total = 0;
#pragma unroll 2
    for (; begin < end; begin += kGroup) {
      uint64_t w[8];
      of_group(w, begin, lane, bad);
#pragma unroll
      for (const uint64_t x : w) total += x;
    }
    return warp_sum(total);
  }
};

// By one warp: which of n numbers holds `rest`, and what is left of it there.
__device__ int find_piece(const uint64_t* pieces, int n, uint64_t& rest, int lane) {
  for (int first = 0;; first += 32) {
    const uint64_t own = first + lane < n ? pieces[first + lane] : 0;
    uint64_t prefix = own;
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, prefix, step);
      if (lane >= step) prefix += other;
    }
    const uint32_t beyond = __ballot_sync(~0u, prefix > rest);
    if (beyond || first + 32 >= n) {
      const int at = beyond ? __ffs(beyond) - 1 : 31;
      rest -= __shfl_sync(~0u, prefix - own, at);
      return first + at;
    }
    rest -= __shfl_sync(~0u, prefix, 31);
  }
}

// By one warp: the token of [begin, end) where the prefix sum exceeds `rest`.
template <class T>
__device__ int64_t find_token(const Weights<T>& weights, int64_t begin, int64_t end, uint64_t rest,
                              int lane) {
  for (; begin < end; begin += kGroup) {
    uint64_t w[8], own = 0;  // eight neighbours per lane: in the order of the row
    for (int e = 0; e < 8; ++e) {
      const int64_t i = begin + lane * 8 + e;
      const bool inside = i < weights.p.length;
      w[e] = inside ? residual_weight(probability(weights.p.at(i), weights.p_law), weights.q_at(i)) : 0;
      own += w[e];
    }
    uint64_t prefix = own;
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, prefix, step);
      if (lane >= step) prefix += other;
    }
    const uint32_t beyond = __ballot_sync(~0u, prefix > rest);
    if (beyond) {
      const int owner = __ffs(beyond) - 1;
      uint64_t left = rest - (prefix - own);
      int e = 0;
      while (e < 7 && left >= w[e]) left -= w[e++];
      return __shfl_sync(~0u, begin + lane * 8 + e, owner);
    }
    rest -= __shfl_sync(~0u, prefix, 31);
  }
  return 0;
}

__device__ __forceinline__ int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The draw from a row's weights; -1 if they are all zero. Valid in the first block.
template <class T>
__device__ int64_t draw_token(Shared& shared, const Team& team, const Weights<T>& weights,
                              uint64_t fraction) {
  const int num_pieces = team.ranks * kWarps;
  const int64_t length = round_up((weights.p.length + num_pieces - 1) / num_pieces, kGroup);
  const int64_t begin = (team.rank * kWarps + team.warp) * length;
  const int64_t end = begin + length < weights.p.length ? begin + length : weights.p.length;
  bool bad = false;
  const uint64_t sum = weights.sum(begin, end, team.lane, bad);
  if (bad) atomicOr(&shared.status, static_cast<uint32_t>(kBadValue));
  if (team.lane == 0) shared.mine[team.warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) shared.mine[kWarps] = shared.status;
  exchange(shared, team);
  for (int i = threadIdx.x; i < num_pieces; i += kThreads)
    shared.pieces[i] = shared.all[i / kWarps][i % kWarps];
  if (static_cast<int>(threadIdx.x) < team.ranks)
    atomicOr(&shared.status, static_cast<uint32_t>(shared.all[threadIdx.x][kWarps]));
  __syncthreads();
  uint64_t total = 0;
  for (int i = team.lane; i < num_pieces; i += 32) total += shared.pieces[i];
  total = warp_sum(total);
  if (total == 0) return -1;
  if (team.rank != 0) return 0;

  uint64_t rest = draw(fraction, total);
  const int piece = find_piece(shared.pieces, num_pieces, rest, team.lane);
  __syncthreads();  // all warps are done with the pieces
  // The same again inside the piece, its parts shared by the warps.
  const int64_t piece_begin = piece * length;
  const int64_t part = round_up((length + kWarps - 1) / kWarps, kGroup);
  const int64_t piece_end = piece_begin + length < weights.p.length ? piece_begin + length : weights.p.length;
  const int64_t part_begin = piece_begin + team.warp * part;
  const int64_t part_end = part_begin + part < piece_end ? part_begin + part : piece_end;
  const uint64_t part_sum = weights.sum(part_begin, part_end, team.lane, bad);
  if (team.lane == 0) shared.pieces[team.warp] = part_sum;
  __syncthreads();
  if (team.warp == 0) {
    const int which = find_piece(shared.pieces, kWarps, rest, team.lane);
    const int64_t from = piece_begin + which * part;
    const int64_t to = from + part < piece_end ? from + part : piece_end;
    const int64_t token = find_token(weights, from, to, rest, team.lane);
    if (team.lane == 0) shared.found[0] = static_cast<uint64_t>(token);
  }
  __syncthreads();
  return static_cast<int64_t>(shared.found[0]);
}

// The largest value's index, the lowest on ties; by all blocks, for all blocks.
template <class T>
__device__ int64_t argmax(Shared& shared, const Team& team, const RowView<T>& row, bool is_logits) {
  const int num_pieces = team.ranks * kWarps;
  const int64_t length = round_up((row.length + num_pieces - 1) / num_pieces, kGroup);
  const int64_t begin = (team.rank * kWarps + team.warp) * length;
  const int64_t end = begin + length < row.length ? begin + length : row.length;
  uint64_t best = 0;
  bool bad = false;
#pragma unroll 2
  for (int64_t g = begin; g < end; g += kGroup) {
    float v[8];
    load_group(v, row, g, team.lane, is_logits ? minus_infinity() : 0.0f);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t i = g + index_in_group<T>(team.lane, e);
      bad |= is_bad_value(v[e], is_logits);
      const uint32_t key = key_of(is_logits ? clean_logit(v[e]) : clean_probability(v[e]));
      const uint64_t candidate = uint64_t{key} << 32 | (~static_cast<uint32_t>(i));
      if (i < row.length && candidate > best) best = candidate;
    }
  }
  best = warp_max(best);
  if (bad) atomicOr(&shared.status, static_cast<uint32_t>(kBadValue));
  if (team.lane == 0) shared.mine[team.warp] = best;
  __syncthreads();
  if (threadIdx.x == 0) shared.mine[kWarps] = shared.status;
  exchange(shared, team);
  best = 0;
  for (int i = team.lane; i < num_pieces; i += 32) {
    const uint64_t other = shared.all[i / kWarps][i % kWarps];
    best = other > best ? other : best;
  }
  if (static_cast<int>(threadIdx.x) < team.ranks)
    atomicOr(&shared.status, static_cast<uint32_t>(shared.all[threadIdx.x][kWarps]));
  __syncthreads();
  return static_cast<int64_t>(~static_cast<uint32_t>(warp_max(best)));
}

}  // namespace quantgemm
