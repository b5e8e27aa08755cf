// SPDX-License-Identifier: MIT
// One sparse page of the native cache (kv_sparse_page.h) by a thread block: 64 tokens of a head. Two lanes of
// a warp load a token, prune it and put it to shared memory; scales and codes are made from there.
#pragma once
#include "../kv_page.h"
#include "memory.cuh"
#include "sparse_kv_pack_dense.cuh"
#include "sparse_kv_prune.cuh"

namespace quantgemm {

inline constexpr int kPackThreads = 2 * kPageTokens;

// Of pairs of values of which some are kept, side by side: extremes, number and sum of magnitudes.
template <class Real16>
struct KeptPairs {
  using P = ExtremePairs<Real16>::P;
  uint32_t lo = ~0u, hi = 0, counts = 0;
  float sum[2] = {};

  __device__ __forceinline__ void add_lowest(uint32_t pair) {  // less one: zeros become the largest
    lo = __viaddmin_u16x2(pair & 0x7fff7fffu, ~0u, lo);
  }
  __device__ __forceinline__ void add_highest(uint32_t pair) {  // NaN wins
    hi = bit_cast<uint32_t>(__hmax2_nan(bit_cast<P>(hi), __habs2(bit_cast<P>(pair))));
  }
  __device__ __forceinline__ void add_count(uint32_t pair) {
    counts = bit_cast<uint32_t>(__hadd2(bit_cast<P>(counts), __hneu2(bit_cast<P>(pair), bit_cast<P>(0u))));
  }
  __device__ __forceinline__ void add_sums(uint32_t pair) {
    sum[0] += fabsf(to_float(Real16{static_cast<uint16_t>(pair)}));
    sum[1] += fabsf(to_float(Real16{static_cast<uint16_t>(pair >> 16)}));
  }
};
__device__ __forceinline__ uint32_t half_at(uint32_t pair, int i) { return pair >> (16 * i) & 0xffffu; }

template <class Real16, int Channels, bool IsValue, PageKind Kind>
struct SparsePacker {
  static constexpr int kPages = 1, kOfPage = kPackThreads, kThreads = kPackThreads;
  // Of tokens in shared memory: where two lanes have 16 bytes each of four tokens, all are in other banks.
  static constexpr int kStride = Channels + 16;
  static constexpr int kWords = Channels / 4;  // of a thread's half of a token
  static constexpr int kFits = IsValue ? kPageTokens : Channels, kWarps = kPackThreads / 32;
  static constexpr int kBlocks = Channels / 64;  // j
  using P = ExtremePairs<Real16>::P;
  struct KeyPart {
    float sum[2];
    uint32_t lo, hi, counts;
  };
  // Of neighbouring words of a bitmap: of each warp eight elements of either.
  struct BitmapRoom {
    uint4 chunks[2 * Channels];
    uint2 masks[Channels];
  };
  // In place of x where that is needed no more.
  using PlanesOfWarps = uint4[kWarps][6][32];
  struct NoPlanes {};
  struct Room {
    alignas(16) uint16_t x[kPageTokens * kStride];
    union {
      KeyPart parts[Channels];
      std::conditional_t<Kind == PageKind::kBitmap, BitmapRoom, NoPlanes> bitmap;
      std::conditional_t<(Channels > 128), PlanesOfWarps, NoPlanes> planes;
    };
    alignas(16) float factors[kFits];  // SparseCoder's; 2 bits: as values, keys side by side
    int before[kWarps];
  };
  Room& room;
  PageFormat format;
  uint8_t* page;
  int thread;

