// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for up to 32 tokens, w packed, on sm_90. Four teams of four warps make exact
// fragments of codes (packed_few_codes.cuh), which cost few instructions, and multiply them without scales:
// sums of the columns that share a scale start anew, and one multiply-add for each joins them to the others.
// A team has 64 rows and every second or fourth slot of columns; what teams summed is added up in shared
// memory, with that of the blocks of a cluster, which share a tile's columns where y has few rows. Offsets
// meet sums of activations, which one warp makes for all. How columns are divided does not depend on the
// tokens, so rows of y are the same in any batch. Limit: reading the weights.
#pragma once
#include "packed_few_stage.cuh"
#include "packed_stage.cuh"

namespace quantgemm::packed_few {

// A lane's weights of an entry.
template <class P>
struct Weights {
  using L = typename P::L;
  using F = typename P::Format;
  PackedBatch<F> batch;
  BatchAffines<F> affines[2];

  template <int First = 0>
  __device__ __forceinline__ void load_heads(const uint8_t* strip) {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      const uint8_t* piece = strip + P::kHeadsAt + P::kSlotRecords * kStripRows * First +
                             static_cast<int>(L::row_in_piece(0, threadIdx.x % 32 / 4, First));
#pragma unroll
      for (int i = 0; i < P::kSlotRecords; ++i)
        memcpy(batch.heads[i] + First / 2,
               __builtin_assume_aligned(piece + i * kStripRows * kSize, kSize < 8 ? 2 * kSize : 16),
               2 * kSize);
      load_heads<First + kSize>(strip);
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
  __device__ __forceinline__ void load(const uint8_t* strip, int tile) {
    read<L::kLowBits>(batch.low[tile], strip + tile * L::kLowTile);
    if constexpr (L::kHighBits > 0)
      read<L::kHighBits>(batch.high[tile], strip + P::kHighAt + tile * L::kHighTile);
  }
  __device__ __forceinline__ void begin(const uint8_t* strip) {
    load_heads(strip);
    load(strip, 0);
    affines[0].prepare(batch, 0);
    affines[1].prepare(batch, 1);
  }
};

// Offsets of an entry as A fragments of a product with sums of activations (sum_activations): of runs 2c and
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
  __device__ __forceinline__ Offsets(const Weights<P>& weights, const uint8_t* strip, int eight) {
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
      const uint8_t* own = strip + P::kHeadsAt + L::row_in_piece(c, threadIdx.x % 32 / 4, 0);
      memcpy(record.words, __builtin_assume_aligned(own, 16), 2 * L::kRecordBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        set(half, F::affine(HeadBlock<F>(record, 0, half).bytes, 0).offset,
            F::affine(HeadBlock<F>(record, F::kGroup, half).bytes, 0).offset);
    }
  }
  __device__ __forceinline__ void multiply(float (&sums)[P::kTokenTiles][4], uint32_t activations) const {
    const uint32_t a[2][4] = {{high[0], high[1], high[0], high[1]}, {rest[0], rest[1], rest[0], rest[1]}};
#pragma unroll
    for (int t = 0; t < P::kTokenTiles; t += 2) {
      const uint4 b = load_shared(activations + t * 256 + threadIdx.x % 32 * 16);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        mma_16x8x16(sums[t], a[part], b.x, b.y, BFloat16{});
        mma_16x8x16(sums[t + 1], a[part], b.z, b.w, BFloat16{});
      }
    }
  }
};

// Where a slot's activations and their sums are. Of activations what this lane names to ldmatrix, for each of
// the four steps of a tile.
struct Activations {
  uint32_t x[4], sums;
};

