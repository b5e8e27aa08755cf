// SPDX-License-Identifier: MIT
// The int8 product (int8_product.h) on sm_90a. A warpgroup has 64 tokens, whose codes of a group of columns
// it keeps in registers, and all rows of w of a tile, 64 at a time: while wgmma multiplies a quarter of the
// rows, the integer sums of the quarter before it become floats, times both scales. One thread copies, the
// codes of w a part for each block of its cluster. Limit: the tensor cores and, nearly as much, the
// multiply-adds.
#pragma once
#include "dependent_launch.cuh"
#include "gemm_packed_int8.h"
#include "memory.cuh"
#include "tensor_copy.cuh"
#include "wgmma_int8.cuh"

namespace quantgemm::packed_int8 {

constexpr int kGroupThreads = 128, kWarpgroups = kInt8Tokens / 64, kMultipliers = kWarpgroups * kGroupThreads;
constexpr int kThreads = kMultipliers + kGroupThreads;  // one of these copies
constexpr int kMultiplierRegisters = 240, kCopierRegisters = 24;
constexpr int kQuarters = kInt8Rows / 64, kRowBytes = 128;  // of half a group
// Shared memory: places with codes of x and of w, of w half of the rows at a time: two halves of a group's
// columns, each [row][128], swizzled; their scales; barriers, of x, then of the rows.
constexpr int kPlaces = 2, kBoxRows = 128;  // as the copy engine brings them
constexpr int kBoxBytes = kBoxRows * kRowBytes, kCodeBytes = 6 * kBoxBytes;
static_assert(kInt8Tokens == kBoxRows && kInt8Rows == 2 * kBoxRows && kInt8Group == 2 * kRowBytes);
constexpr int kScaleBytes = 4 * (kInt8Tokens + kInt8Rows), kScalesAt = kPlaces * kCodeBytes;
constexpr int kBarriersAt = kScalesAt + kPlaces * kScaleBytes, kPlaceBarriers = 16 * 3;
constexpr int kSharedBytes = 1024 + kBarriersAt + kPlaces * kPlaceBarriers;
static_assert(kSharedBytes <= 232448);

struct Place {
  int index = 0;
  uint32_t turn = 0;
  __device__ __forceinline__ void next() {
    if (++index == kPlaces) index = 0, turn ^= 1;
  }
};

// The tile that a block is at. Some sets of tokens with all rows, then the next ones: what is read at a time
// fits in the L2.
struct Walk {
  const Schedule& s;
  int mate, tile;
  __device__ __forceinline__ explicit Walk(const Schedule& s)
      : s(s), mate(static_cast<int>(blockIdx.x) % s.mates), tile(static_cast<int>(blockIdx.x) / s.mates) {}
  __device__ __forceinline__ bool valid() const { return tile < s.tiles; }
  __device__ __forceinline__ void next() { tile += s.clusters; }
  __device__ __forceinline__ void locate(int& token_tile, int& row_tile) const {
    constexpr int kTogether = 16;
    const int band = tile / (kTogether * s.row_tiles), in_band = tile % (kTogether * s.row_tiles);
    const int height = min(kTogether, s.token_sets - band * kTogether);
    token_tile = (band * kTogether + in_band % height) * s.mates + mate;
    row_tile = in_band / height;
  }
};

__device__ __forceinline__ void copy(const Schedule& s, const CUtensorMap& x, const CUtensorMap& w,
                                     const float* token_scales, const float* row_scales, uint32_t smem) {
  Place place;
  for (Walk at(s); at.valid(); at.next()) {
    int token_tile, row_tile;
    at.locate(token_tile, row_tile);
    const int first[3] = {token_tile * kInt8Tokens, row_tile * kInt8Rows, row_tile * kInt8Rows + kBoxRows};
#pragma unroll 1
    for (int group = 0; group < s.groups; ++group, place.next()) {
      const uint32_t barriers = smem + kBarriersAt + place.index * kPlaceBarriers;
      const uint32_t codes = smem + place.index * kCodeBytes;
      const uint32_t scales = smem + kScalesAt + place.index * kScaleBytes;
#pragma unroll
      for (int part = 0; part < 3; ++part) {
        const uint32_t full = barriers + 16 * part;
        mbarrier_wait(full + 8, place.turn ^ 1);
        mbarrier_arrive_expecting(full, 2 * kBoxBytes + 4 * kBoxRows);
        const float* from =
            part == 0 ? token_scales + group * s.scale_tokens : row_scales + group * s.scale_rows;
        copy_bulk(scales + 4 * kBoxRows * part, from + first[part], 4 * kBoxRows, full);
        // A block of two copies half of the rows for both.
        if (part > 0 && s.mates == 2 && part - 1 != at.mate) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t to = codes + (2 * part + half) * kBoxBytes;
          const int col = group * kInt8Group + half * kRowBytes;
          if (part > 0 && s.mates == 2)
            copy_tile(to, w, col, first[part], full, 3);
          else
            copy_tile(to, part == 0 ? x : w, col, first[part], full);
        }
      }
    }
  }
}

