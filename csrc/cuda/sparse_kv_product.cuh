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
  // What says where codes are; fetched two steps ahead.
  struct Heads {
    uint64_t bitmaps[4];
    int32_t offsets[4];
    uint64_t scales, zeros;  // four of 16 bits each
  };
  // The codes as they lie, from a word boundary on; fetched one step ahead.
  struct Codes {
    uint32_t words[4][kFetched];
  };

  __device__ ProductWarp(const KvProductArgs& a, int64_t head, int64_t row0, int64_t column0)
      : args(a), lane(threadIdx.x % 32) {
    const int r = lane / 4;
    row = row0 + r * Rows;
    const TileGrid grid = args.is_value ? value_grid(args.channels) : key_grid(args.channels);
    const int64_t group = row / kTile;
    inside = row < args.m;
    block_stride = grid.block_stride;
    first_tile = head * args.blocks * args.channels + (inside ? group * grid.group_stride : 0) + lane % 4 * 4;
    skip = static_cast<int>(row % kTile);
    const int64_t column = column0 + r;
    has_column = column < args.columns;
    x = static_cast<const uint16_t*>(args.x) + (head * args.columns + (has_column ? column : 0)) * args.k;
  }

  __device__ __forceinline__ Heads fetch_heads(int64_t k) const {
    Heads h{};
    if (!inside) return h;
    const int64_t tile = first_tile + k / kTile * block_stride + k % kTile;  // a multiple of 4
    const auto* bitmaps = reinterpret_cast<const ulonglong2*>(args.bitmaps + tile);
    const ulonglong2 b0 = __ldg(bitmaps), b1 = __ldg(bitmaps + 1);
    const int4 offsets = __ldg(reinterpret_cast<const int4*>(args.offsets + tile));
    h.bitmaps[0] = b0.x, h.bitmaps[1] = b0.y, h.bitmaps[2] = b1.x, h.bitmaps[3] = b1.y;
    h.offsets[0] = offsets.x, h.offsets[1] = offsets.y, h.offsets[2] = offsets.z, h.offsets[3] = offsets.w;
    if constexpr (Bits != kRawBits) {
      h.scales = __ldg(
          reinterpret_cast<const unsigned long long*>(static_cast<const uint16_t*>(args.scales) + tile));
      h.zeros =
          __ldg(reinterpret_cast<const unsigned long long*>(static_cast<const uint16_t*>(args.zeros) + tile));
    }
    return h;
  }

  // Set elements of the tile before this lane's.
  __device__ __forceinline__ int rank(uint64_t bitmap) const {
    return skip == 0 ? 0 : __popcll(bitmap >> (kTile - skip));
  }

  __device__ __forceinline__ Codes fetch_codes(const Heads& h) const {
    Codes codes{};
    if constexpr (Bits != kRawBits) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t word = int64_t{h.offsets[i]} + rank(h.bitmaps[i]) * Bits / 32;
#pragma unroll
        for (int j = 0; j < kFetched; ++j)  // whatever the offsets say, nothing outside is read
          codes.words[i][j] = static_cast<uint64_t>(word + j) < static_cast<uint64_t>(args.num_words)
                                  ? __ldg(args.packed + word + j)
                                  : 0;
      }
    }
    return codes;
  }

  // Four neighbouring values of this lane's column of x.
  __device__ __forceinline__ uint2 fetch_x(int64_t k) const {
    k += lane % 4 * 4;
    if (!has_column || k >= args.k) return make_uint2(0, 0);
    if (args.k % 4 == 0) return __ldg(reinterpret_cast<const uint2*>(x + k));
    uint32_t v[4];
    for (int i = 0; i < 4; ++i) v[i] = k + i < args.k ? __ldg(x + k + i) : 0;
    return make_uint2(v[0] | v[1] << 16, v[2] | v[3] << 16);
  }

  __device__ __forceinline__ void multiply(const Heads& h, const Codes& codes, uint2 b,
                                           const uint32_t* selectors) {
    Tile tiles[4];
    uint32_t bits[4];  // of this lane's rows, from the top
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits[i] = static_cast<uint32_t>(h.bitmaps[i] << skip >> 32);
      const int before = rank(h.bitmaps[i]);
      if constexpr (Bits == kRawBits) {
        const int64_t first = 2 * int64_t{h.offsets[i]} + before, end = 2 * args.num_words;
        const bool good = first >= 0 && first < end;
        tiles[i].at = reinterpret_cast<const uint16_t*>(args.packed) + (good ? first : 0);
        tiles[i].left = good ? end - first : 0;
      } else {
#pragma unroll
        for (int j = 0; j + 1 < kFetched; ++j)
          tiles[i].window[j] = __funnelshift_r(codes.words[i][j], codes.words[i][j + 1], before * Bits);
        tiles[i].scale = twice(h.scales, i), tiles[i].zero = twice(h.zeros, i);
      }
    }
#pragma unroll
    for (int byte = 0; byte < Rows / 8; ++byte) {
      uint32_t v[4][4];  // [tile][elements 2j, 2j + 1]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t eight = bits[i] >> (24 - 8 * byte) & 0xffu;
        if constexpr (Bits == kRawBits)
          tiles[i].next_of(eight, v[i]);
        else
          tiles[i].next(selectors[eight * 32 + lane], __popc(eight), v[i]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {__byte_perm(v[0][j], v[1][j], 0x5410), __byte_perm(v[0][j], v[1][j], 0x7632),
                               __byte_perm(v[2][j], v[3][j], 0x5410), __byte_perm(v[2][j], v[3][j], 0x7632)};
        mma_16x8x16(sums[4 * byte + j], a, b.x, b.y, Real16{});
      }
    }
  }

  // Sums of k0 … k1 in steps, everything a step needs being under way before.
  __device__ __forceinline__ void run(int64_t k0, int64_t k1, int64_t step, const uint32_t* selectors) {
    if (k0 >= k1) return;
    Heads heads = fetch_heads(k0);
    Codes codes = fetch_codes(heads);
    uint2 b = fetch_x(k0);
    Heads next_heads = fetch_heads(k0 + step < k1 ? k0 + step : k0);
    for (int64_t k = k0; k < k1; k += step) {
      const int64_t k_next = k + step < k1 ? k + step : k0, k_after = k_next + step < k1 ? k_next + step : k0;
      const Codes next_codes = fetch_codes(next_heads);
      const uint2 next_b = fetch_x(k_next);
      const Heads after = fetch_heads(k_after);
      multiply(heads, codes, b, selectors);
      heads = next_heads, codes = next_codes, b = next_b, next_heads = after;
    }
  }

  const KvProductArgs& args;
  const int lane;
  int64_t row;  // this lane's first
  float sums[Rows / 2][4] = {};

 private:
  static __device__ __forceinline__ uint32_t twice(uint64_t four, int i) {
    return static_cast<uint32_t>(four >> (16 * i) & 0xffffu) * 0x10001u;
  }

  int64_t first_tile, block_stride;
  int skip;
  bool inside, has_column;
  const uint16_t* x;
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
    const int64_t steps = (args.k + 15) / 16, each = (steps + args.split - 1) / args.split;
    const int64_t last = (split + 1) * each < steps ? (split + 1) * each : steps;
    mine.run(16 * (split * each + warp), 16 * last, 16 * kProductWarps, room);
    add_warps(mine.sums, reinterpret_cast<float*>(room), warp, mine.lane);
    if (warp > 0) return;
  } else {
    if (row0 >= args.m) return;
    mine.run(0, args.k, 16, room);
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
