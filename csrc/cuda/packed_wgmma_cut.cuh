// SPDX-License-Identifier: MIT
// Tiles whose columns several clusters have (gemm_packed_wgmma.h, Schedule): a block's sums go to the scratch
// memory and come from there, always added in the same order. A warp that does not multiply raises the flags
// and waits for them, so that multipliers need not wait for memory in between.
#pragma once
#include "packed_wgmma_output.cuh"

namespace quantgemm::packed_wgmma {

// As sync_some, without waiting: what this thread wrote comes before whatever those that wait do next.
// PTX ISA 9.7.13.1 (barrier.arrive).
template <int Id, int Threads>
__device__ __forceinline__ void arrive_some() {
  asm volatile("bar.arrive %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}
// Behind a barrier, for what all of the block has written. PTX ISA 9.7.9.11 (st), 9.7.9.8 (ld).
__device__ __forceinline__ void publish_flag(uint64_t* flag, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t read_flag(const uint64_t* flag) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}
// Past the L1.
__device__ __forceinline__ float4 load_fresh(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

template <class P>
__device__ __forceinline__ uint8_t* sums_of(const Schedule& s, int block) {
  return s.scratch + block * scratch_sums(P::kTokens);
}
template <class P>
__device__ __forceinline__ uint64_t* flag_at(const Schedule& s, int block) {
  return reinterpret_cast<uint64_t*>(sums_of<P>(s, s.blocks())) + block;
}

// Named barriers: sums of this block are on their way; sums of others are there.
constexpr int kSumsLeft = 4, kSumsThere = 5;

template <class P>
__device__ __forceinline__ void leave_for_others(const Sums<P>& sums, const Schedule& s) {
  leave_sums<P>(sums, sums_of<P>(s, blockIdx.x));
  arrive_some<kSumsLeft, P::kMultipliers + 32>();
}
// Those of the other pieces of this tile, in the order of their columns, which is that of lower blocks.
template <class P>
__device__ __forceinline__ void add_others(Sums<P>& sums, const Walk<P::kSlotSteps>& at) {
  sync_some<kSumsThere, P::kMultipliers + 32>();
  const Schedule& s = at.s;
  const int end = (at.tile + 1) * s.units();
  int block = static_cast<int>(blockIdx.x) - s.ranks();
  // So many at a time: the way there is long. Of 32 tokens four would cost the loop above registers.
  constexpr int kPieces = P::kSumTokens / 8, kBlocks = P::kTokens == 32 ? 3 : 16 / kPieces;
#pragma unroll 1
  for (int unit = s.first_unit(at.cluster()) + s.range; unit < end;
       unit += kBlocks * s.range, block -= kBlocks * s.ranks()) {
#pragma unroll
    for (int part = 0; part < P::kSums; ++part) {
      float4 more[kBlocks][kPieces] = {};
#pragma unroll
      for (int other = 0; other < kBlocks; ++other)
        if (unit + other * s.range < end) {
          const auto* from = reinterpret_cast<const float4*>(sums_of<P>(s, block - other * s.ranks()));
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            more[other][i] = load_fresh(from + (part * kPieces + i) * P::kMultipliers + threadIdx.x);
        }
#pragma unroll
      for (int other = 0; other < kBlocks; ++other)
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const float4 d = more[other][i];
          float* const sum = sums[part] + 4 * i;
          sum[0] += d.x, sum[1] += d.y, sum[2] += d.z, sum[3] += d.w;
        }
    }
  }
}

// One warp.
template <class P>
__device__ __forceinline__ void pass_sums(const Schedule& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, cluster = static_cast<int>(blockIdx.x) / s.ranks();
  const int units = s.units(), first = s.first_unit(cluster), last = s.last_unit(cluster);
  if (first >= last) return;
  wait_for_previous_kernel();  // it may have had this memory
  if (first % units != 0) {
    sync_some<kSumsLeft, P::kMultipliers + 32>();
    if (lane == 0) publish_flag(flag_at<P>(s, blockIdx.x), flag_of(blockIdx.x));
  }
  const int tile = last / units * units;  // that the range ends in
  if (tile < first || tile == last) return;
#pragma unroll 1
  for (int i = lane; last + i * s.range < tile + units; i += 32) {
    const int other = static_cast<int>(blockIdx.x) - (i + 1) * s.ranks();
    uint64_t* const flag = flag_at<P>(s, other);
    while (read_flag(flag) != flag_of(other)) __nanosleep(20);
    *flag = 0;
  }
  __syncwarp();
  arrive_some<kSumsThere, P::kMultipliers + 32>();
}

}  // namespace quantgemm::packed_wgmma