__device__ __forceinline__ float load_float(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ float2 load_float2(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}

// sums += integers · scales; row_scales of the quarter.
__device__ __forceinline__ void add_scaled(float (&sums)[32], const int (&integers)[32], float2 tokens,
                                           uint32_t row_scales) {
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    const float2 rows = load_float2(row_scales + 32 * t);
    const int* d = integers + 4 * t;
    float* y = sums + 4 * t;
    y[0] = __fmaf_rn(static_cast<float>(d[0]) * tokens.x, rows.x, y[0]);
    y[1] = __fmaf_rn(static_cast<float>(d[1]) * tokens.x, rows.y, y[1]);
    y[2] = __fmaf_rn(static_cast<float>(d[2]) * tokens.y, rows.x, y[2]);
    y[3] = __fmaf_rn(static_cast<float>(d[3]) * tokens.y, rows.y, y[3]);
  }
}

// ---- y ----
// Values of a lane: of token `token` and the one 8 further, rows `row` + 8 i + {0, 1}.
template <class T>
__device__ __forceinline__ void store_sums(float (&sums)[kQuarters][32], const GemmPackedArgs& args,
                                           int64_t token, int64_t row) {
  const int c = threadIdx.x % 4;
  T* const y = static_cast<T*>(args.y) + token * args.n;
  const T* const biases = static_cast<const T*>(args.bias);
  const bool wide = sizeof(T) == 2 && args.n % 8 == 0;
  if constexpr (sizeof(T) == 2) {
    if (wide && biases == nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool there = token + 8 * half < args.m;
        T* const to = y + 8 * half * args.n + row + 8 * c;
        const int rows = static_cast<int>(min(args.n - row, int64_t{kInt8Rows})) - 8 * c;
#pragma unroll
        for (int i = 0; i < kQuarters * 8; i += 4) {
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* d = sums[i / 8] + 4 * (i % 8 + j) + 2 * half;
            words[j] = pack_pair(d[0], d[1], T{});
          }
          transpose_quad(words);
          if (there && 8 * i < rows)
            *reinterpret_cast<uint4*>(to + 8 * i) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kQuarters * 8; i += 4) {  // 32 rows
    const int64_t first = row + 8 * i;
    float v[2][4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t col = first + 8 * j + 2 * c + e;
        const float bias = biases != nullptr && col < args.n ? to_float(biases[col]) : 0.0f;
        v[0][j][e] = sums[i / 8][4 * (i % 8 + j) + e] + bias;
        v[1][j][e] = sums[i / 8][4 * (i % 8 + j) + 2 + e] + bias;
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there = token + 8 * half < args.m;
      T* const to = y + 8 * half * args.n;
      if constexpr (sizeof(T) == 2) {
        if (wide) {
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) words[j] = pack_pair(v[half][j][0], v[half][j][1], T{});
          transpose_quad(words);
          if (there && first + 8 * c < args.n)
            *reinterpret_cast<uint4*>(to + first + 8 * c) =
                make_uint4(words[0], words[1], words[2], words[3]);
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int64_t col = first + 8 * j + 2 * c + e;
          if (there && col < args.n) store1(to + col, v[half][j][e]);
        }
    }
  }
}

// By a whole warp: the vote tells the compiler that its threads stay together, else descriptors leave the
// uniform registers.
__device__ __forceinline__ void mbarrier_wait_together(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!__all_sync(~0u, done != 0));
}

