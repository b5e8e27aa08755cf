// SPDX-License-Identifier: MIT
// One dense page of the native cache (kv_page.h) by a thread block, from 64 tokens in shared memory. A
// column is what a fit belongs to: a channel of keys, a token of values.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kv_page.h"
#include "memory.cuh"

namespace quantgemm {

inline constexpr int kPackThreads = 2 * kPageTokens;

// Two halves, or bfloat16, side by side. NaN wins.
template <class Real16>
struct ExtremePairs {
  using P = std::conditional_t<std::is_same_v<Real16, Half>, __half2, __nv_bfloat162>;
  uint32_t lo, hi;

  __device__ __forceinline__ void add(uint32_t low, uint32_t high) {
    lo = bit_cast<uint32_t>(__hmin2_nan(bit_cast<P>(lo), bit_cast<P>(low)));
    hi = bit_cast<uint32_t>(__hmax2_nan(bit_cast<P>(hi), bit_cast<P>(high)));
  }
  // Of the lower or the upper ones.
  __device__ __forceinline__ float2 half(int i) const {
    return make_float2(to_float(Real16{static_cast<uint16_t>(lo >> 16 * i)}),
                       to_float(Real16{static_cast<uint16_t>(hi >> 16 * i)}));
  }
};

template <class Real16, int Channels>
struct DensePacker {
  static constexpr int kStride = Channels + 8;  // of tokens: 16-byte pieces in other banks
  static constexpr int kVectors = Channels / 8, kWords = kStride / 2;
  static constexpr int kPairs = Channels / 2, kParts = kPackThreads / kPairs < 1 ? 1 : kPackThreads / kPairs;
  struct Room {
    alignas(16) uint16_t x[kPageTokens * kStride];
    float2 coders[Channels < kPageTokens ? kPageTokens : Channels];  // PageCoder's inverse and lift
    ExtremePairs<Real16> parts[kParts][kPairs];
  };
  Room& room;
  uint8_t* page;
  int thread;

  // Vector i of the page's row-major tokens.
  __device__ __forceinline__ void put(int i, uint4 v) {
    *reinterpret_cast<uint4*>(room.x + i / kVectors * kStride + i % kVectors * 8) = v;
  }

  template <bool IsValue>
  __device__ __forceinline__ void run(int bits) {
    __syncthreads();  // x
    bits == 2 ? run_bits<2, IsValue>() : run_bits<4, IsValue>();
  }

 private:
  __device__ __forceinline__ uint32_t word(int token, int pair) const {
    return reinterpret_cast<const uint32_t*>(room.x)[token * kWords + pair];
  }
  __device__ __forceinline__ float at(int token, int channel) const {
    return to_float(Real16{room.x[token * kStride + channel]});
  }
  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return to_float(Real16{static_cast<uint16_t>(pair >> 16 * i)});
  }

