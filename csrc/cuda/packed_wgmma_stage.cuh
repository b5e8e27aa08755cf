// SPDX-License-Identifier: MIT
// How a packed product on wgmma lays out its shared memory (Tile), goes from tile to tile (Walk), and how
// activations and weights get there: rings of places, each with a barrier for "full" and one for "empty".
#pragma once
#include "expert_routes.cuh"
#include "gemm_packed_wgmma.h"
#include "packed_tile.cuh"
#include "tensor_copy.cuh"

namespace quantgemm::packed_wgmma {

constexpr int kStrips = kRows / kStripRows, kGroupThreads = 128, kRowGroups = kRows / kGroupRows;
constexpr int kSharedBytes = 232448;

// Ragged: tiles may have few tokens, of which the first sums are enough.
template <PackableFormat F, class X, int Tokens, bool Ragged>
struct Tile {
  using Format = F;
  using T = X;
  using L = PackedLayout<F>;
  // Three warps of four more copy.
  static constexpr int kMultipliers = kRowGroups * kGroupThreads, kThreads = kMultipliers + kGroupThreads;
  // What follows depends on the type as measured; ptxas schedules what it likes.
  static constexpr bool kWide = Tokens == 256 || F::kOffset;
  static constexpr int kMultiplierRegisters = kWide ? 232 : 224, kCopierRegisters = kWide ? 40 : 56;
  // Fragments of 16 columns that are multiplied in one go; steps whose activations share a barrier.
  static constexpr int kBatch = Tokens == 256 && L::kLowBits != 8 ? 4 : 2;
  static constexpr int kTogether = Tokens <= 64 || (Tokens == 128 && L::kHighBits == 0) ? 2 : 1;
  static constexpr int kTokens = Tokens, kSumTokens = Tokens < 128 ? Tokens : 128;  // of one wgmma
  static constexpr int kSums = Tokens / kSumTokens;
  static_assert(!Ragged || kSums > 1);
  // Of a tile that has `count`.
  QG_HD static constexpr int tokens_multiplied(int count) {
    return Ragged && count <= kSumTokens ? kSumTokens : kTokens;
  }
  // How weights are made (packed_wgmma_weights.cuh): in bfloat16 or in halves, else in float32. Of codes with
  // high bits as measured: tiles of 128 tokens lose a seventh by bfloat16, those of 256 gain a twentieth, and
  // others gain there nothing.
  static constexpr bool kPairs = std::is_same_v<X, BFloat16> && !F::kOffset && !MiniFloats<F> &&
                                 (PackedFragment<F, X, false>::kBytes || L::kLowBits == 4) &&
                                 (L::kSpan == kTileCols || TwoLevelFormat<F>) &&
                                 (Tokens < 128 || (Tokens == 128) == (L::kHighBits == 0));
  static constexpr bool kHalves =
      std::is_same_v<X, Half> && F::kGroup == F::kElems && !MiniFloats<F> && Tokens < 256;
  // Weights arrive in slots of whole records.
  static constexpr int kSlotSteps = L::kLowBits == 8 && !(kPairs && Tokens <= 64) ? 2 : 4;
  static_assert(kSlotSteps * kTileCols % L::kSpan == 0);
  static constexpr int kSlotRecords = kSlotSteps * kTileCols / L::kSpan;
  // A strip in a slot is like a strip of packed.h: low bits, high bits, pieces of heads.
  static constexpr int kHighAt = kSlotSteps * L::kLowTile, kHeadsAt = kHighAt + kSlotSteps * L::kHighTile;
  static constexpr int kStripBytes = kHeadsAt + kSlotRecords * kStripRows * L::kRecordBytes;
  static constexpr int kSlotBytes = kStrips * kStripBytes;
  static_assert(kStripBytes % 16 == 0);
  // Shared memory: activations [place][token][64], swizzled; y on its way out [row group][token][64 rows],
  // the same; slots; scales.
  static constexpr int kPlaces = Tokens == 256 ? 4 : Tokens == 128 && L::kLowBits == 8 ? 6 : 8;
  static_assert(kPlaces % kSlotSteps == 0 && kSlotSteps % kTogether == 0);
  static constexpr int kPlaceBytes = Tokens * 128;
  static constexpr int kOutAt = kPlaces * kPlaceBytes, kOutBytes = 16384;  // or 64 sums
  static constexpr int kSlotsAt = kOutAt + kRowGroups * kOutBytes;
  // Whether the lanes of a row share their scales, of which there are so many words for a step and two rows.
  static constexpr int kRoom = kSharedBytes - 1024 - 256 - kSlotsAt;
  static constexpr int kStepWords = kTileCols / F::kGroup * (kPairs ? 2 : 4);
  static constexpr bool kShares =
      kPairs || (Tokens < 256 && kSlotSteps == 4 && kStepWords > 0 &&
                 (std::is_same_v<X, BFloat16> ? Tokens < 128 || L::kHighBits == 0 : F::kOffset && !kHalves) &&
                 (L::kSpan == kTileCols || TwoLevelFormat<F>) &&
                 kRoom >= 2 * kSlotBytes + kStrips * 32 * kSlotSteps * kStepWords);
  static constexpr int kScaleBytes = kShares ? 32 * kSlotSteps * kStepWords : 0;  // of a strip
  static constexpr int kFit = (kRoom - kStrips * kScaleBytes) / kSlotBytes, kSlots = kFit < 6 ? kFit : 6;
  static_assert(kSlots >= 2);
  static constexpr int kScalesAt = kSlotsAt + kSlots * kSlotBytes;
  static constexpr int kBarriersAt = kScalesAt + kStrips * kScaleBytes,
                       kFirstSlotBarrier = kPlaces / kTogether, kBarriers = kFirstSlotBarrier + kSlots;
  static constexpr int kBytes = 1024 + kBarriersAt + 16 * kBarriers;
  static_assert(kBytes <= kSharedBytes && kPlaces * kPlaceBytes >= Tokens * kRows * 4);  // sums go there
};

// A place in a ring, its barriers (full, then empty), and how often the ring was used up.
template <int Count>
struct Ring {
  uint32_t barriers;
  int place = 0;
  uint32_t turn = 0;

