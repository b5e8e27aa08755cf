// SPDX-License-Identifier: MIT
// From blocks in shared memory to what mma.sync wants in registers: affines and codes of a warp's
// rows. Nothing here knows a format.
#pragma once
#include "../formats/block_format.h"
#include "memory.cuh"

namespace quantgemm {

// Where a slab of 64 weights lies in shared memory: the blocks of a lane's two rows, from weight
// `within` on. Blocks of 32 have a second pair, `second` bytes further on (0 if k ends at 32: their
// weights then meet zeros of x).
struct Slab {
  bytes_ptr blocks[2];
  int within, second;
};

// Lane 4r + c of a row tile holds rows r and r + 8 ("half" 0 and 1). The affines of a slab of both: where
// each lane needs several, the four lanes of a row decode different ones and pass them around. Blocks of 32
// have one cheap scale each.
template <BlockFormat F>
struct SlabAffines {
  static constexpr int kGroups = F::kElems == 32 ? 1 : F::kGroup >= 64 ? 1 : 64 / F::kGroup;
  static constexpr bool kShared = kGroups > 1;
  static constexpr int kHeld = kShared ? kGroups / 2 : 2;
  Affine held[kHeld];

  __device__ __forceinline__ void load(const Slab& slab, int c) {
    if constexpr (F::kElems > 32) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        held[i] = kShared ? F::affine(c % 2 ? slab.blocks[1] : slab.blocks[0],
                                      slab.within / F::kGroup + 2 * i + c / 2)
                          : F::affine(slab.blocks[i], slab.within / F::kGroup);
    }
  }
  // Of group 2 pair + odd; pair and half are the same in all lanes.
  __device__ __forceinline__ Affine get(int pair, int odd, int half) const {
    if constexpr (!kShared) return held[half];
    const int source = (threadIdx.x & 28) + 2 * odd + half;
    const float offset = F::kOffset ? __shfl_sync(~0u, held[pair].offset, source) : 0.0f;
    return {__shfl_sync(~0u, held[pair].scale, source), offset};
  }
};

// A fragments: both steps of a row tile (16 of k each), then the next row tile's.
template <int Count>
struct Fragments {
  uint32_t words[Count][4];
};

// Codes as 16-bit floats, exactly: four bytes become two words of two.
__device__ __forceinline__ void codes_to_real(uint32_t quad, uint32_t& low, uint32_t& high, Half) {
  const uint32_t biased = quad ^ 0x80808080u;  // code + 128 in the low bits of 1024 + …
  asm("sub.rn.f16x2 %0, %1, %2;"
      : "=r"(low)
      : "r"(__byte_perm(biased, 0x64646464u, 0x4140)), "r"(0x64806480u));
  asm("sub.rn.f16x2 %0, %1, %2;"
      : "=r"(high)
      : "r"(__byte_perm(biased, 0x64646464u, 0x4342)), "r"(0x64806480u));
}
// bfloat16 has 7 bits behind the point. Byte b under an exponent of 2^7 reads 128 + b up to 127, then
// the eighth bit doubles it to 2b: less 256, that is the code if negative, else twice the code.
__device__ __forceinline__ uint32_t mend_doubled(uint32_t pair) {
  uint32_t doubled, positive, code;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(doubled) : "r"(pair), "r"(0x3f803f80u), "r"(0xc380c380u));
  asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(positive) : "r"(pair), "r"(0x3f803f80u), "r"(0xc380c380u));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(code) : "r"(positive), "r"(0xbf00bf00u), "r"(doubled));
  return code;
}
__device__ __forceinline__ void codes_to_real(uint32_t quad, uint32_t& low, uint32_t& high, BFloat16) {
  const uint32_t biased = quad ^ 0x80808080u;
  low = mend_doubled(__byte_perm(biased, 0x43434343u, 0x4140));
  high = mend_doubled(__byte_perm(biased, 0x43434343u, 0x4342));
}
// Codes 0…127 less a constant need neither: 7 bits are enough, and one subtraction.
template <int Zero>
__device__ __forceinline__ void codes_less_zero(uint32_t codes, uint32_t& low, uint32_t& high, Half) {
  constexpr uint32_t kBias = (0x6400u + Zero) * 0x00010001u;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(low) : "r"(__byte_perm(codes, 0x64646464u, 0x4140)), "r"(kBias));
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(high) : "r"(__byte_perm(codes, 0x64646464u, 0x4342)), "r"(kBias));
}
template <int Zero>
__device__ __forceinline__ void codes_less_zero(uint32_t codes, uint32_t& low, uint32_t& high, BFloat16) {
  constexpr uint32_t kOne = 0x3f803f80u, kBias = (0xc300u + Zero) * 0x00010001u;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(low)
      : "r"(__byte_perm(codes, 0x43434343u, 0x4140)), "r"(kOne), "r"(kBias));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(high)
      : "r"(__byte_perm(codes, 0x43434343u, 0x4342)), "r"(kOne), "r"(kBias));
}

