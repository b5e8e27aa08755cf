// SPDX-License-Identifier: MIT
// A team of blocks working on one row: the draw from its integer weights, and its argmax. Each warp
// sums a contiguous piece, every block gets all the sums, and the block whose piece holds the draw
// looks for it there. The sums are integers, so the number of blocks cannot change a token.
#pragma once
#include "ptx.cuh"
#include "row_weights.cuh"
#include "team.cuh"

namespace quantgemm {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMaxTeam = 6;

// What a warp tells all blocks of its team: a number, and status bits.
struct alignas(16) Told {
  uint64_t number, bits;
};

template <int Warps, int Ranks = kMaxTeam>
struct SharedOf {
  Told told[2][Ranks * Warps];  // of all warps of the team, twice in turn
  uint64_t arrivals[2];         // mbarriers: how many bytes of it have come
  uint64_t parts[2][Warps];
  uint32_t status;
};
using Shared = SharedOf<kWarps>;

// The next but one exchange may complete.
template <int Warps>
__device__ __forceinline__ void expect_told([[maybe_unused]] uint64_t& arrivals, [[maybe_unused]] int ranks) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&arrivals)),
               "r"(static_cast<uint32_t>(ranks * Warps * sizeof(Told)))
               : "memory");
#endif
}

// Before a team meets for the first time.
template <int Warps, int Ranks>
__device__ __forceinline__ void prepare(SharedOf<Warps, Ranks>& shared, const Team& team) {
#if __CUDA_ARCH__ >= 900
  if (team.ranks > 1 && threadIdx.x == 0) {
    for (uint64_t& a : shared.arrivals) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&a)) : "memory");
      expect_told<Warps>(a, team.ranks);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
#endif
}

// Every warp's number to every block. Between blocks by stores that count themselves where they arrive
// (st.async, sm_90): a cluster's barrier would wait for all other memory traffic as well. What arrives lies
// in the block's own shared memory: to acquire it for the cluster would empty the L1, in which find_draw
// finds its piece of the row.
template <int Warps, int Ranks>
__device__ __forceinline__ void tell(SharedOf<Warps, Ranks>& shared, Team& team, uint64_t number,
                                     uint32_t bits) {
  team.turn = (team.turn + 1) & 3;
  Told* const own = &shared.told[team.turn & 1][team.piece_of(team.warp)];
#if __CUDA_ARCH__ >= 900
  if (team.ranks > 1) {
    uint64_t& arrivals = shared.arrivals[team.turn & 1];
    if (team.lane < team.ranks) {
      uint32_t there, arrivals_there;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(team.lane));
      asm("mapa.shared::cluster.u32 %0, %1, %2;"
          : "=r"(arrivals_there)
          : "r"(shared_address(&arrivals)), "r"(team.lane));
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%0], {%1, %2}, [%3];" ::"r"(there),
          "l"(number), "l"(uint64_t{bits}), "r"(arrivals_there)
          : "memory");
    }
    // Turns 1 and 2 are the first of the two barriers' phases 0, turns 3 and 0 those of phases 1.
    const uint32_t parity = team.turn == 3 || team.turn == 0;
    for (uint32_t done = 0; !done;)
      asm volatile(
          "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;"
          " selp.u32 %0, 1, 0, done; }"
          : "=r"(done)
          : "r"(shared_address(&arrivals)), "r"(parity)
          : "memory");
    if (threadIdx.x == 0) expect_told<Warps>(arrivals, team.ranks);
    __syncwarp();
    return;
  }
#endif
  if (team.lane == 0) *own = {number, bits};
  __syncthreads();
}

// The sums of the pieces of a row in order, some neighbours per lane, and of all of them.
template <int Count>
struct Pieces {
  static constexpr int kOwn = (Count + 31) / 32;
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

// Σ of the weights, for all threads of all blocks. Rows of weights are Weights<T, …>, or of the same
// shape: p, sum() and group().
template <int Warps, int Ranks, class Row>
__device__ __forceinline__ Pieces<Ranks * Warps> weigh(SharedOf<Warps, Ranks>& shared, Team& team,
                                                       const Row& weights, uint32_t& status) {
  const int piece = team.piece_of(team.warp), begin = team.begin_of(piece);
  const int end = min(team.begin_of(piece + 1), weights.p.length);
  bool bad = false;
  const uint64_t sum = weights.sum(begin, end, team.lane, bad);
  tell(shared, team, sum, __any_sync(~0u, bad) ? kBadValue : 0);
  Pieces<Ranks * Warps> out;
  uint32_t bits = 0;
  uint64_t own = 0;
#pragma unroll
  for (int j = 0; j < out.kOwn; ++j) {
    const int i = team.lane * out.kOwn + j;
    const Told t = i < team.ranks * Warps ? shared.told[team.turn & 1][i] : Told{0, 0};
    own += out.own[j] = t.number, bits |= static_cast<uint32_t>(t.bits);
  }
  status |= __reduce_or_sync(~0u, bits);
  const uint64_t prefix = inclusive_prefix(own, team.lane);
  out.before = prefix - own;
  out.total = __shfl_sync(~0u, prefix, 31);
  return out;
}

// Prefix sums of a group's weights over the lanes of a warp. A group lies in order lane by lane, as one run
// of 8 values each or as two of 4.
template <class T>
struct LanePrefix {
  static constexpr int kRun = sizeof(T) == 4 ? 4 : 8, kRuns = 8 / kRun;
  uint64_t upto[kRuns];  // from the group's first value up to the last of the lane's run

