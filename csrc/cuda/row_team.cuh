// SPDX-License-Identifier: MIT
// A team of blocks working on one row: the draw from its integer weights, and its argmax. Each warp
// sums a contiguous piece, every block gets all the sums, and the block whose piece holds the draw
// looks for it there. The sums are integers, so the number of blocks cannot change a token.
#pragma once
#include "row_weights.cuh"
#include "team.cuh"

namespace quantgemm {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMaxTeam = 4;

// What a warp tells all blocks of its team: a number, and status bits.
struct Told {
  uint64_t number, bits;
};

struct Shared {
  Told told[2][kMaxTeam * kWarps];  // of all warps of the team, twice in turn
  uint64_t parts[2][kWarps];
  uint32_t status;
};

// Every warp's number to every block, one barrier. A team meets for the first time before this.
__device__ __forceinline__ void tell(Shared& shared, Team& team, uint64_t number, uint32_t bits) {
  team.turn ^= 1;
  if (team.lane < team.ranks)
    *team.at_rank(&shared.told[team.turn][team.rank * kWarps + team.warp], team.lane) = {number, bits};
  team.arrive();
  team.wait();
}

__device__ __forceinline__ uint64_t inclusive_prefix(uint64_t x, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// The sums of the pieces of a row in order, four neighbours per lane, and of all of them.
struct Pieces {
  static constexpr int kOwn = kMaxTeam * kWarps / 32;
  uint64_t own[kOwn], before, total;

  // Which piece holds `rest`, and what is left of it there. rest < total
  __device__ __forceinline__ int find(uint64_t& rest) const {
    uint64_t left = rest - before;
    int at = 0;
    bool here = rest >= before;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (at == j && left >= own[j]) left -= own[j], ++at;
    }
    here &= at < kOwn;
    const int lane = __ffs(__ballot_sync(~0u, here)) - 1;
    rest = __shfl_sync(~0u, left, lane);
    return lane * kOwn + __shfl_sync(~0u, at, lane);
  }
};

__device__ __forceinline__ int round_up(int n) { return (n + kGroup - 1) / kGroup * kGroup; }

// Rows of weights are Weights<T, …>, or of the same shape: p, sum() and group(). Each warp of a team
// has a piece of the row.
__device__ __forceinline__ int piece_length(const Team& team, int row_length) {
  return round_up((row_length + team.ranks * kWarps - 1) / (team.ranks * kWarps));
}

// Σ of the weights, for all threads of all blocks.
template <class Row>
__device__ __forceinline__ Pieces weigh(Shared& shared, Team& team, const Row& weights, uint32_t& status) {
  const int length = piece_length(team, weights.p.length);
  const int begin = (team.rank * kWarps + team.warp) * length;
  const int end = begin + length < weights.p.length ? begin + length : weights.p.length;
  bool bad = false;
  const uint64_t sum = weights.sum(begin, end, team.lane, bad);
  tell(shared, team, sum, __any_sync(~0u, bad) ? kBadValue : 0);
  Pieces out;
  uint32_t bits = 0;
  uint64_t own = 0;
#pragma unroll
  for (int j = 0; j < Pieces::kOwn; ++j) {
    const int i = team.lane * Pieces::kOwn + j;
    const Told t = i < team.ranks * kWarps ? shared.told[team.turn][i] : Told{0, 0};
    own += out.own[j] = t.number, bits |= static_cast<uint32_t>(t.bits);
  }
  status |= __reduce_or_sync(~0u, bits);
  const uint64_t prefix = inclusive_prefix(own, team.lane);
  out.before = prefix - own;
  out.total = __shfl_sync(~0u, prefix, 31);
  return out;
}

// The value of a group where the prefix sum of the weights exceeds `rest`, by a warp; -1 if it is not
// there. A group lies in order lane by lane, as one run of 8 values each or as two of 4.
template <class T>
__device__ __forceinline__ int find_in_group(const float (&r)[8], uint64_t rest, int lane) {
  constexpr int kRun = sizeof(T) == 4 ? 4 : 8;
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
      return __shfl_sync(~0u, index_in_group<T>(lane, first + e), __ffs(beyond) - 1);
    }
    rest -= __shfl_sync(~0u, prefix, 31);
  }
  return -1;
}

// After weigh(): the token where the prefix sum exceeds `rest`, in the one warp that finds it; -1 in
// all others. The block that owns the piece has read it a moment ago.
template <class T, class Row>
__device__ __forceinline__ int find_draw(Shared& shared, const Team& team, const Row& weights,
                                         const Pieces& pieces, uint64_t rest) {
  const int piece = pieces.find(rest);
  if (piece / kWarps != team.rank) return -1;
  int length = piece_length(team, weights.p.length), begin = piece * length;
  for (int turn = 0;; turn ^= 1) {
    // The same again inside the piece, its parts shared by the warps of the block.
    const int end = begin + length < weights.p.length ? begin + length : weights.p.length;
    length = round_up((length + kWarps - 1) / kWarps);
    float r[8];
    bool bad = false;  // the first pass has told
    FixedSum sum;
    for (int g = begin + team.warp * length; g < begin + (team.warp + 1) * length && g < end; g += kGroup) {
      weights.group(r, g, team.lane, bad);
      for (const float x : r) sum.add(x);
    }
    const uint64_t part = warp_sum(sum.value());
    if (team.lane == 0) shared.parts[turn][team.warp] = part;
    __syncthreads();
    const uint64_t own = team.lane < kWarps ? shared.parts[turn][team.lane] : 0;
    const uint64_t prefix = inclusive_prefix(own, team.lane);
    const int which = __ffs(__ballot_sync(~0u, prefix > rest)) - 1;
    rest -= __shfl_sync(~0u, prefix - own, which);
    begin += which * length;
    if (length > kGroup) continue;
    return team.warp == which ? begin + find_in_group<T>(r, rest, team.lane) : -1;
  }
}

// The largest value's index, the lowest on ties; by all blocks, for all blocks.
template <class T>
__device__ __noinline__ int argmax(Shared& shared, Team& team, const RowView<T>& row, bool is_logits,
                                   uint32_t& status) {
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
  tell(shared, team, warp_max(best), __any_sync(~0u, bad) ? kBadValue : 0);
  best = 0;
  uint32_t bits = 0;
  for (int i = team.lane; i < num_pieces; i += 32) {
    const Told t = shared.told[team.turn][i];
    best = t.number > best ? t.number : best, bits |= static_cast<uint32_t>(t.bits);
  }
  status |= __reduce_or_sync(~0u, bits);
  return static_cast<int>(~static_cast<uint32_t>(warp_max(best)));
}

// A team per sequence: at most one block per multiprocessor, each with 4096 values at least. Not 8:
// with one block on a multiprocessor, 16 clusters of 8 do not all fit on an H200 at once.
inline int ranks_for(const VerifyArgs& args, const Device& device) {
  int ranks = 1;
  if (device.major >= 9)
    while (ranks < kMaxTeam && args.num_sequences * ranks * 2 <= device.multiprocessors &&
           args.vocab >= ranks * 2 * 4096)
      ranks *= 2;
  return ranks;
}

inline cudaError_t launch_teams(void (*kernel)(VerifyArgs, int), const VerifyArgs& args, int ranks,
                                const Device& device, cudaStream_t stream) {
  DependentLaunch launch(static_cast<unsigned>(args.num_sequences * ranks), kThreads, device, stream, 0,
                         ranks);
  return cudaLaunchKernelEx(&launch.config, kernel, args, ranks);
}

}  // namespace quantgemm