template <class T>
__device__ __forceinline__ void multiply(const GemmPackedArgs& args, const Schedule& s, uint32_t smem) {
  const int lane = threadIdx.x % 32, own_token = threadIdx.x / 32 * 16 + lane / 4;  // and 8 further
  const uint32_t own_row = (threadIdx.x / 32 * 16 + lane % 16) * kRowBytes, lowest = lane % 8,
                 upper = lane / 16;
  const uint32_t mate = address_in(smem, lane % s.mates) - smem;
  Place place;
  for (Walk at(s); at.valid(); at.next()) {
    float sums[kQuarters][32] = {};
    int integers[2][32] = {};
    // The last quarter is added while the next group's first one is multiplied.
    float2 tokens;
    uint32_t scales, used;
    const auto add_last = [&] {
      sums_are_ready(integers[1]);
      add_scaled(sums[kQuarters - 1], integers[1], tokens, scales + 4 * kInt8Tokens + 256 * (kQuarters - 1));
      __syncwarp();
    };
#pragma unroll 1
    for (int group = 0; group < s.groups; ++group, place.next()) {
      const uint32_t codes = __shfl_sync(~0u, smem + place.index * kCodeBytes, 0);
      const uint32_t barriers = smem + kBarriersAt + place.index * kPlaceBarriers;
      mbarrier_wait_together(barriers, place.turn);
      wgmma_wait<0>();  // with the fragments of the group before
      uint32_t a[8][4];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        load_matrices(a[i], codes + i / 4 * kBoxBytes + own_row + 16 * ((2 * (i % 4) + upper) ^ lowest));
      const uint64_t weights = swizzled_rows(codes + 2 * kBoxBytes);
#pragma unroll
      for (int quarter = 0; quarter < kQuarters; ++quarter) {
        int (&d)[32] = integers[quarter % 2];
        const uint64_t b = weights + (quarter / 2 * 2 * kBoxBytes + quarter % 2 * (kBoxBytes / 2)) / 16;
        if (quarter % 2 == 0) mbarrier_wait_together(barriers + 16 * (1 + quarter / 2), place.turn);
        wgmma_fence();
        wgmma_int8<false>(d, a[0], b);
#pragma unroll
        for (int i = 1; i < 8; ++i) wgmma_int8<true>(d, a[i], b + i / 4 * (kBoxBytes / 16) + i % 4 * 2);
        wgmma_commit();
        if (quarter == 0) {
          if (group > 0) {
            add_last();
            if (lane < s.mates) mbarrier_arrive_there(mate + used);
          }
          scales = smem + kScalesAt + place.index * kScaleBytes + 8 * (lane % 4);
          const uint32_t own = smem + kScalesAt + place.index * kScaleBytes + 4 * own_token;
          tokens = make_float2(load_float(own), load_float(own + 32));
          __syncwarp();
          if (lane == 0) mbarrier_arrive(barriers + 8);
        } else {
          wgmma_wait<1>();
          sums_are_ready(integers[1 - quarter % 2]);
          add_scaled(sums[quarter - 1], integers[1 - quarter % 2], tokens,
                     scales + 4 * kInt8Tokens + 256 * (quarter - 1));
          __syncwarp();
          if (quarter == 2 && lane < s.mates) mbarrier_arrive_there(mate + barriers + 16 + 8);
        }
      }
      used = barriers + 32 + 8;
    }
    wgmma_wait<0>();
    add_last();
    if (lane < s.mates) mbarrier_arrive_there(mate + used);
    int token_tile, row_tile;
    at.locate(token_tile, row_tile);
    store_sums<T>(sums, args, int64_t{token_tile} * kInt8Tokens + own_token, int64_t{row_tile} * kInt8Rows);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    int8_kernel([[maybe_unused]] const __grid_constant__ GemmPackedArgs args,
                [[maybe_unused]] const __grid_constant__ Schedule schedule,
                [[maybe_unused]] const __grid_constant__ CUtensorMap x,
                [[maybe_unused]] const __grid_constant__ CUtensorMap w,
                [[maybe_unused]] const float* token_scales, [[maybe_unused]] const float* row_scales) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) uint8_t dynamic[];
  const uint32_t smem = shared_address(dynamic) + (-shared_address(dynamic) & 1023);
  if (threadIdx.x < kPlaces * 3) {
    const uint32_t full = smem + kBarriersAt + 16 * threadIdx.x;
    const bool counts_tokens = threadIdx.x % 3 == 0;
    mbarrier_init(full, 1);
    mbarrier_init(full + 8, kMultipliers / 32 * (counts_tokens ? 1 : schedule.mates));
    publish_barriers();
  }
  const bool alone = schedule.mates == 1;
  alone ? __syncthreads() : sync_cluster();
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (threadIdx.x < kMultipliers) {
    grow_registers<kMultiplierRegisters>();
    multiply<T>(args, schedule, smem);
  } else {
    shrink_registers<kCopierRegisters>();
    if (threadIdx.x == kMultipliers) copy(schedule, x, w, token_scales, row_scales, smem);
    __syncwarp();
  }
  if (!alone) sync_cluster();  // nobody copies to a block that has ended, or arrives there
#endif
}

}  // namespace quantgemm::packed_int8
