// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for up to 16 tokens, w packed, on sm_90. Eight warps make exact fragments of codes
// (packed_few_codes.cuh), which cost few instructions, and multiply them without scales: sums of the columns
// that share a scale start anew, and one multiply-add for each joins them to the others. Weights come in long
// runs of a strip, of which each warp has the same columns every time, so that its activations stay in
// registers; offsets meet sums of them. What warps leave in the weights' place others add up, send to the
// block of the cluster that stores the strip, and store, while the next strips are multiplied. Blocks of a
// cluster share a strip's columns. How columns are divided does not depend on the tokens, so rows of y are
// the same in any batch. Limit: reading the weights.
#pragma once
#include "gemv_packed_copy.cuh"
#include "packed_few_sums.cuh"

namespace quantgemm::packed_few {

// A unit in an entry, by its number there.
struct Unit {
  const uint8_t* entry;
  int at;
};

// A lane's weights of a unit.
template <class P>
struct Weights {
  using L = typename P::L;
  using F = typename P::Format;
  PackedBatch<F> batch;
  BatchAffines<F> affines[2];

  template <int First>
  static __device__ __forceinline__ const uint8_t* piece_at(const Unit& unit, int record) {
    return unit.entry + P::kHeadsAt + kRunUnits * P::kPieces * First +
           unit.at * (P::kPieces * L::piece_bytes(First)) +
           L::row_in_piece(record, threadIdx.x % 32 / 4, First);
  }
  template <int First = 0>
  __device__ __forceinline__ void load_heads(const Unit& unit) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
#pragma unroll
      for (int i = 0; i < P::kRecords; ++i)
        memcpy(batch.heads[i] + First / 2,
               __builtin_assume_aligned(piece_at<First>(unit, i), kSize < 8 ? 2 * kSize : 16), 2 * kSize);
      load_heads<First + kSize>(unit);
    }
  }
  template <int Bits>
  static __device__ __forceinline__ void read(uint32_t* words, const uint8_t* tile) {
    const uint8_t* own = tile + PackedField<Bits>::at(threadIdx.x % 32, 0);
    if constexpr (Bits >= 4) {
#pragma unroll
      for (int w = 0; w < Bits; w += 4) {
        const uint4 v = load_shared(shared_address(own) + w / 4 * 512);
        words[w] = v.x, words[w + 1] = v.y, words[w + 2] = v.z, words[w + 3] = v.w;
      }
    } else if constexpr (Bits == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(own);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(own);
    }
  }
  __device__ __forceinline__ void load(const Unit& unit, int tile) {
    read<L::kLowBits>(batch.low[tile], unit.entry + unit.at * P::kUnitLow + tile * L::kLowTile);
    if constexpr (L::kHighBits > 0)
      read<L::kHighBits>(batch.high[tile],
                         unit.entry + P::kHighAt + unit.at * P::kUnitHigh + tile * L::kHighTile);
  }
  __device__ __forceinline__ void begin(const Unit& unit) {
    load_heads(unit);
    load(unit, 0);
    affines[0].prepare(batch, 0);
    affines[1].prepare(batch, 1);
  }
};

// Offsets of a unit as A fragments of a product with sums of activations (sum_activations): of runs 2c and
// 2c + 1 of eight, rows r and r + 8, in two parts of bfloat16. Times 2^−kDown, as sums are.
template <class P>
struct Offsets {
  using L = typename P::L;
  using F = typename P::Format;
  uint32_t high[2], rest[2];  // [half]

  struct Record {
    uint32_t words[(2 * L::kRecordBytes + 3) / 4];
    __device__ __forceinline__ uint32_t head_unit(int, int half, int b) const {
      const typename L::Piece piece = L::piece_of(b);
      const int at = 2 * piece.first + half * piece.size + b - piece.first;
      return words[at / 4] >> (8 * (at % 4));
    }
  };

