// SPDX-License-Identifier: MIT
// y[m, n] for few tokens: every weight is read once, at the speed of DRAM, in its native layout.
// A thread block owns a run of rows, a slice of 32 · kSpan weights of a row is a warp's step. The
// warp keeps the slice's activations in registers while it walks down the rows; it streams their
// bytes through a ring of its own in shared memory, in 16-byte cp.async, since blocks of 18 or 210
// bytes allow no wide load; a lane then decodes kSpan neighbouring weights. Sums over lanes are
// shuffled, sums over slices meet in shared memory in a fixed order. Limit: DRAM.
#pragma once
#include "gemm_3_dp4a.cuh"

namespace quantgemm::dp4a {

constexpr int kRings = 160 * 1024, kSlack = 16;  // bytes; behind the rings a window may read a word

template <BlockFormat F, int Tokens>
struct Plan {
  // Activations take kSpan / 4 registers a token. Wide spans share words that hold several planes.
  static constexpr int kWidest = F::kElems < 128 ? 64 : 128;
  static constexpr int kSpan = Tokens <= 2 ? kWidest : Tokens <= 4 ? kWidest / 2 : 32;
  static constexpr int kGroups = kSpan / kGroup, kParts = kSpan / kPart<F>;
  static constexpr int kSlice = 32 * kSpan, kSliceBytes = kSlice / F::kElems * F::kBytes;
  static constexpr int kSlot = (kSliceBytes + 30) / 16 * 16;  // from and to a multiple of 16 bytes
  static constexpr int kRows = [] {                           // a step of a warp
    int rows = 1;
    while (2 * rows * Tokens <= 32 && 2 * rows * kSliceBytes <= 2560) rows *= 2;
    return rows;
  }();
  static constexpr int kWarps = Tokens <= 2 ? 16 : 8;  // with half as many, each has 255 registers
  static constexpr int kItemBytes = kRows * kSlot;
  static constexpr int kStages = kRings / kWarps / kItemBytes < 6 ? kRings / kWarps / kItemBytes : 6;
  static_assert(kSlice % F::kElems == 0 && kStages >= 2);
};

__device__ __forceinline__ void copy_async16(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(target))),
               "l"(source));
}
__device__ __forceinline__ void close_async_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_async_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A lane's activations of a slice, for all tokens.
template <BlockFormat F, int Tokens>
struct Activations {
  using P = Plan<F, Tokens>;
  uint32_t codes[Tokens][P::kSpan / 4];
  float scale[Tokens][P::kGroups];
  int start[Tokens][P::kParts];  // of the accumulator
  float sum[Tokens][P::kParts];  // of the activations
  int groups;                    // how many are inside the row

  __device__ void load(const GemmArgs& args, int64_t first) {
    const int64_t inside = args.k - first;
    groups = inside <= 0 ? 0 : inside < P::kSpan ? static_cast<int>(inside) / kGroup : P::kGroups;
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      const int64_t token = t < args.m ? t : args.m - 1;
      const uint8_t* row = args.activations + token * ActivationRow::bytes(args.k);
      const auto* scales = reinterpret_cast<const float2*>(row + ActivationRow::scales_offset(args.k));
#pragma unroll
      for (int g = 0; g < P::kGroups; ++g) {
        const int64_t at = g < groups ? first / kGroup + g : 0;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const uint4 words = reinterpret_cast<const uint4*>(row + at * kGroup)[v];
          uint32_t* to = codes[t] + g * 8 + v * 4;
          to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
        }
        scale[t][g] = scales[at].x;
      }
#pragma unroll
      for (int p = 0; p < P::kParts; ++p) {
        int integers = 0;
#pragma unroll
        for (int j = 0; j < kPart<F> / 4; ++j)
          integers = dot4(codes[t][p * (kPart<F> / 4) + j], 0x01010101u, integers);
        start[t][p] = kMagicBits - kZeroOf<F> * integers;
        sum[t][p] = scale[t][p * kPart<F> / kGroup] * static_cast<float>(integers);
      }
    }
  }
};

// Bytes of shared memory to words in registers, wherever they begin.
template <int Bytes>
struct Window {
  static constexpr int kWords = (Bytes + 3) / 4;
  alignas(16) uint8_t bytes[4 * kWords];

