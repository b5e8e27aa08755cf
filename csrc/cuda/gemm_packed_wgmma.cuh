// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for many tokens, w packed, on sm_90a. A warpgroup has 64 rows of w: its lanes
// decode their own fragments from shared memory, once for all tokens of a tile, and wgmma takes them from
// registers; while it multiplies a step of 64 columns the next one is decoded. One warp copies activations,
// blocks of a cluster that share tokens each a part for all of them; another copies weights. Where y has few
// tiles, blocks of a cluster share a tile's columns and add their sums up in the end.
// Limit: the tensor cores, from 128 tokens on.
#pragma once
#include "dependent_launch.cuh"
#include "packed_wgmma_stage.cuh"
#include "wgmma.cuh"

namespace quantgemm::packed_wgmma {

// ---- a lane's weights ----
template <int Words, int Step = 16>
__device__ __forceinline__ void load_shared(uint32_t* words, const uint8_t* p) {
  if constexpr (Words >= 4) {
#pragma unroll
    for (int w = 0; w < Words; w += 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(p + w / 4 * Step);
      words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
    }
  } else if constexpr (Words == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    words[0] = v.x, words[1] = v.y;
  } else {
    words[0] = *reinterpret_cast<const uint32_t*>(p);
  }
}

__device__ __forceinline__ float low_float(uint32_t pair, BFloat16) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair, BFloat16) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ float low_float(uint32_t pair, Half) {
  return half_to_float(static_cast<uint16_t>(pair));
}
__device__ __forceinline__ float high_float(uint32_t pair, Half) {
  return half_to_float(static_cast<uint16_t>(pair >> 16));
}

// Those of a strip's slot: weight = scale · (code + bias) + (offset − bias · scale), float32, rounded once.
template <class P>
struct SlotWeights {
  using L = typename P::L;
  using F = typename P::Format;
  PackedBatch<F> batch;
  BatchAffines<F> affines[2];
  float scale[2], start[2];

  template <int First = 0>
  __device__ __forceinline__ void load_heads(const uint8_t* strip, int first, int records) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      const uint8_t* piece =
          strip + P::kHeadsAt + P::kSlotRecords * kStripRows * First +
          static_cast<int>(L::row_in_piece(first * kTileCols / L::kSpan, threadIdx.x % 32 / 4, First));
#pragma unroll
      for (int i = 0; i < P::kSlotRecords; ++i)
        if (i < records) load_shared<kSize / 2>(batch.heads[i] + First / 2, piece + i * kStripRows * kSize);
      load_heads<First + kSize>(strip, first, records);
    }
  }
  // `records`, `step` and `s` are constants where these are used.
  __device__ __forceinline__ void begin(const uint8_t* strip, int first, int records) {
    load_heads(strip, first, records);
    affines[0].prepare(batch, 0);
    affines[1].prepare(batch, 1);
  }
  // Of the steps from `first` on, that one.
  __device__ __forceinline__ void load(const uint8_t* strip, int first, int step) {
    const int lane = threadIdx.x % 32, tile = first + step;
    load_shared<L::kLowBits, L::kLowBits == 8 ? 512 : 16>(
        batch.low[step], strip + tile * L::kLowTile + PackedField<L::kLowBits>::at(lane, 0));
    if constexpr (L::kHighBits > 0)
      load_shared<L::kHighBits>(batch.high[step],
                                strip + P::kHighAt + tile * L::kHighTile + lane * 4 * L::kHighBits);
  }
  // Fragment s of a step that is loaded.
  __device__ __forceinline__ void decode(uint32_t (&a)[4], int step, int s) {
    const int col = step * kTileCols + 16 * s;
    if (s == 0 || col % F::kGroup == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Affine affine = affines[half].get(batch, col, half);
        scale[half] = affine.scale;
        start[half] = __fmaf_rn(-1.0f * P::Fragment::kBias, affine.scale, affine.offset);
      }
    }
    P::Fragment::make(batch, step, s, a);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[j] = pack_pair(__fmaf_rn(low_float(a[j], typename P::T{}), scale[j % 2], start[j % 2]),
                       __fmaf_rn(high_float(a[j], typename P::T{}), scale[j % 2], start[j % 2]),
                       typename P::T{});
  }
};

// ---- y ----
// Sums of 16 tokens, as two tiles of an accumulator, to a warpgroup's [token][64 rows], 16-byte pieces
// swapped within a token. PTX ISA 9.7.14.5.16 (stmatrix), sm_90.
template <class T>
__device__ __forceinline__ void turn_sums(uint32_t out, int token, const float (&v)[8],
                                          const float (&bias)[2], T type) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = token + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack_pair(v[2 * i] + bias[i % 2], v[2 * i + 1] + bias[i % 2], type);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   out + row * 128 + 16 * (piece ^ (row % 8))),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}
