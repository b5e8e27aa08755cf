// SPDX-License-Identifier: MIT
// y[m, n] for few tokens: every weight is read once, at the speed of DRAM, in its native layout.
// A thread block owns a run of rows. Its warps stream pieces of rows through rings of their own in
// shared memory, since blocks of 18 or 210 bytes allow no wide load from DRAM; then a lane takes
// kSpan neighbouring weights to registers, where every shift and field offset is a constant, and
// multiplies them with all tokens, whose activations lie in shared memory beside the sums they need.
// Limits: DRAM at one token, from about four on integer arithmetic.
#pragma once
#include <bit>

#include "gemm_3_dp4a_stream.cuh"

namespace quantgemm::dp4a {

constexpr int kSlack = 16;       // bytes behind the rings: a window may read one word more
constexpr int kReserved = 1024;  // for barriers, and what the system takes
constexpr int kMostSlices = 16;  // of a panel

template <BlockFormat F, int Tokens>
struct Plan {
  // Weights a lane takes at a time: long spans for one token, to spread what a step costs besides.
  static constexpr int spans_of(int elems) {
    return F::kElems < elems ? elems / F::kElems * F::kElems : F::kElems;
  }
  static constexpr bool kLong = Tokens <= 2 && spans_of(256) / F::kElems * F::kBytes <= 160;
  static constexpr int kSpan = spans_of(kLong ? 256 : 128), kSpanBytes = kSpan / F::kElems * F::kBytes;
  static constexpr int kGroups = kSpan / kGroup;
  static constexpr int kFewestLanes = 4, kMostLanes = 16;  // of a row
  // Rows a lane takes at a time: two share what is loaded of many tokens' activations.
  static constexpr int kDepth = Tokens >= 4 && kSpanBytes <= 150 ? 2 : 1;
  static constexpr int kPieceBytes = 32 * kSpanBytes + 32 / kFewestLanes * 32,
                       kItemBytes = kDepth * kPieceBytes;
  static constexpr int kWarps = kItemBytes <= 5120 && Tokens < 8 ? 16 : kItemBytes <= 7168 ? 12 : 8;
  static constexpr int kFits = 160 * 1024 / (kWarps * kItemBytes), kStages = kFits < 2   ? 2
                                                                             : kFits < 4 ? kFits
                                                                                         : 4;
  // Of a span in shared memory, per token: the codes, and per group a record of the scale, the
  // accumulator's first value (or one per part) and the sum of activations (or one per part).
  static constexpr int kGroupParts = kGroup / kPart<F>;
  static constexpr int kStarts = kZeroOf<F> != 0 ? kGroupParts : 0, kSums = F::kOffset ? kGroupParts : 0;
  static constexpr int kRecord = 4 * static_cast<int>(std::bit_ceil(1u + kStarts + kSums));
  static constexpr int kTokenBytes = (kSpan + kGroups * kRecord + 15) / 16 * 16;
  static constexpr int kPitch = (Tokens * kTokenBytes / 16 | 1) * 16;  // odd, against bank conflicts
};

// How a warp's lanes share an item: `rows` of them, each by `lanes` spans, which make a slice.
struct Split {
  int rows_per_block, slices, panel;  // a panel: slices whose activations fit in shared memory
  int lanes, log2_lanes, rows;        // lanes · rows = 32, and that as often as Plan::kDepth
  int64_t safe_rows;                  // so far before w's end that 16-byte copies stay inside
};

// Activations of k from `first` on, `count` values, into shared memory as Plan says.
template <BlockFormat F, int Tokens>
__device__ __forceinline__ void stage_activations(uint8_t* staged, const GemmArgs& args, int64_t first,
                                                  int count) {
  using P = Plan<F, Tokens>;
  const int pieces = count / 16;  // two to a group, of two neighbouring lanes
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int tokens = static_cast<int>(args.m), teams = tokens < warps ? tokens : warps,
            team_warps = warps / teams;
  if (warp >= teams * team_warps) return;
#pragma unroll 1
  for (int token = warp % teams; token < tokens; token += teams) {
    const uint8_t* row = args.activations + token * ActivationRow::bytes(args.k);
    const auto* scales =
        reinterpret_cast<const float2*>(row + ActivationRow::scales_offset(args.k)) + first / kGroup;
#pragma unroll 4
    for (int v = warp / teams * 32 + lane; v - lane < pieces; v += team_warps * 32) {
      const int piece = v < pieces ? v : 0, group = piece / 2;
      const uint4 words = reinterpret_cast<const uint4*>(row + first)[piece];
      const float scale = scales[group].x;
      int mine = dot4(words.x, 0x01010101u, dot4(words.y, 0x01010101u, 0));
      mine = dot4(words.z, 0x01010101u, dot4(words.w, 0x01010101u, mine));
      const int other = __shfl_xor_sync(~0u, mine, 1);
      if (v >= pieces) continue;
      uint8_t* span = staged + group / P::kGroups * P::kPitch + token * P::kTokenBytes;
      *reinterpret_cast<uint4*>(span + piece % (2 * P::kGroups) * 16) = words;
      auto* record = reinterpret_cast<uint32_t*>(span + P::kSpan + group % P::kGroups * P::kRecord);
      const int part = P::kGroupParts == 2 ? v % 2 : 0, integers = P::kGroupParts == 2 ? mine : mine + other;
      record[0] = __float_as_uint(scale);
      if constexpr (P::kStarts > 0) record[1 + part] = kMagicBits - kZeroOf<F> * integers;
      if constexpr (P::kSums > 0)
        record[1 + P::kStarts + part] = __float_as_uint(scale * static_cast<float>(integers));
    }
  }
}

// sums[r][t] += weights of window r · token t, for the span's first `groups` groups.
template <BlockFormat F, int Tokens>
__device__ __forceinline__ void multiply_span(
    float (&sums)[Plan<F, Tokens>::kDepth][Tokens],
    const Window<Plan<F, Tokens>::kSpanBytes> (&windows)[Plan<F, Tokens>::kDepth], const uint8_t* x,
    int groups) {
  using P = Plan<F, Tokens>;
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
          for (int j = 0; j < 4; ++j) codes[r][j] = codes_of<F>(windows[r].bytes + at, (within + v) / 4 + j);
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

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Block b owns rows b · rows_per_block …; panel by panel, its warps share the items, slice by slice,
// evenly. Partial sums lie in shared memory, [slices of a panel][rows][Tokens].
template <BlockFormat F, int Tokens>
__global__ void __launch_bounds__(32 * Plan<F, Tokens>::kWarps, 1)
    few_tokens_kernel(const GemmArgs args, const Split split) {
  using P = Plan<F, Tokens>;
  extern __shared__ uint4 shared[];
  __shared__ uint64_t barriers[P::kWarps * P::kStages];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint8_t* const ring = reinterpret_cast<uint8_t*>(shared) + warp * (P::kStages * P::kItemBytes);
  uint8_t* const staged = reinterpret_cast<uint8_t*>(shared) + warps * (P::kStages * P::kItemBytes) + kSlack;
  float* const partial = reinterpret_cast<float*>(staged + split.panel * split.lanes * P::kPitch);

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * split.rows_per_block;
  const int64_t left = args.n - first_row, row_bytes = args.k / F::kElems * F::kBytes;
  const int rows = left < split.rows_per_block ? static_cast<int>(left) : split.rows_per_block;
  const int item_rows = P::kDepth * split.rows, chunks = (rows + item_rows - 1) / item_rows;
  const int panels = (split.slices + split.panel - 1) / split.panel;
  const int row_in_item = lane >> split.log2_lanes, span = lane & (split.lanes - 1);
  const int slice_bytes = split.lanes * P::kSpanBytes;
  uint8_t* const slot = ring + row_in_item * ((slice_bytes + 30) / 16 * 16);
  const auto items_before = [&](int panel, int w) {  // items of the panel that are not for warp w or above
    const int slices = split.slices - panel * split.panel;
    return chunks * (slices < split.panel ? slices : split.panel) * w / warps;
  };

  // The lanes of a row copy its piece, from and to multiples of 16 bytes.
  const uint8_t* const w_end = args.w + args.n * row_bytes;
  const int64_t piece_step = split.rows * row_bytes, safe = split.safe_rows - first_row;
  const int safe_rows = safe < rows ? static_cast<int>(safe) : rows;
  int panel = -1, ahead = 0, until_slice = 0, next_slice = 0, next_row = 0, piece = 0;
  const uint8_t* next = nullptr;
  const auto enter_slice = [&](int slice, int chunk) {
    next_slice = slice, next_row = chunk * item_rows + row_in_item, until_slice = chunks - chunk;
    const int64_t at = static_cast<int64_t>(slice) * slice_bytes, rest = row_bytes - at;
    piece = rest < slice_bytes ? static_cast<int>(rest) : slice_bytes;
    next = args.w + (first_row + next_row) * row_bytes + at;
  };
  Arrivals arrivals(barriers + warp * P::kStages, P::kStages, item_rows, lane);
  const auto fetch = [&](int stage) {
    while (ahead == 0 && panel + 1 < panels) {
      const int begin = items_before(++panel, warp);
      ahead = items_before(panel, warp + 1) - begin;
      enter_slice(panel * split.panel + begin / chunks, begin % chunks);
    }
    if (ahead > 0) {
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r) {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(next) & 15), last = shift + piece;
        const uint8_t* const from = next - shift;
        uint8_t* const to = slot + stage * P::kItemBytes + r * P::kPieceBytes;
        int bytes = next_row < rows ? (last + 15) & ~15 : 0;
        if (next_row >= safe_rows && next_row < rows && bytes > w_end - from) {  // w ends inside the last 16
          bytes = static_cast<int>(w_end - from) & ~15;
          for (int i = bytes + span; i < last; i += split.lanes) to[i] = from[i];
        }
        arrivals.start(stage, shared_address(to), from, bytes, span, split.lanes);
        next_row += split.rows, next += piece_step;
      }
      --ahead;
      if (--until_slice == 0) enter_slice(next_slice + 1, 0);
    }
    arrivals.close();
  };
#pragma unroll 1
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s);

  wait_for_previous_kernel();
  int stage = 0;
