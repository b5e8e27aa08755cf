// SPDX-License-Identifier: MIT
// Waves: which rows a launch of the kernels over rows of logits is about.
#pragma once
#include "team.cuh"
#include "verdict.cuh"

namespace quantgemm {

// Rows of positions [first, end) of all sequences.
struct Wave {
  int first, end;
  bool in_order = false;
  bool streams = false;  // what is read leaves the L2 first
  // Of waves that overlap (row_strips.cu): this launch also judges the positions before `first`; it reads
  // what the verdict on those before `known` leaves, for which it waits.
  bool overlaps = false, judges = false;
  int known = 0;

  // Rows of a sequence: the target's, and those of the draft that need a law.
  __host__ __device__ int layers(const VerifyArgs& args) const {
    return (end - first) * (reads_drafts(args) ? 2 : 1);
  }
  // The first positions last, unless in order: most chains stop at one of them, and its rows are then
  // still in the L2.
  __device__ __forceinline__ SlotRow row(const VerifyArgs& args, int64_t sequence, int layer) const {
    const int at = in_order ? layer : layers(args) - 1 - layer, with_drafts = reads_drafts(args) ? 1 : 0;
    return row_of_slot(args, sequence, first + (at >> with_drafts), (at & with_drafts) != 0);
  }
};

cudaError_t launch_row_strips(const VerifyArgs& args, Wave wave, const Device& device, cudaStream_t stream);

// Are the first `count` drafts of its sequence accepted? By all threads of a block, for all.
template <class T>
__device__ bool all_accepted(const VerifyArgs& args, const RowScratch& scratch, LawTable& table,
                             const SlotRow& row, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int first = 0; first < count; first += 32) {
    const int some = count - first < 32 ? count - first : 32;
    Draft d;
    if (warp == 0) d = gather_draft<T>(args, row.sequence, row.rows, first + lane);
    fill_laws(args, scratch, table, row.sequence, first, some, row.parameters.slope);
    __syncthreads();
    bool accepted = true;
    if (warp == 0 && lane < some)
      accepted = !judge<true>(args, table.laws[0][lane], table.laws[1][lane], row.sequence, first + lane, d,
                              row.parameters)
                      .stops;
    if (__syncthreads_or(!accepted)) return false;
  }
  return true;
}

// Does a chain reach the wave, not the first one? By all threads of a block, for all. The first blocks
// of a sequence find it out and leave it in `states`, which the first wave has cleared, for the others.
// state: what the block's first thread has seen there.
__device__ __forceinline__ uint32_t state_of(const RowScratch& scratch, int64_t sequence) {
  return *static_cast<volatile uint32_t*>(scratch.states + sequence);
}
__device__ __forceinline__ void leave_state(const RowScratch& scratch, int64_t sequence, int position,
                                            bool reached) {
  *static_cast<volatile uint32_t*>(scratch.states + sequence) =
      static_cast<uint32_t>(position) << 1 | static_cast<uint32_t>(reached);
}
template <class T>
__device__ __forceinline__ bool is_reached(const VerifyArgs& args, const RowScratch& scratch, Wave wave,
                                           const SlotRow& row, uint32_t state) {
  __shared__ LawTable table;
  __shared__ uint32_t for_all;
  if (threadIdx.x == 0) for_all = state;
  __syncthreads();
  const uint32_t stopped = static_cast<uint32_t>(wave.first) << 1, reached = stopped | 1;
  if (for_all == stopped || for_all == reached) return for_all == reached;
  const bool accepted = all_accepted<T>(args, scratch, table, row, wave.first);
  if (threadIdx.x == 0) leave_state(scratch, row.sequence, wave.first, accepted);
  return accepted;
}

}  // namespace quantgemm