template <class P>
__device__ __forceinline__ void multiply_entry(float (&sums)[P::kTokenTiles][4], const uint8_t* strip,
                                               const Activations& of) {
  using F = typename P::Format;
  using T = typename P::T;
  Weights<P> weights;
  weights.begin(strip);
  if constexpr (F::kOffset)
#pragma unroll
    for (int i = 0; i < P::kSums; ++i)
      Offsets<P>(weights, strip, i).multiply(sums, of.sums + i * P::kSumBytes);
#pragma unroll
  for (int run = 0; run < P::kRuns; ++run) {
    float parts[P::kTokenTiles][4] = {}, scales[2];
#pragma unroll
    for (int i = 0; i < P::kSumSteps; ++i) {
      const int step = run * P::kSumSteps + i, tile = step / 4;
      if (step % 4 == 0 && tile + 1 < P::kSlotTiles) weights.load(strip, tile + 1);
      uint32_t a[4];
      P::Codes::make(weights.batch.low[tile], weights.batch.high[tile], step % 4, a);
#pragma unroll
      for (int t = 0; t < P::kTokenTiles; t += 2) {
        uint32_t b[4];
        load_matrices(b, of.x[step % 4] + tile * P::kPlaceBytes + t * 1024);
        mma_16x8x16(parts[t], a, b[0], b[1], T{});
        mma_16x8x16(parts[t + 1], a, b[2], b[3], T{});
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scales[half] = weights.affines[half].get(weights.batch, run * P::kSumSteps * 16, half).scale;
#pragma unroll
    for (int t = 0; t < P::kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[t][e] = __fmaf_rn(scales[e / 2], parts[t][e], sums[t][e]);
  }
}

// Sums of a tile, [run of columns][token][row] where activations were; and from there to y.
template <class P>
struct Output {
  using F = typename P::Format;
  using T = typename P::T;
  const GemmPackedArgs& args;
  const Work& work;
  int tile;
  float* area;

  __device__ __forceinline__ int runs() const { return kTeams / work.s.row_groups; }
  // Four more: so a warp's sums lie in different banks.
  __device__ __forceinline__ int pitch() const { return work.s.row_groups * kGroupRows + 4; }
  __device__ __forceinline__ void leave(const float (&sums)[P::kTokenTiles][4]) const {
    const int team = threadIdx.x / kTeamThreads, lane = threadIdx.x % 32;
    const int run = team / work.s.row_groups, group = team % work.s.row_groups;
    float* own = area + (run * P::kTokens + lane % 4 * 2) * pitch() + group * kGroupRows +
                 threadIdx.x % kTeamThreads / 32 * 16 + lane / 4;
#pragma unroll
    for (int t = 0; t < P::kTokenTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        own[(t * 8 + e % 2) * pitch() + e / 2 * 8] = sums[t][e] * (1 << P::Codes::kDown);
  }
  __device__ __forceinline__ float total(int token, int row) const {
    float sum = 0;
    for (int part = 0; part < work.s.parts; ++part)
      for (int run = 0; run < runs(); ++run) {
        const float* at = area + (run * P::kTokens + token) * pitch() + row;
        const float v = work.s.parts == 1 ? *at : load_float_there(address_in(shared_address(at), part));
        sum += v;
      }
    return sum;
  }
  // One output of w, or of up.
  __device__ __forceinline__ float value(int token, int row, int64_t y_col, int64_t matrix) const {
    const float sum = total(token, row);
    if (sum == sum) return sum;
    const int64_t strip = y_col / kStripRows;
    return packed_gemm::dot_decoded<F>(args.packed + matrix + strip * P::L::strip_bytes(args.k),
                                       static_cast<int>(y_col % kStripRows),
                                       static_cast<const T*>(args.x) + token * args.k, args.k);
  }
  __device__ __forceinline__ void store() const {
    const int rows = work.s.gated ? kGroupRows : work.s.row_groups * kGroupRows;
    const int tokens = static_cast<int>(args.m), row = static_cast<int>(threadIdx.x) % rows;
    const int64_t col = work.first_row(tile, 0) + row;
    if (col >= args.n) return;
    const float bias = args.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(args.bias)[col]);
    const int end = tokens * (work.part + 1) / work.s.parts;
#pragma unroll 1
    for (int token = tokens * work.part / work.s.parts + static_cast<int>(threadIdx.x) / rows; token < end;
         token += P::kMultipliers / rows) {
      const int64_t at = token * args.n + col;
      float v = 0, factor = 1;
#pragma unroll 1
      for (int matrix = 0; matrix <= work.s.gated; ++matrix) {
        if (matrix > 0) factor = silu(v);
        v = value(token, row + matrix * kGroupRows, col, matrix * args.up_at);
      }
      if (work.s.gated) v *= factor;
      v += bias;
      if (args.residual != nullptr) v += to_float(static_cast<const T*>(args.residual)[at]);
      store1(static_cast<T*>(args.y) + at, v);
    }
  }
};

template <class P>
__device__ __forceinline__ void multiply(const GemmPackedArgs& args, const Work& work, uint8_t* memory) {
  const uint32_t smem = shared_address(memory);
  const int lane = threadIdx.x % 32, strip = threadIdx.x / 32 % kPanelStrips;
  const int team = threadIdx.x / kTeamThreads, row_groups = work.s.row_groups, group = team % row_groups;
  uint32_t own[4];
#pragma unroll
  for (int step = 0; step < 4; ++step)
    own[step] = smem + (lane / 16 * 8 + lane % 8) * 128 + 16 * ((2 * step + lane / 8 % 2) ^ lane % 8);
#pragma unroll 1
  for (int i = 0; i < work.tiles; ++i) {
    float sums[P::kTokenTiles][4] = {};
#pragma unroll 1
    for (int slot = team / row_groups; slot < work.slots; slot += kTeams / row_groups) {
      const auto activations = slot_place<P>(smem, i * work.slots + slot);
      const auto entry = entry_place<P>(smem, i * work.entries() + slot * row_groups + group);
      Activations of{{}, smem + P::kSumsAt + activations.at * P::kSums * P::kSumBytes};
#pragma unroll
      for (int step = 0; step < 4; ++step) of.x[step] = own[step] + activations.at * P::kSlotBytes;
      mbarrier_wait(activations.full, activations.turn);
      if constexpr (P::Format::kOffset)
        mbarrier_wait(summed_barrier<P>(smem, activations.at), activations.turn);
      mbarrier_wait(entry.full, entry.turn);
      multiply_entry<P>(sums, memory + P::kEntriesAt + entry.at * P::kEntryBytes + strip * P::kStripBytes,
                        of);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(entry.empty()), mbarrier_arrive(activations.empty());
    }
    const Output<P> output{args, work, i, reinterpret_cast<float*>(memory)};
    sync_some<1, P::kMultipliers>();
    output.leave(sums);
    if (work.s.parts > 1)
      sync_cluster();
    else
      sync_some<1, P::kMultipliers>();
    output.store();
    publish_to_copies();
    if (i + 1 < work.tiles) mbarrier_arrive(turned_barrier<P>(smem));
  }
}

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__((Tile<F, X, Tokens>::kThreads), 1)
    few_kernel([[maybe_unused]] const __grid_constant__ GemmPackedArgs args,
               [[maybe_unused]] const Schedule schedule,
               [[maybe_unused]] const __grid_constant__ CUtensorMap x) {
#if __CUDA_ARCH__ >= 900
  using P = Tile<F, X, Tokens>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const memory = dynamic + (-shared_address(dynamic) & 1023);
  const uint32_t smem = shared_address(memory);
  const Work work(schedule, P::kSlotTiles);
  const int copier = static_cast<int>(threadIdx.x) - P::kMultipliers;
  const WeightCopies<P> weights{args, work, smem, (copier - 64) / 32};
  if (copier >= 64) weights.copy_first();
  if (copier == 0) expect_copies(x);
  if (threadIdx.x < P::kBarriers) {
    const int of = threadIdx.x;
    const uint32_t full = smem + P::kBarriersAt + 16 * of;
    const bool slot = of < P::kSlots || of > P::kOthers, turned = of == P::kOthers;
    mbarrier_init(full, slot ? 1 : turned ? P::kMultipliers : 64);
    mbarrier_init(full + 8, slot ? kPanelStrips * schedule.row_groups : kPanelStrips);
    publish_barriers();
  }
  __syncthreads();
  if (copier < 0) {
    multiply<P>(args, work, memory);
  } else {
    if (copier == 0) {
      // What weights are does not depend on the previous kernel; who has seen activations comes behind it.
      wait_for_previous_kernel();
      let_next_kernel_start();
      copy_activations<P>(work, x, smem);
    } else if (copier >= 64) {
      weights.copy_others();
    } else if (copier >= 32) {
      if constexpr (F::kOffset) sum_activations<P>(work, smem);
    }
    __syncwarp();
    if (schedule.parts > 1) sync_cluster();  // with the sums' exchange
  }
  if (schedule.parts > 1) sync_cluster();  // nobody ends whose sums are read
#endif
}

// args.m up to Tokens.
template <PackableFormat F, class X, int Tokens>
cudaError_t launch(const GemmPackedArgs& args, const Schedule& schedule, const CUtensorMap& x,
                   const Device& device, cudaStream_t stream) {
  const auto kernel = few_kernel<F, X, Tokens>;
  constexpr int kBytes = Tile<F, X, Tokens>::kBytes;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(schedule.clusters * schedule.parts, Tile<F, X, Tokens>::kThreads, device,
                               stream, kBytes, schedule.parts);
  return cudaLaunchKernelEx(&launch.config, kernel, args, schedule, x);
}

template <class X, int Tokens>
cudaError_t launch_type(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                        cudaStream_t stream) {
  CUtensorMap x;
  cudaError_t status = describe_tiles(x, {args.x, args.m, 2 * args.k, 2 * args.k}, Tokens);
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) status = launch<F, X, Tokens>(args, schedule, x, device, stream);
  });
  return status;
}

}  // namespace quantgemm::packed_few
