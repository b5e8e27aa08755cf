// SPDX-License-Identifier: MIT
// Every row of logits read once (row_strips.cuh). 1…8 blocks share a row, so that few rows are spread
// over all multiprocessors too; then a warp has one strip, and what it does before its loads counts.
// Rows of a chain behind a refused draft decide nothing: a wave, a range of its positions, passes
// over the sequences that have stopped in an earlier one.
#include "row_strips.cuh"
#include "row_waves.cuh"

namespace quantgemm {
namespace {

// grid (2^share blocks for a sequence; positions of the target's rows, then the draft's)
template <class T, bool Streams>
__global__ void __launch_bounds__(kStripThreads, 4)
    row_strips_kernel(const __grid_constant__ VerifyArgs args, const __grid_constant__ RowScratch scratch,
                      Wave wave, int share) {
  const bool comes_first = wave.first == 0;
  if (comes_first) wait_for_previous_kernel();
  const SlotRow info = wave.row(args, blockIdx.x >> share, static_cast<int>(blockIdx.y));
  uint32_t state = 0;
  if (!comes_first) {
    wait_for_previous_kernel();
    // Not sooner: who finds nothing there judges, and when all blocks do that takes microseconds.
    if (threadIdx.x == 0) state = state_of(scratch, info.sequence);
  }
  let_next_kernel_start();
  if (!info.exists) return;
  if (comes_first) {
    if (threadIdx.x == 0) scratch.states[info.sequence] = 0;
  } else if (!is_reached<T>(args, scratch, wave, info, state)) {
    return;
  }
  const int part = static_cast<int>(blockIdx.x) & ((1 << share) - 1);
  const RowView<T> row = view_of<T>(args, info);
  read_strips<Streams>(row, part * kStripWarps + static_cast<int>(threadIdx.x) / 32, kStripWarps << share,
                       info.parameters.slope, needs_sums(info.parameters.top_k, row.length),
                       scratch.strips + info.slot * kMaxStrips, keys_of(scratch, info.slot));
}

// The same in three waves that overlap: the second is read without asking while its first layer of blocks
// judges what the first wave has read, and the third waits for that verdict alone. The end of its first block
// tells verification that all waves have ended. A wave's blocks start when all of the one before have
// started (or, where launches do not overlap, ended), so those that others wait for are never behind them.
template <class T>
__global__ void __launch_bounds__(kStripThreads, 4)
    overlapping_strips_kernel(const __grid_constant__ VerifyArgs args,
                              const __grid_constant__ RowScratch scratch, Wave wave, int share) {
  __shared__ LawTable table;
  const int64_t sequence = blockIdx.x >> share;
  const int part = static_cast<int>(blockIdx.x) & ((1 << share) - 1);
  if (wave.first == 0) {
    wait_for_previous_kernel();
    // Who looks there without having waited finds no verdict from before.
    const bool clears = blockIdx.y == 0 && part == 0;
    if (clears && threadIdx.x == 0) {
      leave_state(scratch, sequence, 0, false);
      __threadfence();
    }
    if (!clears || threadIdx.x == 0) let_next_kernel_start();
  } else {
    let_next_kernel_start();
  }
  if (wave.judges && blockIdx.y == 0) {
    if (blockIdx.x >= args.num_sequences) return;
    const SlotRow row = row_of_slot(args, blockIdx.x, 0, false);
    const bool accepted = all_accepted<T>(args, scratch, table, row, wave.first);
    wait_for_previous_kernel();
    if (threadIdx.x == 0) leave_state(scratch, blockIdx.x, wave.first, accepted);
    return;
  }
  const SlotRow info = wave.row(args, sequence, static_cast<int>(blockIdx.y) - wave.judges);
  bool wanted = info.exists;
  if (wanted && wave.known > 0) {
    uint32_t state;
    do {
      state = state_of(scratch, sequence);
    } while (state >> 1 < static_cast<uint32_t>(wave.known));
    wanted = (state & 1) != 0;
  }
  if (wanted)
    read_strips<true>(view_of<T>(args, info), part * kStripWarps + static_cast<int>(threadIdx.x) / 32,
                      kStripWarps << share, info.parameters.slope, true,
                      scratch.strips + info.slot * kMaxStrips, keys_of(scratch, info.slot));
  if (wave.known > 0 && blockIdx.x == 0 && blockIdx.y == 0) wait_for_previous_kernel();
}

}  // namespace

cudaError_t launch_row_strips(const VerifyArgs& args, Wave wave, const Device& device, cudaStream_t stream) {
  const int64_t rows = args.num_sequences * wave.layers(args);
  const RowScratch scratch = scratch_of(args);
  const int64_t length = args.vocab > args.draft_vocab ? args.vocab : args.draft_vocab;
  int share = share_for(static_cast<int>(length), rows, device.multiprocessors);
  // Of a second wave most blocks pass over their row. Before laws are found half as many do it sooner.
  if (wave.in_order && laws_are_stored(args) && share > 0) --share;
  const dim3 grid(static_cast<unsigned>(args.num_sequences << share),
                  static_cast<unsigned>(wave.layers(args) + wave.judges));
  DependentLaunch launch(grid, kStripThreads, device, stream);
  cudaError_t error = cudaSuccess;
  visit_real(args.value_type, [&]<class T>(T) {
    auto* kernel = wave.streams ? row_strips_kernel<T, true> : row_strips_kernel<T, false>;
    if (wave.overlaps) kernel = overlapping_strips_kernel<T>;
    error = cudaLaunchKernelEx(&launch.config, kernel, args, scratch, wave, share);
  });
  return error;
}

}  // namespace quantgemm