  // x is there: of a warp's 16 tokens for the warp.
  __device__ __forceinline__ void run() {
    if constexpr (Kind == PageKind::kBitmap)
      __syncwarp();  // it prunes them
    else
      __syncthreads();  // x
    const int half = thread % 2;
    uint16_t* row = room.x + thread / 2 * kStride;
    // The smallest magnitude that is kept, if all are kept that may be: it is no zero then.
    uint32_t lowest = 0;
    bool has_nans = true;  // perhaps
    if constexpr (Kind == PageKind::kFourOfEight) {
      uint32_t hi = 0;
      lowest = ~0u;
      // A loop's instructions are there when another warp wants them; those that are in a row are not.
#pragma unroll 2
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = vector(i);
        uint32_t w[4] = {v.x, v.y, v.z, v.w};
        keep_four(w, lowest, hi);
        vector(i) = make_uint4(w[0], w[1], w[2], w[3]);
      }
      lowest = half_at(lowest, 0), has_nans = __vmaxu2(hi, 0x7c007c00u) != 0x7c007c00u;
    } else if (format.keep < Channels) {
      uint32_t pairs[kWords];
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 v = vector(i / 4);
        pairs[i] = v.x, pairs[i + 1] = v.y, pairs[i + 2] = v.z, pairs[i + 3] = v.w;
      }
      Pruning<kWords> pruning;
      pruning.find(pairs, format.keep);
      pruning.keep_largest(pairs);
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        vector(i / 4) = make_uint4(pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]);
      pruning.drop_excess(row, [&](int word) { return (word / 4 * 2 + half) * 8 + word % 4 * 2; });
      lowest = pruning.cutoff, has_nans = pruning.has_largest;
    }
    if (has_nans) replace_nans(row, half);
    format.bits == 2 ? finish<2>(lowest) : finish<4>(lowest);
  }

 private:
  // By infinity: scales and codes are the same. In a token's half in shared memory.
  static __device__ __noinline__ void replace_nans(uint16_t* row, int half) {
    constexpr uint16_t kInfinity = std::is_same_v<Real16, Half> ? 0x7c00 : 0x7f80;
#pragma unroll 1
    for (int i = 0; i < Channels; ++i)
      if (i / 8 % 2 == half && (row[i] & 0x7fff) > kInfinity) row[i] = kInfinity;
  }

  // Of this thread's half of its token.
  __device__ __forceinline__ uint4& vector(int i) const {
    return reinterpret_cast<uint4*>(room.x + thread / 2 * kStride)[2 * i + thread % 2];
  }

  template <int Bits>
  __device__ __forceinline__ void finish(uint32_t lowest) {
    bool is_odd = false;
    if constexpr (IsValue)
      is_odd = fit_value<Bits>(lowest);
    else
      is_odd = fit_keys<Bits>();
    // x and factors; parts have been read
    if constexpr (Bits == 2)
      __syncthreads(), pack<2, false>();
    else if (__syncthreads_or(is_odd))
      pack<4, true>();
    else
      pack<4, false>();
  }
  template <int Bits, bool IsOdd>
  __device__ __forceinline__ void pack() {
    if constexpr (Kind == PageKind::kBitmap)
      pack_bitmap<Bits, IsOdd>();
    else
      pack_planes<Bits, IsOdd>();
  }

  // Whether it is an odd one: something is kept, but the scale is zero, no number, or so small that it is
  // not within 2^-11 of what it should be.
  template <int Bits>
  __device__ __forceinline__ bool keep_fit(int k, const SparseGroup& group) {
    const uint16_t scale = fit_sparse_group(group, Bits);
    const float factor = SparseCoder(scale, Bits).factor;
    if constexpr (Bits == 4) {
      room.factors[k] = group.hi == 0.0f ? 0.0f : factor;  // no NaN that would reach its neighbours
    } else {  // what is above it is above the next lower half too
      uint32_t limit;
      if constexpr (std::is_same_v<Real16, Half>)
        limit = __half_as_ushort(__float2half_rz(factor));
      else
        limit = __bfloat16_as_ushort(__float2bfloat16_rz(factor));
      if (IsValue)
        reinterpret_cast<uint32_t*>(room.factors)[k] = limit * 0x10001u;
      else
        reinterpret_cast<uint16_t*>(room.factors)[k] = static_cast<uint16_t>(limit);
    }
    const int place = IsValue ? sparse_value_scale_place(k) : sparse_key_scale_place(k, Channels);
    reinterpret_cast<uint16_t*>(page + sparse_codes_bytes(Channels, format))[place] = scale;
    return group.hi != 0.0f && (scale < 0x0400u || scale > 0x7c00u);
  }
  static __device__ __forceinline__ float magnitude(uint32_t bits) {
    return to_float(Real16{static_cast<uint16_t>(bits)});
  }

  template <int Bits>
  __device__ __forceinline__ bool fit_value(uint32_t lowest) {
    const auto other = [](auto x) { return __shfl_xor_sync(~0u, x, 1); };
    lowest = min(lowest, other(lowest));
    int count = Kind == PageKind::kFourOfEight ? Channels / 2 : format.keep;
    if (__any_sync(~0u, lowest == 0)) {  // zeros are not kept: look at all
      KeptPairs<Real16> all;
#pragma unroll 1
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = vector(i);
        for (const uint32_t pair : {v.x, v.y, v.z, v.w}) all.add_lowest(pair), all.add_count(pair);
      }
      lowest = min(half_at(all.lo, 0), half_at(all.lo, 1)) + 1;
      count = static_cast<int>(magnitude(half_at(all.counts, 0)) + magnitude(half_at(all.counts, 1)));
      lowest = min(lowest, other(lowest)), count += other(count);
      if (lowest > 0xffffu) lowest = 0;
    }
    uint32_t hi = 0;
    float sum = 0.0f;
