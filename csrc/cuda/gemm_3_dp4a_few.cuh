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
  int64_t safe_rows;                  // so far before w's end that 16-byte copies stay inside
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
      int dots[P::kDepth][Tokens];
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r)
#pragma unroll
        for (int t = 0; t < Tokens; ++t)
          dots[r][t] = P::kStarts > 0 ? static_cast<int>(records[t][1 + p]) : kMagicBits;
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
            dots[r][t] = dot4(codes[r][0], a.x, dots[r][t]);
            dots[r][t] = dot4(codes[r][1], a.y, dots[r][t]);
            dots[r][t] = dot4(codes[r][2], a.z, dots[r][t]);
            dots[r][t] = dot4(codes[r][3], a.w, dots[r][t]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r) {
        const Affine affine = F::affine(windows[r].bytes + at, within / F::kGroup);
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
          added[r][t] +=
              affine.scale * __uint_as_float(records[t][0]) * (__int_as_float(dots[r][t]) - kMagic);
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
// evenly. Partial sums lie in shared memory, [slices of a panel][rows][Tokens].
template <BlockFormat F, int Tokens, bool Tabled>
__global__ void __launch_bounds__(32 * Plan<F, Tokens, Tabled>::kWarps, 1)
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
  const int slice_bytes = split.lanes * P::kSpanBytes;
  uint8_t* const slot = ring + row_in_item * ((slice_bytes + 30) / 16 * 16);
  // Items go round the warps, slice by slice.
  struct Item {
    int slice, chunk;
  };
  const auto settle = [&](Item& item) {
    while (item.chunk >= chunks) item.chunk -= chunks, ++item.slice;
  };

  // The lanes of a row copy its piece, from and to multiples of 16 bytes.
  const uint8_t *const w_end = args.w + args.n * row_bytes, *const w_block = args.w + first_row * row_bytes;
  const int64_t piece_step = split.rows * row_bytes, safe = split.safe_rows - first_row;
  const int safe_rows = safe < rows ? static_cast<int>(safe) : rows;
  Arrivals arrivals(barriers + warp * P::kStages, P::kStages, item_rows, lane);
  Item ahead{0, warp};
  settle(ahead);
  const auto fetch = [&](int stage) {
    if (ahead.slice < split.slices) {
      const int64_t at = static_cast<int64_t>(ahead.slice) * slice_bytes, rest = row_bytes - at;
      const int piece = rest < slice_bytes ? static_cast<int>(rest) : slice_bytes;
      int row = ahead.chunk * item_rows + row_in_item;
      const uint8_t* next = w_block + row * row_bytes + at;
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r) {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(next) & 15), last = shift + piece;
        const uint8_t* const from = next - shift;
        uint8_t* const to = slot + stage * P::kItemBytes + r * P::kPieceBytes;
        int bytes = row < rows ? (last + 15) & ~15 : 0;
        if (row >= safe_rows && row < rows && bytes > w_end - from) {  // w ends inside the last 16
          bytes = static_cast<int>(w_end - from) & ~15;
          for (int i = bytes + span; i < last; i += split.lanes) to[i] = from[i];
        }
        arrivals.start(stage, shared_address(to), from, bytes, span, split.lanes);
        row += split.rows, next += piece_step;
      }
      ahead.chunk += warps;
      settle(ahead);
    }
    arrivals.close();
  };
  LaneTable<F, Tabled>::fill(shared);
  const LaneTable<F, Tabled> table(shared, lane);
  // What quantises activations writes no weights, any other kernel before this one may have done so.
  if (P::kFolds) {
    let_next_kernel_start();
    wait_for_previous_kernel();
  }
#pragma unroll 1
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s);
  if (!P::kFolds) wait_for_previous_kernel();
  int stage = 0;
  Item item{0, warp};
  settle(item);
#pragma unroll 1
  for (int first_slice = 0; first_slice < split.slices; first_slice += split.panel) {
    const int64_t first = static_cast<int64_t>(first_slice) * split.lanes * P::kSpan, rest = args.k - first;
    const int most = split.panel * split.lanes * P::kSpan,
              count = rest < most ? static_cast<int>(rest) : most;
    __syncthreads();  // the previous panel's activations were used
    dp4a::stage<F, Tokens, Tabled>(staged, args, first, count);
    __syncthreads();
    const int end = first_slice + split.panel < split.slices ? first_slice + split.panel : split.slices;
#pragma unroll 1
    for (; item.slice < end; item.chunk += warps, settle(item)) {
      arrivals.wait<P::kStages>(stage);  // and all lanes have used the previous item's bytes
      fetch(stage == 0 ? P::kStages - 1 : stage - 1);

      const int slice = item.slice - first_slice;
      const int row = item.chunk * item_rows + row_in_item;
      const uint32_t low = static_cast<uint32_t>(first_row + row) * static_cast<uint32_t>(row_bytes) +
                           static_cast<uint32_t>(item.slice) * static_cast<uint32_t>(slice_bytes);
      const uint8_t* const bytes = slot + stage * P::kItemBytes + span * P::kSpanBytes;
      Window<P::kSpanBytes> windows[P::kDepth];
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r)
        windows[r].load(bytes + r * P::kPieceBytes + (low + r * static_cast<uint32_t>(piece_step)) % 16);
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
  const int64_t w_row_bytes = args.k / F::kElems * F::kBytes;
  split.safe_rows = (args.n * w_row_bytes - 15) / w_row_bytes;

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
