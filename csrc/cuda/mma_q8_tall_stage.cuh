// SPDX-License-Identifier: MIT
// Shared memory of the warpgroups' int8 product and the warpgroup that fills it: activations as wgmma
// wants them, weights decoded to the fragments of m16n8k32, scales. Stages of 128 of k in a ring; a
// pair of barriers for each says when it is full and when it is free again.
#pragma once
#include "mma_q8_stage.cuh"
#include "wgmma_q8.cuh"

namespace quantgemm::mma_q8 {

// Formats that it multiplies: for offsets per 16 it would need sums of 16 activations.
template <class F>
concept Tall = BlockFormat<F> && F::kElems % ActivationRow::kGroup == 0 &&
               !(F::kOffset && F::kGroup < ActivationRow::kGroup);

// How a sum becomes s · sum by one FFMA without a conversion: the tensor core adds it to 2^19, the product of
// two matrices of -128, which makes it positive. Read as a float it is then the subnormal
// (2^19 + sum) · 2^-149, and fma(that, s · 2^104, -s · 2^-26) is s · sum · 2^-45, rounded once. Scales beyond
// 2^23, which few types have, would be infinite: their sums start at 1.5 · 2^23 in floating point
// instead, put there by 64 more instructions.
template <BlockFormat F>
inline constexpr bool kWideScale = requires { F::kWideScale; };
template <BlockFormat F>
inline constexpr float kScaleFactor = kWideScale<F> ? 0x1p-24f : 0x1p104f;
template <BlockFormat F>
inline constexpr float kOffsetFactor = kWideScale<F> ? 0x1p-24f : 0x1p-45f;
template <BlockFormat F>
inline constexpr float kMinus = kWideScale<F> ? -kMagic : -0x1p-130f;

template <BlockFormat F>
struct TallLayout : Staging<F, 8> {
  using S = Staging<F, 8>;
  static constexpr bool kTall = true;
  static constexpr int kThreads = 3 * 128;  // that multiply; kCopyThreads more decode and copy
  static constexpr int kWarps = kThreads / 32, kWarpRows = 16, kRows = kWarps * kWarpRows;
  static constexpr int kSumVectors = kRows * S::kTokens / kThreads / 4;  // of four sums, in a thread
  static constexpr int kBlocksPerSm = 1;

  static constexpr int kActBytes = (S::kActBytes + 1023) / 1024 * 1024;  // codes begin at multiples of 1024
  static constexpr int kFragmentBytes = kRows * kStageElems;
  static constexpr int kGroups = kStageElems / S::kGroup;          // of a stage
  static constexpr int kEntry = kWarpRows * (F::kOffset ? 2 : 1);  // of a warp's table, floats
  static constexpr int kTableBytes =
      kWarps * kGroups * kEntry * 4;  // [warp][group][scale, offset][r][row / 8]
  static constexpr int kRingBytes = (kActBytes + kFragmentBytes + kTableBytes + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kRows * S::kRowBytes;
  static constexpr int kStartBytes = 4096;  // 64 and 128 rows of 32 times -128
  static constexpr int kOutTokens = 16,
                       kOutStride = kWarpRows + 4;  // a warp's results on their way out, floats
  static constexpr int kOutBytes = kWarps * kOutTokens * kOutStride * 4;
  static constexpr int kFixedBytes = 2 * kWeightBytes + kStartBytes + kOutBytes + 64;
  static constexpr int kBuffers = 3 * kRingBytes + kFixedBytes <= 226 * 1024 ? 3 : 2;
  static constexpr int kBytes = kBuffers * kRingBytes + kFixedBytes;

  uint8_t* memory;
  __device__ uint8_t* codes(int buffer) const { return memory + buffer * kRingBytes; }
  __device__ uint8_t* scales(int buffer) const { return codes(buffer) + S::kCodeBytes; }
  __device__ uint8_t* fragments(int buffer) const { return codes(buffer) + kActBytes; }
  __device__ float* table(int buffer, int warp) const {
    return reinterpret_cast<float*>(fragments(buffer) + kFragmentBytes) + warp * (kGroups * kEntry);
  }
  __device__ uint8_t* weights(int step) const {
    return memory + kBuffers * kRingBytes + step % 2 * kWeightBytes;
  }
  __device__ uint8_t* start() const { return weights(0) + 2 * kWeightBytes; }
  __device__ float* out(int warp) const {
    return reinterpret_cast<float*>(start() + kStartBytes) + warp * (kOutTokens * kOutStride);
  }
  __device__ uint32_t full(int buffer) const {
    return shared_address(start() + kStartBytes + kOutBytes) + 16 * buffer;
  }
  __device__ uint32_t free(int buffer) const { return full(buffer) + 8; }
};

// Where a block is in the ring.
template <class L>
struct RingPlace {
  int buffer = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++buffer == L::kBuffers) buffer = 0, parity ^= 1;
  }
};