#pragma unroll 1
  for (int first_slice = 0; first_slice < split.slices; first_slice += split.panel) {
    const int64_t first = static_cast<int64_t>(first_slice) * split.lanes * P::kSpan, rest = args.k - first;
    const int most = split.panel * split.lanes * P::kSpan,
              count = rest < most ? static_cast<int>(rest) : most;
    __syncthreads();  // the previous panel's activations were used
    stage_activations<F, Tokens>(staged, args, first, count);
    __syncthreads();
    int item = items_before(first_slice / split.panel, warp);
    const int end = items_before(first_slice / split.panel, warp + 1);
    int slice = item / chunks, chunk = item % chunks;
#pragma unroll 1
    for (; item < end; ++item) {
      arrivals.wait<P::kStages>(stage);  // and all lanes have used the previous item's bytes
      fetch(stage == 0 ? P::kStages - 1 : stage - 1);

      const int row = chunk * item_rows + row_in_item;
      const uint32_t low = static_cast<uint32_t>(first_row + row) * static_cast<uint32_t>(row_bytes) +
                           static_cast<uint32_t>(first_slice + slice) * static_cast<uint32_t>(slice_bytes);
      const uint8_t* const bytes = slot + stage * P::kItemBytes + span * P::kSpanBytes;
      Window<P::kSpanBytes> windows[P::kDepth];
#pragma unroll
      for (int r = 0; r < P::kDepth; ++r)
        windows[r].load(bytes + r * P::kPieceBytes + (low + r * static_cast<uint32_t>(piece_step)) % 16);
      const int inside = count - (slice * split.lanes + span) * P::kSpan;
      float sums[P::kDepth][Tokens] = {};
      multiply_span<F, Tokens>(sums, windows, staged + (slice * split.lanes + span) * P::kPitch,
                               inside < P::kSpan ? inside / kGroup : P::kGroups);
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
      if (++chunk == chunks) chunk = 0, ++slice;
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

struct Device {
  int sms, shared, major;
};

inline cudaError_t describe(Device& device) {
  int id = 0;
  cudaError_t status = cudaGetDevice(&id);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, id);
  };
  ask(device.sms, cudaDevAttrMultiProcessorCount);
  ask(device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(device.major, cudaDevAttrComputeCapabilityMajor);
  device.shared -= kReserved;
  return status;
}

template <BlockFormat F, int Tokens>
cudaError_t launch(const GemmArgs& args, const Device& device, cudaStream_t stream) {
  using P = Plan<F, Tokens>;
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
  while (warps > 1 && warps * P::kStages * P::kItemBytes > device.shared * 3 / 4) warps /= 2;
  int bytes = warps * P::kStages * P::kItemBytes + kSlack;
  // Of what is left, two thirds for activations, the rest for partial sums: one block for each
  // multiprocessor, or as many waves of blocks as the partial sums need.
  const int most_slices = (device.shared - bytes) * 2 / 3 / (split.lanes * P::kPitch);
  split.panel = most_slices < 1 ? 1 : most_slices < kMostSlices ? most_slices : kMostSlices;
  if (split.slices < split.panel) split.panel = split.slices;
  bytes += split.panel * split.lanes * P::kPitch;
  const int row_bytes = split.panel * Tokens * static_cast<int>(sizeof(float));
  const int64_t most_rows = (device.shared - bytes) / row_bytes * device.sms;
  const int64_t blocks = (args.n + most_rows - 1) / most_rows * device.sms;
  split.rows_per_block = static_cast<int>((args.n + blocks - 1) / blocks);
  bytes += split.rows_per_block * row_bytes;

  const auto kernel = few_tokens_kernel<F, Tokens>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>((args.n + split.rows_per_block - 1) / split.rows_per_block);
  config.blockDim = 32 * warps;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  // The first weights are on their way while the launch before this one still quantises activations
  // (it must not write w): the kernel waits for that launch before it reads them.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = device.major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args, split);
}

// m up to Tokens.
template <int Tokens>
cudaError_t launch_few_tokens(const GemmArgs& args, cudaStream_t stream) {
  Device device{};
  cudaError_t status = describe(device);
  if (status != cudaSuccess) return status;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (kServes<F>) status = launch<F, Tokens>(args, device, stream);
  });
  return status;
}

}  // namespace quantgemm::dp4a
