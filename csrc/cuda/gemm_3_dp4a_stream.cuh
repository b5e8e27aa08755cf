// SPDX-License-Identifier: MIT
// How weights reach a lane's registers: pieces of rows fly to a warp's ring in shared memory, on
// Hopper by the bulk copy engine, before that by cp.async; then a lane takes its bytes in the widest
// loads that their place allows.
#pragma once
#include <type_traits>

#include "gemm_3_dp4a.cuh"
#include "ptx.cuh"

namespace quantgemm::dp4a {

// The L2 asks for these bytes, a multiple of 16 at such an address. Whoever writes them meanwhile, it has
// what they wrote: what is asked for early is never stale.
__device__ __forceinline__ void prefetch_to_l2(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (bytes > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// How pieces of rows arrive in a warp's ring. A row's first lane calls start(); wait() returns to
// all lanes when the stage's rows are there. `bytes` is a multiple of 16, as are both addresses.
#if __CUDA_ARCH__ >= 900
struct Arrivals {  // the bulk copy engine: one instruction of one lane, completed on a barrier
  uint32_t barriers, phase = 0;
  uint64_t policy;  // weights are read once: let them leave the L2 before all else

  __device__ Arrivals(uint64_t* stages, int count, int rows, int lane) : barriers(shared_address(stages)) {
    if (lane < count)
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barriers + 8 * lane), "r"(rows));
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
  }
  __device__ void start(int stage, uint32_t to, const void* from, int bytes, int in_row, int) {
    if (in_row != 0) return;
    const uint32_t barrier = barriers + 8 * stage;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    if (bytes > 0)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
          "[%3], %4;" ::"r"(to),
          "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
          : "memory");
  }
  __device__ void close() {}
  template <int Stages>
  __device__ void wait(int stage) {
    asm volatile(
        "{\n .reg .pred p;\n wait: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n @!p bra wait;\n}" ::"r"(
            barriers + 8 * stage),
        "r"(phase)
        : "memory");
    if (stage == Stages - 1) phase ^= 1;
    __syncwarp();
  }
};
#else
struct Arrivals {  // 16 bytes an instruction, counted in groups
  __device__ Arrivals(uint64_t*, int, int, int) {}
  __device__ void start(int, uint32_t to, const void* from, int bytes, int in_row, int per_row) {
    for (int i = 16 * in_row; i < bytes; i += 16 * per_row)
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + i),
                   "l"(static_cast<const uint8_t*>(from) + i));
  }
  __device__ void close() { cp_async_commit(); }
  template <int Stages>
  __device__ void wait(int) {
    cp_async_wait<Stages - 2>();
    __syncwarp();
  }
};
#endif

// Bytes of shared memory to registers, in the widest loads that their number and place allow.
template <int Bytes>
struct Window {
  static constexpr int kWords = (Bytes + 3) / 4;
  using Widest =
      std::conditional_t<Bytes % 16 == 0, uint4, std::conditional_t<Bytes % 8 == 0, uint2, uint32_t>>;
  alignas(16) uint8_t bytes[4 * kWords];

  template <class Vector>
  __device__ __forceinline__ void load_as(const uint8_t* source) {
#pragma unroll
    for (int i = 0; i < Bytes / static_cast<int>(sizeof(Vector)); ++i) {
      const Vector v = reinterpret_cast<const Vector*>(source)[i];
      memcpy(bytes + i * sizeof(Vector), &v, sizeof v);
    }
  }
  __device__ __forceinline__ void load(const uint8_t* source) {
    const uint32_t address = shared_address(source);
    if (Bytes % 4 == 0 && address % sizeof(Widest) == 0) {
      load_as<Widest>(source);
    } else {
      load_across_words(source - address % 4, 8 * (address % 4));
    }
  }
  __device__ __forceinline__ void load_across_words(const uint8_t* source, uint32_t shift) {
    const auto* aligned = reinterpret_cast<const uint32_t*>(source);
    uint32_t low = aligned[0];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t high = aligned[i + 1], word = __funnelshift_r(low, high, shift);
      memcpy(bytes + 4 * i, &word, 4);
      low = high;
    }
  }
};

}  // namespace quantgemm::dp4a
