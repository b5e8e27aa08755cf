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
#include "gemm_3_dp4a_staging.cuh"

namespace quantgemm::dp4a {

// How a warp's lanes share an item: `rows` of them, each by `lanes` spans, which make a slice.
struct Split {
  int rows_per_block, slices, panel;  // a panel: slices whose activations fit in shared memory
  int lanes, log2_lanes, rows;        // lanes · rows = 32, and that as often as Plan::kDepth
};

// sums[r][t] += weights of window r · token t, for the span's first `groups` groups.
template <BlockFormat F, int Tokens, bool Tabled>
__device__ __forceinline__ void multiply_span(
    float (&sums)[Plan<F, Tokens, Tabled>::kDepth][Tokens],
    const Window<Plan<F, Tokens, Tabled>::kSpanBytes> (&windows)[Plan<F, Tokens, Tabled>::kDepth],
    const uint8_t* x, int groups, const LaneTable<F, Tabled>& table) {
  using P = Plan<F, Tokens, Tabled>;
  constexpr bool kWhole = F::kElems == P::kSpan;  // spans are inside the row or outside
#pragma unroll
  for (int g = 0; g < P::kGroups; ++g) {
    uint32_t records[Tokens][P::kRecord / 4];
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
      memcpy(records[t],
             __builtin_assume_aligned(x + t * P::kTokenBytes + P::kSpan + g * P::kRecord, P::kRecord),
             P::kRecord);
    float added[P::kDepth][Tokens] = {};
#pragma unroll
    for (int p = 0; p < P::kGroupParts; ++p) {
      const int e = g * kGroup + p * kPart<F>, within = e % F::kElems, at = e / F::kElems * F::kBytes;
      constexpr int kPlanes = P::kPlanes.count, kLast = kPlanes - 1;
      int dots[P::kDepth][Tokens][kPlanes] = {};
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          int& start = dots[r][t][kLast];
          start = P::kStarts > 0 ? static_cast<int>(records[t][1 + p]) : kMagicBits;
          if constexpr (P::kHalves)
            start = __dp2a_lo(start, static_cast<int>(F::zeros(windows[r].bytes + at, within / kPart<F>)),
                              kMagicBits);
        }
#pragma unroll
      for (int v = 0; v < kPart<F>; v += 16) {
        uint32_t codes[P::kDepth][4];
#pragma unroll
        for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            codes[r][j] =
                few_codes<F, P::kStrided, Tabled>(windows[r].bytes + at, (within + v) / 4 + j, table);
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          const uint4 a = *reinterpret_cast<const uint4*>(x + t * P::kTokenBytes + e + v);
#pragma unroll
          for (int r = 0; r < P::kDepth; ++r) {
            int (&planes)[kPlanes] = dots[r][t];
            planes[0] = dot4(codes[r][0], a.x, planes[0]);
            planes[1 % kPlanes] = dot4(codes[r][1], a.y, planes[1 % kPlanes]);
            planes[2 % kPlanes] = dot4(codes[r][2], a.z, planes[2 % kPlanes]);
            planes[3 % kPlanes] = dot4(codes[r][3], a.w, planes[3 % kPlanes]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r) {
        const Affine affine = F::affine(windows[r].bytes + at, within / F::kGroup);
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          int dot = dots[r][t][0];
#pragma unroll
          for (int plane = 1; plane < kPlanes; ++plane) dot = (dot << P::kPlanes.bits) + dots[r][t][plane];
          added[r][t] += affine.scale * __uint_as_float(records[t][0]) * (__int_as_float(dot) - kMagic);
          if constexpr (F::kOffset)
            added[r][t] += affine.offset * __uint_as_float(records[t][1 + P::kStarts + p]);
        }
      }
    }
    const bool inside = kWhole || g < groups;  // bytes behind the row's end may decode to NaN
#pragma unroll
    for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
      for (int t = 0; t < Tokens; ++t) sums[r][t] = inside ? sums[r][t] + added[r][t] : sums[r][t];
  }
#pragma unroll
  for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
    for (int t = 0; t < Tokens; ++t) sums[r][t] = groups > 0 ? sums[r][t] : 0.0f;
}

// Block b owns rows b · rows_per_block …; panel by panel, its warps share the items, slice by slice,
// evenly. Partial sums lie in shared memory, [slices of a panel][rows][Tokens]; a single token's rows that
// are one slice have none.
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

