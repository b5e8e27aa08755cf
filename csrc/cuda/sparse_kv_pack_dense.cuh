// SPDX-License-Identifier: MIT
// Two neighbouring dense pages of the native cache (kv_page.h) by a thread block, from 128 tokens in shared
// memory. A column is what a fit belongs to: a channel of keys, a token of values.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kv_page.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace quantgemm {

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

template <class Real16, int Channels, bool IsValue>
struct DensePacker {
  static constexpr int kPages = 2, kTokens = kPages * kPageTokens, kOfPage = 2 * kPageTokens;
  static constexpr int kThreads = kPages * kOfPage;
  static constexpr int kStride = Channels + 8;  // of tokens: 16-byte pieces in other banks
  static constexpr int kVectors = Channels / 8, kWords = kStride / 2;
  static constexpr int kPairs = Channels / 2, kParts = kThreads / kPairs;
  static constexpr int kColumns = IsValue ? kTokens : Channels;
  struct Room {
    alignas(16) uint16_t x[kTokens * kStride];
    float2 coders[kColumns];  // PageCoder's inverse and lift
    uint8_t* pages[kPages];
    union {
      ExtremePairs<Real16> parts[kThreads];  // extremes of some rows, of keys a pair of columns
      int ranges[kColumns];
    };
  };
  Room& room;
  PageFormat format;
  uint8_t* page;  // of this thread, which is one of a half of the block; null: it has no place
  int thread;

