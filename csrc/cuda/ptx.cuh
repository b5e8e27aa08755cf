// SPDX-License-Identifier: MIT
// The instructions that CUDA C++ has no name for. PTX ISA sections are those of version 8.7.
#pragma once
#include "../args.h"

namespace quantgemm {

// d[16, 8] += a[16, 16] · b[16, 8] of a warp, float32 sums. Lane 4r + c holds
//   a: rows r, r + 8, r, r + 8 of columns 2c 2c+1 (words 0, 1) and 2c+8 2c+9 (words 2, 3)
//   b: rows 2c 2c+1 (word 0) and 2c+8 2c+9 (word 1) of column r
//   d: columns 2c 2c+1 of row r (0, 1) and of row r + 8 (2, 3)
// PTX ISA 9.7.14.5.14 (mma.sync), fragments of m16n8k16: 9.7.14.5.8; sm_80.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                            Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                            BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A shared memory address as these instructions want it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory in the background, past the L1; of them the first
// valid_bytes are read and the others become zero. PTX ISA 9.7.9.25.3.1 (cp.async), sm_80.
__device__ __forceinline__ void cp_async16(uint32_t target, const void* source, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid_bytes)
               : "memory");
}
// The same under a condition, and with zeros instead of the source's bytes if `zero` (ignore-src).
__device__ __forceinline__ void cp_async16_if(bool active, uint32_t target, const void* source, bool zero) {
  asm volatile(
      "{ .reg .pred active, zero; setp.ne.b32 active, %2, 0; setp.ne.b32 zero, %3, 0;"
      " @active cp.async.cg.shared.global [%0], [%1], 16, zero; }" ::"r"(target),
      "l"(source), "r"(static_cast<int>(active)), "r"(static_cast<int>(zero))
      : "memory");
}
// Closes a group of copies; waits until all but the Pending latest groups of this thread have
// arrived. Other threads' copies need a barrier as well. PTX ISA 9.7.9.25.3.2 and .3, sm_80.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace quantgemm
