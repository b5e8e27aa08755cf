// SPDX-License-Identifier: MIT
// The instances of gemm_packed_few.cuh, activation type and tokens of a pass, and how they divide work.
#pragma once
#include "device.h"
#include "launch.h"

namespace quantgemm {

// Any m, 16 tokens a pass; up and a residual too.
cudaError_t launch_few_packed(const GemmPackedArgs& args, cudaStream_t stream);

}  // namespace quantgemm

namespace quantgemm::packed_few {

constexpr int kRunUnits = 8;  // of an entry of the ring, the most
// Shared memory of a strip's sums of a token, of an entry's barriers, and of the block's.
constexpr int kTokenBytes = 64, kEntryBarriers = 24, kBlockBarriers = 8;

// What of the division depends on the type.
struct Sizes {
  int unit_tiles, entry_bytes, x_pitch;
};

// Clusters have `each` strips of 16 rows (of w and of up if `gated`), the first `more` of them one more. The
// blocks of a cluster share a strip's `units` evenly; a block goes through all strips with up to `run` of its
// units, a panel, then through all strips with the next.
struct Schedule {
  int log_parts, clusters, each, more, most_strips;
  int received;             // strips' sums from other blocks that a block stores
  int units, tiles;         // of a strip
  int panels, run, phases;  // phases: warps that have the same unit
  int ring, bytes;          // entries; shared memory
  int gated;                // 0 or 1
};

// `tokens`, 8 or 16, decide what shared memory holds, and nothing else. clusters = 0: there is no room.
Schedule schedule_of(const GemmPackedArgs& args, const Device& device, const Sizes& sizes, int tokens);

cudaError_t launch_bf16_8(const GemmPackedArgs&, const Device&, cudaStream_t);
cudaError_t launch_bf16_16(const GemmPackedArgs&, const Device&, cudaStream_t);
cudaError_t launch_f16_8(const GemmPackedArgs&, const Device&, cudaStream_t);
cudaError_t launch_f16_16(const GemmPackedArgs&, const Device&, cudaStream_t);

}  // namespace quantgemm::packed_few
