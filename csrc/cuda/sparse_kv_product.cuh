// SPDX-License-Identifier: MIT
// y[columns, m] = x[columns, k] · aᵀ for the sparse key-value container, keys and values alike (TileGrid).
// A warp owns 8·Rows rows m and 8 columns (the query heads of a group, so that a tile is decoded once
// for all of them) and walks over k in steps of 16:
//
//   lane 4r + c decodes rows r·Rows … +Rows of tiles k + 4c … +4; tensor cores take rows in any order
//   as long as y is read back in it: their rows r and r + 8 are this lane's rows 2j and 2j + 1
#pragma once
#include "launch.h"
#include "ptx.cuh"
#include "sparse_kv_tile.cuh"

namespace quantgemm {

inline constexpr int kProductWarps = 8;
inline constexpr int kProductThreads = 32 * kProductWarps;

template <class Real16, int Bits, int Rows>
class ProductWarp {
  using Tile = TileCodes<Real16, Bits, Rows>;
  static constexpr int kFetched = Tile::kWords + 1;

 public:
  // What says where the codes of four tiles are; fetched two steps ahead.
  struct Heads {
    uint64_t bitmaps[4];
    int32_t offsets[4];
    uint64_t scales, zeros;  // four of 16 bits each
  };
  // What this lane decodes of them; fetched one step ahead.
  struct Codes {
    uint32_t words[4][kFetched];  // as they lie, from a word boundary on
    uint32_t bits[4];             // of the bitmaps, from the top
    uint32_t shifts;              // a byte each: where in the first word the codes begin
    int64_t first[Bits == kRawBits ? 4 : 1];
    uint64_t scales, zeros;
    uint2 x;  // four neighbouring values of this lane's column
  };

  __device__ ProductWarp(const KvProductArgs& a, int64_t head, int64_t row0, int64_t column0)
      : args(a), lane(threadIdx.x % 32) {
    const int r = lane / 4;
    row = row0 + r * Rows;
    inside = row < args.m;
    skip = static_cast<int>(row % kTile);
    const TileGrid grid = args.is_value ? value_grid(args.channels) : key_grid(args.channels);
    block_stride = static_cast<uint32_t>(grid.block_stride);
    const int64_t group = inside ? row / kTile : 0;
    const int64_t tile = head * args.blocks * args.channels + group * grid.group_stride + lane % 4 * 4;
    bitmaps = args.bitmaps + tile;
    offsets = args.offsets + tile;
    scales = static_cast<const uint16_t*>(args.scales) + tile;
    zeros = static_cast<const uint16_t*>(args.zeros) + tile;
    // A word's number has 31 bits, as offsets have; anything else is outside.
    num_words =
        static_cast<uint32_t>(args.num_words < (int64_t{1} << 31) ? args.num_words : int64_t{1} << 31);
    const int64_t column = column0 + r;
    first_x = lane % 4 * 4;
    num_x = column < args.columns ? static_cast<int>(args.k) : 0;
    x_is_even = args.k % 4 == 0;
    x = static_cast<const uint16_t*>(args.x) + (head * args.columns + (num_x > 0 ? column : 0)) * args.k +
        first_x;
  }

  __device__ __forceinline__ Heads fetch_heads(int k) const {
    Heads h{};
    if (!inside) return h;
    const uint32_t at = static_cast<uint32_t>(k) / kTile * block_stride + static_cast<uint32_t>(k) % kTile;
    const auto* two = reinterpret_cast<const ulonglong2*>(bitmaps + at);  // tiles are multiples of 4
    const ulonglong2 b0 = __ldg(two), b1 = __ldg(two + 1);
    const int4 o = __ldg(reinterpret_cast<const int4*>(offsets + at));
    h.bitmaps[0] = b0.x, h.bitmaps[1] = b0.y, h.bitmaps[2] = b1.x, h.bitmaps[3] = b1.y;
    h.offsets[0] = o.x, h.offsets[1] = o.y, h.offsets[2] = o.z, h.offsets[3] = o.w;
    if constexpr (Bits != kRawBits) {
      h.scales = __ldg(reinterpret_cast<const unsigned long long*>(scales + at));
      h.zeros = __ldg(reinterpret_cast<const unsigned long long*>(zeros + at));
    }
    return h;
  }

