// SPDX-License-Identifier: MIT
// What the few-token kernel keeps in shared memory: its plan, and activations as a lane wants them,
// the codes of a span beside the sums they need. A single token it quantises itself, in every block.
#pragma once
#include <bit>

#include "activation_group.cuh"
#include "gemm_3_dp4a_stream.cuh"
#include "gemm_3_dp4a_table.cuh"

namespace quantgemm::dp4a {

constexpr int kSlack = 16;       // bytes behind the rings: a window may read one word more
constexpr int kReserved = 1024;  // for barriers, and what the system takes
constexpr int kMostSlices = 16;  // of a panel

template <BlockFormat F, int Tokens, bool Tabled>
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
  static constexpr int kDepth =
      (Tokens >= 4 && kSpanBytes <= 150) || (Tokens == 1 && kSpanBytes <= 72) ? 2 : 1;
  static constexpr int kPieceBytes = 32 * kSpanBytes + 32 / kFewestLanes * 32,
                       kItemBytes = kDepth * kPieceBytes;
  static constexpr int kWarps = kItemBytes <= 5120 && Tokens < 8 ? 16 : kItemBytes <= 7168 ? 12 : 8;
  // Blocks that a multiprocessor can hold: of two the second may be the next kernel's, and begin early.
  static constexpr int kBlocks = Tokens == 1 && !Tabled && kSpanBytes <= 40 ? 2 : 1;
  static constexpr int kFits = ((kBlocks > 1 ? 90 : 160) * 1024 - LaneTable<F, Tabled>::kBytes) /
                               (kWarps * kItemBytes),
                       kStages = kFits < 2   ? 2
                                 : kFits < 4 ? kFits
                                             : 4;
  // Of a span in shared memory, per token: the codes, and per group a record of the scale, the
  // accumulator's first value (or one per part) and the sum of activations (or one per part).
  static constexpr int kGroupParts = kGroup / kPart<F>;
  static constexpr bool kFolds = Tokens <= kRoundedInside, kStrided = kFolds && StridedFormat<F>;
  // For more(): behind the first value of a part come the sums of its halves, two to a word.
  static constexpr bool kHalves = Tabled && PlanarTable<F>;
  static constexpr Planes kPlanes = [] {
    if constexpr (kHalves || (kStrided && PlanarStrides<F>)) return F::kPlanes;
    return Planes{1, 0, 1};
  }();
  static constexpr bool kIntegers = kHalves && SmallScales<F>;  // sums of groups, before they become float
  static constexpr int kStarts = kHalves           ? 2 * kGroupParts
                                 : kZeroOf<F> != 0 ? kGroupParts
                                                   : 0,
                       kSums = F::kOffset ? kGroupParts : 0;
  static constexpr int kRecord = 4 * static_cast<int>(std::bit_ceil(1u + kStarts + kSums));
  static constexpr int kTokenBytes = (kSpan + kGroups * kRecord + 15) / 16 * 16;
  static constexpr int kPitch = (Tokens * kTokenBytes / 16 | 1) * 16;  // odd, against bank conflicts
};

template <BlockFormat F, int Tokens, bool Tabled>
__device__ __forceinline__ void write_record(uint32_t* record, int part, float scale, int integers) {
  using P = Plan<F, Tokens, Tabled>;
  record[0] = __float_as_uint(scale * (1.0f / P::kPlanes.unit));
  if constexpr (P::kHalves)
    record[1 + 2 * part] = (P::kIntegers ? 0 : kMagicBits) - F::kLeast * P::kPlanes.unit * integers;
  else if constexpr (P::kStarts > 0)
    record[1 + part] = kMagicBits - kZeroOf<F> * P::kPlanes.unit * integers;
  if constexpr (P::kSums > 0)
    record[1 + P::kStarts + part] = __float_as_uint(scale * static_cast<float>(integers));
}

