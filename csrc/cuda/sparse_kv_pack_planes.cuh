// SPDX-License-Identifier: MIT
// SparsePacker: bit planes of a four of eight page (kv_sparse_page.h).
#pragma once
#include "sparse_kv_pack.cuh"

namespace quantgemm {

// A thread has four groups of its lane (n, k) for either half of a plane's words, with 64 channels two.
template <class Real16, int Channels, bool IsValue, PageKind Kind>
template <int Bits, bool IsOdd>
__device__ __forceinline__ void SparsePacker<Real16, Channels, IsValue, Kind>::pack_planes() {
  constexpr int kPlanes = four_of_eight_planes(Bits), kStored = Channels == 64 ? kPlanes / 2 : kPlanes;
  constexpr int kEach = Channels == 64 ? 1 : 2, kSecond = IsValue ? 4 : 8;
  const int warp = thread / 32, lane = thread % 32;
  const bool is_whole = IsValue || Channels == 64;  // an x pair for each warp
  const int own = IsValue || Channels > 64 ? warp % 2 * 2 + warp / 2 * 8 : 2 * warp;  // its first bit
#pragma unroll 1
  for (int block = 0; block < (Channels + 127) / 128; ++block) {
    uint32_t set[8], data[8] = {}, is_set[4] = {}, is_large[4] = {}, is_negative[4] = {};
#pragma unroll 1
    for (int k = 0; k < kEach; ++k)
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const int x = is_whole ? 2 * warp + n : 2 * (warp % 2) + n + 4 * k;
        const int j = 2 * block + (is_whole ? k : warp / 2);
        const SparseOrigin first = origin(x, j, 0), second = origin(x, j, 1);
        uint32_t a[4], b[4];
        load_eight(a, first), load_eight(b, second);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const uint32_t here = 0x01010101u << (n + 4 * k);
          is_set[p] |= signs(set_signs(a[p]), set_signs(b[p])) & here;
          if constexpr (Bits == 2) {
            is_negative[p] |= signs(a[p], b[p]) & here;
            is_large[p] |=
                signs(large_signs(a[p], limits(first, p)), large_signs(b[p], limits(second, p))) & here;
          } else {
#pragma unroll
            for (int i = 2 * p; i < 2 * p + 2; ++i)
              data[i] += lifted_codes<IsOdd>(__byte_perm(a[p], b[p], i % 2 ? 0x7632 : 0x5410),
                                             factor(first, i), factor(second, i))
                         << 4 * (k + 2 * n);
          }
        }
      }
    using Planes = uint4[kWarps][kStored / 4][32];  // 64 channels: where partial results were, too
    static_assert(sizeof(Planes) <=
                  (Channels > 128 ? sizeof(PlanesOfWarps) : sizeof(Room::x) + Channels * sizeof(KeyPart)));
    auto& planes = *reinterpret_cast<Planes*>(Channels > 128 ? static_cast<void*>(&room.planes) : room.x);
    if (Channels <= 128) __syncthreads();  // x has been read
    uint32_t by_rank[4] = {}, out[kPlanes];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      set[i] = __byte_perm(is_set[i / 2], 0, i % 2 ? 0x3311 : 0x2200);  // in each plane's place
      out[i] = (set[i] & kFirstPlane) << own;
      if constexpr (Bits == 2) {
        data[i] = __byte_perm(is_large[i / 2], is_negative[i / 2], i % 2 ? 0x7351 : 0x6240) & set[i];
      } else {
        data[i] ^= kLifts;
        const auto exchange = [&](int by, uint32_t those) {  // bits by so many places up, and back
          const uint32_t t = (data[i] ^ data[i] >> by) & those;
          data[i] ^= t ^ t << by;
        };
        exchange(7, 0x00aa00aau), exchange(6, 0x00cc00ccu);
        set[i] *= 5u, data[i] &= set[i];
      }
    }
#pragma unroll
    for (int end = 0; end < 2; ++end) {  // see four_of_eight_rank
      const auto at = [&](int i) { return end ? 7 - i : i; };
      const uint32_t a = set[at(0)], b = set[at(1)], c = set[at(2)];
      const uint32_t x0 = data[at(0)], x1 = data[at(1)], x2 = data[at(2)], x3 = data[at(3)];
      const uint32_t none3 = ~(a | b | c), odd3 = a ^ b ^ c, two3 = (a & b) | (a & c) | (b & c);
      by_rank[at(0) % 4] |= x0 | (~a & x1) | (~(a | b) & x2) | (none3 & x3);
      by_rank[at(1) % 4] |= (a & x1) | ((a ^ b) & x2) | (odd3 & ~two3 & x3);
      by_rank[at(2) % 4] |= (a & b & x2) | (two3 & ~odd3 & x3);
      by_rank[at(3) % 4] |= a & b & c & x3;
    }
#pragma unroll
    for (int rank = 0; rank < 4; ++rank)
#pragma unroll
      for (int b = 0; b < Bits; ++b) {
        const uint32_t word = by_rank[rank];
        out[8 + rank * Bits + b] = ((word >> plane_shift<Bits>(b)) & kFirstPlane) << own;
      }
#pragma unroll
    for (int i = 0; i < kStored; i += 4) {
      uint32_t w[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        w[n] = kStored == kPlanes ? out[i + n] : out[i + n] | out[i + n + kPlanes / 2] << kSecond;
      planes[warp][i / 4][lane] = make_uint4(w[0], w[1], w[2], w[3]);
    }
    __syncthreads();  // planes
    for (int i = thread; i < kStored / 4 * 32; i += kPackThreads) {
      uint4 all = planes[0][i / 32][i % 32];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        const uint4 v = planes[w][i / 32][i % 32];
        all = make_uint4(all.x | v.x, all.y | v.y, all.z | v.z, all.w | v.w);
      }
      reinterpret_cast<uint4*>(page)[block * (kPlanes / 4 * 32) + i] = all;
    }
    if (Channels > 128) __syncthreads();  // they have been read
  }
}

}  // namespace quantgemm
