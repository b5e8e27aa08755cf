// SPDX-License-Identifier: MIT
// Waves: which rows a launch of the kernels over rows of logits is about.
#pragma once
#include "team.cuh"
#include "verdict.cuh"

namespace quantgemm {

// Rows of positions [first, end) of all sequences.
struct Wave {
  int first, end;

  // Rows of a sequence: the target's, then those of the draft that need a law.
  __host__ __device__ int layers(const VerifyArgs& args) const {
    const bool drafts = args.draft && args.draft_is_logits && !args.draft_lse;
    return (end - first) * (drafts ? 2 : 1);
  }
  __device__ __forceinline__ SlotRow row(const VerifyArgs& args, int64_t sequence, int layer) const {
    const bool is_draft = layer >= end - first;
    return row_of_slot(args, sequence, first + (is_draft ? layer - (end - first) : layer), is_draft);
  }
};

cudaError_t launch_row_strips(const VerifyArgs& args, Wave wave, const Device& device, cudaStream_t stream);

// Are the first `count` drafts of its sequence accepted? By all threads of a block, for all; waits for
// the kernel that read their rows.
template <class T>
__device__ bool all_accepted(const VerifyArgs& args, LawTable& table, const SlotRow& row, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int first = 0; first < count; first += 32) {
    const int some = count - first < 32 ? count - first : 32;
    Draft d;
    if (warp == 0) d = gather_draft<T>(args, row.sequence, row.rows, first + lane);
    if (first == 0) wait_for_previous_kernel();
    fill_laws(args, table, row.sequence, first, some, row.parameters.slope);
    __syncthreads();
    bool accepted = true;
    if (warp == 0 && lane < some)
      accepted = !judge<true>(args, table, row.sequence, first + lane, d, row.parameters).stops;
    if (__syncthreads_or(!accepted)) return false;
  }
  return true;
}

}  // namespace quantgemm