  __device__ __forceinline__ void set(int half, float first, float second) {
    constexpr float kScale = 1.0f / (1 << P::Codes::kDown);
    split_pair(first * kScale, second * kScale, high[half], rest[half]);
  }
  __device__ __forceinline__ Offsets(const Weights<P>& weights, const Unit& unit, int eight) {
    const int c = threadIdx.x % 4;
    if constexpr (TwoLevelFormat<F>) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const BatchAffines<F>& affines = weights.affines[half];
        const uint32_t four = c < 2 ? affines.offsets[2 * eight] : affines.offsets[2 * eight + 1];
        const float factor = affines.factors.offset;
        set(half, BatchAffines<F>::times_code(four, c % 2 * 2, factor),
            BatchAffines<F>::times_code(four, c % 2 * 2 + 1, factor));
      }
    } else {  // a record of two groups
      static_assert(L::kSpan == 2 * F::kGroup && P::kSumSteps == 2 && L::piece_bytes(0) == L::kRecordBytes);
      Record record;
      const uint8_t* own = Weights<P>::template piece_at<0>(unit, c);
      memcpy(record.words, __builtin_assume_aligned(own, 16), 2 * L::kRecordBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        set(half, F::affine(HeadBlock<F>(record, 0, half).bytes, 0).offset,
            F::affine(HeadBlock<F>(record, F::kGroup, half).bytes, 0).offset);
    }
  }
  __device__ __forceinline__ void multiply(float (&sums)[P::kTokenTiles][4],
                                           const uint32_t (&x)[P::kTokenTiles][2]) const {
    const uint32_t a[2][4] = {{high[0], high[1], high[0], high[1]}, {rest[0], rest[1], rest[0], rest[1]}};
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int t = 0; t < P::kTokenTiles; ++t) mma_16x8x16(sums[t], a[part], x[t][0], x[t][1], BFloat16{});
  }
};

// The scale of the columns from `col` on. A signed byte in the middle of a float of 2^15 reads 32768 + 128 +
// code; the products with a half are exact, so is the rest: one multiply-add in place of three instructions.
template <class P>
__device__ __forceinline__ float scale_of(const Weights<P>& weights, int col, int half) {
  using F = typename P::Format;
  const BatchAffines<F>& affines = weights.affines[half];
  if constexpr (TwoLevelFormat<F> && !F::kOffset) {
    const int group = col / F::kGroup;
    const float factor = affines.factors.scale;
    const uint32_t biased =
        __byte_perm(affines.scales[group / 4] ^ 0x80808080u, 0x47000000u, 0x7404 | group % 4 << 4);
    return __fmaf_rn(__uint_as_float(biased), factor, -32896.0f * factor);
  } else {
    return affines.get(weights.batch, col, half).scale;
  }
}

