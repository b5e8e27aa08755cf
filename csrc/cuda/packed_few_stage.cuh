// SPDX-License-Identifier: MIT
// How a packed product of few tokens (gemm_packed_few.cuh) lays out its shared memory (Tile), which columns
// and rows a thread block has (Work), and how activations and weights get there. A slot is 128 or 256 columns
// of activations; an entry is 64 rows of w of a slot's columns, which one warpgroup multiplies: the next four
// entries belong to the four warpgroups.
#pragma once
#include "dependent_launch.cuh"
#include "gemm_packed_few.h"
#include "packed_few_codes.cuh"
#include "tensor_copy.cuh"

namespace quantgemm::packed_few {

constexpr int kTeams = 4, kTeamThreads = 128, kSharedBytes = 232448;

template <PackableFormat F, class X, int Tokens>
struct Tile {
  using Format = F;
  using T = X;
  using L = PackedLayout<F>;
  using Codes = packed_few::Codes<F, X>;
  static constexpr int kTokens = Tokens;
  // Four more warps: one copies activations, one sums them if that is wanted, two copy weights.
  static constexpr int kMultipliers = kTeams * kTeamThreads, kThreads = kMultipliers + 128;
  // Columns that share a scale, in steps of 16.
  static constexpr int kSumSteps = F::kGroup < 32 ? F::kGroup / 16 : 2, kTokenTiles = Tokens / 8;
  static constexpr int kSlotTiles = L::kLowBits == 8 ? 2 : 4, kRuns = kSlotTiles * 4 / kSumSteps;
  static constexpr int kSlotRecords = kSlotTiles * kTileCols / L::kSpan;
  static_assert(F::kGroup % 16 == 0 && kSlotTiles * kTileCols % L::kSpan == 0);
  // A strip in an entry is like a strip of packed.h: low bits, high bits, pieces of heads.
  static constexpr int kHighAt = kSlotTiles * L::kLowTile, kHeadsAt = kHighAt + kSlotTiles * L::kHighTile;
  static constexpr int kStripBytes = kHeadsAt + kSlotRecords * kStripRows * L::kRecordBytes;
  static constexpr int kEntryBytes = kPanelStrips * kStripBytes;
  static_assert(kStripBytes % 16 == 0);
  // Sums of activations of eight such runs of columns, in two parts: 16 columns of a slot's product with
  // offsets.
  static constexpr int kSums = F::kOffset ? kRuns / 8 : 0, kSumBytes = Tokens * 32;
  // Shared memory: activations [slot][tile][token][64], swizzled, later sums; sums of activations
  // [slot][kSums][16 tokens][lane] uint4; entries; barriers.
  static constexpr int kPlaceBytes = Tokens * 128, kSlotBytes = kSlotTiles * kPlaceBytes,
                       kSlots =
                           (Tokens == 16 ? 32 : 24) / kSlotTiles;  // eight or six long ones: four are at work
  static constexpr int kSumsAt = kSlots * kSlotBytes, kEntriesAt = kSumsAt + kSlots * kSums * kSumBytes;
  static constexpr int kFit = (kSharedBytes - 1024 - 512 - kEntriesAt) / kEntryBytes,
                       kEntries = kFit < 16 ? kFit : 16;
  static constexpr int kBarriersAt = kEntriesAt + kEntries * kEntryBytes, kOthers = kSlots + kEntries,
                       kBarriers = kOthers + 1 + (F::kOffset ? kSlots : 0);
  static constexpr int kBytes = 1024 + kBarriersAt + 16 * kBarriers;
  static_assert(kEntries >= 4 && kBytes <= kSharedBytes);
};

__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}
__device__ __forceinline__ float load_float_there(uint32_t address) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
// Two numbers as sums of two of bfloat16 each.
__device__ __forceinline__ void split_pair(float v0, float v1, uint32_t& high, uint32_t& rest) {
  high = pack_pair(v0, v1, BFloat16{});
  rest = pack_pair(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u), BFloat16{});
}

