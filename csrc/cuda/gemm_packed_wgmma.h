// SPDX-License-Identifier: MIT
// The instances of gemm_packed_wgmma.cuh, activation type and tokens of a tile, and how they divide work.
#pragma once
#include "device.h"
#include "launch.h"

namespace quantgemm::packed_wgmma {

constexpr int kGroupRows = 64, kRows = 128;  // of w in a tile
constexpr int kTilesTogether = 8;
constexpr int kUnitSteps = 4;     // whole slots of every type
constexpr int kStoreTokens = 32;  // at a time
constexpr int kFewTokens = 32;    // of x, by a call, where a tile is not whole

// Clusters take tiles in turn. Of a cluster's blocks, `mates` have the same tokens and rows of w that follow
// each other; `parts` times so many share the columns of these tiles, and then there is one turn.
// Where turns would not be whole, the first `cut_tiles` are cut (then there are no parts): of all their units
// of columns, tile by tile, each cluster has a range of as many, before it takes its turns with the other
// tiles. A range begins with the end of a tile whose beginning the range before it has, and ends with the
// beginning of one: who has the end leaves sums in `scratch`, and who has the beginning adds them to its own,
// later, and stores the tile. Cluster 0 has the last range, so a block waits only for blocks that were there
// before it.
struct Schedule {
  int mates, parts;
  int row_sets, token_tiles, tiles;  // row_sets · mates tiles of rows
  int clusters, steps;               // of 64 columns
  int cut_tiles, range;              // in units
  uint8_t* scratch;                  // of each block sums, then of each a flag

  constexpr __host__ __device__ int ranks() const { return mates * parts; }
  constexpr __host__ __device__ int blocks() const { return clusters * ranks(); }
  constexpr __host__ __device__ int slots(int slot_steps) const {
    return (steps + slot_steps - 1) / slot_steps;
  }
  constexpr __host__ __device__ int units() const { return slots(kUnitSteps); }  // of a tile
  constexpr __host__ __device__ int first_unit(int cluster) const { return (clusters - 1 - cluster) * range; }
  constexpr __host__ __device__ int last_unit(int cluster) const {
    const int end = first_unit(cluster) + range, all = cut_tiles * units();
    return end < all ? end : all;
  }
};

// Sums of a block, and its flag, which reads like this when they are there. Whoever has read them clears it:
// memory that comes back later does not look as if there were some. It may look like anything else.
constexpr __host__ __device__ int64_t scratch_sums(int tokens) { return int64_t{kRows} * tokens * 4; }
constexpr int64_t scratch_bytes(const Schedule& s, int tokens) {
  return s.cut_tiles == 0 ? 0 : s.blocks() * (scratch_sums(tokens) + 8);
}
constexpr __host__ __device__ uint64_t flag_of(int block) { return 0x9d3f6ab1c25e7084u + block; }

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

namespace quantgemm {

// With routes, or without scratch memory, no tile is cut.
int64_t wgmma_scratch_bytes(const GemmPackedArgs& args);
cudaError_t launch_wgmma_packed(const GemmPackedArgs& args, uint8_t* scratch, cudaStream_t stream);
// residual and up too
cudaError_t launch_wgmma_and_finish(const GemmPackedArgs& args, uint8_t* scratch, cudaStream_t stream);

}  // namespace quantgemm
