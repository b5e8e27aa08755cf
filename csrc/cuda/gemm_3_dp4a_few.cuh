// SPDX-License-Identifier: MIT
// y[m, n] for few tokens: every weight is read once, at the speed of DRAM, in its native layout.
// A thread block owns a run of rows. Its warps stream pieces of rows through rings of their own in
// shared memory, since blocks of 18 or 210 bytes allow no wide load from DRAM; then a lane takes
// kSpan neighbouring weights to registers, where every shift and field offset is a constant, and
// multiplies them with all tokens, whose activations lie in shared memory beside the sums they need.
// Limits: DRAM at one token, from about four on integer arithmetic.
#pragma once
#include <bit>

#include "dependent_launch.cuh"
#include "gemm_3_dp4a_one.cuh"

namespace quantgemm::dp4a {

// How a warp's lanes share an item: `rows` of them, each by `lanes` spans, which make a slice.
struct Split {
  int rows_per_block, slices, panel;  // a panel: slices whose activations fit in shared memory
  int lanes, log2_lanes, rows;        // lanes · rows = 32, and that as often as Plan::kDepth
};

// Block b owns rows b · rows_per_block …; panel by panel, its warps share the items, slice by slice,
// evenly. Partial sums lie in shared memory, [slices of a panel][rows][Tokens].
template <BlockFormat F, int Tokens, bool Tabled>
__global__ void __launch_bounds__(32 * Plan<F, Tokens, Tabled>::kWarps, Plan<F, Tokens, Tabled>::kBlocks)
    few_tokens_kernel(const GemmArgs args, const Split split) {
  using P = Plan<F, Tokens, Tabled>;
  extern __shared__ uint4 shared[];
  __shared__ uint64_t barriers[P::kWarps * P::kStages];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint8_t* const rings = reinterpret_cast<uint8_t*>(shared) + LaneTable<F, Tabled>::kBytes;
  uint8_t* const ring = rings + warp * (P::kStages * P::kItemBytes);
  uint8_t* const staged = rings + warps * (P::kStages * P::kItemBytes) + kSlack;
  float* const partial = reinterpret_cast<float*>(staged + split.panel * split.lanes * P::kPitch);

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * split.rows_per_block;
  const int64_t left = args.n - first_row, row_bytes = args.k / F::kElems * F::kBytes;
  const int rows = left < split.rows_per_block ? static_cast<int>(left) : split.rows_per_block;
  const int item_rows = P::kDepth * split.rows, chunks = (rows + item_rows - 1) / item_rows;
  const int row_in_item = lane >> split.log2_lanes, span = lane & (split.lanes - 1);
  const int slice_bytes = split.lanes * P::kSpanBytes, slot_bytes = (slice_bytes + 30) / 16 * 16;
  // Items go round the warps, slice by slice.
  struct Item {
    int slice, chunk;
  };
  const auto settle = [&](Item& item) {
    while (item.chunk >= chunks) item.chunk -= chunks, ++item.slice;
  };

  // Copies go from and to multiples of 16 bytes; the lanes of a row copy its piece.
  const uint8_t *const w_end = args.w + args.n * row_bytes, *const w_block = args.w + first_row * row_bytes;
  Arrivals arrivals(barriers + warp * P::kStages, P::kStages, item_rows, lane);
  Item ahead{0, warp};
  settle(ahead);
  const auto fetch = [&](int stage) {
    if (ahead.slice < split.slices) {
      const int64_t at = static_cast<int64_t>(ahead.slice) * slice_bytes, rest = row_bytes - at;
#pragma unroll 1
      for (int r = 0; r < P::kDepth; ++r) {
        const int row = ahead.chunk * item_rows + r * split.rows + row_in_item;
        const uint8_t* const piece = w_block + row * row_bytes + at;
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(piece) & 15),
                  last = shift + static_cast<int>(rest < slice_bytes ? rest : slice_bytes);
        const uint8_t* const from = piece - shift;
        uint8_t* const to = ring + stage * P::kItemBytes + r * P::kPieceBytes + row_in_item * slot_bytes;
        int bytes = row < rows ? (last + 15) & ~15 : 0;
        if (row < rows && bytes > w_end - from) {  // w ends inside the last 16
          bytes = static_cast<int>(w_end - from) & ~15;
          for (int i = bytes + span; i < last; i += split.lanes) to[i] = from[i];
        }
        arrivals.start(stage, shared_address(to), from, bytes, span, split.lanes);
      }
      ahead.chunk += warps;
      settle(ahead);
    }
    arrivals.close();
  };
  fill_table<F, Tabled>(shared);
  const LaneTable<F, Tabled> table(shared, lane);
  // What quantises activations writes no weights, any other kernel before this one may have done so.
  const int most = split.panel * split.lanes * P::kSpan;  // activations of a panel
  Rounding<F, Tokens, Tabled> rounding;
  if constexpr (P::kFolds) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    rounding.ask(args, 0, args.k < most ? static_cast<int>(args.k) : most);
  }
