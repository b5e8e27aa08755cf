// SPDX-License-Identifier: MIT
// Batches, 256 columns of a packed strip, on their way to shared memory. A stage is a batch for each warp;
// those that lie side by side in a strip are copied at once, plane by plane.
#pragma once
#include "packed_tile.cuh"
#include "tensor_copy.cuh"

namespace quantgemm::packed_gemv {

template <PackableFormat F>
struct Batch {
  using L = PackedLayout<F>;
  static constexpr int kCols = 256, kTiles = kCols / kTileCols;
  static constexpr int kSumCols = F::kGroup < 32 ? F::kGroup : 32, kUnits = kCols / (8 * kSumCols);
  static constexpr int kSumSteps = kSumCols / 16;
  static constexpr int kRecords = kCols / L::kSpan, kRecordRows = kRecords * kStripRows;
  static constexpr int kLow = kTiles * L::kLowTile, kHigh = kTiles * L::kHighTile;  // bytes
  static constexpr int kHeads = kRecordRows * L::kRecordBytes, kBytes = kLow + kHigh + kHeads;
  // Warps that multiply, each a batch of a stage: what matrices of 4096 columns have to a strip.
  static constexpr int kWarps = 32 * kBytes <= 110000 ? 16 : 12;
  // In a stage: batches' low bits side by side, then the others, then heads, piece after piece.
  static constexpr int kHighAt = kWarps * kLow, kHeadsAt = kHighAt + kWarps * kHigh;
  static constexpr int kStage = (kWarps * kBytes + 127) / 128 * 128;  // the copy engine is slower off these
  static_assert((kSumCols == 16 || kSumCols == 32) && L::kSpan <= kCols);
};

#if __CUDA_ARCH__ >= 900
constexpr bool kCopyEngine = true;
#else
constexpr bool kCopyEngine = false;
#endif

// `bytes` of a strip into a stage for each lane that asks: by the copy engine where there is one, else by all
// lanes of the warp together.
__device__ __forceinline__ void copy_run(bool asks, uint32_t target, bytes_ptr source, int bytes,
                                         uint32_t barrier) {
  if constexpr (kCopyEngine) {
    if (asks) copy_bulk(target, source, static_cast<uint32_t>(bytes), barrier);
  } else {
    const int lane = threadIdx.x % 32;
    for (uint32_t left = __ballot_sync(~0u, asks); left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1, count = __shfl_sync(~0u, bytes, from);
      const uint32_t to = __shfl_sync(~0u, target, from);
      bytes_ptr first =
          reinterpret_cast<bytes_ptr>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(source), from));
      for (int i = lane * 16; i < count; i += 512) cp_async16(to + i, first + i);
    }
  }
}

// Batches that lie side by side in a strip of `tiles` tiles: `count` from `batch` on, to places of a stage
// from `place` on. Codes behind the last tile may be anything; their scales must be finite, and become zero.
template <PackableFormat F>
struct Run {
  using B = Batch<F>;
  using L = PackedLayout<F>;
  bytes_ptr strip;
  int tiles, batch, count, place, own_tiles, records;

  __device__ __forceinline__ Run(bytes_ptr strip, int tiles, int batch, int count, int place)
      : strip(strip), tiles(tiles), batch(batch), count(count), place(place) {
    own_tiles = min(tiles - batch * B::kTiles, count * B::kTiles);
    records = (own_tiles * kTileCols + L::kSpan - 1) / L::kSpan;
  }
  __device__ __forceinline__ int bytes() const {
    return own_tiles * (L::kLowTile + L::kHighTile) + records * (kStripRows * L::kRecordBytes);
  }
  // Before the copies and their barrier's arrivals.
  __device__ __forceinline__ void clear_rest(bool asks, uint32_t stage) const {
    if (L::kSpan < B::kCols && asks && own_tiles < count * B::kTiles) clear_heads(stage, place + count - 1);
    if constexpr (!kCopyEngine) __syncwarp();
  }
  __device__ __forceinline__ void copy(bool asks, uint32_t stage, uint32_t barrier) const {
    copy_run(asks, stage + place * B::kLow, strip + batch * B::kLow, own_tiles * L::kLowTile, barrier);
    if constexpr (L::kHighBits > 0)
      copy_run(asks, stage + B::kHighAt + place * B::kHigh, strip + tiles * L::kLowTile + batch * B::kHigh,
               own_tiles * L::kHighTile, barrier);
    copy_heads(asks, stage, strip + tiles * (L::kLowTile + L::kHighTile), barrier);
  }

 private:
  template <int First = 0>
  __device__ __forceinline__ void copy_heads(bool asks, uint32_t stage, bytes_ptr heads,
                                             uint32_t barrier) const {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      copy_run(asks, stage + heads_at<First>(place),
               heads + (tiles * kTileCols / L::kSpan * kStripRows) * First + batch * (B::kRecordRows * kSize),
               records * kStripRows * kSize, barrier);
      copy_heads<First + kSize>(asks, stage, heads, barrier);
    }
  }
  template <int First = 0>
  static __device__ __forceinline__ void clear_heads(uint32_t stage, int place) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
#pragma unroll 1
      for (int i = 0; i < B::kRecordRows * kSize; i += 16)
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(stage + heads_at<First>(place) + i),
                     "r"(0)
                     : "memory");
      clear_heads<First + kSize>(stage, place);
    } else if constexpr (kCopyEngine) {
      publish_to_copies();  // it writes here next
    }
  }

 public:
  // A piece of a place's heads in a stage.
  template <int First>
  static __device__ __forceinline__ int heads_at(int place) {
    return B::kHeadsAt + B::kWarps * B::kRecordRows * First +
           place * (B::kRecordRows * L::piece_bytes(First));
  }
};

// Into the L2, by a warp: the begin of the block's part of what a later launch reads, divided among so many
// blocks. Memory has nothing else to do while this launch ends and that one begins.
__device__ __forceinline__ void read_ahead(bytes_ptr ahead, int64_t bytes) {
  constexpr int64_t kMost = 65536, kPiece = 4096;  // of a block; for a lane to ask for at a time
  const int64_t share = bytes / gridDim.x / 16 * 16, first = share * blockIdx.x;
  const int64_t count = share < kMost ? share : kMost;
#pragma unroll 1
  for (int64_t at = threadIdx.x % 32 * kPiece; at < count; at += 32 * kPiece)
    prefetch_bulk(ahead + first + at, static_cast<uint32_t>(count - at < kPiece ? count - at : kPiece));
}

}  // namespace quantgemm::packed_gemv
