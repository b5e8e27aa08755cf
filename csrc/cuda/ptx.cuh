// SPDX-License-Identifier: MIT
// The instructions that CUDA C++ has no name for. PTX ISA sections are those of version 8.7.
#pragma once
#include "../args.h"
#include "../formats/portable.h"

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

// The compiler takes x for changed here, so it will not compute it again from what it was made of.
__device__ __forceinline__ void keep_in_register(uint32_t& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep_in_register(bytes_ptr& x) { asm volatile("" : "+l"(x)); }

// A shared memory address as these instructions want it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Matrices of 8 × 16 bytes; lane i gives the address of row i % 8 of matrix i / 8 and receives bytes
// 4c … 4c + 3 of row r of each. PTX ISA 9.7.14.5.15 (ldmatrix), sm_75.
template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

template <bool Transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  load_matrices<Transposed>(words, shared_address(row));
}

// 16 bytes of shared memory. Loads of this kind stay in the order in which they are written, which the
// compiler's own do not: it places them right before their use, and a warp waits.
__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
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

// ---- barriers in shared memory: a phase ends when as many arrivals as were announced have come ----
// PTX ISA 9.7.13.15 (mbarrier), sm_80. Arrivals release and waits acquire, within the block.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Arrives when this thread's copies so far have. PTX ISA 9.7.13.15.17, sm_80.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Waits for the end of a phase with this parity. From sm_90 on the waiting warp sleeps.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define QG_WAIT "mbarrier.try_wait.parity"
#else
#define QG_WAIT "mbarrier.test_wait.parity"
#endif
  uint32_t done;
  do {
    asm volatile("{ .reg .pred done; " QG_WAIT ".shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
#undef QG_WAIT
}

// A barrier of some of the block's warps: Threads threads that name the same Id, 1 … 15.
// PTX ISA 9.7.13.1.
template <int Id, int Threads>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}

// Registers of each thread of this group of four warps from here on; only sm_90a can move them.
// PTX ISA 9.7.19.5 (setmaxnreg).
template <int Count>
__device__ __forceinline__ void shrink_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}
template <int Count>
__device__ __forceinline__ void grow_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
#endif
}

// 2^x, about 2 ulp; results below 2^-126 are 0. PTX ISA 9.7.3.20 (ex2).
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The 8×8 matrix of 16-bit values of which lane 4r + c holds columns 2c 2c+1 of row r, transposed.
// PTX ISA 9.7.14.5.17 (movmatrix), sm_75.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

}  // namespace quantgemm