#pragma unroll 1
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s);
  if constexpr (!P::kFolds) wait_for_previous_kernel();
  int stage = 0;
  Item item{0, warp};
  settle(item);
#pragma unroll 1
  for (int first_slice = 0; first_slice < split.slices; first_slice += split.panel) {
    const int64_t first = static_cast<int64_t>(first_slice) * split.lanes * P::kSpan, rest = args.k - first;
    const int count = rest < most ? static_cast<int>(rest) : most;
    if (first_slice > 0) {
      __syncthreads();  // the previous panel's activations were used
      if constexpr (P::kFolds) rounding.ask(args, first, count);
    }
    if constexpr (P::kFolds)
      rounding.stage(staged, args, first, count);
    else
      stage_activations<F, Tokens, Tabled>(staged, args, first, count);
    __syncthreads();
    const int end = first_slice + split.panel < split.slices ? first_slice + split.panel : split.slices;
#pragma unroll 1
    for (; item.slice < end; item.chunk += warps, settle(item)) {
      arrivals.wait<P::kStages>(stage);  // and all lanes have used the previous item's bytes
      fetch(stage == 0 ? P::kStages - 1 : stage - 1);

      const int slice = item.slice - first_slice;
      const int row = item.chunk * item_rows + row_in_item;
      const uint8_t* const slot = ring + stage * P::kItemBytes + span * P::kSpanBytes;
      const auto place = [&](int of_row) {  // modulo 16
        return (static_cast<uint32_t>(first_row + of_row) * static_cast<uint32_t>(row_bytes) +
                static_cast<uint32_t>(item.slice) * static_cast<uint32_t>(slice_bytes)) %
               16;
      };
      Window<P::kSpanBytes> windows[P::kDepth];
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r)
        windows[r].load(slot + place(row + r * split.rows) + row_in_item * slot_bytes + r * P::kPieceBytes);
      const int inside = count - (slice * split.lanes + span) * P::kSpan;
      float sums[P::kDepth][Tokens] = {};
      multiply_span<F, Tokens, Tabled>(sums, windows, staged + (slice * split.lanes + span) * P::kPitch,
                                       inside < P::kSpan ? inside / kGroup : P::kGroups, table);
#pragma unroll
      for (int bit = P::kMostLanes / 2; bit > 0; bit /= 2)
        if (bit < split.lanes)
#pragma unroll
          for (int i = 0; i < P::kDepth * Tokens; ++i) {
            float& sum = sums[i / Tokens][i % Tokens];
            sum += __shfl_xor_sync(~0u, sum, bit);
          }
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r) {
        if (span != 0 || row + r * split.rows >= rows) continue;
        float* to = partial + (slice * rows + row + r * split.rows) * Tokens;
#pragma unroll
        for (int t = 0; t < Tokens; ++t) to[t] = first_slice == 0 ? sums[r][t] : to[t] + sums[r][t];
      }
      stage = stage + 1 == P::kStages ? 0 : stage + 1;
    }
  }
  __syncthreads();

  const int parts = split.slices < split.panel ? split.slices : split.panel;
