// SPDX-License-Identifier: MIT
// How a packed product of few tokens (gemm_packed_few.cuh) makes y of what units leave, while others still
// multiply: some warps add up each entry, others store the strips of which all sums have come.
#pragma once
#include "packed_few_stage.cuh"
#include "packed_stage.cuh"

namespace quantgemm::packed_few {

// Stores to another block of the cluster, counted by a barrier there, and the wait for such a barrier's first
// phase. PTX ISA 9.7.9.12 (st.async), 9.7.13.15.16 (mbarrier.try_wait).
__device__ __forceinline__ void send(uint32_t address, const float4& v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          address),
      "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)),
      "r"(__float_as_uint(v.w)), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void wait_for_sent(uint32_t barrier) {
  for (uint32_t done = 0; !done;)
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;"
        " selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(barrier)
        : "memory");
}

// The warp that adds up tokens 8 · tile …: in the order of columns, run after run. What is complete goes to
// the block that stores it.
template <class P>
__device__ __forceinline__ void add_sums(const Work& work, const Shared<P>& shared, int tile) {
  const int own = tile * P::kQuadBytes + threadIdx.x % 32 * 16;
  Turn turn;
#pragma unroll 1
  for (int panel = 0; panel < work.panels; ++panel) {
    const int units = work.units_of(panel);
#pragma unroll 1
    for (int strip = 0; strip < work.strips; ++strip) {
      mbarrier_wait(shared.left(turn.at), turn.parity);
      const uint8_t* const sums = shared.ring + turn.at * P::kEntryBytes + own;
      float4 sum = *reinterpret_cast<const float4*>(sums);
#pragma unroll
      for (int i = 1; i < kRunUnits; ++i)
        if (i < units) {
          const float4 v = *reinterpret_cast<const float4*>(sums + i * P::kUnitLow);
          sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
      publish_to_copies();  // they write here next
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.empty(turn.at));
      const uint32_t total = shared.totals + strip * P::kTotalBytes + own;
      if (panel > 0) {
        const uint4 v = load_shared(total);
        sum.x += __uint_as_float(v.x), sum.y += __uint_as_float(v.y);
        sum.z += __uint_as_float(v.z), sum.w += __uint_as_float(v.w);
      }
      const int owner = work.owner(strip);
      if (panel + 1 < work.panels || owner == work.part)
        store_shared(total, {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z),
                             __float_as_uint(sum.w)});
      else
        send(address_in(shared.received + work.received(strip, work.part) * P::kTotalBytes + own, owner), sum,
             address_in(shared.complete(work.slot(strip)), owner));
      if (panel + 1 == work.panels && owner == work.part) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.complete(work.slot(strip)));
      }
      turn.advance(work.s.ring);
    }
  }
}

// A strip's y by the warps that store: a lane has a row or two of a token.
template <class P>
struct Output {
  using F = typename P::Format;
  using T = typename P::T;
  static constexpr int kRows = kStripRows * P::kTokens / (32 * P::kWriters), kLanes = kStripRows / kRows;
  const GemmPackedArgs& args;
  const Work& work;
  const Shared<P>& shared;
  int token, row, own;  // own: the first row's place in a strip's sums

  __device__ __forceinline__ Output(const GemmPackedArgs& args, const Work& work, const Shared<P>& shared)
      : args(args), work(work), shared(shared) {
    const int i = threadIdx.x % (32 * P::kWriters);
    token = i / kLanes, row = i % kLanes * kRows;
    own = token / 8 * P::kQuadBytes + (4 * (row % 8) + token % 8 / 2) * 16 + (row / 8 * 2 + token % 2) * 4;
  }
  // Of all blocks of the cluster, in their order.
  __device__ __forceinline__ float total(int strip, int e) const {
    constexpr int kMostParts = 4;
    float v[kMostParts];
#pragma unroll
    for (int part = 0; part < kMostParts; ++part)
      if (part < 1 << work.s.log_parts)
        v[part] =
            load_float(own + e * 64 +
                       (part == work.part ? shared.totals + strip * P::kTotalBytes
                                          : shared.received + work.received(strip, part) * P::kTotalBytes));
    float sum = v[0];
#pragma unroll
    for (int part = 1; part < kMostParts; ++part)
      if (part < 1 << work.s.log_parts) sum += v[part];
    return sum * (1 << P::Codes::kDown);
  }
  static __device__ __forceinline__ float load_float(uint32_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
  }
  // Infinity less infinity is not what the weights say.
  __device__ __forceinline__ float mended(float sum, int64_t col, int64_t matrix) const {
    if (sum == sum) return sum;
    const int64_t strip = col / kStripRows * P::L::strip_bytes(args.k);
    return packed_gemm::dot_decoded<F>(args.packed + matrix + strip, static_cast<int>(col % kStripRows),
                                       static_cast<const T*>(args.x) + token * args.k, args.k);
  }
  __device__ __forceinline__ void store(int strip) const {
    const int64_t col = int64_t{work.first_strip + (strip >> work.s.gated)} * kStripRows + row;
    const int64_t at = token * args.n + col;
    float carried[kRows] = {}, added[kRows] = {};  // residual, bias
    bool inside[kRows];
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      inside[e] = token < args.m && col + e < args.n;
      if (inside[e] && args.bias != nullptr) added[e] = to_float(static_cast<const T*>(args.bias)[col + e]);
      if (inside[e] && args.residual != nullptr)
        carried[e] = to_float(static_cast<const T*>(args.residual)[at + e]);
    }
    wait_for_sent(shared.complete(work.slot(strip)));
#pragma unroll
    for (int e = 0; e < kRows; ++e) {
      if (!inside[e]) continue;
      float sum = mended(total(strip, e), col + e, 0);
      if (work.s.gated) sum = mended(total(strip + 1, e), col + e, args.up_at) * silu(sum);
      if (args.bias != nullptr) sum += added[e];
      if (args.residual != nullptr) sum += carried[e];
      store1(static_cast<T*>(args.y) + at + e, sum);
    }
  }
};

template <class P>
__device__ __forceinline__ void store_sums(const GemmPackedArgs& args, const Work& work,
                                           const Shared<P>& shared) {
  const Output<P> output(args, work, shared);
  wait_for_previous_kernel();  // whose results residual and y may be
#pragma unroll 1
  for (int strip = work.part << work.s.gated; strip < work.strips;
       strip += 1 << work.s.gated << work.s.log_parts)
    output.store(strip);
}

}  // namespace quantgemm::packed_few
