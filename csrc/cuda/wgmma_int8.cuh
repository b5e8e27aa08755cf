// SPDX-License-Identifier: MIT
// wgmma.cuh with int8: d[64, 64] = or += a[64, 32] · b[64, 32]ᵀ, integer sums. Lane 4r + c of a warp holds of
// A columns 4c … 4c + 3 of rows r and r + 8 (words 0, 1), then those 16 further (words 2, 3), of the sums
// what it does elsewhere. B lies as swizzled_rows() says; 32 of k further are 32 bytes more. PTX ISA 9.7.15.
#pragma once
#include "wgmma.cuh"

namespace quantgemm {

template <bool kAdd>
__device__ __forceinline__ void wgmma_int8(int (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, add; }"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
        "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
        "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]),
        "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]),
        "+r"(d[30]), "+r"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0));
}
__device__ __forceinline__ void sums_are_ready(int (&d)[32]) {
#pragma unroll
  for (int& sum : d) asm volatile("" : "+r"(sum)::"memory");
}

}  // namespace quantgemm
