// SPDX-License-Identifier: MIT
// What sparse_kv_compress does with the values of a tile: their extremes and bits, then their codes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kv.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace quantgemm {

template <class Real16>
using Pair = std::conditional_t<std::is_same_v<Real16, Half>, __half2, __nv_bfloat162>;

// Two tiles' values, or two values of a tile, side by side: what is set, and the extremes of that.
template <class Real16>
struct PairScan {
  // Not a number: as an operand of minimum and maximum it yields to the other one.
  uint32_t lo = ~0u, hi = ~0u;

  // The halves of the result say which values have a smaller magnitude than the limit, in whose halves that
  // is the same, and are not set: all bits. None of them is a NaN of a half, of whatever type they are, so
  // they compare, and stay what they are with a zero added, as halves do.
  __device__ __forceinline__ uint32_t add(uint32_t values, uint32_t limit) {
    using P = Pair<Real16>;
    const auto own = bit_cast<__half2>(values);
    const uint32_t dropped = __hlt2_mask(__habs2(own), bit_cast<__half2>(limit));
    uint32_t others;  // NaN for those. PTX ISA 9.7.4.1 (add)
    asm("add.f16x2 %0, %1, %2;" : "=r"(others) : "r"(values), "r"(dropped));
    lo = bit_cast<uint32_t>(__hmin2(bit_cast<P>(lo), bit_cast<P>(others)));
    hi = bit_cast<uint32_t>(__hmax2(bit_cast<P>(hi), bit_cast<P>(others)));
    return dropped;
  }
};

// round(x / scale) + zero, held in 0 … 2^bits - 1, without a division.
template <class Real16>
struct Coder {
  static constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23 + an integer is a float in steps of 1
  static constexpr float kCoarse = 768.0f;      // and this is in steps of 2^-14
  float scale, inverse, zero;
  int top, shift;
  bool is_plain;

  __device__ Coder(TileFit<Real16> fit, int bits)
      : scale(value_of(fit.scale)),
        inverse(1.0f / scale),
        zero(value_of(fit.zero)),
        top((1 << bits) - 1),
        shift(static_cast<int>(zero) - bit_cast<int>(kMagic)),
        is_plain(fabsf(scale) > 1e-30f && fabsf(scale) < 1e30f && fabsf(zero) <= 128.0f) {}

  // The quotient of two halves (or bfloat16) is half an integer or at least 2^-13 away from that, which the
  // product is too after its rounding to 2^-14; so both have the same nearest integer (tried all).
  __device__ __forceinline__ uint32_t plain_code(Real16 stored) const {
    const float ratio = fmaf(value_of(stored), inverse, kCoarse) + (kMagic - kCoarse);
    return static_cast<uint32_t>(__viaddmin_s32_relu(bit_cast<int>(ratio), shift, top));
  }
  __device__ __forceinline__ uint32_t code(Real16 stored) const {
    return code_of(value_of(stored), scale, zero, top == 3 ? 2 : 4);
  }
};

// 32 elements' bits as a bitmap has them. Of x the lower half has the even elements', the upper one the odd
// ones', both those of the first 16 elements in bits 15, 13, 11, ... and of the last ones in bits 14, 12, 10,
// ...
__device__ __forceinline__ uint32_t in_order(uint32_t x) {
  const uint32_t moved = (x >> 1 & 0x55550000u) | (x << 1 & ~0x55550000u);
  return (__byte_perm(x, 0u, 0x1032) & 0xaaaa5555u) | (moved & ~0xaaaa5555u);
}

// Whether no 32 neighbours of a tile are all zeros: they would be in its middle.
__device__ __forceinline__ bool is_close(uint64_t bitmap) {
  const auto low = static_cast<uint32_t>(bitmap), high = static_cast<uint32_t>(bitmap >> 32);
  return high != 0 && __clz(static_cast<int>(low)) + __ffs(static_cast<int>(high)) <= 32;
}

// A tile's codes from one set element to the next, which is among the next 32, a few at a time (of 16 bits
// two, a word); what is behind the last one is cut off, and looks set.
template <class Real16, int Each, int Step, class CodeOf>
__device__ __forceinline__ void pack_close(const uint16_t* from, uint64_t bitmap, int bits, uint32_t* to,
                                           CodeOf&& code_of_value) {
  auto next = static_cast<uint32_t>(bitmap >> 32), later = static_cast<uint32_t>(bitmap);
  uint32_t at = shared_address(from), of_next;  // 1 << bits, a factor: shifts are for the lanes of logic
  asm("shl.b32 %0, 1, %1;" : "=r"(of_next) : "r"(bits));
  const uint32_t ones = ~threadIdx.y;  // what the compiler knows it makes anew each time
  for (int left_bits = __popcll(bitmap) * bits; left_bits > 0; left_bits -= 32) {
    uint32_t word = 0;
    int bit = 0;
    const int bits_of_word = min(left_bits, 32);
    do {
      uint32_t codes[Each];
#pragma unroll
      for (int n = 0; n < Each; ++n) {
        uint32_t i;  // PTX ISA 9.7.1.20 (bfind)
        asm("bfind.u32 %0, %1;" : "=r"(i) : "r"(next));
        next = __funnelshift_r(later, next, i), later = __funnelshift_r(ones, later, i);
        // One operation, which the compiler would take apart. PTX ISA 9.7.1.4 (mad)
        asm("mad.lo.u32 %0, %1, %2, %0;" : "+r"(at) : "r"(i), "n"(-2 * Step));
        uint16_t value;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at + 2 * Step * (32 * n + 31)) : "memory");
        codes[n] = code_of_value(Real16{value});
      }
#pragma unroll
      for (int n = Each - 2; n >= 0; --n) codes[n] += codes[n + 1] * of_next;
      word = Each == 2 ? codes[0] : __funnelshift_r(word, codes[0], Each * bits);
      at += 2 * Step * (32 * Each), bit += Each * bits;
    } while (bit < bits_of_word);
    *to++ = word << (bit - bits_of_word) >> (32 - bits_of_word);
  }
}

// The same of any tile.
template <class Real16, int Each, class CodeOf>
__device__ __forceinline__ void pack(const uint16_t* from, int step, uint64_t bitmap, int bits, uint32_t* to,
                                     CodeOf&& code_of_value) {
  uint32_t left = static_cast<uint32_t>(bitmap >> 32);
  const uint32_t rest = static_cast<uint32_t>(bitmap);
  const uint16_t* const second = from + 63 * step;  // of the element of bit 0
  from += 31 * step;
  for (int left_bits = __popcll(bitmap) * bits; left_bits > 0; left_bits -= 32) {
    uint32_t word = 0;
    int bit = 0;
    do {
#pragma unroll
      for (int n = 0; n < Each; ++n) {
        if (left == 0) left = rest, from = second;
        int i;
        uint32_t highest;  // PTX ISA 9.7.1.20 (bfind), 9.7.8.6 (shl); of none -1, and no bit
        asm("bfind.u32 %0, %1;" : "=r"(i) : "r"(left));
        asm("shl.b32 %0, 1, %1;" : "=r"(highest) : "r"(i));
        left ^= highest;
        word = __funnelshift_r(word, code_of_value(Real16{from[-i * step]}), bits);
      }
      bit += Each * bits;
    } while (bit < 32 && bit < left_bits);
    word >>= 32 - bit;
    *to++ = left_bits < 32 ? word & ~(~0u << left_bits) : word;
  }
}

}  // namespace quantgemm
