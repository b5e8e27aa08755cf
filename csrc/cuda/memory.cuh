// SPDX-License-Identifier: MIT
// Moving rows between global memory, shared memory and registers in the widest pieces the addresses
// allow, and float32 <-> half, bfloat16 on the way.
#pragma once
#include "../args.h"
#include "../formats/portable.h"

namespace quantgemm {

__device__ __forceinline__ uint32_t pack_pair(float low, float high, Half) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t pack_pair(float low, float high, BFloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What one 16-byte access holds.
template <class T>
inline constexpr int kPerVector = 16 / sizeof(T);

// Neighbouring values as one 16-byte store. Streaming: results are larger than the L2 and are not
// read again by the same kernel.
__device__ __forceinline__ void store_vector(float* out, const float (&v)[4]) {
  __stcs(reinterpret_cast<float4*>(out), make_float4(v[0], v[1], v[2], v[3]));
}
template <class Real16>
__device__ __forceinline__ void store_vector(Real16* out, const float (&v)[8]) {
  __stcs(reinterpret_cast<uint4*>(out),
         make_uint4(pack_pair(v[0], v[1], Real16{}), pack_pair(v[2], v[3], Real16{}),
                    pack_pair(v[4], v[5], Real16{}), pack_pair(v[6], v[7], Real16{})));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return half_to_float(x.bits); }
__device__ __forceinline__ float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }
// Eight neighbouring values from a 16-byte boundary of global or shared memory.
__device__ __forceinline__ void load8(float (&v)[8], const float* x) {
  const float4 a = reinterpret_cast<const float4*>(x)[0], b = reinterpret_cast<const float4*>(x)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <class Real16>
__device__ __forceinline__ void load8(float (&v)[8], const Real16* x) {
  const uint4 words = *reinterpret_cast<const uint4*>(x);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  for (int j = 0; j < 8; ++j) v[j] = to_float(Real16{static_cast<uint16_t>(pairs[j / 2] >> (16 * (j % 2)))});
}

__device__ __forceinline__ void store1(float* out, float x) { *out = x; }
__device__ __forceinline__ void store1(Half* out, float x) { out->bits = float_to_half(x); }
__device__ __forceinline__ void store1(BFloat16* out, float x) { out->bits = float_to_bfloat16(x); }

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// Word i of lane c of each four lanes to lane i, as its word c.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4]) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int by = 1; by < 4; by *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & by) != 0) continue;
      const bool upper = (c & by) != 0;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? word[i] : word[i + by], by);
      word[i] = upper ? got : word[i], word[i + by] = upper ? word[i + by] : got;
    }
}

// num_bytes from source to target, both multiples of 16, by all threads of the block.
template <int Threads>
__device__ __forceinline__ void copy_bytes(uint8_t* target, const uint8_t* source, int num_bytes) {
  for (int i = threadIdx.x; i < num_bytes / 16; i += Threads)
    reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(source)[i];
  for (int i = num_bytes / 16 * 16 + threadIdx.x; i < num_bytes; i += Threads) target[i] = source[i];
}

}  // namespace quantgemm