#pragma unroll 1
  for (int token = 0; token < static_cast<int>(args.m); ++token)
#pragma unroll 1
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      float sum = 0;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) sum += partial[(part * rows + row) * Tokens + token];
      store_real(args.y, token * args.n + first_row + row, sum, args.type);
    }
}

template <BlockFormat F, int Tokens, bool Tabled>
cudaError_t launch(const GemmArgs& args, const Device& device, cudaStream_t stream) {
  using P = Plan<F, Tokens, Tabled>;
  if constexpr (Tokens == 1 && Tabled == kHasTable<F>)
    if (fits_one_slice<F, Tabled>(args, device)) return launch_one_slice<F, Tabled>(args, device, stream);
  const int shared = device.shared_per_block - kReserved;
  const Slices of_row = slices_of<P>(args.k);
  Split split{};
  split.lanes = of_row.lanes, split.slices = of_row.count;
  split.log2_lanes = std::countr_zero(static_cast<unsigned>(split.lanes));
  split.rows = 32 / split.lanes;

  int warps = P::kWarps;
  const int most_bytes = Tokens == 1 ? shared / 8 * 7 : shared / 4 * 3;
  while (warps > 1 && LaneTable<F, Tabled>::kBytes + warps * P::kStages * P::kItemBytes > most_bytes)
    warps /= 2;
  int bytes = LaneTable<F, Tabled>::kBytes + warps * P::kStages * P::kItemBytes + kSlack;
  // Of what is left, two thirds for activations, the rest for partial sums: one block for each
  // multiprocessor, or as many waves of blocks as the partial sums need.
  const int most_slices = (shared - bytes) * 2 / 3 / (split.lanes * P::kPitch);
  split.panel = most_slices < 1 ? 1 : most_slices < kMostSlices ? most_slices : kMostSlices;
  if (split.slices < split.panel) split.panel = split.slices;
  bytes += split.panel * split.lanes * P::kPitch;
  const int row_bytes = split.panel * Tokens * static_cast<int>(sizeof(float));
  const int64_t most_rows = (shared - bytes) / row_bytes * device.multiprocessors;
  const int64_t blocks = (args.n + most_rows - 1) / most_rows * device.multiprocessors;
  split.rows_per_block = static_cast<int>((args.n + blocks - 1) / blocks);
  bytes += split.rows_per_block * row_bytes;

  const auto kernel = few_tokens_kernel<F, Tokens, Tabled>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // The first weights are on their way while the launch before this one still quantises activations
  // (it must not write w): the kernel waits for that launch before it reads them.
  const auto grid = static_cast<unsigned>((args.n + split.rows_per_block - 1) / split.rows_per_block);
  const DependentLaunch launch(grid, 32 * warps, device, stream, bytes);
  return cudaLaunchKernelEx(&launch.config, kernel, args, split);
}

// Where tables leave half of the shared memory, or enough for the rings of eight warps.
template <BlockFormat F>
bool has_room_for_table(const Device& device) {
  using P = Plan<F, 1, true>;
  const int shared = device.shared_per_block - kReserved, table = LaneTable<F, true>::kBytes;
  return 2 * table <= shared || table + 8 * P::kStages * P::kItemBytes <= shared / 8 * 7;
}

// m up to Tokens.
template <int Tokens>
cudaError_t launch_few_tokens(const GemmArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (kServes<F>) {
      if constexpr (Tokens == 1 && kHasTable<F>)
        if (has_room_for_table<F>(device)) {
          status = launch<F, Tokens, true>(args, device, stream);
          return;
        }
      status = launch<F, Tokens, false>(args, device, stream);
    }
  });
  return status;
}

}  // namespace quantgemm::dp4a