// A warpgroup's [tokens][64 rows] to y, whose first of them is `to`; rows and tokens that are there.
template <class T>
__device__ __forceinline__ void store_rows(T* to, int64_t n, const uint8_t* out, int tokens, int rows) {
  const int thread = threadIdx.x % kGroupThreads, piece = thread % 8;
#pragma unroll 1
  for (int token = thread / 8; token < tokens; token += kGroupThreads / 8) {
    const uint4 eight = *reinterpret_cast<const uint4*>(out + token * 128 + 16 * (piece ^ (token % 8)));
    T* const at = to + token * n + 8 * piece;
    if (n % 8 == 0) {
      if (8 * piece < rows) *reinterpret_cast<uint4*>(at) = eight;
    } else {
      const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (8 * piece + e < rows) at[e].bits = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
    }
  }
}

template <class P>
struct Output {
  using T = typename P::T;
  T* y;
  int64_t n;
  int tokens, rows;  // from here on
  float bias[2];

  __device__ __forceinline__ Output(const GemmPackedArgs& args, const Walk& at) : n(args.n) {
    const int group = threadIdx.x / kGroupThreads, in_group = threadIdx.x % kGroupThreads;
    const int64_t row = int64_t{at.row_tile} * kRows + group * kGroupRows;
    const int64_t token = int64_t{at.token_tile} * P::kTokens;
    y = static_cast<T*>(args.y) + token * n + row;
    tokens = static_cast<int>(min(args.m - token, int64_t{P::kTokens}));
    rows = static_cast<int>(max(min(n - row, int64_t{kGroupRows}), int64_t{0}));
    const int own = in_group / 32 * 16 + in_group % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      bias[half] = args.bias != nullptr && own + 8 * half < rows
                       ? to_float(static_cast<const T*>(args.bias)[row + own + 8 * half])
                       : 0.0f;
  }
  // Tokens of the tile from `first` on, `count` of them at most, from the warpgroup's part of shared memory.
  __device__ __forceinline__ void store(const uint8_t* out, int first, int count) const {
    store_rows(y + first * n, n, out, min(tokens - first, count), rows);
  }
};

// bar.sync of a warpgroup.
__device__ __forceinline__ void sync_group() {
  if (threadIdx.x < kGroupThreads)
    sync_some<1, kGroupThreads>();
  else
    sync_some<2, kGroupThreads>();
}

template <class P>
using Sums = float[P::kSums][P::kSumTokens / 2];