  __device__ uint32_t full() const { return barriers + 16 * place; }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void step(int steps = 1) {
    place += steps;
    if (place >= Count) place -= Count, turn ^= 1;
  }
};

// Whether a phase with this parity has ended, without waiting.
__device__ __forceinline__ uint32_t mbarrier_over(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
// As mbarrier_wait, by a whole warp that may have asked before: the vote tells the compiler that its threads
// stay together, else descriptors leave the uniform registers. An answer takes long; the vote comes no
// earlier than `behind`, a word that is never all ones, is known.
__device__ __forceinline__ void mbarrier_wait_together(uint32_t barrier, uint32_t parity, uint32_t over,
                                                       uint32_t behind) {
  while (!__all_sync(~0u, over != 0 && behind != ~0u)) over = mbarrier_over(barrier, parity), behind = 0;
}

// What a block is in its cluster, and the tile, or the piece of one, that the cluster is at:
//     for (Walk<P::kSlotSteps> at(schedule, routes); at.valid(); at.next())
template <int SlotSteps>
struct Walk {
  const Schedule& s;
  const ExpertRoutes& routes;
  int part, mate, tile, row_tile, token_tile, first_slot, last_slot;

  __device__ __forceinline__ explicit Walk(const Schedule& schedule, const ExpertRoutes& routes)
      : s(schedule),
        routes(routes),
        part(static_cast<int>(blockIdx.x) % s.ranks() / s.mates),
        mate(static_cast<int>(blockIdx.x) % s.mates) {
    const int first = s.first_unit(cluster()), count = s.last_unit(cluster()) - first;
    if (s.cut_tiles > 0 && count > 0) {
      tile = first / s.units();
      take(first % s.units(), count);
    } else {
      tile = s.cut_tiles + cluster();
      take_whole();
    }
    locate();
  }
  __device__ __forceinline__ int cluster() const { return static_cast<int>(blockIdx.x) / s.ranks(); }
  __device__ __forceinline__ int slots() const { return s.slots(SlotSteps); }
  __device__ __forceinline__ bool valid() const {
    return tile < (routes.groups == nullptr ? s.tiles : *routes.num_groups * s.row_sets);
  }
  __device__ __forceinline__ void next() {
    const int left = tile < s.cut_tiles ? s.last_unit(cluster()) - (tile + 1) * s.units() : 0;
    if (left > 0) {
      ++tile;
      take(0, left);
    } else {
      tile = tile < s.cut_tiles ? s.cut_tiles + cluster() : tile + static_cast<int>(gridDim.x) / s.ranks();
      take_whole();
    }
    locate();
  }
  // A piece from `unit` of the tile on, of at most `count`.
  __device__ __forceinline__ void take(int unit, int count) {
    constexpr int kSlots = kUnitSteps / SlotSteps;  // of a unit
    first_slot = unit * kSlots, last_slot = min((unit + count) * kSlots, slots());
  }
  __device__ __forceinline__ void take_whole() {
    first_slot = slots() * part / s.parts, last_slot = slots() * (part + 1) / s.parts;
  }
  // Of a cut tile: another block stores it; others have the rest of its columns.
  __device__ __forceinline__ bool is_end() const { return s.cut_tiles > 0 && first_slot > 0; }
  __device__ __forceinline__ bool is_beginning() const { return s.cut_tiles > 0 && last_slot < slots(); }
  // Some token tiles with all rows, then the next ones: what is read at a time fits in the L2. A group of an
  // expert's tokens is a tile.
  __device__ __forceinline__ void locate() {
    if (routes.groups != nullptr) {  // also behind the last one
      token_tile = tile / s.row_sets, row_tile = tile % s.row_sets * s.mates + mate;
      return;
    }
    const int together = kTilesTogether * s.row_sets, band = tile / together, in_band = tile % together;
    const int height = min(kTilesTogether, s.token_tiles - band * kTilesTogether);
    if (!valid()) return;
    token_tile = band * kTilesTogether + in_band % height;
    row_tile = in_band / height * s.mates + mate;
  }
  // Of x; a group's rows lie side by side.
  __device__ __forceinline__ int first_row(int tokens) const {
    return routes.groups == nullptr ? token_tile * tokens : routes.groups[token_tile].first;
  }
  // How many of a tile's tokens are there.
  __device__ __forceinline__ int count(int64_t m, int tokens) const {
    return routes.groups == nullptr ? static_cast<int>(min(m - int64_t{token_tile} * tokens, int64_t{tokens}))
                                    : routes.groups[token_tile].count;
  }
  __device__ __forceinline__ ExpertGroup group() const {
    return routes.groups == nullptr ? ExpertGroup{} : routes.groups[token_tile];
  }
};

// Copies with this map will be asked for.
__device__ __forceinline__ void expect_copies(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One thread copies activations: a mate's share by one call, with `x`, or, where much of a tile is not there,
// the tokens that are, with `few`, since zeros behind the last token take longer than tokens do. What lies in
// their places is multiplied, and not stored.
template <class P>
__device__ __forceinline__ void copy_activations(const GemmPackedArgs& args, const Schedule& s,
                                                 const CUtensorMap& x, const CUtensorMap& few,
                                                 uint32_t smem) {
  Ring<P::kFirstSlotBarrier> ring{smem + P::kBarriersAt};
  for (Walk<P::kSlotSteps> at(s, args.routes); at.valid(); at.next()) {
    const int there = (at.count(args.m, P::kTokens) + kFewTokens - 1) / kFewTokens * kFewTokens;
    const bool whole = P::kTokens <= kFewTokens || 8 * there > 5 * P::kTokens;
    const int tokens = whole ? P::kTokens : there, share = P::kTokens / s.mates;
    const int first = at.mate * share, end = min(first + share, tokens), at_once = whole ? share : kFewTokens;
    const int row = at.first_row(P::kTokens);
    const CUtensorMap& map = whole ? x : few;
    const int blocks = ((1 << s.mates) - 1) << at.part * s.mates;
    const int last = 128 * at.last_slot * P::kSlotSteps;  // zeros behind k
#pragma unroll 1
    for (int col = 128 * at.first_slot * P::kSlotSteps; col < last; col += 128 * P::kTogether, ring.step()) {
      mbarrier_wait(ring.empty(), ring.turn ^ 1);
      mbarrier_arrive_expecting(ring.full(), P::kTogether * tokens * 128);
#pragma unroll
      for (int i = 0; i < P::kTogether; ++i)
#pragma unroll 1
        for (int token = first; token < end; token += at_once)
          copy_tile(smem + (ring.place * P::kTogether + i) * P::kPlaceBytes + token * 128, map, col + 128 * i,
                    row + token, ring.full(), blocks);
    }
  }
}

// Bytes, a multiple of 16 and at most Most, by a warp.
template <int Most>
__device__ __forceinline__ void copy_run(uint32_t to, bytes_ptr from, int bytes) {
  const int at = 16 * static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < Most; i += 512)
    if (Most % 512 == 0 || at + i < Most) cp_async16(to + at + i, from + at + i, at + i < bytes ? 16 : 0);
}

template <class P, int First>
__device__ __forceinline__ void copy_pieces(uint32_t to, bytes_ptr strip, int64_t k, int record,
                                            int records) {
  using L = typename P::L;
  if constexpr (First < L::kRecordBytes) {
    constexpr int kSize = L::piece_bytes(First);
    copy_run<P::kSlotRecords * kStripRows * kSize>(
        to + P::kSlotRecords * kStripRows * First,
        strip + L::piece_at(k, First) + L::row_in_piece(record, 0, First), records * kStripRows * kSize);
    copy_pieces<P, First + kSize>(to, strip, k, record, records);
  }
}

// `count` arrivals at once. PTX ISA 9.7.13.15.13, sm_90.
__device__ __forceinline__ void mbarrier_arrive_times(uint32_t barrier, int count) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Each of two warps copies the weights of a row group, whole slots by the copy engine: each lane asks for a
// run of a strip, since one lane's calls would come 60 to 95 clocks behind each other, and 25 instructions
// for each kB, which cp.async takes, are more than a warp beside others can issue. The first slot, which
// comes before barriers are there, and the last one of a row, with zeros behind it, by cp.async.
template <class P>
struct WeightCopies {
  using L = typename P::L;
  using At = Walk<P::kSlotSteps>;
  const GemmPackedArgs& args;
  const Schedule& s;
  uint32_t smem;
  int group;

  __device__ __forceinline__ int first_strip(const At& at) const {
    const auto strips = static_cast<int>(num_strips(args.n));
    const int strip = at.row_tile * kStrips + group * kPanelStrips;
    if (strip >= strips) return -1;
    return args.routes.groups == nullptr ? strip : strip + args.routes.groups[at.token_tile].expert * strips;
  }
  __device__ __forceinline__ uint32_t place_at(int place) const {
    return smem + P::kSlotsAt + place * P::kSlotBytes + group * kPanelStrips * P::kStripBytes;
  }
  // Bytes go where they are in the strip, less what lies before the slot.
  __device__ __forceinline__ void copy(const At& at, int slot, int place) const {
    const int64_t strip_bytes = L::strip_bytes(args.k);
    const int strip = first_strip(at);
    if (strip < 0) return;
    const int step = slot * P::kSlotSteps, count = min(s.steps - step, P::kSlotSteps);
    const int records = count * kTileCols / L::kSpan, record = step * kTileCols / L::kSpan;
    bytes_ptr from = args.packed + strip * strip_bytes;
    uint32_t to = place_at(place);
#pragma unroll 1
    for (int i = 0; i < kPanelStrips; ++i, from += strip_bytes, to += P::kStripBytes) {
      copy_run<P::kHighAt>(to, from + int64_t{step} * L::kLowTile, count * L::kLowTile);
      if constexpr (L::kHighBits > 0)
        copy_run<P::kHeadsAt - P::kHighAt>(
            to + P::kHighAt, from + L::high_at(args.k) + int64_t{step} * L::kHighTile, count * L::kHighTile);
      copy_pieces<P, 0>(to + P::kHeadsAt, from, args.k, record, records);
    }
  }
  // What a lane asks for: of the slots of a row one after the other.
  struct Run {
    bytes_ptr from;  // of slot 0
    int to, bytes;   // none: it has no run
  };
  __device__ __forceinline__ Run own_run(const At& at) const {
    const int lane = static_cast<int>(threadIdx.x % 32), own = lane % kPanelStrips, strip = first_strip(at);
    int run = lane / kPanelStrips;
    bytes_ptr from = args.packed + (strip + own) * L::strip_bytes(args.k);
    const int to = own * P::kStripBytes;
    if (strip < 0) return {from, to, 0};
    if (run == 0) return {from, to, P::kHighAt};
    if (L::kHighBits > 0 && run == 1)
      return {from + L::high_at(args.k), to + P::kHighAt, P::kHeadsAt - P::kHighAt};
    run -= 1 + (L::kHighBits > 0);
#pragma unroll
    for (int first = 0; first < L::kRecordBytes; first += L::piece_bytes(first), --run) {
      constexpr int kRows = P::kSlotRecords * kStripRows;
      if (run == 0)
        return {from + L::piece_at(args.k, first), to + P::kHeadsAt + kRows * first,
                kRows * L::piece_bytes(first)};
    }
    return {from, to, 0};
  }
  // The first slot may be copied before barriers are there.
  __device__ __forceinline__ void copy_first() const {
    const At at(s, args.routes);
    if (at.valid()) copy(at, at.first_slot, 0);
  }
  __device__ __forceinline__ void copy_others() const {
    Ring<P::kSlots> ring{smem + P::kBarriersAt + 16 * P::kFirstSlotBarrier};
    bool is_first = true;
    for (At at(s, args.routes); at.valid(); at.next()) {
      int slot = at.first_slot;
      if (is_first) {  // it is on its way
        mbarrier_arrive_after_copies(ring.full());
        ring.step(), ++slot, is_first = false;
      }
      copy_whole(at, slot, ring);
      if (slot < at.last_slot) {
        mbarrier_wait(ring.empty(), ring.turn ^ 1);
        copy(at, slot, ring.place);
        mbarrier_arrive_after_copies(ring.full());
        ring.step();
      }
    }
  }
  __device__ __forceinline__ void copy_whole(const At& at, int& slot, Ring<P::kSlots>& ring) const {
    const int whole = min(at.last_slot, s.steps / P::kSlotSteps);
    const Run run = own_run(at);
    const uint32_t expected = first_strip(at) < 0 ? 0 : kPanelStrips * P::kStripBytes;
    bytes_ptr from = run.from + int64_t{slot} * run.bytes;
#pragma unroll 1
    for (; slot < whole; ++slot, ring.step(), from += run.bytes) {
      mbarrier_wait(ring.empty(), ring.turn ^ 1);
      if (threadIdx.x % 32 == 0) {
        mbarrier_arrive_expecting(ring.full(), expected);
        mbarrier_arrive_times(ring.full(), 31);
      }
      __syncwarp();
      if (run.bytes > 0) copy_bulk(place_at(ring.place) + run.to, from, run.bytes, ring.full());
    }
  }
};

}  // namespace quantgemm::packed_wgmma
