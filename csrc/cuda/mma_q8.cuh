// SPDX-License-Identifier: MIT
// The instructions of the int8 tensor-core product, one wrapper each (PTX ISA: cp.async in
// "Data Movement", ldmatrix and mma in "Warp Level Matrix Instructions"), beside those of ptx.cuh.
// Fragments of m16n8k32, lane = 4 r + c:  A: rows r, r+8, quads c, 4+c   B: column r, quads c, 4+c
//                                         C: rows r, r, r+8, r+8, columns 2c, 2c+1, 2c, 2c+1
#pragma once
#include "ptx.cuh"

namespace quantgemm {

// If wanted: Bytes from global to shared memory, behind the thread's back; all but `valid` of them
// become zero. Predicated, not branched around, so that arithmetic can be scheduled across it.
template <int Bytes>
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool wanted,
                                           int valid = Bytes) {
  if constexpr (Bytes == 16) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %3; }" ::"r"(
            target),
        "l"(source), "r"(static_cast<int>(wanted)), "r"(valid)
        : "memory");
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global [%0], [%1], %4, %3; }" ::"r"(
            target),
        "l"(source), "r"(static_cast<int>(wanted)), "r"(valid), "n"(Bytes)
        : "memory");
  }
}

// Integer accumulators start at the bits of 1.5 · 2^23: read as float they are 1.5 · 2^23 + sum.
inline constexpr uint32_t kMagicBits = 0x4b400000u;
inline constexpr float kMagic = 12582912.0f;

// d = magic + A · B over 32 weights
__device__ __forceinline__ void multiply_32(uint32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(kMagicBits));
}
// The same from four registers that hold the magic: a loop that keeps them does not make them anew.
__device__ __forceinline__ void multiply_32(uint32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, const uint4& magic) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(magic.x), "r"(magic.y),
        "r"(magic.z), "r"(magic.w));
}
// d = magic + A · B over 16 weights: quad c of rows r and r+8
__device__ __forceinline__ void multiply_16(uint32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%7, %7, %7, %7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(kMagicBits));
}

}  // namespace quantgemm