  // own: all of the lane's weights
  __device__ __forceinline__ LanePrefix(const float (&r)[8], uint64_t own, int lane) {
    if constexpr (kRuns == 1) {
      upto[0] = inclusive_prefix(own, lane);
    } else {
      uint64_t first = 0;
#pragma unroll
      for (int e = 0; e < kRun; ++e) first += to_fixed(r[e]);
      upto[0] = inclusive_prefix(first, lane);
      upto[1] = inclusive_prefix(own - first, lane) + __shfl_sync(~0u, upto[0], 31);
    }
  }

  // The value where the prefix sum exceeds `rest`; -1 if it is not there.
  __device__ __forceinline__ int find(const float (&r)[8], uint64_t rest, int lane) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const uint32_t beyond = __ballot_sync(~0u, upto[run] > rest);
      if (beyond == 0) continue;
      uint64_t w[kRun], own = 0;
#pragma unroll
      for (int e = 0; e < kRun; ++e) own += w[e] = to_fixed(r[run * kRun + e]);
      uint64_t before = upto[run] - own;
      int e = run * kRun;
#pragma unroll
      for (int j = 0; j < kRun - 1; ++j) {
        before += w[j];
        if (before <= rest) e = run * kRun + j + 1;
      }
      return __shfl_sync(~0u, index_in_group<T>(lane, e), __ffs(beyond) - 1);
    }
    return -1;
  }
};

constexpr int kElsewhere = -1, kNowhere = -2;

// The token where the prefix sum exceeds `rest` in the part of a row of this length from `begin` on, by
// a block: the warp that finds it knows it, for all others it is kElsewhere. Where `of` is given, rest
// is a share of that many instead of the part's sum, and kNowhere the answer if the sum is 0.
template <class T, int Warps, int Ranks, class Row>
__device__ __forceinline__ int find_in_part(SharedOf<Warps, Ranks>& shared, const Team& team,
                                            const Row& weights, int begin, int length, uint64_t rest,
                                            uint64_t of = 0) {
#pragma unroll 1
  for (int turn = 0;; turn ^= 1) {
    const int end = begin + length < weights.p.length ? begin + length : weights.p.length;
    length = round_up((length + Warps - 1) / Warps);
    float r[8] = {};
    bool bad = false;  // whoever summed the row has told
    uint64_t part = 0;
#pragma unroll 1
    for (int g = begin + team.warp * length; g < begin + (team.warp + 1) * length && g < end; g += kGroup) {
      weights.group(r, g, team.lane, bad);
      part += fixed_sum(r);
    }
    // What can be known of a warp's one group before the barrier.
    const LanePrefix<T> prefix(r, part, team.lane);
    const bool is_last = length <= kGroup;
    part = is_last ? prefix.upto[LanePrefix<T>::kRuns - 1] : warp_sum(part);
    if (team.lane == 31) shared.parts[turn][team.warp] = part;
    __syncthreads();
    const uint64_t own = team.lane < Warps ? shared.parts[turn][team.lane] : 0;
    if (of != 0) {
      const uint64_t total = warp_sum(own);
      if (total == 0) return kNowhere;
      rest = static_cast<uint64_t>(static_cast<double>(rest) / static_cast<double>(of) *
                                   static_cast<double>(total));
      rest = rest < total ? rest : total - 1, of = 0;
    }
    if (is_last) {
      // Of a warp behind the token, what is left wraps around, beyond all sums.
      const int at = prefix.find(r, rest - warp_sum(team.lane < team.warp ? own : 0), team.lane);
      return at >= 0 ? begin + team.warp * length + at : kElsewhere;
    }
    const uint64_t upto = inclusive_prefix(own, team.lane);
    const int which = __ffs(__ballot_sync(~0u, upto > rest)) - 1;
    rest -= __shfl_sync(~0u, upto - own, which);
    begin += which * length;
  }
}

// After weigh(): the token where the prefix sum exceeds `rest`, in the one warp that finds it. The
// block that owns the piece has read it a moment ago.
template <class T, int Warps, int Ranks, class Row>
__device__ __forceinline__ int find_draw(SharedOf<Warps, Ranks>& shared, const Team& team, const Row& weights,
                                         const Pieces<Ranks * Warps>& pieces, uint64_t rest) {
  const int piece = pieces.find(rest);
  if (!__any_sync(~0u, team.lane < Warps && team.piece_of(team.lane) == piece)) return kElsewhere;
  const int begin = team.begin_of(piece), length = team.begin_of(piece + 1) - begin;
  return find_in_part<T>(shared, team, weights, begin, length, rest);
}