  __device__ __forceinline__ Codes fetch_codes(const Heads& h, int k) const {
    Codes codes;
    codes.shifts = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes.bits[i] = static_cast<uint32_t>(h.bitmaps[i] << skip >> 32);
      // Set elements of the tile before this lane's.
      const int rank = Rows == 8 || skip != 0 ? __popcll(h.bitmaps[i] >> (63 - skip) >> 1) : 0;
      if constexpr (Bits == kRawBits) {
        codes.first[i] = 2 * int64_t{h.offsets[i]} + rank;
        continue;
      }
      codes.shifts |= static_cast<uint32_t>(rank * Bits % 32) << (8 * i);
      const uint32_t word = static_cast<uint32_t>(h.offsets[i]) + static_cast<uint32_t>(rank * Bits / 32);
#pragma unroll
      for (int j = 0; j < kFetched; ++j)  // whatever the offsets say, nothing outside is read
        codes.words[i][j] = word + j < num_words ? __ldg(args.packed + word + j) : 0;
    }
    codes.scales = h.scales, codes.zeros = h.zeros;
    codes.x = fetch_x(k);
    return codes;
  }

  __device__ __forceinline__ uint2 fetch_x(int k) const {
    const int left = num_x - k - first_x;
    if (left <= 0) return make_uint2(0, 0);
    if (x_is_even) return __ldg(reinterpret_cast<const uint2*>(x + k));
    uint32_t v[4];
    for (int i = 0; i < 4; ++i) v[i] = i < left ? __ldg(x + k + i) : 0;
    return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
  }

  __device__ __forceinline__ void multiply(const Codes& codes, const uint32_t* selectors) {
    Tile tiles[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Bits == kRawBits) {
        const int64_t end = 2 * args.num_words;
        const bool good = codes.first[i] >= 0 && codes.first[i] < end;
        tiles[i].at = reinterpret_cast<const uint16_t*>(args.packed) + (good ? codes.first[i] : 0);
        tiles[i].left = good ? end - codes.first[i] : 0;
      } else {
#pragma unroll
        for (int j = 0; j + 1 < kFetched; ++j)
          tiles[i].window[j] =
              __funnelshift_r(codes.words[i][j], codes.words[i][j + 1], codes.shifts >> (8 * i));
        tiles[i].fit(twice(codes.scales, i), twice(codes.zeros, i));
      }
    }
#pragma unroll
    for (int byte = 0; byte < Rows / 8; ++byte) {
      uint32_t v[4][4];  // [tile][elements 2j, 2j + 1]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t eight = codes.bits[i] >> (24 - 8 * byte) & 0xffu;
        if constexpr (Bits == kRawBits)
          tiles[i].next_of(eight, v[i]);
        else
          tiles[i].next(selectors[eight * 32 + lane], __popc(eight), v[i]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {__byte_perm(v[0][j], v[1][j], 0x5410), __byte_perm(v[0][j], v[1][j], 0x7632),
                               __byte_perm(v[2][j], v[3][j], 0x5410), __byte_perm(v[2][j], v[3][j], 0x7632)};
        mma_16x8x16(sums[4 * byte + j], a, codes.x.x, codes.x.y, Real16{});
      }
    }
  }

  // Sums of columns k0 … k1 in steps, what a step needs being under way before.
  __device__ __forceinline__ void run(int k0, int k1, int step, const uint32_t* selectors) {
    if (k0 >= k1) return;
    Codes codes = fetch_codes(fetch_heads(k0), k0);
    Heads heads = fetch_heads(k0 + step < k1 ? k0 + step : k0);
#pragma unroll 2
    for (int k = k0; k < k1; k += step) {
      const int next = k + step < k1 ? k + step : k0;
      const Codes next_codes = fetch_codes(heads, next);
      heads = fetch_heads(next + step < k1 ? next + step : k0);
      multiply(codes, selectors);
      codes = next_codes;
    }
  }

  const KvProductArgs& args;
  const int lane;
  int64_t row;  // this lane's first
  float sums[Rows / 2][4] = {};

 private:
  static __device__ __forceinline__ uint32_t twice(uint64_t four, int i) {
    const auto two = static_cast<uint32_t>(four >> (i / 2 * 32));
    return __byte_perm(two, 0, i % 2 ? 0x3232 : 0x1010);
  }

  const uint64_t* bitmaps;  // of this lane's tiles, at k = 0
  const int32_t* offsets;
  const uint16_t *scales, *zeros, *x;
  uint32_t block_stride, num_words;
  int skip, first_x, num_x;
  bool inside, x_is_even;
};