// Activations of k from `first` on, `count` values, into shared memory as Plan says.
template <BlockFormat F, int Tokens, bool Tabled>
__device__ __forceinline__ void stage_activations(uint8_t* staged, const GemmArgs& args, int64_t first,
                                                  int count) {
  using P = Plan<F, Tokens, Tabled>;
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
      write_record<F, Tokens, Tabled>(record, part, scale, integers);
    }
  }
}

// The same from x itself, in two steps: a thread asks for its first eight values before it needs them.
template <BlockFormat F, int Tokens, bool Tabled>
struct Rounding {
  using P = Plan<F, Tokens, Tabled>;
  uint4 asked[2] = {};

  __device__ __forceinline__ void ask(const GemmArgs& args, int64_t first, int count, int v) {
    const int units = count >> 3, token = Tokens > 1 ? v / units : 0;
    if (v >= (Tokens > 1 ? static_cast<int>(args.m) * units : units)) return;
    const int64_t at = token * args.k + first + 8 * (v - token * units);
    if (args.type == Real::kFloat32) {
      const auto* x = reinterpret_cast<const uint4*>(static_cast<const float*>(args.x) + at);
      asked[0] = x[0], asked[1] = x[1];
    } else {
      asked[0] = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(args.x) + at);
    }
  }
  __device__ __forceinline__ void ask(const GemmArgs& args, int64_t first, int count) {
    ask(args, first, count, threadIdx.x);
  }
  __device__ __forceinline__ void answer(float (&values)[8], Real type) const {
    const uint32_t words[8] = {asked[0].x, asked[0].y, asked[0].z, asked[0].w,
                               asked[1].x, asked[1].y, asked[1].z, asked[1].w};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto half = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
      values[j] = type == Real::kFloat32   ? __uint_as_float(words[j])
                  : type == Real::kFloat16 ? half_to_float(half)
                                           : bfloat16_to_float(half);
    }
  }

  __device__ __forceinline__ void stage(uint8_t* staged, const GemmArgs& args, int64_t first, int count) {
    const uint32_t units = static_cast<uint32_t>(count) / 8,
                   all = Tokens > 1 ? static_cast<uint32_t>(args.m) * units : units, lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t v = threadIdx.x; v - lane < all; v += blockDim.x) {
      const uint32_t inside = v < all ? v : 0, token = Tokens > 1 ? inside / units : 0,
                     unit = inside - token * units, group = unit / 4, quarter = v % 4;
      float values[8];
      answer(values, args.type);
      ask(args, first, count, static_cast<int>(v + blockDim.x));
      const EightActivations eight = quantize_eight(values);
      const int pair = eight.sum + __shfl_xor_sync(~0u, eight.sum, 1);
      const int sum = P::kGroupParts == 1 ? pair + __shfl_xor_sync(~0u, pair, 2) : pair;
      if (v >= all) continue;
      uint8_t* const span = staged + group / P::kGroups * P::kPitch + token * P::kTokenBytes;
      uint8_t* const codes = span + group % P::kGroups * kGroup;
      if constexpr (P::kStrided) {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          codes[4 * j + quarter] = static_cast<uint8_t>(eight.codes[j / 4] >> (8 * (j % 4)));
      } else {
        *reinterpret_cast<uint2*>(codes + 8 * quarter) = make_uint2(eight.codes[0], eight.codes[1]);
      }
      auto* record = reinterpret_cast<uint32_t*>(span + P::kSpan + group % P::kGroups * P::kRecord);
      write_record<F, Tokens, Tabled>(record, P::kGroupParts == 2 ? quarter / 2 : 0, eight.scale, sum);
      if constexpr (P::kHalves) {
        constexpr bool kTwo = P::kGroupParts == 2;
        const int half = F::kMore * P::kPlanes.unit * (kTwo ? eight.sum : pair);
        reinterpret_cast<int16_t*>(record + 2 +
                                   (kTwo ? quarter / 2 * 2 : 0))[kTwo ? quarter % 2 : quarter / 2] =
            static_cast<int16_t>(half);
      }
    }
  }
};

}  // namespace quantgemm::dp4a