// A unit times activations.
template <class P>
__device__ __forceinline__ void multiply_unit(float (&sums)[P::kTokenTiles][4], const Unit& unit,
                                              const Activations<P>& x) {
  using F = typename P::Format;
  using T = typename P::T;
  Weights<P> weights;
  weights.begin(unit);
  if constexpr (F::kOffset)
#pragma unroll
    for (int i = 0; i < P::kOffsets; ++i) Offsets<P>(weights, unit, i).multiply(sums, x.sums[i]);
#pragma unroll
  for (int run = 0; run < P::kRuns; ++run) {
    float parts[P::kTokenTiles][4] = {}, scales[2];
#pragma unroll
    for (int i = 0; i < P::kSumSteps; ++i) {
      const int step = run * P::kSumSteps + i, tile = step / 4;
      if (step % 4 == 0 && tile + 1 < P::kTiles) weights.load(unit, tile + 1);
      uint32_t a[4];
      P::Codes::make(weights.batch.low[tile], weights.batch.high[tile], step % 4, a);
      const auto& b = x.fragments[step];
#pragma unroll
      for (int t = 0; t < P::kTokenTiles; ++t) mma_16x8x16(parts[t], a, b[t][0], b[t][1], T{});
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) scales[half] = scale_of<P>(weights, run * P::kSumSteps * 16, half);
#pragma unroll
    for (int t = 0; t < P::kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[t][e] = __fmaf_rn(scales[e / 2], parts[t][e], sums[t][e]);
  }
}

// The warps that multiply. Each has the same unit of a panel in all strips, so that its activations stay in
// registers; where a panel has few units, warps of the same one take entries in turn. All see all entries, so
// that none is ever two turns of the ring ahead of one.
template <class P>
__device__ __forceinline__ void multiply(const GemmPackedArgs& args, const Work& work,
                                         const Shared<P>& shared) {
  const Schedule& s = work.s;
  const int lane = threadIdx.x % 32;
  int unit = threadIdx.x / 32, until = 0;  // until its next entry comes
  for (; unit >= s.run; unit -= s.run) ++until;
  if (until >= s.phases) unit = kRunUnits;  // it has none
  wait_for_previous_kernel();
  copy_activations(args, work, shared, 0);
  let_next_kernel_start();
  Activations<P> x;
  Turn turn;
#pragma unroll 1
  for (int panel = 0; panel < work.panels; ++panel) {
    const bool has = unit < work.units_of(panel);
    mbarrier_wait(shared.arrived(), panel & 1);
    if (has) x.load(shared, unit);
    if (panel + 1 < work.panels) {
      publish_to_copies();  // they write here next
      sync_some<1, 32 * P::kWarps>();
      copy_activations(args, work, shared, panel + 1);
    }
#pragma unroll 1
    for (int strip = 0; strip < work.strips; ++strip) {
      mbarrier_wait(shared.full(turn.at), turn.parity);
      if (until == 0 && has) {
        uint8_t* const entry = shared.ring + turn.at * P::kEntryBytes;
        float sums[P::kTokenTiles][4] = {};
        multiply_unit<P>(sums, {entry, unit}, x);
        __syncwarp();  // all lanes have read what these replace
#pragma unroll
        for (int t = 0; t < P::kTokenTiles; ++t)
          store_shared(shared_address(entry) + unit * P::kUnitLow + t * P::kQuadBytes + lane * 16,
                       {__float_as_uint(sums[t][0]), __float_as_uint(sums[t][1]), __float_as_uint(sums[t][2]),
                        __float_as_uint(sums[t][3])});
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.left(turn.at));
      until = until == 0 ? s.phases - 1 : until - 1;
      turn.advance(s.ring);
    }
  }
}

template <class P>
__device__ __forceinline__ void begin_barriers(const Work& work, const Shared<P>& shared) {
  const Schedule& s = work.s;
  const int i = static_cast<int>(threadIdx.x);
  if (i < s.ring) {
    mbarrier_init(shared.full(i), 1);
    mbarrier_init(shared.left(i), P::kWarps);
    mbarrier_init(shared.empty(i), P::kAdders);
  } else if (i == s.ring) {
    mbarrier_init(shared.arrived(), P::kWarps);
  }
  const int matrices = 1 << s.gated, others = (1 << s.log_parts) - 1;
  if (i < work.slots()) {
    mbarrier_init(shared.complete(i), P::kAdders * matrices + 1);
    mbarrier_arrive_expecting(shared.complete(i), static_cast<uint32_t>(others * matrices * P::kTotalBytes));
  }
  publish_barriers();
}

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__((Tile<F, X, Tokens>::kThreads), 1)
    few_kernel([[maybe_unused]] const __grid_constant__ GemmPackedArgs args,
               [[maybe_unused]] const __grid_constant__ Schedule schedule) {
#if __CUDA_ARCH__ >= 900
  using P = Tile<F, X, Tokens>;
  extern __shared__ __align__(128) uint8_t memory[];
  const Work work(schedule);
  const Shared<P> shared(memory, schedule);
  begin_barriers(work, shared);
  if (schedule.log_parts > 0)
    sync_cluster();
  else
    __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (warp < P::kWarps) {
    grow_registers<P::kMultiplierRegisters>();
    multiply<P>(args, work, shared);
  } else {
    shrink_registers<P::kOtherRegisters>();
    // What weights are does not depend on the previous kernel.
    if (warp == P::kCopier) {
      copy_weights<P>(args, work, shared);
      packed_gemv::read_ahead(args.ahead, args.ahead_bytes);
    } else if (warp >= P::kFirstWriter)
      store_sums<P>(args, work, shared);
    else if (warp < P::kFirstAdder + P::kAdders)
      add_sums<P>(work, shared, warp - P::kFirstAdder);
  }
  // What others send to a block, its warps that store have waited for.
#endif
}

// args.m up to Tokens.
template <PackableFormat F, class X, int Tokens>
cudaError_t launch(const GemmPackedArgs& args, const Device& device, cudaStream_t stream) {
  using P = Tile<F, X, Tokens>;
  const auto kernel = few_kernel<F, X, Tokens>;
  const Schedule schedule = schedule_of(args, device, P::kSizes, Tokens);
  if (schedule.clusters == 0) return cudaErrorNotSupported;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, schedule.bytes);
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(schedule.clusters << schedule.log_parts, P::kThreads, device, stream,
                               schedule.bytes, 1 << schedule.log_parts);
  return cudaLaunchKernelEx(&launch.config, kernel, args, schedule);
}

template <class X, int Tokens>
cudaError_t launch_type(const GemmPackedArgs& args, const Device& device, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) status = launch<F, X, Tokens>(args, device, stream);
  });
  return status;
}

}  // namespace quantgemm::packed_few