// The token of a row from which nothing has been taken: if it is one of logits, and nothing is cut off,
// the sums of its strips tell the strip, and only that is read. kNowhere if the row must be weighed.
// By each block for itself; the first one's answer counts.
template <class T, int Warps, int Ranks, class Row>
__device__ __forceinline__ int find_by_strips(SharedOf<Warps, Ranks>& shared, const Team& team,
                                              const Row& weights, const RowLaw& law, const float2* strips,
                                              uint64_t fraction) {
  static_assert(kMaxStrips == 64);
  if (law.slope == 0.0f || law.cutoff != minus_infinity()) return kNowhere;
  const int length = strip_length(weights.p.length);
  const StripPair pair(strips, weights.p.length, 2 * team.lane, 1);
  uint64_t own[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float2 sum = pair.own[j];
    own[j] =
        to_fixed(multiply(multiply(fabsf(sum.y), relative_weight(sum.x, law.max, law.slope)), law.scale));
  }
  const uint64_t prefix = inclusive_prefix(own[0] + own[1], team.lane);
  const uint64_t total = __shfl_sync(~0u, prefix, 31);
  if (total == 0) return kNowhere;
  const uint64_t rest = draw(fraction, total);
  const int lane = __ffs(__ballot_sync(~0u, prefix > rest)) - 1;
  const uint64_t first = __shfl_sync(~0u, own[0], lane), second = __shfl_sync(~0u, own[1], lane);
  const uint64_t left = rest - (__shfl_sync(~0u, prefix, lane) - first - second);
  const bool is_second = left >= first;
  const int token = find_in_part<T>(shared, team, weights, (2 * lane + is_second) * length, length,
                                    is_second ? left - first : left, is_second ? second : first);
  return token >= 0 && team.rank != 0 ? kElsewhere : token;
}

// The largest value's index, the lowest on ties, and status bits; by all blocks, for all blocks.
struct Largest {
  int index;
  uint32_t bits;
};
template <int Warps, int Ranks, class T>
__device__ __noinline__ Largest find_largest(SharedOf<Warps, Ranks>& shared, Team team, RowView<T> row,
                                             bool is_logits) {
  const int num_pieces = team.ranks * Warps, piece = team.piece_of(team.warp);
  const int begin = team.begin_of(piece), end = min(team.begin_of(piece + 1), row.length);
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
    const Told t = shared.told[team.turn & 1][i];
    best = t.number > best ? t.number : best, bits |= static_cast<uint32_t>(t.bits);
  }
  return {static_cast<int>(~static_cast<uint32_t>(warp_max(best))), __reduce_or_sync(~0u, bits)};
}
template <int Warps, int Ranks, class T>
__device__ __forceinline__ int argmax(SharedOf<Warps, Ranks>& shared, Team& team, const RowView<T>& row,
                                      bool is_logits, uint32_t& status) {
  const Largest largest = find_largest(shared, team, row, is_logits);
  team.turn = (team.turn + 1) & 3;  // that was told once
  status |= largest.bits;
  return largest.index;
}

// A team per sequence: at most one block per multiprocessor, each with 4096 values at least, and no more
// than shorten a warp's piece. Larger clusters leave multiprocessors over: of an H200's 132, at once
// 66 of 2 blocks fit, 39 of 3, 30 of 4, 22 of 5, 17 of 6, 15 of 7 or of 8.
inline TeamShape team_for(const VerifyArgs& args, const Device& device) {
  static_assert(kPieceStep == 2 * kGroup);
  const auto shape = [&](int ranks) { return TeamShape::of(ranks, kWarps, args.vocab); };
  const auto fits = [&](int ranks) {
    int percent = 100;
    if (ranks > 2) percent = 90;
    if (ranks > 4) percent = 75;
    const int places = device.multiprocessors * percent / 100;
    return device.major >= 9 && args.num_sequences * ranks <= places && args.vocab >= ranks * 4096;
  };
  int ranks = kMaxTeam;
  while (ranks > 1 && !fits(ranks)) --ranks;
  while (ranks > 1 && shape(ranks - 1).longest() == shape(ranks).longest()) --ranks;
  return shape(ranks);
}

template <class... More>
inline cudaError_t launch_teams(void (*kernel)(VerifyArgs, TeamShape, More...), const VerifyArgs& args,
                                TeamShape shape, const Device& device, cudaStream_t stream, More... more) {
  const unsigned ranks = static_cast<unsigned>(shape.ranks);
  DependentLaunch launch(dim3(static_cast<unsigned>(args.num_sequences), ranks), kThreads, device, stream);
  launch.in_clusters(1, ranks);
  return cudaLaunchKernelEx(&launch.config, kernel, args, shape, more...);
}

}  // namespace quantgemm
