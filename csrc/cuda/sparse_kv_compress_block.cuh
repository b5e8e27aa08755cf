// SPDX-License-Identifier: MIT
// What a thread block of sparse_kv_compress has in shared memory and does there with the tiles of its 64
// tokens.
#pragma once
#include "ptx.cuh"
#include "sparse_kv_compress.cuh"

namespace quantgemm {

inline constexpr int kCompressThreads = 2 * kTile;

template <class Real16, int Channels>
struct CompressBlock {
  static constexpr int kStride = Channels + 8;                    // 16 bytes of 8 tokens lie in all banks
  static constexpr int kParts = 2 * kCompressThreads / Channels;  // of a pair of key tiles, one per thread
  static constexpr int kEach =
      Channels < kCompressThreads ? 1 : Channels / kCompressThreads;  // tiles of a thread
  alignas(16) uint16_t x[(kTile + 3) * kStride];  // [64, Channels]; pack may read three rows more
  uint32_t limits[kTile];  // of tokens: the smallest magnitude that stays, in both halves
  int sums[kCompressThreads / 32];
  int begin;
  union {
    struct {
      uint64_t bitmaps[Channels];
      PairScan<Real16> parts[kParts][Channels / 2];
    };
    uint32_t words[1];  // as many as the launch has room for: those of all tiles
  };

  // A token's vectors of eight channels: four to its first lane, four to its second one, and so on.
  static constexpr int kVectors = Channels / 8, kEachOwn = kVectors / 2;  // of a token, of a thread

  // Copies a warp's 16 tokens, as neighbours of other lanes'; what is behind the first `rows` becomes zero.
  __device__ __forceinline__ void copy_tokens(const uint4* from, int rows, int warp, int lane) {
    constexpr int kRows = 32 / kVectors;  // at once
    const int row = lane / kVectors;
    const uint32_t to = shared_address(x + (warp * 16 + row) * kStride + lane % kVectors * 8);
    if (rows >= 16) {
      const uint4* own = from + lane;
      asm("" : "+l"(own));  // as if it were any pointer: else each address is made by itself
#pragma unroll
      for (int j = 0; j < kEachOwn; ++j) cp_async16(to + 2 * kStride * kRows * j, own + 32 * j);
    } else {
#pragma unroll 1
      for (int j = 0; j < kEachOwn; ++j) {
        const bool is_there = row + j * kRows < rows;
        cp_async16(to + 2 * kStride * kRows * j, from + (is_there ? lane + 32 * j : 0), is_there ? 16 : 0);
      }
    }
    cp_async_commit();
  }
  // This lane's half of its token.
  __device__ __forceinline__ void take_token(uint32_t (&pairs)[4 * kEachOwn], int token, int half) const {
    const auto* own = reinterpret_cast<const uint4*>(x + token * kStride) + 4 * half;
#pragma unroll
    for (int j = 0; j < kEachOwn; ++j) {
      const uint4 v = own[j % 4 + j / 4 * 8];
      pairs[4 * j] = v.x, pairs[4 * j + 1] = v.y, pairs[4 * j + 2] = v.z, pairs[4 * j + 3] = v.w;
    }
  }
  // The channel of the lower half of one of those words.
  static __device__ __forceinline__ int channel_of(int word, int half) {
    return word / 16 * 64 + half * 32 + word % 16 * 2;
  }

  // What a thread knows of its tiles, thread + n · kCompressThreads.
  struct Tile {
    uint64_t bitmap;
    TileFit<Real16> fit;
    int before;  // words of the tiles before, in this block
  };
  struct Scan {
    uint64_t bitmap;
    float lo, hi;  // NaN if nothing is set, or NaN is
  };

  // Values, threads in step: those of a tile side by side in pairs.
  __device__ __forceinline__ Scan scan_value(int tile) const {
    const auto* from = reinterpret_cast<const uint4*>(x + tile % kTile * kStride + tile / kTile * kTile);
    const uint32_t limit = limits[tile % kTile];
    PairScan<Real16> scan;
    uint32_t bits[2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const uint4 v = from[4 * h + i / 4];
        const uint32_t first = (i < 8 ? 0x80008000u : 0x40004000u) >> i % 8 * 2;
        bits[h] |= ~scan.add(v.x, limit) & first, bits[h] |= ~scan.add(v.y, limit) & first >> 2;
        bits[h] |= ~scan.add(v.z, limit) & first >> 4, bits[h] |= ~scan.add(v.w, limit) & first >> 6;
      }
      bits[h] = in_order(bits[h]);
    }
    return {uint64_t{bits[0]} << 32 | bits[1], fminf(half_of(scan.lo, 0), half_of(scan.lo, 1)),
            fmaxf(half_of(scan.hi, 0), half_of(scan.hi, 1))};
  }

