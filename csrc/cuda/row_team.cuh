// SPDX-License-Identifier: MIT
// A cluster of 1…8 blocks working on one row: the draw from its integer weights, and its argmax.
// Each warp sums a contiguous piece, the cluster shares the sums, and the first block walks into the
// piece that holds the draw. The sums are integers, so the number of blocks cannot change a token.
#pragma once
#include <cooperative_groups.h>

#include "verdict.cuh"

namespace quantgemm {

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
__device__ inline void exchange(Shared& shared, const Team& team) {
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

// The stopping row: weights of its tokens.
template <class T>
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
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (!Logits) bad |= is_bad_value(r[e], false);
      r[e] = Logits ? softmax_probability(r[e], p_law) : clean_probability(r[e]);
      if constexpr (Q == Subtract::kProbabilities) {
        bad |= is_bad_value(y[e], false);
        r[e] = fmaxf(r[e] - clean_probability(y[e]), 0.0f);
      }
      if constexpr (Q == Subtract::kLogits) r[e] = fmaxf(r[e] - softmax_probability(y[e], q_law), 0.0f);
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

  // Two groups in flight per warp as long as both lie inside aligned rows.
  template <bool Logits, Subtract Q>
  __device__ __forceinline__ uint64_t sum_all(int begin, int end, int lane, bool& bad) const {
    uint64_t total = 0;
    int inside = p.aligned && (!kReadsQ<Q> || q.aligned) ? min(end, p.length) : 0;
    if (kReadsQ<Q>) inside = min(inside, q.length);
    for (; begin + 2 * kGroup <= inside; begin += 2 * kGroup) {
      float r[2][8], y[2][8] = {};
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        load_vectors(r[u], p, begin + u * kGroup, lane);
        if constexpr (kReadsQ<Q>) load_vectors(y[u], q, begin + u * kGroup, lane);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
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

__device__ __forceinline__ uint64_t inclusive_prefix(uint64_t x, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// By one warp: which of n numbers holds `rest`, and what is left of it there.
__device__ inline int find_piece(const uint64_t* pieces, int n, uint64_t& rest, int lane) {
  for (int first = 0;; first += 32) {
    const uint64_t own = first + lane < n ? pieces[first + lane] : 0;
    const uint64_t prefix = inclusive_prefix(own, lane);
    const uint32_t beyond = __ballot_sync(~0u, prefix > rest);
    if (beyond || first + 32 >= n) {
      const int at = beyond ? __ffs(beyond) - 1 : 31;
      rest -= __shfl_sync(~0u, prefix - own, at);
      return first + at;
    }
    rest -= __shfl_sync(~0u, prefix, 31);
  }
}

// By one warp: the token of [begin, end) where the prefix sum exceeds `rest`. A group lies in order
// lane by lane, as one run of 8 values each or as two of 4.
template <class T, class Row>
__device__ int find_token(const Row& weights, int begin, int end, uint64_t rest, int lane) {
  constexpr int kRun = sizeof(T) == 4 ? 4 : 8;
  for (; begin < end; begin += kGroup) {
    float r[8];
    bool bad = false;
    weights.group(r, begin, lane, bad);
#pragma unroll
    for (int first = 0; first < 8; first += kRun) {
      uint64_t w[kRun], own = 0;
#pragma unroll
      for (int e = 0; e < kRun; ++e) own += w[e] = to_fixed(r[first + e]);
      const uint64_t prefix = inclusive_prefix(own, lane);
      const uint32_t beyond = __ballot_sync(~0u, prefix > rest);
      if (beyond) {
        uint64_t before = prefix - own;
        int e = 0;
#pragma unroll
        for (int j = 0; j < kRun - 1; ++j) {
          before += w[j];
          if (before <= rest) e = j + 1;
        }
        return __shfl_sync(~0u, begin + index_in_group<T>(lane, first + e), __ffs(beyond) - 1);
      }
      rest -= __shfl_sync(~0u, prefix, 31);
    }
  }
  return 0;
}

__device__ __forceinline__ int round_up(int n) { return (n + kGroup - 1) / kGroup * kGroup; }

// Rows of weights are Weights<T>, or of the same shape: p, sum() and group(). Each warp of a team has a
// piece of the row.
__device__ __forceinline__ int piece_length(const Team& team, int row_length) {
  return round_up((row_length + team.ranks * kWarps - 1) / (team.ranks * kWarps));
}

// Σ of the weights, for all threads of all blocks; leaves those of the pieces in shared.pieces.
template <class Row>
__device__ __forceinline__ uint64_t weigh(Shared& shared, const Team& team, const Row& weights) {
  const int num_pieces = team.ranks * kWarps;
  const int length = piece_length(team, weights.p.length);
  const int begin = (team.rank * kWarps + team.warp) * length;
  const int end = begin + length < weights.p.length ? begin + length : weights.p.length;
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
  return warp_sum(total);
}

// After weigh(): the token where the prefix sum exceeds `rest`. By the first block; 0 in the others.
template <class T, class Row>
__device__ __forceinline__ int find_draw(Shared& shared, const Team& team, const Row& weights,
                                         uint64_t rest) {
  if (team.rank != 0) return 0;
  const int length = piece_length(team, weights.p.length);
  const int piece = find_piece(shared.pieces, team.ranks * kWarps, rest, team.lane);
  __syncthreads();  // all warps are done with the pieces
  // The same again inside the piece, its parts shared by the warps.
  const int piece_begin = piece * length;
  const int part = round_up((length + kWarps - 1) / kWarps);
  const int piece_end = piece_begin + length < weights.p.length ? piece_begin + length : weights.p.length;
  const int part_begin = piece_begin + team.warp * part;
  const int part_end = part_begin + part < piece_end ? part_begin + part : piece_end;
  bool bad = false;  // the first pass has told
  const uint64_t part_sum = weights.sum(part_begin, part_end, team.lane, bad);
  if (team.lane == 0) shared.pieces[team.warp] = part_sum;
  __syncthreads();
  if (team.warp == 0) {
    const int which = find_piece(shared.pieces, kWarps, rest, team.lane);
    const int from = piece_begin + which * part;
    const int to = from + part < piece_end ? from + part : piece_end;
    const int token = find_token<T>(weights, from, to, rest, team.lane);
    if (team.lane == 0) shared.found[0] = static_cast<uint64_t>(token);
  }
  __syncthreads();
  return static_cast<int>(shared.found[0]);
}

// The draw from a row's weights; -1 if they are all zero. Valid in the first block.
template <class T>
__device__ int draw_token(Shared& shared, const Team& team, const Weights<T>& weights, uint64_t fraction) {
  const uint64_t total = weigh(shared, team, weights);
  return total == 0 ? -1 : find_draw<T>(shared, team, weights, draw(fraction, total));
}

// The largest value's index, the lowest on ties; by all blocks, for all blocks.
template <class T>
__device__ __noinline__ int argmax(Shared& shared, const Team& team, const RowView<T>& row, bool is_logits) {
  const int num_pieces = team.ranks * kWarps;
  const int length = round_up((row.length + num_pieces - 1) / num_pieces);
  const int begin = (team.rank * kWarps + team.warp) * length;
  const int end = begin + length < row.length ? begin + length : row.length;
  uint64_t best = 0;
  bool bad = false;
#pragma unroll 2
  for (int g = begin; g < end; g += kGroup) {
    float v[8];
    load_group(v, row, g, team.lane, is_logits ? minus_infinity() : 0.0f);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = g + index_in_group<T>(team.lane, e);
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
  return static_cast<int>(~static_cast<uint32_t>(warp_max(best)));
}

}  // namespace quantgemm