// Codes and scales of a stage's weights, by the four warps of the copying warpgroup.
template <BlockFormat F>
__device__ __forceinline__ void decode_stage(const TallLayout<F>& shared, uint32_t first_row_bytes,
                                             const Work& work, int stage, int buffer) {
  using L = TallLayout<F>;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, step = stage / L::kStages;
  const int within = stage % L::kStages * kStageElems;  // of the step
  bytes_ptr weights = shared.weights(step);
  const auto row_at = [&](int row) {  // where it begins within its first 16-byte piece depends on the row
    const uint32_t begin =
        first_row_bytes + row * static_cast<uint32_t>(work.row_bytes) + step * L::kStepBytes;
    return weights + row * L::kRowBytes + (begin & 15);
  };
#pragma unroll 1
  for (int warp = threadIdx.x / 32 % 4; warp < L::kWarps; warp += 4) {
    const bytes_ptr rows[2] = {row_at(warp * 16 + r), row_at(warp * 16 + r + 8)};
    uint4* fragments = reinterpret_cast<uint4*>(shared.fragments(buffer)) + warp * kStageGroups * 32 + lane;
    // Scales: lanes 0-15 a row each of even groups, lanes 16-31 of odd ones. All loads come first, since the
    // compiler cannot let them pass a store.
    const int odd = lane / 16;
    const bytes_ptr row = row_at(warp * 16 + lane % 16);
    Affine affine[L::kGroups / 2];
#pragma unroll
    for (int i = 0; i < L::kGroups / 2; ++i) {
      const int e = within + (2 * i + odd) * L::kGroup;
      affine[i] = F::affine(row + e / F::kElems * F::kBytes, e % F::kElems / F::kGroup);
    }
    uint4 quads[kStageGroups];
#pragma unroll
    for (int g = 0; g < kStageGroups; ++g) {
      const int e = within + 32 * g, block = e / F::kElems * F::kBytes, quad = e % F::kElems / 4 + c;
      quads[g] = make_uint4(F::quad(rows[0] + block, quad), F::quad(rows[1] + block, quad),
                            F::quad(rows[0] + block, quad + 4), F::quad(rows[1] + block, quad + 4));
    }
#pragma unroll
    for (int g = 0; g < kStageGroups; ++g) fragments[g * 32] = quads[g];
    float* entry = shared.table(buffer, warp) + odd * L::kEntry + 2 * (lane % 8) + lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < L::kGroups / 2; ++i) {
      const int e = stage * kStageElems + (2 * i + odd) * L::kGroup;
      const bool valid = e < work.k;  // groups past the row's end count nothing
      // Two bits less of a wide scale keep its product with 1.5 · 2^23 exact.
      const float scale =
          kWideScale<F> ? __uint_as_float(__float_as_uint(affine[i].scale) & ~3u) : affine[i].scale;
      entry[2 * i * L::kEntry] = valid ? scale * kScaleFactor<F> : 0.0f;
      if constexpr (F::kOffset)
        entry[2 * i * L::kEntry + L::kWarpRows] = valid ? affine[i].offset * kOffsetFactor<F> : 0.0f;
    }
  }
}