#pragma unroll(Bits == 4 ? 8 : 4)
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = vector(i);
      for (const uint32_t pair : {v.x, v.y, v.z, v.w}) {
        hi = bit_cast<uint32_t>(__hmax2_nan(bit_cast<P>(hi), __habs2(bit_cast<P>(pair))));
        if (Bits == 2) sum += fabsf(magnitude(half_at(pair, 0))), sum += fabsf(magnitude(half_at(pair, 1)));
      }
    }
    hi = bit_cast<uint32_t>(__hmax2_nan(bit_cast<P>(hi), bit_cast<P>(other(hi))));
    hi = max(half_at(hi, 0), half_at(hi, 1));
    const float second = other(sum);
    return thread % 2 == 0 &&
           keep_fit<Bits>(thread / 2, {magnitude(lowest), magnitude(hi), {sum, second}, count});
  }

  // How many of each 32 tokens are asked for the smallest magnitude of a channel: it matters whether it is
  // half of the largest or more (2 bits), or the same.
  template <int Bits>
  static constexpr int kAsked = Bits == 2 ? 32 : 16;
  // A thread takes 32 tokens of two channels, then a channel.
  template <int Bits>
  __device__ __forceinline__ bool fit_keys() {
    __syncthreads();  // x
    constexpr int kPairs = Channels / 2;
    for (int item = thread; item < Channels; item += kPackThreads) {
      const auto* from =
          reinterpret_cast<const uint32_t*>(room.x + item / kPairs * 32 * kStride) + item % kPairs;
      KeptPairs<Real16> m;
#pragma unroll
      for (int first = 0; first < 32; first += kAsked<Bits>)
#pragma unroll 16
        for (int t = first; t < first + kAsked<Bits>; ++t) {
          const uint32_t pair = from[t * (kStride / 2)];
          if (first == 0) m.add_lowest(pair);
          m.add_highest(pair);
          if (Bits == 2) m.add_count(pair), m.add_sums(pair);
        }
      room.parts[item] = {{m.sum[0], m.sum[1]}, m.lo, m.hi, m.counts};
    }
    __syncthreads();  // parts
    bool is_odd = false;
    for (int k = thread; k < Channels; k += kPackThreads) {
      const KeyPart &a = room.parts[k / 2], &b = room.parts[k / 2 + kPairs];
      const int i = k % 2;
      const float count = magnitude(half_at(a.counts, i)) + magnitude(half_at(b.counts, i));
      const float hi = magnitude(max(half_at(a.hi, i), half_at(b.hi, i)));
      uint32_t lowest = min(half_at(a.lo, i), half_at(b.lo, i)) + 1;
      if (kAsked<Bits> < 32 && (lowest > 0xffffu || !(hi > magnitude(lowest)))) {
        lowest = 0x10000u;
#pragma unroll 1
        for (int t = 0; t < kPageTokens; ++t) {
          const uint32_t own = room.x[t * kStride + k] & 0x7fffu;
          lowest = own == 0 ? lowest : min(lowest, own);
        }
      }
      if (lowest > 0xffffu) lowest = 0;
      is_odd |= keep_fit<Bits>(
          k, {magnitude(lowest), hi, {a.sum[i], b.sum[i]}, Bits == 2 ? static_cast<int>(count) : 1});
    }
    return is_odd;
  }

  // Eight channels of group (x, j, even) of this lane.
  __device__ __forceinline__ SparseOrigin origin(int x, int j, int even) const {
    const SparseElement e{thread % 32, 0, x, j, even};
    return IsValue ? sparse_value_origin(e) : sparse_key_origin(e, Channels);
  }
  __device__ __forceinline__ void load_eight(uint32_t (&pairs)[4], SparseOrigin o) const {
    const uint4 v = *reinterpret_cast<const uint4*>(room.x + o.token * kStride + o.channel);
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
  }
  // Beyond which the two channels of a pair have level 2; the factor of one channel.
  __device__ __forceinline__ uint32_t limits(SparseOrigin o, int pair) const {
    return reinterpret_cast<const uint32_t*>(room.factors)[IsValue ? o.token : o.channel / 2 + pair];
  }
  __device__ __forceinline__ float factor(SparseOrigin o, int i) const {
    return room.factors[IsValue ? o.token : o.channel + i];
  }
  // Words of whose halves the signs say what is to be known: of a pair that is no NaN, whether it is set, and
  // whether it has level 2. Sums are for other lanes of the multiprocessor than comparisons.
  static __device__ __forceinline__ uint32_t set_signs(uint32_t pair) {
    return bit_cast<uint32_t>(__hadd2(__hneg2(__habs2(bit_cast<P>(pair))), bit_cast<P>(0u)));  // 0 - 0 is +0
  }
  static __device__ __forceinline__ uint32_t large_signs(uint32_t pair, uint32_t limit) {
    return bit_cast<uint32_t>(__hsub2(bit_cast<P>(limit), __habs2(bit_cast<P>(pair))));
  }
  // The signs of a's and b's halves all over the bytes: a's lower, a's upper, b's; and with a's and b's taken
  // by turns.
  static __device__ __forceinline__ uint32_t signs(uint32_t a, uint32_t b) {
    return pick_bytes(a, b, 0xfdb9u);
  }
  static __device__ __forceinline__ uint32_t signs_by_turns(uint32_t a, uint32_t b) {
    return pick_bytes(a, b, 0xfbd9u);
  }
  // x · factor as an integer, in the lowest bits of a float's. With a scale that is no odd one it is no more
  // than 7: see SparseCoder and keep_fit.
  static __device__ __forceinline__ uint32_t rounded(float x, float factor) {
    return bit_cast<uint32_t>(rounded_product(x, factor) + 12582912.0f);
  }
  // The same as the i-th of four that nibbles() puts side by side, plus 16, so that none is negative and
  // none borrows from the next. All else in those floats adds up to 0 in the lower half of each byte.
  static __device__ __forceinline__ uint32_t rounded(float x, float factor, int i) {
    const float lift = 12582912.0f + (i == 1 ? 65536.0f + 16.0f : (i == 3 ? 20.0f : 16.0f));
    return bit_cast<uint32_t>(rounded_product(x, factor) + lift);
  }
  static __device__ __forceinline__ uint32_t nibbles(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return (a + b * 256u + (c + d * 256u) * 65536u) & 0x0f0f0f0fu;
  }
  // 4 bits: the codes of a pair's halves, plus 8 (which is their highest bit, inverted); of what is not set
  // they may be anything.
  static constexpr uint32_t kLifts = 0x88888888u;
  template <bool IsOdd>
  static __device__ __forceinline__ uint32_t lifted_codes(uint32_t pair, float first, float second) {
    const float a = magnitude(half_at(pair, 0)), b = magnitude(half_at(pair, 1));
    if constexpr (IsOdd) {
      SparseCoder coder(0, 4);
      coder.factor = first;
      const uint32_t low = coder.code(a, 4);
      coder.factor = second;
      return (low | coder.code(b, 4) << 16) ^ 0x00080008u;
    } else {
      const uint32_t both = __byte_perm(rounded(a, first), rounded(b, second), 0x5410);
      return __viaddmin_s16x2_relu(both, 0x00080008u, 0x000f000fu);
    }
  }

  template <int Bits, bool IsOdd>
  __device__ __forceinline__ void pack_bitmap();
  template <int Bits, bool IsOdd, class Factors>
  __device__ __forceinline__ void chunk(const uint32_t (&pairs)[2][2][2], int o, const Factors* first,
                                        const Factors* second, uint32_t selectors, uint32_t& mask,
                                        uint32_t& codes_of_set) const;
  template <int Bits>
  __device__ __forceinline__ void join_chunks();
  template <int Bits, bool IsOdd>
  __device__ __forceinline__ void pack_planes();
  // Planes of a thread's groups, one word for bit b of all from plane_shift(b) on: compacting them to ranks
  // takes few operations then. A bit's place is that of the page but for the warp's own.
  template <int Bits>
  static __device__ constexpr int plane_shift(int b) {
    return Bits == 2 ? 8 * b : b % 2 * 2 + b / 2 * 8;
  }
  static constexpr uint32_t kFirstPlane = 0x00330033u;
};

}  // namespace quantgemm

#include "sparse_kv_pack_bitmap.cuh"
#include "sparse_kv_pack_planes.cuh"