  __device__ explicit Window(const uint8_t* source) {
    const uint32_t beyond = static_cast<uint32_t>(__cvta_generic_to_shared(source)) % 4, shift = 8 * beyond;
    const auto* aligned = reinterpret_cast<const uint32_t*>(source - beyond);
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = aligned[i];
    if (shift != 0) {
      const uint32_t last = aligned[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        words[i] = __funnelshift_r(words[i], i + 1 < kWords ? words[i + 1] : last, shift);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) memcpy(bytes + 4 * i, words + i, 4);
  }
};

// sums[t] += the lane's kSpan weights, from weight `first` of the block on, times token t.
template <BlockFormat F, int Tokens>
__device__ __forceinline__ void multiply_span(float* sums, const Activations<F, Tokens>& x, bytes_ptr block,
                                              int first) {
  using P = Plan<F, Tokens>;
#pragma unroll
  for (int p = 0; p < P::kParts; ++p) {
    const int e = first + p * kPart<F>, within = P::kSpan > F::kElems ? e % F::kElems : e;
    const bytes_ptr b = block + (P::kSpan > F::kElems ? e / F::kElems * F::kBytes : 0);
    const Affine affine = F::affine(b, within / F::kGroup);
    int dots[Tokens];
#pragma unroll
    for (int t = 0; t < Tokens; ++t) dots[t] = kZeroOf<F> != 0 ? x.start[t][p] : kMagicBits;
#pragma unroll
    for (int j = 0; j < kPart<F> / 4; ++j) {
      const uint32_t codes = codes_of<F>(b, within / 4 + j);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) dots[t] = dot4(codes, x.codes[t][p * (kPart<F> / 4) + j], dots[t]);
    }
    const int g = p * kPart<F> / kGroup;
    if (g >= x.groups) continue;  // bytes behind the row's end may decode to NaN
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      sums[t] += affine.scale * x.scale[t][g] * (__int_as_float(dots[t]) - kMagic);
      if constexpr (F::kOffset) sums[t] += affine.offset * x.sum[t][p];
    }
  }
}

// Sums Values numbers over the warp: value i ends in lane i · 32 / Values. Each shuffle halves the
// numbers as long as there are several: a lane gives away the half that it does not keep.
template <int Values>
__device__ __forceinline__ float sum_over_lanes(float (&v)[Values], int lane) {
  int count = Values;
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < Values / 2; ++i) {
        if (i >= count) break;
        const float kept = upper ? v[i + count] : v[i], given = upper ? v[i] : v[i + count];
        v[i] = kept + __shfl_xor_sync(~0u, given, bit);
      }
    } else {
      v[0] += __shfl_xor_sync(~0u, v[0], bit);
    }
  }
  return v[0];
}

// One warp's next item: kRows rows of one slice.
struct Cursor {
  int slice, chunk;
  __device__ Cursor(int item, int chunks) : slice(item / chunks), chunk(item % chunks) {}
  __device__ void advance(int chunks) {
    if (++chunk == chunks) chunk = 0, ++slice;
  }
};

// Block b owns rows b · rows_per_block …; its warps share the items, slice by slice, evenly. Partial
// sums lie in `parts` copies of [rows][Tokens]: one per slice, or one per warp where slices are more.
template <BlockFormat F, int Tokens>
__global__ void __launch_bounds__(32 * Plan<F, Tokens>::kWarps, 1)
    few_tokens_kernel(const GemmArgs args, int rows_per_block, int slices, int parts) {
  using P = Plan<F, Tokens>;
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint8_t* ring = reinterpret_cast<uint8_t*>(shared) + warp * (P::kStages * P::kItemBytes);
  float* partial = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(shared) +
                                            warps * (P::kStages * P::kItemBytes) + kSlack);

  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int64_t left = args.n - first_row, row_bytes = args.k / F::kElems * F::kBytes;
  const int rows = left < rows_per_block ? static_cast<int>(left) : rows_per_block;
  const int chunks = (rows + P::kRows - 1) / P::kRows;
  const int64_t all = static_cast<int64_t>(chunks) * slices;
  const int begin = static_cast<int>(all * warp / warps), end = static_cast<int>(all * (warp + 1) / warps);
  const int64_t w_bytes = args.n * row_bytes;

  const auto copy = [&](const Cursor& at, int stage) {
    const int64_t in_row = static_cast<int64_t>(at.slice) * P::kSliceBytes, rest = row_bytes - in_row;
    const int wanted = rest < P::kSliceBytes ? static_cast<int>(rest) : P::kSliceBytes;
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const int row = at.chunk * P::kRows + r;
      if (row >= rows) break;
      const int64_t begins = (first_row + row) * row_bytes + in_row, from = begins & ~int64_t{15};
      const int bytes = static_cast<int>(begins - from) + wanted;
      const int whole = w_bytes - from < bytes + 15 ? static_cast<int>(w_bytes - from) / 16 * 16 : bytes;
      const uint8_t* source = args.w + from;
      uint8_t* target = ring + stage * P::kItemBytes + r * P::kSlot;
#pragma unroll
      for (int i = 0; i < (P::kSlot + 511) / 512; ++i)
        if (512 * i + 16 * lane < whole)
          copy_async16(target + 16 * lane + 512 * i, source + 16 * lane + 512 * i);
      if (whole + lane < bytes) target[whole + lane] = source[whole + lane];  // the last bytes of w
    }
  };

  Cursor next(begin, chunks), at = next;
  int fetched = begin;
  const auto fetch = [&](int stage) {
    if (fetched < end) copy(next, stage);
    ++fetched;
    next.advance(chunks);
    close_async_group();
  };
