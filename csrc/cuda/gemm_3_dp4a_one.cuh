// SPDX-License-Identifier: MIT
// y[1, n] where a slice is a whole row (k up to 4096 for most types): then a warp's item is a run of
// bytes, one copy brings it, a lane's activations are the same for all items, and outputs leave at once.
// A thread block owns a run of rows, its warps take items in turn.
#pragma once
#include <bit>

#include "dependent_launch.cuh"
#include "gemm_3_dp4a_span.cuh"

namespace quantgemm::dp4a {

struct OneSplit {
  int rows_per_block, row_bytes;
  int rows, log2_rows;  // of an item, and that Plan::kDepth times; 32 / rows lanes to each
};

template <BlockFormat F, bool Tabled>
struct OnePlan : Plan<F, 1, Tabled> {
  using P = Plan<F, 1, Tabled>;
  // An item lies in shared memory as in global memory modulo 128, so that no line becomes two.
  static constexpr int kLine = 128;
  static constexpr int kItemBytes = (P::kDepth * 32 * P::kSpanBytes + 15 + 2 * kLine - 1) / kLine * kLine;
  static constexpr int kRingBytes = P::kWarps * P::kStages * kItemBytes + kSlack;
  // Lanes of an item's rows lie side by side, so that loads of activations coincide, but for types whose
  // weights come in loads as wide: there it is those that would meet in a bank.
  static constexpr bool kBeside = P::kSpanBytes % 16 != 0;
  static constexpr int kMostRows = 4096, kMostLanes = 32;  // of a block, of a row
};

template <BlockFormat F, bool Tabled>
__global__ void __launch_bounds__(32 * Plan<F, 1, Tabled>::kWarps, Plan<F, 1, Tabled>::kBlocks)
    one_slice_kernel(const GemmArgs args, const OneSplit split) {
  using P = OnePlan<F, Tabled>;
  using Table = LaneTable<F, Tabled>;
  constexpr int kThreads = 32 * P::kWarps;
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ uint64_t barriers[P::kWarps * P::kStages];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Words of the table, asked for before all else, so before the wait; put to their places while x is under
  // way.
  constexpr int kMade = (Table::kWords + kThreads - 1) / kThreads;
  uint32_t words[kMade + 1];
#pragma unroll
  for (int j = 0; j < kMade; ++j)
    if (const int i = threadIdx.x + j * kThreads; i < Table::kWords) words[j] = Table::word(i);
  uint8_t* const rings = memory + Table::kBytes;
  uint8_t* const ring = rings + warp * (P::kStages * P::kItemBytes);
  uint8_t* const staged = rings + P::kRingBytes;

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * split.rows_per_block;
  const int64_t left = args.n - first_row;
  const int rows = left < split.rows_per_block ? static_cast<int>(left) : split.rows_per_block;
  const int item_rows = P::kDepth * split.rows, item_bytes = item_rows * split.row_bytes;
  const int bytes = rows * split.row_bytes, step = P::kWarps * item_bytes;
  const uint8_t* const w = args.w + first_row * split.row_bytes;
  const auto misplaced = [&](int at) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(w) + at) & (P::kLine - 1);
  };

  // Copies go from and to multiples of 16 bytes.
  Arrivals arrivals(barriers + warp * P::kStages, P::kStages, 1, lane);
  int ahead = warp * item_bytes;
  const auto fetch = [&](int stage) {
    if (ahead < bytes) {
      const int place = misplaced(ahead), shift = place & 15;
      const int last = shift + (bytes - ahead < item_bytes ? bytes - ahead : item_bytes);
      const uint8_t* const from = w + (ahead - shift);
      uint8_t* const to = ring + stage * P::kItemBytes + (place - shift);
      int whole = (last + 15) & ~15;
      if (rows == left && whole > bytes - ahead + shift) {  // w ends inside the last 16
        whole = last & ~15;
        uint32_t word = whole + lane < last ? from[whole + lane] << (8 * (lane % 4)) : 0;
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2) word |= __shfl_xor_sync(~0u, word, bit);
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = __shfl_sync(~0u, word, 4 * j);
        if (lane == 0)
          *reinterpret_cast<uint4*>(to + whole) = make_uint4(words[0], words[1], words[2], words[3]);
      }
      arrivals.start(stage, shared_address(to), from, whole, lane, 32);
      ahead += step;
    }
    arrivals.close();
  };
  // A block that begins while the kernel before is busy has the L2 fetch its weights meanwhile.
  if (P::kBlocks > 1 && lane == 0) {
#pragma unroll 1
    for (int s = 0, at = ahead; s < P::kStages && at < bytes; ++s, at += step) {
      const int shift = misplaced(at) & 15, length = bytes - at < item_bytes ? bytes - at : item_bytes;
      prefetch_to_l2(w + (at - shift), (length + shift) & ~15);
    }
  }
  const Table table(memory, lane);
  wait_for_previous_kernel();
  let_next_kernel_start();
  Rounding<F, 1, Tabled> rounding;
  rounding.ask(args, 0, static_cast<int>(args.k));