// A ring's place `count` steps from its begin: its barriers (full, then empty), and which turn it is.
template <int Count>
struct Place {
  int at;
  uint32_t turn, full;
  __device__ __forceinline__ Place(uint32_t barriers, int count)
      : at(count % Count), turn(count / Count & 1), full(barriers + 16 * at) {}
  __device__ __forceinline__ uint32_t empty() const { return full + 8; }
};
template <class P>
__device__ __forceinline__ Place<P::kSlots> slot_place(uint32_t smem, int count) {
  return {smem + P::kBarriersAt, count};
}
template <class P>
__device__ __forceinline__ Place<P::kEntries> entry_place(uint32_t smem, int count) {
  return {smem + P::kBarriersAt + 16 * P::kSlots, count};
}
template <class P>
__device__ __forceinline__ uint32_t turned_barrier(uint32_t smem) {
  return smem + P::kBarriersAt + 16 * P::kOthers;
}
template <class P>
__device__ __forceinline__ uint32_t summed_barrier(uint32_t smem, int slot) {
  return smem + P::kBarriersAt + 16 * (P::kOthers + 1 + slot);
}

// What a block of a cluster does: `tiles` one after the other, of each the slots from `first_slot` on.
struct Work {
  const Schedule& s;
  int part, cluster, tiles, first_slot, slots;

  __device__ __forceinline__ Work(const Schedule& schedule, int slot_tiles)
      : s(schedule),
        part(static_cast<int>(blockIdx.x) % s.parts),
        cluster(static_cast<int>(blockIdx.x) / s.parts) {
    const int all = (s.steps + slot_tiles - 1) / slot_tiles;
    tiles = (s.tiles - cluster + s.clusters - 1) / s.clusters;
    first_slot = all * part / s.parts;
    slots = all * (part + 1) / s.parts - first_slot;
  }
  __device__ __forceinline__ int entries() const { return slots * s.row_groups; }  // of a tile
  // The first row of 64, of w or up if `gated`.
  __device__ __forceinline__ int first_row(int i, int row_group) const {
    const int tile = cluster + i * s.clusters;
    return kGroupRows * (s.gated ? tile : tile * s.row_groups + row_group);
  }
};

// Copies with this map will be asked for.
__device__ __forceinline__ void expect_copies(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One thread copies activations. Behind the sums of a tile, which lie where they come to.
template <class P>
__device__ __forceinline__ void copy_activations(const Work& work, const CUtensorMap& x, uint32_t smem) {
  int count = 0;
#pragma unroll 1
  for (int i = 0; i < work.tiles; ++i) {
    if (i > 0) mbarrier_wait(turned_barrier<P>(smem), i - 1 & 1);
#pragma unroll 1
    for (int slot = 0; slot < work.slots; ++slot, ++count) {
      const auto place = slot_place<P>(smem, count);
      mbarrier_wait(place.empty(), place.turn ^ 1);
      mbarrier_arrive_expecting(place.full, P::kSlotBytes);
#pragma unroll
      for (int t = 0; t < P::kSlotTiles; ++t)  // zeros behind k
        copy_tile(smem + place.at * P::kSlotBytes + t * P::kPlaceBytes, x,
                  128 * ((work.first_slot + slot) * P::kSlotTiles + t), 0, place.full);
    }
  }
}

// One warp sums activations: 16 tokens by columns of ones for each run that shares a scale.
template <class P>
__device__ __forceinline__ void sum_activations(const Work& work, uint32_t smem) {
  using T = typename P::T;
  constexpr uint32_t kOnes = std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u;
  const int lane = threadIdx.x % 32;
  const int token = lane / 8 % 2 * 8 + lane % 8;  // of the rows that this lane names to ldmatrix
  const int count = work.tiles * work.slots;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const auto place = slot_place<P>(smem, i);
    mbarrier_wait(place.full, place.turn);
#pragma unroll 1
    for (int first = 0; first < P::kTokens; first += 16) {
      float sums[2][4] = {};  // of even and odd steps, or of the first and the second eight runs
#pragma unroll
      for (int step = 0; step < P::kSlotTiles * 4; ++step) {
        const int run = step / P::kSumSteps;
        uint32_t a[4];
        load_matrices(a, smem + place.at * P::kSlotBytes + step / 4 * P::kPlaceBytes + (first + token) * 128 +
                             16 * (step % 4 * 2 + lane / 16 ^ token % 8));
        const uint32_t ones = lane / 4 == run % 8 ? kOnes : 0;
        mma_16x8x16(sums[P::kSums == 1 ? step % 2 : run / 8], a, ones, ones, T{});
      }
#pragma unroll
      for (int s = 0; s < P::kSums; ++s) {
        uint32_t words[4];  // of two tiles of tokens
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v[2];
#pragma unroll
          for (int e = 0; e < 2; ++e)
            v[e] = sums[s][2 * half + e] + (P::kSums == 1 ? sums[1][2 * half + e] : 0.0f);
          split_pair(v[0], v[1], words[2 * half], words[2 * half + 1]);
        }
        store_shared(smem + P::kSumsAt + (place.at * P::kSums + s) * P::kSumBytes + first * 32 + lane * 16,
                     words);
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(summed_barrier<P>(smem, place.at));
  }
}

// `bytes`, a multiple of 16 and at most Most, by a warp; zeros behind them. Not the copy engine, which would
// want 95 clocks for each such call.
template <int Most, bool kWhole>
__device__ __forceinline__ void copy_run(uint32_t to, bytes_ptr from, int bytes) {
  const int at = 16 * static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < Most; i += 512)
    if (Most % 512 == 0 || at + i < Most)
      cp_async16(to + at + i, from + at + i, kWhole || at + i < bytes ? 16 : 0);
}