  // x is there. Keys are packed if both pages have a place.
  __device__ __forceinline__ void run() {
    if (thread % kOfPage == 0) room.pages[thread / kOfPage] = page;
    __syncthreads();  // x and pages
    if (!IsValue && (room.pages[0] == nullptr || room.pages[1] == nullptr)) return;
    format.bits == 2 ? run_bits<2>() : run_bits<4>();
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

  template <int Bits>
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
      room.parts[part * kTokens + token] = own;
    } else {
      constexpr int kEach = kTokens / kParts;
      const int pair = thread % kPairs, first = thread / kPairs * kEach;
      ExtremePairs<Real16> own{word(first, pair), word(first, pair)};
#pragma unroll 8
      for (int t = 0; t < kEach; ++t) {
        const uint32_t w = word(first + t, pair);
        own.add(w, w);
      }
      room.parts[thread] = own;
    }
    __syncthreads();  // parts
    // The first warps have the columns: a warp with half of its lanes takes as long as one with all.
    constexpr int kStep = IsValue ? kTokens : kPairs;
    const int first = IsValue ? thread % kTokens : thread % Channels / 2;
    ExtremePairs<Real16> all = room.parts[first];
#pragma unroll
    for (int i = kStep; i < kThreads; i += kStep) all.add(room.parts[first + i].lo, room.parts[first + i].hi);
    if constexpr (IsValue) all.add(all.lo >> 16 | all.lo << 16, all.hi >> 16 | all.hi << 16);
    fit_column<Bits>(thread < kColumns ? thread : -1, all.half(IsValue ? 0 : thread % 2));
    __syncthreads();  // coders
    pack<Bits>();
  }

  // Of this thread's column k (-1: none), whose extremes these are.
  template <int Bits>
  __device__ __forceinline__ void fit_column(int k, float2 extremes) {
    float lo = extremes.x, hi = extremes.y;
    if (k >= 0) {
      if (lo == 0.0f) {  // of zeros the first, for its sign
        int row = 0;
        while ((IsValue ? at(k, row) : at(row, k)) != 0.0f) ++row;
        lo = IsValue ? at(k, row) : at(row, k);
      }
      if (lo != lo || hi != hi) lo = hi = bit_cast<float>(0x7fc00000u);
      const RangeGrid grid(lo, hi);
      if (Bits == 2) room.coders[k] = make_float2(grid.inverse, -grid.middle);
    }
    if constexpr (Bits == 2) {
      __syncthreads();  // grids
#pragma unroll 1
      for (int tile = thread / 32; tile < kColumns / 16; tile += kThreads / 32) choose_ranges(tile);
      __syncthreads();  // ranges
    }
    if (k < 0) return;
    const float cut = Bits == 2 ? range_cut(room.ranges[k], lo, hi) : 0.0f;
    const bool is_cut = Bits == 2 && room.coders[k].x > 0.0f;
    const PageFit fit = fit_page_range(is_cut ? lo + cut : lo, is_cut ? hi - cut : hi, Bits);
    const PageCoder coder(fit, Bits);
    room.coders[k] = make_float2(coder.inverse, coder.lift);
    const auto fits = [&](int i) {
      return reinterpret_cast<uint16_t*>(room.pages[i] + page_codes_bytes(Channels, Bits));
    };
    if constexpr (!IsValue) {
      fits(0)[fit_place(k)] = fit.scale, fits(1)[fit_place(k)] = fit.shift;
    } else if (room.pages[k / kPageTokens] != nullptr) {
      uint16_t* to = fits(k / kPageTokens) + fit_place(k % kPageTokens);
      to[0] = fit.scale, to[kPageTokens] = fit.shift;
    }
  }

  // fit_page_group's ranges of 16 columns by a warp: tensor cores add what is beyond each step, in whole
  // numbers. Lane 4r + c has values of columns r and r + 8.
  __device__ __forceinline__ void choose_ranges(int tile) {
    constexpr int kRows = IsValue ? Channels : kTokens;
    constexpr float kMagic = 12582912.0f;
    const int lane = thread % 32;
    const float2 grids[2] = {room.coders[16 * tile + lane / 4], room.coders[16 * tile + lane / 4 + 8]};
    float sums[kRanges + 1][4] = {};
    constexpr uint32_t kOnes = 0x3c003c00u;
    // Zero is added: what the compiler knows it makes anew for each product.
    const uint32_t ones[2] = {kOnes + threadIdx.y, kOnes + threadIdx.z};
#pragma unroll 2
    for (int row = 0; row < kRows; row += 16) {
      const int m = lane / 8;  // this lane has the address of a row of matrix m
      const uint16_t* from = IsValue
                                 ? room.x + (16 * tile + lane % 16) * kStride + row + m / 2 * 8
                                 : room.x + (row + lane % 8 + m / 2 * 8) * kStride + 16 * tile + m % 2 * 8;
      uint32_t values[4], units[4];
      load_matrices<!IsValue>(values, from);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 grid = grids[i % 2];
        const auto distance = [&](int half) { return fmaf(half_of(values[i], half), grid.x, grid.y); };
        const auto pair = bit_cast<__half2>(pack_pair(distance(0), distance(1), Half{}));
        // Halves from 1024 to 2048 are whole.
        units[i] = bit_cast<uint32_t>(__hadd2(__habs2(pair), __float2half2_rn(kRangeUnits)));
      }
      mma_16x8x16(sums[kRanges], units, ones[0], ones[1], Half{});
#pragma unroll
      for (int n = 0; n < kRanges; ++n) {
        uint32_t beyond[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          beyond[i] = bit_cast<uint32_t>(
              __hfma2_relu(bit_cast<__half2>(units[i]), bit_cast<__half2>(kOnes),
                           __float2half2_rn(-static_cast<float>(kRangeUnits + range_step(n)))));
        mma_16x8x16(sums[n], beyond, ones[0], ones[1], Half{});
      }
    }
    // Lanes 4r and 4r + 1 have a column each.
    const auto whole = [&](int n) {
      return bit_cast<int>((lane % 2 == 0 ? sums[n][0] : sums[n][2]) + kMagic) - bit_cast<int>(kMagic);
    };
    const int sum = whole(kRanges) - kRows * kRangeUnits;
    int best = 0, error = range_error(0, kRows, sum, whole(0));
    bool is_better = true;
#pragma unroll
    for (int n = 1; n < kRanges; ++n) {
      const int own = range_error(n, kRows, sum, whole(n));
      is_better &= own < error;
      if (is_better) best = n;
      error = own;
    }
    if (lane % 4 < 2) room.ranges[16 * tile + lane / 4 + lane % 2 * 8] = best;
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

  // Matrices of 8 tokens by 8 channels, of values transposed, are what the lanes of a warp need: kTiles side
  // by side and, with 4 bits, two of them one below the other.
  template <int Bits>
  __device__ __forceinline__ void pack() {
    using V = Vector<Bits>;
    constexpr int kTiles = V::kSpan / 8, kDown = 4 / kTiles,
                  kColumnsOfPage = IsValue ? kPageTokens : Channels;
    if (page == nullptr) return;
    const int first = thread / kOfPage * kPageTokens, lane = thread % 32, matrix = lane / 8;
#pragma unroll 1
    for (int i = thread % kOfPage; i < Channels * Bits / 2; i += kOfPage) {
      const int column = i / 32 * V::kSpan % kColumnsOfPage, row = i / 32 * V::kSpan / kColumnsOfPage * 64;
      const int from_column = column + matrix % kTiles * 8, from_row = row + matrix / kTiles * 8;
      const uint16_t* from = room.x + first * kStride + lane % 8 * kStride +
                             (IsValue ? from_column * kStride + from_row : from_row * kStride + from_column);
      const V vector(room.coders + (IsValue ? first : 0) + column + lane % 4 * 2);
      uint32_t words[4] = {};
#pragma unroll
      for (int r = 0; r < 8; r += kDown) {
        uint32_t pairs[4];
        load_matrices<IsValue>(pairs, from + 8 * r * (IsValue ? 1 : kStride));
#pragma unroll
        for (int m = 0; m < 4; ++m)
          vector.add(words, r + m / kTiles, m % kTiles * 2, half_of(pairs[m], 0), half_of(pairs[m], 1));
      }
      V::store(page, i, words);
    }
  }
};

}  // namespace quantgemm