// Operands of a stage or step, as Copier copies them, by fewer instructions where no row, token or byte of
// the tile is missing: pieces of 16 bytes may hold some of the next row.
template <class L>
__device__ __forceinline__ void copy_rows(const GemmArgs& args, const Copier<L>& copier, int64_t first_row,
                                          int step, int last) {
  using C = Copier<L>;
  const int64_t row_bytes = copier.work.row_bytes, offset = static_cast<int64_t>(step) * L::kStepBytes;
  const int64_t end = (first_row + L::kRows - 1) * row_bytes + offset + 16 * L::kPieces;
  if (end > args.n * row_bytes || step >= last) {
    copier.template copy_weights<C::kPasses>(step, last);
    return;
  }
  const int row = copier.thread / L::kPieces, piece = copier.thread % L::kPieces;
  const uint32_t target = shared_address(copier.shared.weights(step)) + row * L::kRowBytes + 16 * piece;
  uint64_t source = reinterpret_cast<uint64_t>(copier.weights + offset);
  if (row >= C::kRowsPerPass) return;
#pragma unroll
  for (int i = 0; i < C::kPasses; ++i, source += C::kRowsPerPass * row_bytes)
    if (i + 1 < C::kPasses || L::kRows % C::kRowsPerPass == 0 || row + i * C::kRowsPerPass < L::kRows)
      cp_async16(target + i * C::kRowsPerPass * L::kRowBytes,
                 reinterpret_cast<bytes_ptr>(source & ~uint64_t{15}));
}

template <class L>
__device__ __forceinline__ void copy_tokens(const Copier<L>& copier, int stage, int end, int buffer) {
  using C = Copier<L>;
  if (copier.tokens < L::kTokens || (stage + 1) * kStageElems > copier.work.k) {
    copier.copy_activations(stage, end, buffer);
    return;
  }
  int token = copier.thread / 8;
  const int piece = copier.thread % 8;
  uint32_t target =
      shared_address(copier.shared.codes(buffer)) + token * kStageElems + 16 * (piece ^ (token % 8));
  bytes_ptr source = copier.codes + static_cast<int64_t>(stage) * kStageElems;
#pragma unroll
  for (int i = 0; i < L::kTokens; i += C::kTokensPerPass, source += C::kTokensPerPass * copier.work.act_bytes)
    cp_async16(target + i * kStageElems, source);
  token = copier.thread / kStageGroups;
  target = shared_address(copier.shared.scales(buffer)) + copier.thread % kStageGroups * L::kScaleStride +
           C::place_of(token) * L::kScaleBytes;
  source = copier.scales + static_cast<int64_t>(stage) * (8 * kStageGroups);
#pragma unroll
  for (int i = 0; i < L::kTokens; i += C::kScalesPerPass, source += C::kScalesPerPass * copier.work.act_bytes)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target + i * L::kScaleBytes), "l"(source),
                 "n"(L::kScaleBytes)
                 : "memory");
}

// Fills the ring with steps [first, last) of a tile.
template <BlockFormat F>
__device__ __forceinline__ void fill_ring(const GemmArgs& args, const Copier<TallLayout<F>>& copier,
                                          RingPlace<TallLayout<F>>& place, int64_t first_row, int first,
                                          int last) {
  using L = TallLayout<F>;
  const Work& work = copier.work;
  const L& shared = copier.shared;
  const int all_stages = (work.k + kStageElems - 1) / kStageElems;
  const int end = last * L::kStages < all_stages ? last * L::kStages : all_stages;
  const auto barrier = [] { asm volatile("bar.sync 2, %0;" ::"n"(kCopyThreads) : "memory"); };
  barrier();  // the tile before has been decoded
  copy_rows<L>(args, copier, first_row, first, last);
  cp_async_commit();
#pragma unroll 1
  for (int stage = first * L::kStages; stage < end; ++stage) {
    barrier_wait(shared.free(place.buffer), place.parity ^ 1);
    copy_tokens<L>(copier, stage, end, place.buffer);
    cp_async_commit();
    if (stage % L::kStages == 0) {
      cp_async_wait<1>();  // the step's weights
      barrier();           // of all threads, and the step before has been decoded
      copy_rows<L>(args, copier, first_row, stage / L::kStages + 1, last);
    }
    cp_async_commit();
    decode_stage<F>(shared, static_cast<uint32_t>(first_row * work.row_bytes), work, stage, place.buffer);
    cp_async_wait<1>();  // the stage's activations
    publish_to_wgmma();
    barrier_arrive(shared.full(place.buffer));
    place.advance();
  }
}

}  // namespace quantgemm::mma_q8