// Sums of all warps into the first one's.
template <class Sums>
__device__ __forceinline__ void add_warps(Sums& sums, float* room, int warp, int lane) {
  constexpr int kCount = sizeof(Sums) / sizeof(float);
  float* mine = &sums[0][0];
#pragma unroll
  for (int half = kProductWarps / 2; half > 0; half /= 2) {
    __syncthreads();  // room: selectors or the round before
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int i = 0; i < kCount; ++i) room[((warp - half) * kCount + i) * 32 + lane] = mine[i];
    __syncthreads();
    if (warp < half)
#pragma unroll
      for (int i = 0; i < kCount; ++i) mine[i] += room[(warp * kCount + i) * 32 + lane];
  }
}

// Rows of two neighbouring columns from a lane's registers to y, or to this split's partial sums.
template <class Real16, int Rows>
__device__ __forceinline__ void store_sums(const KvProductArgs& args, const float (&sums)[Rows / 2][4],
                                           int64_t head, int64_t row, int64_t column, int64_t split) {
#pragma unroll
  for (int c = 0; c < 2; ++c, ++column) {
    if (column >= args.columns) return;
    const int64_t at = (head * args.columns + column) * args.m + row;
#pragma unroll
    for (int i = 0; i < Rows; i += 8) {
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = sums[(i + j) / 2][j % 2 * 2 + c];
      if (args.split > 1) {  // of values: m is a multiple of 64
        float* to = args.partial + split * args.heads * args.columns * args.m + at + i;
        reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
        reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
        continue;
      }
      auto* to = static_cast<Real16*>(args.y) + at + i;
      if (args.m % 8 == 0 && row + i < args.m) {
        store_vector(to, v);
      } else {
        for (int j = 0; j < 8; ++j)
          if (row + i + j < args.m) store1(to + j, v[j]);
      }
    }
  }
}

// Grid: (heads · rows · splits, columns / 8). A block's warps share rows and divide k between them, or,
// where rows are many, each has rows of its own.
template <class Real16, int Bits, int Rows>
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(KvProductArgs args, int64_t parts, bool share_rows) {
  __shared__ alignas(16) uint32_t room[256 * 32];  // selectors, at the end sums
  if constexpr (Bits != kRawBits) {
    fill_selectors<TileCodes<Real16, Bits, Rows>>(room, static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column0 = 8 * int64_t{blockIdx.y}, split = blockIdx.x % args.split;
  const int64_t part = blockIdx.x / args.split % parts, head = blockIdx.x / args.split / parts;
  const int64_t row0 = 8 * Rows * (share_rows ? part : part * kProductWarps + warp);
  ProductWarp<Real16, Bits, Rows> mine(args, head, row0, column0);
  if (share_rows) {
    const auto steps = static_cast<int>((args.k + 15) / 16), splits = static_cast<int>(args.split);
    const int each = (steps + splits - 1) / splits, first = static_cast<int>(split) * each;
    const int last = first + each < steps ? first + each : steps;
    mine.run(16 * (first + warp), 16 * last, 16 * kProductWarps, room);
    add_warps(mine.sums, reinterpret_cast<float*>(room), warp, mine.lane);
    if (warp > 0) return;
  } else {
    if (row0 >= args.m) return;
    mine.run(0, static_cast<int>(args.k), 16, room);
  }
  store_sums<Real16, Rows>(args, mine.sums, head, mine.row, column0 + mine.lane % 4 * 2, split);
}

template <int Bits>
cudaError_t launch_product_of(const KvProductArgs& args, int rows, bool share_rows, cudaStream_t stream) {
  const int64_t per_block = int64_t{8} * rows * (share_rows ? 1 : kProductWarps);
  const int64_t parts = (args.m + per_block - 1) / per_block;
  const dim3 grid(static_cast<unsigned>(args.heads * parts * args.split),
                  static_cast<unsigned>((args.columns + 7) / 8));
  const auto launch = [&]<int Rows>(auto real, std::integral_constant<int, Rows>) {
    product_kernel<decltype(real), Bits, Rows><<<grid, kProductThreads, 0, stream>>>(args, parts, share_rows);
  };
  const auto launch_any = [&](auto real) {
    if (rows == 8) launch(real, std::integral_constant<int, 8>{});
    if (rows == 16) launch(real, std::integral_constant<int, 16>{});
    if (rows == 32) launch(real, std::integral_constant<int, 32>{});
  };
  args.type == Real::kFloat16 ? launch_any(Half{}) : launch_any(BFloat16{});
  return cudaGetLastError();
}

}  // namespace quantgemm