  template <int Bits, bool IsValue>
  __device__ __forceinline__ void run_bits() {
    if constexpr (IsValue) {
      // Two lanes have a token, 16 lanes apart.
      const int token = thread / 32 * 16 + thread % 16, part = thread / 16 % 2;
      ExtremePairs<Real16> own;
#pragma unroll
      for (int i = 0; i < kVectors / 2; ++i) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(room.x + token * kStride + (part * (kVectors / 2) + i) * 8);
        if (i == 0) own.lo = own.hi = v.x;
        own.add(v.x, v.x), own.add(v.y, v.y), own.add(v.z, v.z), own.add(v.w, v.w);
      }
      own.add(own.lo >> 16 | own.lo << 16, own.hi >> 16 | own.hi << 16);
      own.add(__shfl_xor_sync(~0u, own.lo, 16), __shfl_xor_sync(~0u, own.hi, 16));
      fit_column<Bits, true, 2>(token, part, own.half(0));
    } else {
      for (int item = thread; item < kParts * kPairs; item += kPackThreads) {
        constexpr int kTokens = kPageTokens / kParts;
        const int pair = item % kPairs, first = item / kPairs * kTokens;
        ExtremePairs<Real16> own{word(first, pair), word(first, pair)};
#pragma unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const uint32_t w = word(first + t, pair);
          own.add(w, w);
        }
        room.parts[item / kPairs][pair] = own;
      }
      __syncthreads();  // parts
      constexpr int kLanes = Channels == 64 ? 2 : 1;
      for (int first = 0; first < Channels * kLanes; first += kPackThreads) {
        const int channel = kLanes == 2 ? thread / 32 * 16 + thread % 16 : first + thread;
        ExtremePairs<Real16> all = room.parts[0][channel / 2];
#pragma unroll
        for (int i = 1; i < kParts; ++i)
          all.add(room.parts[i][channel / 2].lo, room.parts[i][channel / 2].hi);
        fit_column<Bits, false, kLanes>(channel, kLanes == 2 ? thread / 16 % 2 : 0, all.half(channel % 2));
      }
    }
    __syncthreads();  // coders
    IsValue ? pack_values<Bits>() : pack_keys<Bits>();
  }

  // Lanes lanes, 16 apart, know a column's extremes.
  template <int Bits, bool IsValue, int Lanes>
  __device__ __forceinline__ void fit_column(int k, int part, float2 extremes) {
    constexpr int kRows = IsValue ? Channels : kPageTokens, kColumns = IsValue ? kPageTokens : Channels;
    const auto x = [&](int row) { return IsValue ? at(k, row) : at(row, k); };
    float lo = extremes.x, hi = extremes.y;
    if (lo == 0.0f) {  // of zeros the first, for its sign
      int row = 0;
      while (x(row) != 0.0f) ++row;
      lo = x(row);
    }
    if (lo != lo || hi != hi) lo = hi = bit_cast<float>(0x7fc00000u);
    PageFit fit;
    if constexpr (Bits == 4)
      fit = fit_page_range(lo, hi, Bits);
    else
      fit = narrowed_fit<IsValue, Lanes>(k, part, lo, hi);
    if (part != 0) return;
    const PageCoder coder(fit, Bits);
    room.coders[k] = make_float2(coder.inverse, coder.lift);
    auto* stored = reinterpret_cast<uint16_t*>(page + page_codes_bytes(Channels, Bits));
    stored[fit_place(k)] = fit.scale, stored[kColumns + fit_place(k)] = fit.shift;
    static_assert(kRows % (8 * Lanes) == 0);
  }

  // fit_page_group: all its ranges in one pass. With levels at middle ± step/2, ± 3/2 step the squared error
  // is a sum of d² - 2·step·|d| - step·||d| - step| and a constant. It is only compared, and where rounding
  // could decide, the warp does it again as the definition says.
  template <bool IsValue, int Lanes>
  __device__ __forceinline__ PageFit narrowed_fit(int k, int part, float lo, float hi) {
    constexpr int kRows = IsValue ? Channels : kPageTokens, kRanges = 6, kEach = kRows / Lanes;
    const float centre = 0.5f * lo + 0.5f * hi;
    PageFit fits[kRanges];
    float middle[kRanges], step[kRanges], sizes[kRanges], rests[kRanges], sum = 0.0f, most = 0.0f;
#pragma unroll
    for (int i = 0; i < kRanges; ++i) {
      const float cut = rounded_product(0.045f * static_cast<float>(i), hi - lo);
      fits[i] = fit_page_range(lo + cut, hi - cut, 2);
      const float scale = half_to_float(fits[i].scale), shift = half_to_float(fits[i].shift);
      step[i] = 0.25f * scale, middle[i] = (shift + 0.375f) * scale - centre;
      most = fmaxf(most, fabsf(shift));
      sizes[i] = rests[i] = 0.0f;
    }
    const auto tree = [](const float (&v)[8]) {
      return ((fabsf(v[0]) + fabsf(v[1])) + (fabsf(v[2]) + fabsf(v[3]))) +
             ((fabsf(v[4]) + fabsf(v[5])) + (fabsf(v[6]) + fabsf(v[7])));
    };
#pragma unroll 1
    for (int row = part * kEach; row < (part + 1) * kEach; row += 8) {
      float v[8];
      if constexpr (IsValue) {
        const uint4 four = *reinterpret_cast<const uint4*>(room.x + k * kStride + row);
        const uint32_t pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = half_of(pairs[i / 2], i % 2) - centre;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = at(row + i, k) - centre;
      }
      sum += ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
#pragma unroll
      for (int n = 0; n < kRanges; ++n) {
        float d[8], rest[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] = v[i] - middle[n], rest[i] = fabsf(d[i]) - step[n];
        sizes[n] += tree(d), rests[n] += tree(rest);
      }
    }
    if constexpr (Lanes == 2) {
      const auto add = [](float& x) { x += __shfl_xor_sync(~0u, x, 16); };
      add(sum);
#pragma unroll
      for (int n = 0; n < kRanges; ++n) add(sizes[n]), add(rests[n]);
    }
    constexpr float kCount = kRows;
    const auto error = [&](int n) {  // less what all have
      return middle[n] * (kCount * middle[n] - 2.0f * sum) +
             step[n] * ((1.25f * kCount * step[n] - 2.0f * sizes[n]) - rests[n]);
    };
    // Bounds of what rounding does to these sums, and to the levels far from zero.
    const float doubt = 3.0f * step[0] * sizes[0] * (2.5e-6f + 1e-6f * most);
    PageFit best = fits[0];
    float best_error = error(0);
    bool in_doubt = !(hi - lo < 1e30f), stopped = false;
#pragma unroll
    for (int n = 1; n < kRanges; ++n) {
      stopped |= fits[n].scale == fits[n - 1].scale && fits[n].shift == fits[n - 1].shift;
      const float own = error(n), less = best_error - own;
      in_doubt |= !stopped && !(fabsf(less) > doubt);
      stopped |= !(less > 0.0f);
      if (!stopped) best = fits[n];
      best_error = own;
    }
    for (uint32_t lanes = __ballot_sync(~0u, in_doubt && part == 0); lanes != 0; lanes &= lanes - 1) {
      const int lane = __ffs(static_cast<int>(lanes)) - 1;
      const PageFit fit = ordered_fit<IsValue>(__shfl_sync(~0u, k, lane), __shfl_sync(~0u, lo, lane),
                                               __shfl_sync(~0u, hi, lane));
      if (thread % 32 == lane) best = fit;
    }
    return best;
  }

  // fit_page_group by a warp: the errors of single values side by side, their sum in order.
  template <bool IsValue>
  __device__ __noinline__ PageFit ordered_fit(int k, float lo, float hi) const {
    constexpr int kEach = (IsValue ? Channels : kPageTokens) / 32;
    PageFit best = {};
    float best_error = -1.0f;
    for (int step = 0; step < 6; ++step) {
      const float cut = rounded_product(0.045f * static_cast<float>(step), hi - lo);
      const PageFit fit = fit_page_range(lo + cut, hi - cut, 2);
      const PageCoder coder(fit, 2);
      float errors[kEach], error = 0.0f;
#pragma unroll
      for (int n = 0; n < kEach; ++n) {
        const int row = n * 32 + thread % 32;
        const float v = IsValue ? at(k, row) : at(row, k), d = v - coder.value(coder.code(v));
        errors[n] = rounded_product(d, d);
      }
#pragma unroll
      for (int n = 0; n < kEach; ++n)
#pragma unroll 8
        for (int i = 0; i < 32; ++i) error += __shfl_sync(~0u, errors[n], i);
      if (step > 0 && !(error < best_error)) break;
      best = fit, best_error = error;
    }
    return best;
  }

  // The code of two values in the halves of a word.
  template <int Bits>
  static __device__ __forceinline__ uint32_t codes(float even, float2 even_coder, float odd,
                                                   float2 odd_coder) {
    constexpr float kMagic = 12582912.0f;  // see PageCoder
    const float a = (rounded_product(even, even_coder.x) - even_coder.y) + kMagic;
    const float b = (rounded_product(odd, odd_coder.x) - odd_coder.y) + kMagic;
    constexpr uint32_t kTop = ((1u << Bits) - 1u) * 0x10001u;
    // The lower halves are the codes, of any sign; those of NaN and infinities become 0.
    return __viaddmin_s16x2_relu(__byte_perm(__float_as_uint(a), __float_as_uint(b), 0x5410), 0u, kTop);
  }

  // A lane has in 16 bytes the rows 8i + lane/4 of 64 and two columns of each eight of kSpan.
  template <int Bits>
  struct Vector {
    static constexpr int kSpan = 64 / Bits, kColumns = kSpan / 4, kPerHalf = 16 / Bits;
    float2 coders[kColumns];

    __device__ __forceinline__ Vector(const float2* from) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) coders[c] = from[c / 2 * 8 + c % 2];
    }
    // Of row r and columns c, c + 1.
    __device__ __forceinline__ void add(uint32_t (&words)[4], int r, int c, float even, float odd) const {
      words[c / 2 * (8 / kPerHalf) + r / kPerHalf] += codes<Bits>(even, coders[c], odd, coders[c + 1])
                                                      << (Bits * (r % kPerHalf));
    }
    static __device__ __forceinline__ void store(uint8_t* page, int i, const uint32_t (&words)[4]) {
      reinterpret_cast<uint4*>(page)[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  };

  template <int Bits>
  __device__ __forceinline__ void pack_keys() {
    using V = Vector<Bits>;
#pragma unroll 1
    for (int i = thread; i < Channels * Bits / 2; i += kPackThreads) {
      const int lane = i % 32, column = i / 32 * V::kSpan + lane % 4 * 2;
      const V vector(room.coders + column);
      uint32_t words[4] = {};
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < V::kColumns; c += 2) {
          const uint32_t pair = word(8 * r + lane / 4, column / 2 + c / 2 * 4);
          vector.add(words, r, c, half_of(pair, 0), half_of(pair, 1));
        }
      V::store(page, i, words);
    }
  }

  // Rows are channels: a thread has two neighbouring ones, the vectors of two lanes.
  template <int Bits>
  __device__ __forceinline__ void pack_values() {
    using V = Vector<Bits>;
#pragma unroll 1
    for (int i = thread; i < Channels * Bits / 4; i += kPackThreads) {
      const int c4 = i % 4, r2 = i / 4 % 4, v = i / 16;
      const int column = v * V::kSpan % kPageTokens + 2 * c4, row = v * V::kSpan / kPageTokens * 64 + 2 * r2;
      const V vector(room.coders + column);
      uint32_t words[2][4] = {};
#pragma unroll
      for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < V::kColumns; c += 2) {
          const uint32_t even = word(column + c / 2 * 8, row / 2 + 4 * r),
                         odd = word(column + c / 2 * 8 + 1, row / 2 + 4 * r);
#pragma unroll
          for (int x = 0; x < 2; ++x) vector.add(words[x], r, c, half_of(even, x), half_of(odd, x));
        }
#pragma unroll
      for (int x = 0; x < 2; ++x) V::store(page, v * 32 + (2 * r2 + x) * 4 + c4, words[x]);
    }
  }
};

}  // namespace quantgemm