  // Keys, threads in step: the same tokens of two channels side by side, and then, behind a barrier, tile by
  // tile.
  __device__ __forceinline__ void scan_keys(int thread) {
    constexpr int kTokens = kTile / kParts;
    const int pair = thread % (Channels / 2), part = thread / (Channels / 2);
    PairScan<Real16> scan;
#pragma unroll
    for (int first = 0; first < kTokens; first += 16) {
      uint32_t both = 0;
      const uint16_t* from = x + (part * kTokens + first) * kStride + 2 * pair;
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const uint4 limit = *reinterpret_cast<const uint4*>(limits + part * kTokens + first + i);
        const auto add = [&](int j, uint32_t limit_of_token) {
          const uint32_t values = *reinterpret_cast<const uint32_t*>(from + (i + j) * kStride);
          both |= ~scan.add(values, limit_of_token) & 0x80008000u >> (i + j);
        };
        add(0, limit.x), add(1, limit.y), add(2, limit.z), add(3, limit.w);
      }
      // The first token is the highest bit, in the last of the bitmap's pieces.
      const int at = kTile / 16 - 1 - (part * kTokens + first) / 16;
      reinterpret_cast<uint16_t*>(bitmaps + 2 * pair)[at] = static_cast<uint16_t>(both);
      reinterpret_cast<uint16_t*>(bitmaps + 2 * pair + 1)[at] = static_cast<uint16_t>(both >> 16);
    }
    parts[part][pair] = scan;
  }
  __device__ __forceinline__ Scan scan_key(int tile) const {
    float lo = bit_cast<float>(0x7fffffffu), hi = lo;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const PairScan<Real16>& own = parts[i][tile / 2];
      lo = fminf(lo, half_of(own.lo, tile % 2)), hi = fmaxf(hi, half_of(own.hi, tile % 2));
    }
    return {bitmaps[tile], lo, hi};
  }
  static __device__ __forceinline__ float half_of(uint32_t pair, int i) {
    return value_of(Real16{static_cast<uint16_t>(pair >> (16 * i))});
  }

  // Either, whatever the values are, one by one.
  static __device__ __noinline__ Scan scan_any(const uint16_t* from, int step, const uint32_t* limit,
                                               int limit_step) {
    Scan scan = {0, bit_cast<float>(0x7fffffffu), bit_cast<float>(0x7fffffffu)};
    bool is_nan = false;
#pragma unroll 1
    for (int i = 0; i < kTile; ++i, from += step, limit += limit_step) {
      const float value = value_of(Real16{*from});
      const bool is_set = magnitude_key(*from) >= (*limit & 0xffffu);
      scan.bitmap = scan.bitmap << 1 | is_set;
      if (!is_set) continue;
      scan.lo = fminf(scan.lo, value), scan.hi = fmaxf(scan.hi, value), is_nan |= value != value;
    }
    if (is_nan) scan.lo = scan.hi = bit_cast<float>(0x7fffffffu);
    return scan;
  }

  // By all threads.
  __device__ __forceinline__ void scan(const KvCompressArgs& args, int64_t first_tile, int thread,
                                       bool is_special, Tile (&tiles)[kEach]) {
    if (!is_special && !args.is_value) {
      scan_keys(thread);
      __syncthreads();  // bitmaps and parts
    }
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int tile = thread + n * kCompressThreads, token = tile % kTile;
      if (tile >= Channels) break;
      Scan own;
      if (is_special)
        own = args.is_value ? scan_any(x + token * kStride + tile / kTile * kTile, 1, limits + token, 0)
                            : scan_any(x + tile, kStride, limits, 1);
      else
        own = args.is_value ? scan_value(tile) : scan_key(tile);
      if (own.bitmap == 0) own.lo = own.hi = 0.0f;
      tiles[n].bitmap = own.bitmap;
      args.bitmaps[first_tile + tile] = own.bitmap;
      if (args.bits == kRawBits) continue;
      const TileFit<Real16> fit = tiles[n].fit = fit_tile<Real16>(own.lo, own.hi, args.bits);
      static_cast<Real16*>(args.scales)[first_tile + tile] = fit.scale;
      static_cast<Real16*>(args.zeros)[first_tile + tile] = fit.zero;
    }
  }

  // Where the words of tiles begin in the block; all of them.
  __device__ __forceinline__ int place(Tile (&tiles)[kEach], int bits, int thread) {
    int total = 0;
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
      const int count = (__popcll(tiles[n].bitmap) * bits + 31) >> 5;
      int until = count;
#pragma unroll
      for (int step = 1; step < 32;
           step *= 2)  // the shuffle says whether there is such a lane. PTX ISA 9.7.9.6
        asm("{ .reg .pred is_there; .reg .b32 other; shfl.sync.up.b32 other|is_there, %0, %1, 0, -1;"
            " @is_there add.s32 %0, %0, other; }"
            : "+r"(until)
            : "r"(step));
      if (n > 0) __syncthreads();  // sums have been read
      if (thread % 32 == 31) sums[thread / 32] = until;
      __syncthreads();  // sums
      int at = total + until - count;
#pragma unroll
      for (int w = 0; w < kCompressThreads / 32; ++w) {
        if (w < thread / 32) at += sums[w];
        total += sums[w];
      }
      tiles[n].before = at;
    }
    return total;
  }
};

}  // namespace quantgemm
