// SPDX-License-Identifier: MIT
// How a packed product of few tokens (gemm_packed_few.cuh) lays out its shared memory (Tile, Shared), which
// strips and columns a thread block has (Work), and how weights and activations get there. A unit is 128 or
// 256 columns of a strip, what a warp multiplies at a time; an entry of the ring is a run of up to eight of
// them, whose planes (low bits, other bits, pieces of heads) the copy engine brings with one request each.
#pragma once
#include "dependent_launch.cuh"
#include "gemm_packed_few.h"
#include "packed_few_codes.cuh"
#include "tensor_copy.cuh"

namespace quantgemm::packed_few {

template <PackableFormat F, class X, int Tokens>
struct Tile {
  using Format = F;
  using T = X;
  using L = PackedLayout<F>;
  using Codes = packed_few::Codes<F, X>;
  static constexpr int kTokens = Tokens, kTokenTiles = Tokens / 8, kTotalBytes = Tokens * kTokenBytes;
  // Behind the warps that multiply: one copies weights, some add up what units left, some store y.
  static constexpr int kWarps = kRunUnits, kAdders = kTokenTiles, kWriters = 4, kThreads = 32 * 2 * kWarps;
  static constexpr int kCopier = kWarps, kFirstAdder = kWarps + 1, kFirstWriter = 2 * kWarps - kWriters;
  // A block is launched with 128 for each thread; what some give away is what others get.
  static constexpr int kMultiplierRegisters = 184, kOtherRegisters = 72;
  // Columns that share a scale, in steps of 16.
  static constexpr int kSumSteps = F::kGroup < 32 ? F::kGroup / 16 : 2;
  static constexpr int kTiles = L::kLowBits == 8 ? 2 : 4, kCols = kTiles * kTileCols;  // of a unit
  static constexpr int kSteps = kTiles * 4, kRuns = kSteps / kSumSteps, kRecords = kCols / L::kSpan;
  static_assert(F::kGroup % 16 == 0 && kCols % L::kSpan == 0);
  // An entry is like a strip of packed.h.
  static constexpr int kUnitLow = kTiles * L::kLowTile, kUnitHigh = kTiles * L::kHighTile;
  static constexpr int kPieces = kRecords * kStripRows;  // of a unit, of each kind
  static constexpr int kHighAt = kRunUnits * kUnitLow, kHeadsAt = kHighAt + kRunUnits * kUnitHigh;
  static constexpr int kEntryBytes = (kHeadsAt + kRunUnits * kPieces * L::kRecordBytes + 127) / 128 * 128;
  // A unit's sums replace its low bits: [kTokenTiles][lane] float4.
  static constexpr int kQuadBytes = 512, kSumsBytes = kTokenTiles * kQuadBytes;
  static_assert(kUnitLow >= kSumsBytes);
  // Sums of activations of eight runs of columns, in two parts: 16 columns of a unit's product with offsets.
  static constexpr int kOffsets = F::kOffset ? kRuns / 8 : 0;
  static_assert(!F::kOffset || kRuns % 8 == 0);
  // Activations of a panel, [token][column], with rows that begin in different banks.
  static constexpr int kXPitch = kRunUnits * kCols * 2 + 16, kXBytes = Tokens * kXPitch;
  static constexpr Sizes kSizes = {kTiles, kEntryBytes, kXPitch};
};

__device__ __forceinline__ void store_shared(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}
// Two numbers as sums of two of bfloat16 each.
__device__ __forceinline__ void split_pair(float v0, float v1, uint32_t& high, uint32_t& rest) {
  high = pack_pair(v0, v1, BFloat16{});
  rest = pack_pair(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u), BFloat16{});
}

// Where shared memory is divided.
template <class P>
struct Shared {
  uint8_t* const ring;  // [ring] entries, at a multiple of 128
  // Addresses: activations; sums [strip][kTokenTiles][lane] float4, own ones and those that other blocks of
  // the cluster send for strips that are stored here; barriers.
  uint32_t x, totals, received, barriers;
  int ring_entries;

  __device__ __forceinline__ Shared(uint8_t* memory, const Schedule& s) : ring(memory), ring_entries(s.ring) {
    x = shared_address(memory) + s.ring * P::kEntryBytes;
    totals = x + P::kXBytes;
    received = totals + s.most_strips * P::kTotalBytes;
    barriers = received + s.received * P::kTotalBytes;
  }
  __device__ __forceinline__ uint32_t arrived() const { return barriers; }  // of activations
  __device__ __forceinline__ uint32_t full(int at) const {
    return barriers + kBlockBarriers + kEntryBarriers * at;
  }
  __device__ __forceinline__ uint32_t left(int at) const { return full(at) + 8; }  // its sums lie there
  __device__ __forceinline__ uint32_t empty(int at) const { return full(at) + 16; }
  // All sums of a strip, or of w's and up's, are here.
  __device__ __forceinline__ uint32_t complete(int slot) const { return full(ring_entries) + 8 * slot; }
};