  // Copies go from and to multiples of 16 bytes. Where a slice is a whole row, an item's rows are neighbours
  // and one copy brings them; else the lanes of a row copy its piece.
  const bool whole = Tokens == 1 && split.slices == 1;
  const int copies = whole ? 1 : P::kDepth, copy_row = whole ? 0 : row_in_item,
            copy_lane = whole ? lane : span, copy_lanes = whole ? 32 : split.lanes;
  const uint8_t *const w_end = args.w + args.n * row_bytes, *const w_block = args.w + first_row * row_bytes;
  Arrivals arrivals(barriers + warp * P::kStages, P::kStages, whole ? 1 : item_rows, lane);
  Item ahead{0, warp};
  settle(ahead);
  const auto fetch = [&](int stage) {
    if (ahead.slice < split.slices) {
      const int64_t at = static_cast<int64_t>(ahead.slice) * slice_bytes, rest = row_bytes - at;
#pragma unroll 1
      for (int r = 0; r < copies; ++r) {
        const int row = ahead.chunk * item_rows + r * split.rows + copy_row, below = rows - row;
        const uint8_t* const piece = w_block + row * row_bytes + at;
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(piece) & 15),
                  length = whole ? (below < item_rows ? below : item_rows) * static_cast<int>(row_bytes)
                                 : static_cast<int>(rest < slice_bytes ? rest : slice_bytes),
                  last = shift + length;
        const uint8_t* const from = piece - shift;
        uint8_t* const to = ring + stage * P::kItemBytes + r * P::kPieceBytes + copy_row * slot_bytes;
        int bytes = below > 0 ? (last + 15) & ~15 : 0;
        if (below > 0 && bytes > w_end - from) {  // w ends inside the last 16
          bytes = static_cast<int>(w_end - from) & ~15;
          for (int i = bytes + copy_lane; i < last; i += copy_lanes) to[i] = from[i];
        }
        arrivals.start(stage, shared_address(to), from, bytes, copy_lane, copy_lanes);
      }
      ahead.chunk += warps;
      settle(ahead);
    }
    arrivals.close();
  };
  // A block that begins while the kernel before is busy has the L2 fetch its weights meanwhile.
  if (P::kBlocks > 1 && whole && lane == 0) {
#pragma unroll 1
    for (int s = 0, chunk = warp; s < P::kStages && chunk < chunks; ++s, chunk += warps) {
      const int row = chunk * item_rows, below = rows - row;
      const uint8_t* const from = w_block + row * row_bytes;
      const auto shift = reinterpret_cast<uintptr_t>(from) & 15;
      const auto bytes = static_cast<int>((below < item_rows ? below : item_rows) * row_bytes + shift);
      prefetch_to_l2(from - shift, bytes & ~15);
    }
  }
  if (P::kFolds) let_next_kernel_start();
  LaneTable<F, Tabled>::fill(shared);
  const LaneTable<F, Tabled> table(shared, lane);
  // What quantises activations writes no weights, any other kernel before this one may have done so.
  const int most = split.panel * split.lanes * P::kSpan;  // activations of a panel
  Rounding<F, Tokens, Tabled> rounding;
  if constexpr (P::kFolds) {
    wait_for_previous_kernel();
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
        windows[r].load(whole ? slot + place(item.chunk * item_rows) +
                                    (row_in_item + r * split.rows) * static_cast<int>(row_bytes)
                              : slot + place(row + r * split.rows) + row_in_item * slot_bytes +
                                    r * P::kPieceBytes);
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
        if (whole) {
#pragma unroll
          for (int t = 0; t < Tokens; ++t)
            if (t < args.m)
              store_real(args.y, t * args.n + first_row + row + r * split.rows, sums[r][t], args.type);
          continue;
        }
        float* to = partial + (slice * rows + row + r * split.rows) * Tokens;
#pragma unroll
        for (int t = 0; t < Tokens; ++t) to[t] = first_slice == 0 ? sums[r][t] : to[t] + sums[r][t];
      }
      stage = stage + 1 == P::kStages ? 0 : stage + 1;
    }
  }
  if (whole) return;
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
  const int shared = device.shared_per_block - kReserved;
  Split split{};
  // As many lanes to a row as leave fewest of them without weights.
  const int64_t spans = (args.k + P::kSpan - 1) / P::kSpan;
  int64_t fewest = -1;
  for (int lanes = P::kMostLanes; lanes >= P::kFewestLanes; lanes /= 2) {
    const int64_t slices = (spans + lanes - 1) / lanes;
    if (fewest >= 0 && slices * lanes >= fewest) continue;
    fewest = slices * lanes, split.lanes = lanes, split.slices = static_cast<int>(slices);
  }
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

// m up to Tokens.
template <int Tokens>
cudaError_t launch_few_tokens(const GemmArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (kServes<F>) {
      if constexpr (Tokens == 1 && TableFormat<F>)
        if (2 * LaneTable<F, true>::kBytes <= device.shared_per_block - kReserved) {
          status = launch<F, Tokens, true>(args, device, stream);
          return;
        }
      status = launch<F, Tokens, false>(args, device, stream);
    }
  });
  return status;
}

}  // namespace quantgemm::dp4a