// Types that store q + kZero, 0…127, may say so (block_format.h).
template <class F>
concept StoresZero = BlockFormat<F> && requires(bytes_ptr block, int i) { F::kZero, F::codes(block, i); };

// Weights 4i … 4i+3 in float32, as decode_quad. A stored code under an exponent of 2^7 reads 128 + code,
// so that one multiply-add makes the weight, exactly: (128 + kZero) · scale is a float32 in all of them.
template <BlockFormat F>
__device__ __forceinline__ Affine for_codes(Affine a) {
  if constexpr (StoresZero<F>) a.offset = -(128.0f + F::kZero) * a.scale;
  return a;
}
template <BlockFormat F>
__device__ __forceinline__ void decode_four(bytes_ptr block, int i, Affine a, float (&w)[4]) {
  if constexpr (StoresZero<F>) {
    const uint32_t codes = F::codes(block, i);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      w[j] = __fmaf_rn(__uint_as_float(__byte_perm(codes, 0x43000000u, 0x7044 | j << 8)), a.scale, a.offset);
  } else {
    decode_quad<F>(block, i, a, w);
  }
}

// q of weights 4i … 4i+3 of a block as two pairs of 16-bit floats.
template <BlockFormat F, class T>
__device__ __forceinline__ void load_codes(bytes_ptr block, int i, uint32_t& low, uint32_t& high, T type) {
  if constexpr (StoresZero<F>)
    codes_less_zero<F::kZero>(F::codes(block, i), low, high, type);
  else
    codes_to_real(F::quad(block, i), low, high, type);
}

// Where lanes take their weights of 32 values of k, two steps of 16, of a row tile: lane c quads c and
// c + 4, which share bytes in blocks of 32 and leave each step in one group; or quads 2c and 2c + 1
// (Paired), so that a lane has one group in larger blocks, and one 16-byte load of x.
//
// Decodes slabs of TileCount row tiles, quad after quad.
template <BlockFormat F, class T, int TileCount, bool Paired>
struct SlabDecoder {
  static constexpr int kCount = 2 * TileCount, kQuads = 2 * kCount;
  using Shared = SlabAffines<F>;
  Slab slabs[TileCount];
  Shared shared[TileCount];
  Affine affines[2];

  __device__ __forceinline__ void load_affines() {
#pragma unroll
    for (int i = 0; i < TileCount; ++i) shared[i].load(slabs[i], threadIdx.x % 4);
  }
  // Quads go through both rows of a fragment, then the fragments.
  __device__ __forceinline__ void quad(Fragments<kCount>& out, int part, int index) {
    const int half = index % 2, fragment = index / 2, i = fragment / 2, c = threadIdx.x % 4;
    const int step = fragment % 2;
    const Slab& slab = slabs[i];
    const bytes_ptr block = slab.blocks[half] + (F::kElems > 32 || part == 0 ? 0 : slab.second);
    if (fragment % 2 == 0 || (Shared::kGroups == 4 && !Paired)) {
      Affine affine;
      if constexpr (F::kElems == 32)
        affine = F::affine(block, 0);
      else if constexpr (Shared::kGroups == 4)
        affine = shared[i].get(part, Paired ? c / 2 : step, half);
      else
        affine = shared[i].get(0, part, half);
      affines[half] = for_codes<F>(affine);
    }
    const int first = F::kElems > 32 ? slab.within / 4 + 8 * part : 0;
    float v[4];
    decode_four<F>(block, first + (Paired ? 2 * c + step : c + 4 * step), affines[half], v);
    out.words[fragment][half] = pack_pair(v[0], v[1], T{});
    out.words[fragment][2 + half] = pack_pair(v[2], v[3], T{});
  }
  // All of a part, 32 of k.
  __device__ __forceinline__ void part(Fragments<kCount>& out, int index) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) quad(out, index, i);
  }
};

template <class T>
inline constexpr uint32_t kOnes = std::is_same_v<T, Half> ? 0x3c003c00u : 0x3f803f80u;  // 1, 1

}  // namespace quantgemm