template <class P>
__device__ __forceinline__ void multiply(const GemmPackedArgs& args, const Schedule& s, uint8_t* memory) {
  using T = typename P::T;
  const uint32_t smem = shared_address(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
  Ring<P::kPlaces> x{smem + P::kBarriersAt};
  Ring<P::kSlots> w{smem + P::kBarriersAt + 16 * P::kPlaces};
  uint8_t* const out = memory + P::kOutAt + group * P::kOutBytes;

  for (Walk at(s, s.slots(P::kSlotSteps)); at.valid(); at.next()) {
    Sums<P> sums = {};
    uint32_t a[4][4];
    int before = -1;  // the place of the step before, which may still be multiplied
    const auto release = [&] {
      if (before >= 0 && lane < s.mates)
        mbarrier_arrive_there(address_in(smem + P::kBarriersAt + 16 * before + 8, at.part * s.mates + lane));
    };
    // Steps from `first` on of a slot; if they are its `last` ones, it is free then.
    const auto multiply_steps = [&]<int Steps>(std::integral_constant<int, Steps>, int first, bool last) {
      if (first == 0) mbarrier_wait(w.full(), w.turn);
      const uint8_t* const strip = memory + P::kSlotsAt + w.place * P::kSlotBytes + warp * P::kStripBytes;
      SlotWeights<P> weights;
      weights.begin(strip, first, Steps * kTileCols / P::L::kSpan);
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        weights.load(strip, first, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights.decode(a[i], step, i);
          if (i == 0) mbarrier_wait(x.full(), x.turn);
          const uint64_t tokens = swizzled_rows(smem + x.place * P::kPlaceBytes) + 2 * i;
          wgmma_fence();
#pragma unroll
          for (int part = 0; part < P::kSums; ++part)
            wgmma(sums[part], a[i], tokens + part * (P::kSumTokens * 128 / 16), T{});
          wgmma_commit();
          wgmma_wait<2>();
          if (i == 2) release();  // all of the step before are done
        }
        if (step == Steps - 1 && last) {
          __syncwarp();
          if (lane == 0) mbarrier_arrive(w.empty());
          w.step();
        }
        before = x.place;
        x.step();
      }
    };
    const int whole = min(at.last_slot, s.steps / P::kSlotSteps);
#pragma unroll 1
    for (int i = at.first_slot; i < whole; ++i)
      multiply_steps(std::integral_constant<int, P::kSlotSteps>{}, 0, true);
    if constexpr (P::L::kSpan == kTileCols) {
      const int rest = whole < at.last_slot ? s.steps - whole * P::kSlotSteps : 0;
#pragma unroll 1
      for (int i = 0; i < rest; ++i) multiply_steps(std::integral_constant<int, 1>{}, i, i + 1 == rest);
    }
    wgmma_wait<0>();
#pragma unroll
    for (auto& part : sums) sums_are_ready(part);
    __syncwarp();
    release();

    const Output<P> output(args, at);
    if (s.parts == 1) {
#pragma unroll
      for (int part = 0; part < P::kSums; ++part) {
        sync_group();  // the earlier ones are read
#pragma unroll
        for (int q = 0; q < P::kSumTokens / 16; ++q) {
          float v[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = sums[part][8 * q + e];
          turn_sums(shared_address(out), 16 * q, v, output.bias, T{});
        }
        sync_group();
        output.store(out, part * P::kSumTokens, P::kSumTokens);
      }
    } else {  // the only tile; all activations are used
      sync_some<3, kMultipliers>();
      auto* own = reinterpret_cast<float4*>(memory) + threadIdx.x;
#pragma unroll
      for (int part = 0; part < P::kSums; ++part)
#pragma unroll
        for (int i = 0; i < P::kSumTokens / 8; ++i)
          own[(part * P::kSumTokens / 8 + i) * kMultipliers] = make_float4(
              sums[part][4 * i], sums[part][4 * i + 1], sums[part][4 * i + 2], sums[part][4 * i + 3]);
      sync_cluster();
      const int share = P::kTokens / s.parts;
#pragma unroll 1
      for (int token = 0; token < share; token += 16) {
        float v[8] = {};
        const uint32_t from =
            smem + ((at.part * share + token) / 8 * kMultipliers + threadIdx.x) * int{sizeof(float4)};
#pragma unroll 1
        for (int part = 0; part < s.parts; ++part) {
          const uint32_t there = address_in(from, part * s.mates + at.mate);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float4 more = load_there(there + e * kMultipliers * int{sizeof(float4)});
            v[4 * e] += more.x, v[4 * e + 1] += more.y, v[4 * e + 2] += more.z, v[4 * e + 3] += more.w;
          }
        }
        turn_sums(shared_address(out), token, v, output.bias, T{});
      }
      sync_group();
      output.store(out, at.part * share, share);
    }
  }
}

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_kernel([[maybe_unused]] const GemmPackedArgs args, [[maybe_unused]] const Schedule schedule,
                 [[maybe_unused]] const __grid_constant__ CUtensorMap x) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Tile<F, X, Tokens>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const memory = dynamic + (-shared_address(dynamic) & 1023);
  const uint32_t smem = shared_address(memory), barriers = smem + P::kBarriersAt;
  if (threadIdx.x < P::kPlaces + P::kSlots) {
    const bool counts_tokens = threadIdx.x < P::kPlaces;
    mbarrier_init(barriers + 16 * threadIdx.x, 1);
    mbarrier_init(barriers + 16 * threadIdx.x + 8, kMultiplierWarps * (counts_tokens ? schedule.mates : 1));
    publish_barriers();
  }
  sync_cluster();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (threadIdx.x < kMultipliers) {
    grow_registers<kMultiplierRegisters>();
    multiply<P>(args, schedule, memory);
  } else {
    shrink_registers<kCopierRegisters>();
    const unsigned warp = threadIdx.x / 32 - kMultiplierWarps;
    if (warp == 0) {
      if (threadIdx.x % 32 == 0) copy_activations<P>(schedule, x, smem);
    } else if (warp == 1) {
      copy_weights<P>(args, schedule, smem);
    }
    __syncwarp();
    if (schedule.parts > 1) sync_cluster();  // with the sums' exchange
  }
  sync_cluster();  // nobody copies to a block that has ended, or reads its sums
#endif
}

template <PackableFormat F, class X, int Tokens>
cudaError_t launch(const GemmPackedArgs& args, const Schedule& schedule, const CUtensorMap& x,
                   const Device& device, cudaStream_t stream) {
  const auto kernel = wgmma_kernel<F, X, Tokens>;
  constexpr int kBytes = Tile<F, X, Tokens>::kBytes;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(schedule.clusters * schedule.ranks(), kThreads, device, stream, kBytes,
                               schedule.ranks());
  return cudaLaunchKernelEx(&launch.config, kernel, args, schedule, x);
}

template <class X, int Tokens>
cudaError_t launch_type(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                        cudaStream_t stream) {
  CUtensorMap x;
  cudaError_t status = describe_tiles(x, {args.x, args.m, 2 * args.k}, Tokens / schedule.mates);
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) status = launch<F, X, Tokens>(args, schedule, x, device, stream);
  });
  return status;
}

}  // namespace quantgemm::packed_wgmma