#pragma unroll 1
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s);
#pragma unroll
  for (int j = 0; j < kMade; ++j)
    if (const int i = threadIdx.x + j * kThreads; i < Table::kWords) Table::put(memory, i, words[j]);
  rounding.stage(staged, args, 0, static_cast<int>(args.k));
  __syncthreads();

  const int log2_lanes = 5 - split.log2_rows;
  const int row_in_item = P::kBeside ? lane & (split.rows - 1) : lane >> log2_lanes;
  const int span = P::kBeside ? lane >> split.log2_rows : lane & ((1 << log2_lanes) - 1);
  const int of_lane = row_in_item * split.row_bytes + span * P::kSpanBytes;
  const int inside = (static_cast<int>(args.k) - span * P::kSpan) / kGroup;
  const uint8_t* const x = staged + span * P::kPitch;
  const int top = P::kBeside ? 16 : 16 >> split.log2_rows;
  const bool second = P::kDepth == 2 && (lane & top) != 0,
             stores = span == (second ? 1 << log2_lanes >> 1 : 0);
  const int kept = second ? split.rows : 0;
  int stage = 0;
#pragma unroll 1
  for (int at = warp * item_bytes, row = warp * item_rows + row_in_item; at < bytes;
       at += step, row += P::kWarps * item_rows) {
    arrivals.template wait<P::kStages>(stage);  // and all lanes have used the previous item's bytes
    fetch(stage == 0 ? P::kStages - 1 : stage - 1);

    const uint8_t* const slot = ring + stage * P::kItemBytes + misplaced(at) + of_lane;
    Window<P::kSpanBytes> windows[P::kDepth];
#pragma unroll
    for (int r = 0; r < P::kDepth; ++r) windows[r].load(slot + r * (split.rows * split.row_bytes));
    float sums[P::kDepth][1] = {};
    multiply_span<F, 1, Tabled>(sums, windows, x, inside < P::kGroups ? inside : P::kGroups, table);
    // At the first exchange, of two rows each half of the lanes keeps one.
    float sum = sums[0][0];
    if constexpr (P::kDepth == 2) {
      const float other = second ? sum : sums[1][0];
      sum = (second ? sums[1][0] : sum) + __shfl_xor_sync(~0u, other, top);
    }
#pragma unroll
    for (int bit = P::kDepth == 2 ? 8 : 16; bit > 0; bit /= 2) {
      const float other = __shfl_xor_sync(~0u, sum, bit);
      if (P::kBeside ? bit >= split.rows : bit < (P::kDepth == 2 ? top : 1 << log2_lanes)) sum += other;
    }
    if (stores && row + kept < rows) store_real(args.y, first_row + row + kept, sum, args.type);
    stage = stage + 1 == P::kStages ? 0 : stage + 1;
  }
}

template <BlockFormat F, bool Tabled>
int one_slice_bytes(int lanes) {
  using P = OnePlan<F, Tabled>;
  return LaneTable<F, Tabled>::kBytes + P::kRingBytes + lanes * P::kPitch;
}

template <BlockFormat F, bool Tabled>
bool fits_one_slice(const GemmArgs& args, const Device& device) {
  const Slices of_row = slices_of<OnePlan<F, Tabled>>(args.k);
  return of_row.count == 1 && one_slice_bytes<F, Tabled>(of_row.lanes) <= device.shared_per_block - kReserved;
}

template <BlockFormat F, bool Tabled>
cudaError_t launch_one_slice(const GemmArgs& args, const Device& device, cudaStream_t stream) {
  using P = OnePlan<F, Tabled>;
  const int lanes = slices_of<P>(args.k).lanes, bytes = one_slice_bytes<F, Tabled>(lanes);
  OneSplit split{};
  split.row_bytes = static_cast<int>(args.k / F::kElems * F::kBytes);
  split.rows = 32 / lanes, split.log2_rows = std::countr_zero(static_cast<unsigned>(split.rows));
  const int64_t most = int64_t{P::kMostRows} * device.multiprocessors;
  const int64_t blocks = (args.n + most - 1) / most * device.multiprocessors;
  split.rows_per_block = static_cast<int>((args.n + blocks - 1) / blocks);

  const auto kernel = one_slice_kernel<F, Tabled>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const auto grid = static_cast<unsigned>((args.n + split.rows_per_block - 1) / split.rows_per_block);
  const DependentLaunch launch(grid, 32 * P::kWarps, device, stream, bytes);
  return cudaLaunchKernelEx(&launch.config, kernel, args, split);
}

}  // namespace quantgemm::dp4a
