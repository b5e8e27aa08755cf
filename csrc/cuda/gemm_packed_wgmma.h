// SPDX-License-Identifier: MIT
// The instances of gemm_packed_wgmma.cuh, activation type and tokens of a tile, and how they divide work.
#pragma once
#include "device.h"
#include "launch.h"

namespace quantgemm::packed_wgmma {

constexpr int kGroupRows = 64, kRows = 128;  // of w in a tile
constexpr int kTilesTogether = 8;
constexpr int kStoreTokens = 32;  // at a time
constexpr int kFewTokens = 32;    // of x, by a call, where a tile is not whole

// Clusters take tiles in turn. Of a cluster's blocks, `mates` have the same tokens and rows of w that follow
// each other; `parts` times so many share the columns of these tiles, and then there is one turn.
struct Schedule {
  int mates, parts;
  int row_sets, token_tiles, tiles;  // row_sets · mates tiles of rows
  int clusters, steps;               // of 64 columns

  constexpr __host__ __device__ int ranks() const { return mates * parts; }
  constexpr __host__ __device__ int slots(int slot_steps) const {
    return (steps + slot_steps - 1) / slot_steps;
  }
};

cudaError_t launch_bf16_32(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_bf16_64(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_bf16_128(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_bf16_256(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_bf16_256_ragged(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_32(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_64(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_128(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_256(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_256_ragged(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);

}  // namespace quantgemm::packed_wgmma
