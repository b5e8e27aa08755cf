// SPDX-License-Identifier: MIT
// The instructions of the int8 product by warpgroups (PTX ISA: "Asynchronous Warpgroup Level Matrix
// Instructions", integer variants), sm_90a alone. d: 64 x 128 sums; a lane 4r + c of warp w holds, for
// each 8 columns, rows 16w + r, 16w + r, 16w + r+8, 16w + r+8, columns 2c, 2c+1, 2c, 2c+1.
#pragma once
#include <cstdint>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define QG_WGMMA 1
#endif

namespace quantgemm {

// Matrices in shared memory, whose 16-byte pieces lie
//   swizzled: rows of 128 bytes, piece p of row i at place p ^ (i % 8); eight rows after eight rows
//   plain: eight rows' first pieces, their second ones, then the next eight rows
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t address) {
  return uint64_t{address >> 4} | 1ull << 16 | uint64_t{1024 >> 4} << 32 | 1ull << 62;
}
__device__ __forceinline__ uint64_t plain_matrix(uint32_t address) {
  return uint64_t{address >> 4} | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
}

// ---- barriers in shared memory, by address ----
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is complete; the one before the first counts as complete, parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef QG_WGMMA
  asm volatile(
      "{ .reg .pred done;\n"
      "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again%=; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Registers of each thread of this warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
#ifdef QG_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
#ifdef QG_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// What ordinary instructions wrote to shared memory is there for wgmma, after the next barrier.
__device__ __forceinline__ void publish_to_wgmma() {
#ifdef QG_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define QG_SUMS_TEXT                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "  \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}"
#define QG_SUMS                                                                                             \
  "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),           \
      "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), \
      "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]),            \
      "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]),            \
      "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]),            \
      "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]),            \
      "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), "+r"(d[48]), "+r"(d[49]), "+r"(d[50]),            \
      "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), "+r"(d[56]), "+r"(d[57]),            \
      "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])

// d += A · B over 32 of k, A in registers as in m16n8k32.
__device__ __forceinline__ void add_product(uint32_t (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#ifdef QG_WGMMA
  asm volatile(
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " QG_SUMS_TEXT
      ", {%64, %65, %66, %67}, %68, 1;\n"
      "wgmma.commit_group.sync.aligned;"
      : QG_SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
      : "memory");
#endif
}
// d = start · startᵀ + A · B, start the same matrix for both sides.
__device__ __forceinline__ void start_product(uint32_t (&d)[64], uint64_t start, const uint32_t (&a)[4],
                                              uint64_t b) {
#ifdef QG_WGMMA
  asm volatile(
      "wgmma.fence.sync.aligned;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " QG_SUMS_TEXT
      ", %69, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " QG_SUMS_TEXT
      ", {%64, %65, %66, %67}, %68, 1;\n"
      "wgmma.commit_group.sync.aligned;"
      : QG_SUMS
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "l"(start)
      : "memory");
#endif
}
__device__ __forceinline__ void wait_for_product(uint32_t (&d)[64]) {
#ifdef QG_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" : QG_SUMS : : "memory");
#endif
}
#undef QG_SUMS
#undef QG_SUMS_TEXT

}  // namespace quantgemm