#pragma unroll
  for (int s = 0; s < P::kStages - 1; ++s) fetch(s);

  Activations<F, Tokens> x;
  int stage = 0, loaded_slice = -1;
  for (int item = begin; item < end; ++item, at.advance(chunks)) {
    if (at.slice != loaded_slice) {
      loaded_slice = at.slice;
      x.load(args, static_cast<int64_t>(at.slice) * P::kSlice + lane * P::kSpan);
    }
    wait_async_groups<P::kStages - 2>();
    __syncwarp();  // all lanes' copies have arrived, and the previous item's bytes were used
    fetch(stage == 0 ? P::kStages - 1 : stage - 1);

    float sums[P::kRows * Tokens] = {};
#pragma unroll
    for (int r = 0; r < P::kRows; ++r) {
      const uint32_t low =
          static_cast<uint32_t>(first_row + at.chunk * P::kRows + r) * static_cast<uint32_t>(row_bytes) +
          static_cast<uint32_t>(at.slice) * P::kSliceBytes;
      const uint8_t* slice = ring + stage * P::kItemBytes + r * P::kSlot + low % 16;
      if constexpr (F::kElems <= P::kSpan) {
        constexpr int kBytes = P::kSpan / F::kElems * F::kBytes;
        const Window<kBytes> window(slice + lane * kBytes);
        multiply_span<F, Tokens>(sums + r * Tokens, x, window.bytes, 0);
      } else {
        const int e = lane * P::kSpan;
        multiply_span<F, Tokens>(sums + r * Tokens, x, slice + e / F::kElems * F::kBytes, e % F::kElems);
      }
    }
    const float sum = sum_over_lanes(sums, lane);
    constexpr int kLanes = 32 / (P::kRows * Tokens);
    const int value = at.chunk * P::kRows * Tokens + lane / kLanes;
    if (lane % kLanes == 0 && value < rows * Tokens) {
      float* to = partial + static_cast<int64_t>(parts < slices ? warp : at.slice) * rows * Tokens + value;
      *to = parts < slices && item - begin >= chunks ? *to + sum : sum;
    }
    stage = stage + 1 == P::kStages ? 0 : stage + 1;
  }
  __syncthreads();

  const int used = args.m < Tokens ? static_cast<int>(args.m) : Tokens;
  for (int i = threadIdx.x; i < rows * used; i += blockDim.x) {
    const int token = i / rows, row = i - token * rows;
    float sum = 0;
    for (int part = 0; part < parts; ++part)
      sum += partial[(static_cast<int64_t>(part) * rows + row) * Tokens + token];
    store_real(args.y, token * args.n + first_row + row, sum, args.type);
  }
}

template <int Tokens>
cudaError_t launch_few_tokens(const GemmArgs& args, cudaStream_t stream) {
  int device = 0, sms = 0, shared_limit = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;

  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (kServes<F>) {
      using P = Plan<F, Tokens>;
      int warps = P::kWarps;
      while (warps > 1 && warps * P::kStages * P::kItemBytes > shared_limit * 3 / 4) warps /= 2;
      const int rings = warps * P::kStages * P::kItemBytes + kSlack;
      const int64_t slices = (args.k + P::kSlice - 1) / P::kSlice;
      const int parts = static_cast<int>(slices < warps ? slices : warps);
      const int row_bytes = parts * Tokens * static_cast<int>(sizeof(float));
      // One block per multiprocessor, or as many waves of blocks as the partial sums need.
      const int64_t most_rows = (shared_limit - rings) / row_bytes;
      const int64_t waves = (args.n + most_rows * sms - 1) / (most_rows * sms);
      const int64_t rows = (args.n + waves * sms - 1) / (waves * sms);
      const auto grid = static_cast<unsigned>((args.n + rows - 1) / rows);
      const int bytes = rings + static_cast<int>(rows) * row_bytes;
      const auto kernel = few_tokens_kernel<F, Tokens>;
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (status != cudaSuccess) return;
      kernel<<<grid, 32 * warps, bytes, stream>>>(args, static_cast<int>(rows), static_cast<int>(slices),
                                                  parts);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace quantgemm::dp4a