// Two warps copy weights, each two strips of all entries. Bytes go where they are in the strip, less what
// lies before the slot.
template <class P>
struct WeightCopies {
  using L = typename P::L;
  static constexpr int kOwnStrips = kPanelStrips / 2;
  const GemmPackedArgs& args;
  const Work& work;
  uint32_t smem;
  int warp;

  template <bool kWhole, int First = 0>
  __device__ __forceinline__ void copy_pieces(uint32_t to, bytes_ptr strip, int record, int records) const {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      copy_run<P::kSlotRecords * kStripRows * kSize, kWhole>(
          to + P::kSlotRecords * kStripRows * First,
          strip + L::piece_at(args.k, First) + L::row_in_piece(record, 0, First),
          records * kStripRows * kSize);
      copy_pieces<kWhole, First + kSize>(to, strip, record, records);
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void copy(uint32_t to, bytes_ptr from, int step, int steps) const {
    const int records = steps * kTileCols / L::kSpan, record = step * kTileCols / L::kSpan;
    const int64_t strip_bytes = L::strip_bytes(args.k);
#pragma unroll
    for (int i = 0; i < kOwnStrips; ++i, from += strip_bytes, to += P::kStripBytes) {
      copy_run<P::kHighAt, kWhole>(to, from + int64_t{step} * L::kLowTile, steps * L::kLowTile);
      if constexpr (L::kHighBits > 0)
        copy_run<P::kHeadsAt - P::kHighAt, kWhole>(
            to + P::kHighAt, from + L::high_at(args.k) + int64_t{step} * L::kHighTile, steps * L::kHighTile);
      copy_pieces<kWhole>(to + P::kHeadsAt, from, record, records);
    }
  }
  // What lies behind the matrix is not copied: nobody looks at what becomes of it.
  __device__ __forceinline__ void copy(int tile, int slot, int group, int place) const {
    const int first_row = work.first_row(tile, group);
    if (first_row >= args.n) return;
    const int step = (work.first_slot + slot) * P::kSlotTiles,
              steps = min(work.s.steps - step, P::kSlotTiles);
    bytes_ptr from = args.packed + (work.s.gated && group == 1 ? args.up_at : 0) +
                     (first_row / kStripRows + warp * kOwnStrips) * L::strip_bytes(args.k);
    const uint32_t to = smem + P::kEntriesAt + place * P::kEntryBytes + warp * kOwnStrips * P::kStripBytes;
    if (steps == P::kSlotTiles)
      copy<true>(to, from, step, steps);
    else
      copy<false>(to, from, step, steps);
  }
  // The first entry may be copied before barriers are there.
  __device__ __forceinline__ void copy_first() const {
    if (work.tiles > 0 && work.slots > 0) copy(0, 0, 0, 0);
  }
  __device__ __forceinline__ void copy_others() const {
    int count = 0;
#pragma unroll 1
    for (int tile = 0; tile < work.tiles; ++tile)
#pragma unroll 1
      for (int slot = 0; slot < work.slots; ++slot)
#pragma unroll 1
        for (int group = 0; group < work.s.row_groups; ++group, ++count) {
          const auto place = entry_place<P>(smem, count);
          if (count > 0) {
            mbarrier_wait(place.empty(), place.turn ^ 1);
            copy(tile, slot, group, place.at);
          }
          mbarrier_arrive_after_copies(place.full);
        }
  }
};

}  // namespace quantgemm::packed_few