// A place in the ring, and the parity of its barriers' phase.
struct Turn {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int ring) {
    if (++at == ring) at = 0, parity ^= 1;
  }
};

// What a block of a cluster does: of `strips` strips (of w and up in turn if gated) the units from first_unit
// on. Entries are, panel after panel, runs of all strips.
struct Work {
  const Schedule& s;
  int part, first_strip, strips, first_unit, units, panels;

  __device__ __forceinline__ explicit Work(const Schedule& schedule) : s(schedule) {
    const int block = static_cast<int>(blockIdx.x), cluster = block >> s.log_parts;
    part = block - (cluster << s.log_parts);
    first_strip = s.each * cluster + min(cluster, s.more);
    strips = s.each + (cluster < s.more) << s.gated;
    first_unit = s.units * part >> s.log_parts;
    units = (s.units * (part + 1) >> s.log_parts) - first_unit;
    panels = s.panels;
    while ((panels - 1) * s.run >= units) --panels;
  }
  __device__ __forceinline__ int units_of(int panel) const { return min(s.run, units - panel * s.run); }
  // A strip, or one of w with that of up, is stored by the blocks of a cluster in turn.
  __device__ __forceinline__ int owner(int strip) const {
    return (strip >> s.gated) & ((1 << s.log_parts) - 1);
  }
  __device__ __forceinline__ int slots() const {
    const int all = strips >> s.gated;
    return (all - part + (1 << s.log_parts) - 1) >> s.log_parts;
  }
  __device__ __forceinline__ int slot(int strip) const { return strip >> s.gated >> s.log_parts; }
  // Where an owner has what another block sends of a strip.
  __device__ __forceinline__ int received(int strip, int sender) const {
    const int others = (1 << s.log_parts) - 1;
    return ((slot(strip) << s.gated) + (strip & s.gated)) * others + sender - (sender > owner(strip));
  }
};

// One warp copies weights. A lane has a plane: where it is in a strip and in an entry.
template <class P>
struct WeightCopies {
  using L = typename P::L;
  int64_t at = 0;
  int tile_bytes = 0, target = 0;

  __device__ __forceinline__ explicit WeightCopies(int64_t k) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) tile_bytes = L::kLowTile;
    if (L::kHighBits > 0 && lane == 1) tile_bytes = L::kHighTile, at = L::high_at(k), target = P::kHighAt;
    set_pieces<0>(lane - (L::kHighBits > 0 ? 2 : 1), k);
  }
  template <int First>
  __device__ __forceinline__ void set_pieces(int piece, int64_t k) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      if (piece == 0) {
        tile_bytes = kStripRows * kTileCols / L::kSpan * kSize;
        at = L::piece_at(k, First), target = P::kHeadsAt + kRunUnits * P::kPieces * First;
      }
      set_pieces<First + kSize>(piece - 1, k);
    }
  }
  // Codes behind the last tile may be anything; their scales must be finite.
  template <int First = 0>
  __device__ __forceinline__ void clear_heads(uint32_t entry, int unit) const {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First), kBytes = P::kPieces * kSize;
      const uint32_t piece = entry + P::kHeadsAt + kRunUnits * P::kPieces * First + unit * kBytes;
      for (int i = 16 * (threadIdx.x % 32); i < kBytes; i += 512) store_shared(piece + i, {0, 0, 0, 0});
      clear_heads<First + kSize>(entry, unit);
    } else {
      publish_to_copies();  // they write here next
    }
  }
  // `tiles` of a strip from `tile` on, for `units` units.
  __device__ __forceinline__ void copy(bytes_ptr strip, int tile, int tiles, int units, uint32_t entry,
                                       uint32_t full) const {
    constexpr int kTileBytes =
        L::kLowTile + L::kHighTile + kStripRows * kTileCols / L::kSpan * L::kRecordBytes;
    if (L::kSpan < P::kCols && tiles < units * P::kTiles) clear_heads(entry, units - 1);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive_expecting(full, static_cast<uint32_t>(tiles * kTileBytes));
    __syncwarp();
    if (tile_bytes > 0)
      copy_bulk(entry + target, strip + at + int64_t{tile} * tile_bytes,
                static_cast<uint32_t>(tiles * tile_bytes), full);
  }
};

