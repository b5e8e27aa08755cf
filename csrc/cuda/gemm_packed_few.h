// SPDX-License-Identifier: MIT
// The instances of gemm_packed_few.cuh, activation type and tokens of a tile, and how they divide work.
#pragma once
#include "device.h"
#include "launch.h"

namespace quantgemm {

// Any m; up and a residual too.
cudaError_t launch_few_packed(const GemmPackedArgs& args, cudaStream_t stream);

}  // namespace quantgemm

namespace quantgemm::packed_few {

constexpr int kGroupRows = 64;  // of w, of a team

// Clusters take tiles in turn: `row_groups` (one or two) times 64 rows, of w and of up if `gated`. `parts`
// blocks of a cluster share their columns, and then there is one turn.
struct Schedule {
  int row_groups, parts;
  int tiles, clusters, steps;  // of 64 columns
  bool gated;
};

cudaError_t launch_bf16_16(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_bf16_32(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_16(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);
cudaError_t launch_f16_32(const GemmPackedArgs&, const Schedule&, const Device&, cudaStream_t);

}  // namespace quantgemm::packed_few