template <class P>
__device__ __forceinline__ void copy_weights(const GemmPackedArgs& args, const Work& work,
                                             const Shared<P>& shared) {
  const Schedule& s = work.s;
  const WeightCopies<P> copies(args.k);
  const int64_t strip_bytes = P::L::strip_bytes(args.k);
  bytes_ptr const w = args.packed + work.first_strip * strip_bytes;
  Turn turn;
#pragma unroll 1
  for (int panel = 0; panel < work.panels; ++panel) {
    const int tile = (work.first_unit + panel * s.run) * P::kTiles, units = work.units_of(panel);
    const int tiles = min(s.tiles - tile, units * P::kTiles);
#pragma unroll 1
    for (int strip = 0; strip < work.strips; ++strip) {
      mbarrier_wait(shared.empty(turn.at), turn.parity ^ 1);
      bytes_ptr const from = w + (strip >> s.gated) * strip_bytes + (strip & s.gated ? args.up_at : 0);
      copies.copy(from, tile, tiles, units, shared_address(shared.ring) + turn.at * P::kEntryBytes,
                  shared.full(turn.at));
      turn.advance(s.ring);
    }
  }
}

// Activations of a panel by the warps that multiply, zeros behind k; each brings some tokens'.
template <class P>
__device__ __forceinline__ void copy_activations(const GemmPackedArgs& args, const Work& work,
                                                 const Shared<P>& shared, int panel) {
  constexpr int kRows = P::kTokens / P::kWarps;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRows;
  const int64_t col = int64_t{work.first_unit + panel * work.s.run} * P::kCols;
  const int cols = work.units_of(panel) * P::kCols,
            inside = static_cast<int>(min(args.k - col, int64_t{cols}));
  const int rows = min(max(static_cast<int>(args.m) - first, 0), kRows);
  const uint32_t to = shared.x + first * P::kXPitch;
  if (inside < cols)
#pragma unroll 1
    for (int row = 0; row < rows; ++row)
#pragma unroll 1
      for (int i = 2 * inside + 16 * lane; i < 2 * cols; i += 512)
        store_shared(to + row * P::kXPitch + i, {0, 0, 0, 0});
  __syncwarp();
  if (lane == 0) mbarrier_arrive_expecting(shared.arrived(), static_cast<uint32_t>(2 * inside * rows));
  __syncwarp();
  if (lane < rows)
    copy_bulk(to + lane * P::kXPitch,
              static_cast<const typename P::T*>(args.x) + (first + lane) * args.k + col,
              static_cast<uint32_t>(2 * inside), shared.arrived());
}

// A warp's activations: those of its unit of a panel, as B fragments, and sums of them for offsets.
template <class P>
struct Activations {
  using T = typename P::T;
  uint32_t fragments[P::kSteps][P::kTokenTiles][2];
  uint32_t sums[P::kOffsets > 0 ? P::kOffsets : 1][P::kTokenTiles][2];  // eight runs, in two parts: likewise

  __device__ __forceinline__ void load(const Shared<P>& shared, int unit) {
    const int lane = threadIdx.x % 32;
    const uint32_t place = shared.x + unit * (P::kCols * 2) + lane % 8 * P::kXPitch;
    const uint32_t own =
        place + (P::kTokenTiles == 1 ? lane / 8 * 16 : lane / 16 * 8 * P::kXPitch + lane / 8 % 2 * 16);
#pragma unroll
    for (int step = 0; step < P::kSteps; step += 2 / P::kTokenTiles) {
      uint32_t words[4];
      load_matrices(words, own + step * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        fragments[step + i / 2 / P::kTokenTiles][i / 2 % P::kTokenTiles][i % 2] = words[i];
    }
    if constexpr (P::kOffsets > 0) add_up();
  }
  // Tokens by columns of ones for each run that shares a scale.
  __device__ __forceinline__ void add_up() {
    constexpr uint32_t kOnes = std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u;
    float all[2][4] = {};  // of even and odd steps, or of the first and the second eight runs
#pragma unroll
    for (int step = 0; step < P::kSteps; ++step) {
      const int run = step / P::kSumSteps;
      const auto& b = fragments[step];
      constexpr int kLast = P::kTokenTiles - 1;
      const uint32_t a[4] = {b[0][0], kLast > 0 ? b[kLast][0] : 0, b[0][1], kLast > 0 ? b[kLast][1] : 0};
      const uint32_t ones = threadIdx.x % 32 / 4 == run % 8 ? kOnes : 0;
      mma_16x8x16(all[P::kOffsets == 1 ? step % 2 : run / 8], a, ones, ones, T{});
    }
#pragma unroll
    for (int i = 0; i < P::kOffsets; ++i)
#pragma unroll
      for (int tile = 0; tile < P::kTokenTiles; ++tile) {
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          v[e] = all[i][2 * tile + e] + (P::kOffsets == 1 ? all[1][2 * tile + e] : 0.0f);
        split_pair(v[0], v[1], sums[i][tile][0], sums[i][tile][1]);
      }
  }
};

}  // namespace quantgemm::packed_few
