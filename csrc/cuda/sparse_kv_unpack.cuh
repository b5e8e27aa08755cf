// SPDX-License-Identifier: MIT
// Pages of any format (kv_page.h, kv_sparse_page.h) to halves in shared memory. Each of four warps unpacks 16
// tokens for itself, those whose number modulo 8 is 2·warp + e, e < 2: own token 2x + e is 8x + 2·warp + e.
// All that it needs is with the same eight of a page's 32 lanes, of keys and of values.
//
//   key tile    [16 tokens][Channels], value tile [Channels][16 tokens]; 16-byte pieces change places so
//               that what a warp reads or writes at once lies in all banks
#pragma once
#include <cuda_fp16.h>

#include "../kv_page.h"

namespace quantgemm {

// Where 8 neighbouring channels of an own token are, and 8 own tokens of a channel: in 16 bytes.
template <int Channels>
__device__ __forceinline__ unsigned key_piece(unsigned token, unsigned group) {
  return token * (Channels / 8) + (group ^ token % 2 * 4 ^ token / 2 % 4);
}
__device__ __forceinline__ unsigned value_piece(unsigned channel, unsigned half) {
  return (channel ^ channel / 8 % 2) * 2 + (half ^ channel / 4 % 2);
}

__device__ __forceinline__ __half2 as_halves(uint32_t pair) { return bit_cast<__half2>(pair); }
__device__ __forceinline__ uint32_t product(__half2 x, uint32_t scale) {
  return bit_cast<uint32_t>(__hmul2(x, as_halves(scale)));
}
// Lower halves of both, upper halves of both.
__device__ __forceinline__ uint32_t lower(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t upper(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// ---- eight elements by a byte that says which are set, and their codes ----
// An entry of the table says which code each of eight bytes gets, or none; these are to become pairs of
// halves (0, 2), (1, 3), (4, 6), (5, 7): of elements with these numbers or, in a table of neighbours, (0, 1),
// (2, 3), (4, 5), (6, 7). A four of eight's second half counts from the end.
//   4 bits  even codes are bytes 0 … 3 to choose from, odd ones 4 … 7
//   2 bits  four codes, for the second half those from its first one on (bitmap), or the same (four of eight)
__device__ __forceinline__ void make_selectors(uint32_t* table, PageFormat format, bool is_value) {
  if (format.kind == PageKind::kDense) return;
  const bool from_end = format.kind == PageKind::kFourOfEight, neighbours = is_value || from_end;
  for (uint32_t bits = threadIdx.x; bits < 256; bits += blockDim.x) {
    uint32_t entry = 0, rank = 0;
    for (int i = 0; i < 8; ++i) {
      // More than four of eight are in no page that was packed; no such record leads astray.
      if (i == 4 && from_end) rank = 4u - static_cast<uint32_t>(__popc(bits >> 4));
      if (i == 4 && !from_end && format.bits == 2) rank = 0;
      const int byte = neighbours ? i / 4 * 4 + i / 2 % 2 + i % 2 * 2 : i;
      uint32_t source = format.bits == 2 ? 4u : 8u;  // zero, or the sign of a byte without one
      if (bits >> i & 1) source = format.bits == 2 ? rank % 4 : rank % 8 / 2 + rank % 2 * 4, ++rank;
      entry |= source << 4 * byte;
    }
    table[bits] = entry;
  }
}
// Pairs of levels. codes: the first one's from bit 0.
template <int Bits, bool IsBitmap>
__device__ __forceinline__ void expand(__half2 (&levels)[4], uint32_t entry, uint32_t codes, uint32_t set) {
  if constexpr (Bits == 2) {
    codes &= 0xffffu, codes = (codes | codes << 8) & 0x00ff00ffu, codes = (codes | codes << 4) & 0x0f0f0f0fu;
    codes = (codes | codes << 2) & 0x33333333u;
    const uint32_t all = 0xc0bc403cu;  // ±1, ±2 as upper halves of halves
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (IsBitmap && h == 1) codes >>= 4 * __popc(set & 15u);
      const uint32_t four = pick_bytes(pick_bytes(all, 0, codes), 0, h ? entry >> 16 : entry);
      levels[2 * h] = as_halves(pick_bytes(four, 0, 0x2404));
      levels[2 * h + 1] = as_halves(pick_bytes(four, 0, 0x3414));
    }
  } else {
    const uint32_t even = codes & 0x0f0f0f0fu, odd = codes >> 4 & 0x0f0f0f0fu;
    const auto level = [](uint32_t pair) {  // the code makes 1024 + 8 + level of 1024 + 8
      return __hsub2(as_halves((pair & 0x000f000fu) ^ 0x64086408u), as_halves(0x64086408u));
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t four = pick_bytes(even, odd, h ? entry >> 16 : entry);
      levels[2 * h] = level(four), levels[2 * h + 1] = level(four >> 8);
    }
  }
}

// Rows and columns of an 8×8 matrix of bits exchanged: byte i of b:a is row i.
__device__ __forceinline__ void transpose_bits(uint32_t& a, uint32_t& b) {
  const auto exchange = [](uint32_t x, int by, uint32_t mask) {
    const uint32_t t = (x ^ x >> by) & mask;
    return x ^ t ^ t << by;
  };
  a = exchange(exchange(a, 7, 0x00aa00aau), 14, 0x0000ccccu);
  b = exchange(exchange(b, 7, 0x00aa00aau), 14, 0x0000ccccu);
  const uint32_t t = (a ^ b << 4) & 0xf0f0f0f0u;
  a ^= t, b ^= t >> 4;
}

// A warp's part of a page of keys or of values in shared memory, to `tile`.
template <int Channels, bool IsValue>
struct PageUnpacker {
  static constexpr int kJ = Channels / 64, kColumns = IsValue ? kPageTokens : Channels;
  const uint8_t* page;
  const uint8_t* fits;
  const uint32_t* table;
  uint4* tile;
  unsigned warp, lane;

  // A lane of the page, whose words four lanes of this warp share; `part` is this one's.
  __device__ __forceinline__ unsigned page_lane() const {
    return IsValue ? lane / 4 * 4 + warp : warp * 8 + lane / 4;
  }
  __device__ __forceinline__ unsigned part() const { return lane % 4; }
  // Keys: of a token modulo 8 less 2·warp, and the page lane's of four groups of channels.
  __device__ __forceinline__ unsigned odd_token() const { return lane / 16; }
  __device__ __forceinline__ unsigned key_group() const { return lane / 4 % 4; }

  __device__ __forceinline__ void store_pair(unsigned piece, unsigned pair, uint32_t x) const {
    reinterpret_cast<uint32_t*>(tile + piece)[pair] = x;
  }
  __device__ __forceinline__ uint4 fits_at(unsigned i) const {
    return reinterpret_cast<const uint4*>(fits)[i];
  }
  // The scale of a pair of this warp's tokens; in its top bits, which are NaN.
  __device__ __forceinline__ uint32_t token_scale(unsigned x) const {
    return reinterpret_cast<const uint32_t*>(fits)[(x / 4 * 4 + warp) * 4 + x % 4];
  }
  static __device__ __forceinline__ uint32_t nan_bits(uint32_t pair) {
    return ((pair & 0x7fff7fffu) + 0x03ff03ffu) & 0x80008000u;
  }
  // Of all of this warp's tokens: 1 for a NaN, which only what is kept may become (spread_nan).
  __device__ __forceinline__ void load_token_scales(uint32_t (&scales)[8]) const {
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const uint32_t scale = token_scale(x), nan = (nan_bits(scale) >> 15) * 0xffffu;
      scales[x] = (scale & ~nan) | (0x3c003c00u & nan);
    }
  }

  __device__ __forceinline__ void run(PageFormat format) const {
    const bool two = format.bits == 2;
    if (format.kind == PageKind::kDense)
      two ? dense<2>() : dense<4>();
    else if (format.kind == PageKind::kBitmap)
      two ? bitmap<2>() : bitmap<4>();
    else
      two ? four_of_eight<2>() : four_of_eight<4>();
    if (IsValue && format.kind != PageKind::kDense) spread_nan();
  }

  // ---- dense: a word has codes of two columns, neighbours, of every eighth row ----
  template <int Bits>
  __device__ __forceinline__ void dense() const {
    constexpr int kPerHalf = 16 / Bits, kOfPair = 8 / kPerHalf;
    const auto* words = reinterpret_cast<const uint32_t*>(page) + page_lane() * 4 + part();
    const auto* pairs = reinterpret_cast<const uint32_t*>(fits);
#pragma unroll 4
    for (unsigned j = 0; j < Channels * Bits / 64; ++j) {
      const unsigned pair = part() / kOfPair + 4 / kOfPair * j, first = part() % kOfPair * kPerHalf;
      uint32_t word = words[j * 128];
      const unsigned lanes = IsValue ? warp : key_group(),
                     at = (pair % (kColumns / 8) / 4 * 4 + lanes) * 4 + pair % 4;
      const uint32_t scale = pairs[at], shift = pairs[kColumns / 2 + at];  // fit_place
      // Keys: of a row, and where in row 2i (key_piece).
      uint4* rows = tile + (IsValue ? 0 : (2 * first + odd_token()) * (Channels / 8));
      const auto to = [&](unsigned i) { return 2 * i * (Channels / 8) + (pair ^ odd_token() * 4 ^ i % 4); };
#pragma unroll
      for (unsigned i = 0; i < kPerHalf; ++i) {
        constexpr unsigned kMask = 0x10001u * ((1u << Bits) - 1u);
        const unsigned up = i * Bits % (Bits == 2 ? 10 : 8);  // so much of a half's ten bits needs no shift
        if (i > 0 && up == 0) word >>= Bits == 2 ? 10 : 8;
        const __half2 code = as_halves((word & kMask << up) | 0x64006400u);  // 1024 + code · 2^up
        const __half2 x =
            __hfma2(__hsub2(code, as_halves(0x64006400u)),
                    __float2half2_rn(1.0f / static_cast<float>(1u << (up + Bits))), as_halves(shift));
        if (IsValue)
          store_pair(value_piece(64 * (pair / 8) + 8 * (first + i) + lane / 4, pair % 8 / 4), pair % 4,
                     product(x, scale));
        else
          reinterpret_cast<uint32_t*>(rows + to(i))[key_group()] = product(x, scale);
      }
    }
  }

  // Scales of channels 8·group + i, i + 1 for i = 4·quad, 4·quad + 2 of the groups `even` of the page lane's.
  __device__ __forceinline__ void load_channel_scales(uint32_t (&first)[2], uint32_t (&second)[2],
                                                      unsigned quad) const {
    const uint4 v = fits_at(quad * 4 + key_group());  // channels 0, 2, 1, 3, each of both groups
    first[0] = lower(v.x, v.z), first[1] = upper(v.x, v.z);
    second[0] = lower(v.y, v.w), second[1] = upper(v.y, v.w);
  }

  // ---- bitmap: a word has the bits of two channels, neighbours; where its codes begin is counted ----
  template <int Bits>
  __device__ __forceinline__ void bitmap() const {
    const auto* pairs = reinterpret_cast<const uint2*>(page);
    const auto* codes = reinterpret_cast<const uint32_t*>(page + bitmap_bytes(Channels));
    uint32_t token_scales[8];
    if (IsValue) load_token_scales(token_scales);
    unsigned all = 0;  // codes so far
#pragma unroll 1
    for (unsigned j = 0; j < kJ; ++j) {
      // Where the codes of the page lane's two pairs of words begin, side by side, from counts by the warp.
      const uint2 low = pairs[64 * j + lane], high = pairs[64 * j + 32 + lane];
      const unsigned own = static_cast<unsigned>(__popc(low.x) + __popc(low.y)) |
                           static_cast<unsigned>(__popc(high.x) + __popc(high.y)) << 16;
      unsigned until = own;
#pragma unroll
      for (unsigned step = 1; step < 32; step *= 2) {
        const unsigned left = __shfl_up_sync(~0u, until, step);
        if (lane >= step) until += left;
      }
      const unsigned sum = __shfl_sync(~0u, until, 31), before = __shfl_sync(~0u, until - own, page_lane());
      unsigned at = all + (part() / 2 ? (sum & 0xffffu) + (before >> 16) : before & 0xffffu);
      all += (sum & 0xffffu) + (sum >> 16);
      const uint2 v = pairs[32 * (part() / 2 + 2 * j) + page_lane()];
      const uint32_t word = part() % 2 ? v.y : v.x;
      at = (at + (part() % 2 ? static_cast<unsigned>(__popc(v.x)) : 0u)) * Bits;
      uint32_t scales[2][2], rows[2][4];
      if (!IsValue) load_channel_scales(scales[0], scales[1], 2 * j + part() / 2);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t set = word >> 8 * n & 0xffu;
        const uint32_t next = __funnelshift_r(codes[at / 32], codes[at / 32 + 1], at);
        __half2 x[4];
        expand<Bits, true>(x, table[set], next, set);
        at += static_cast<unsigned>(__popc(set)) * Bits;
        if constexpr (IsValue) {  // tokens 8(t + 2h) …, of one channel and the next
          const int t = n / 2 * 4 + n % 2;
#pragma unroll
          for (int h = 0; h < 4; ++h)
            rows[h / 2][n % 2 + h % 2 * 2] = product(x[h], token_scales[t + h % 2 * 2]);
#pragma unroll
          for (int i = 0; n % 2 == 1 && i < 2; ++i)
            tile[value_piece(8 * (lane / 4 + 8 * j) + 2 * part() + i, n / 2)] =
                make_uint4(rows[i][0], rows[i][1], rows[i][2], rows[i][3]);
        } else {  // tokens 8·2n …, 8·(2n + 1) …, of a group and the one that is half of all further
#pragma unroll
          for (int h = 0; h < 4; ++h)
            store_pair(
                key_piece<Channels>(2 * (2 * n + h / 2) + odd_token(), 4 * (j + h % 2 * kJ) + key_group()),
                part(), product(x[h], part() % 2 ? scales[1][h % 2] : scales[0][h % 2]));
        }
      }
    }
  }

  // ---- four of eight: bytes of 8 planes are transposed to a byte for each of eight groups ----
  // This lane's byte of four planes, whose words are v. Keys: of 8 tokens. Values: of 4 tokens, even and odd.
  static __device__ __forceinline__ uint32_t own_bytes(const uint4& v, unsigned at) {
    const auto bytes = [&](int i) {
      const uint32_t two = 0x40u + 0x11u * static_cast<uint32_t>(i);
      return lower(__byte_perm(v.x, v.y, two), __byte_perm(v.z, v.w, two));
    };
    if (!IsValue) return bytes(at);
    const uint32_t even = bytes(at / 2) >> at % 2 * 4, odd = bytes(2 + at / 2) >> at % 2 * 4;
    return (even & 0x0f0f0f0fu) | (odd & 0x0f0f0f0fu) << 4;
  }

  template <int Bits>
  __device__ __forceinline__ void four_of_eight() const {
    constexpr int kPlanes = four_of_eight_planes(Bits), kStored = Channels == 64 ? kPlanes / 2 : kPlanes;
    const auto* words = reinterpret_cast<const uint4*>(page) + page_lane();
    uint32_t token_scales[8];
    if (IsValue) load_token_scales(token_scales);
#pragma unroll 1
    for (unsigned set = 0; set < (kJ + 1) / 2; ++set) {
      // Values: part is j % 2 + 2·(token/32), keys: j % 2 + 2·even. With 64 channels the planes' second half
      // lies where j = 1 would, and half of the lanes have nothing to do but what others do as well.
      const unsigned j = 2 * set + (Channels == 64 ? 0 : part() % 2), rest = part() / 2;
      uint32_t t[kPlanes / 8][2];
#pragma unroll
      for (int q = 0; q < kPlanes / 4; ++q) {
        const unsigned second = 4 * q >= kStored, place = Channels == 64 ? second : part() % 2;
        t[q / 2][q % 2] =
            own_bytes(words[32 * (set * kPlanes / 4 + q - second * (kStored / 4))], 2 * rest + place);
      }
#pragma unroll
      for (int p = 0; p < kPlanes / 8; ++p) transpose_bits(t[p][0], t[p][1]);
      const auto levels = [&](__half2(&x)[4], int n) {
        const auto byte = [&](int p) { return t[p][n / 4] >> n % 4 * 8 & 0xffu; };
        uint32_t codes = byte(1);
        if constexpr (Bits == 4) codes |= byte(2) << 8;
        expand<Bits, false>(x, table[byte(0)], codes, 0);
      };
      if constexpr (IsValue) {
        uint32_t rows[8][4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          __half2 x[2][4];
          levels(x[0], n), levels(x[1], n + 4);
          const uint32_t scale = rest ? token_scales[4 + n] : token_scales[n];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const uint32_t a = bit_cast<uint32_t>(x[0][i / 2]), b = bit_cast<uint32_t>(x[1][i / 2]);
            rows[i][n] = product(as_halves(i % 2 ? upper(a, b) : lower(a, b)), scale);
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
          tile[value_piece(8 * (lane / 4 + 8 * j) + i, rest)] =
              make_uint4(rows[i][0], rows[i][1], rows[i][2], rows[i][3]);
      } else {
        uint32_t scales[4][2];
        load_channel_scales(scales[0], scales[1], 2 * j),
            load_channel_scales(scales[2], scales[3], 2 * j + 1);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          __half2 x[4];
          levels(x, n);
          uint32_t row[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) row[i] = product(x[i], rest ? scales[i][1] : scales[i][0]);
          tile[key_piece<Channels>(2 * n + odd_token(), 4 * (j + rest * kJ) + key_group())] =
              make_uint4(row[0], row[1], row[2], row[3]);
        }
      }
    }
  }

  // Levels of tokens whose scale is NaN become NaN, but for 0. Rare, and the same branch for all lanes.
  __device__ __forceinline__ void spread_nan() const {
    uint32_t any = 0;
#pragma unroll
    for (int x = 0; x < 8; ++x) any |= nan_bits(token_scale(x));
    if (any == 0) return;
    __syncwarp();  // tile
#pragma unroll 1
    for (unsigned i = lane; i < 8 * Channels; i += 32) {
      uint32_t& pair = reinterpret_cast<uint32_t*>(tile + value_piece(i / 8, i % 8 / 4))[i % 4];
      const uint32_t is_set = ((pair & 0x7fff7fffu) + 0x7fff7fffu) & 0x80008000u;
      pair |= (is_set & nan_bits(token_scale(i % 8))) / 0x8000u * 0x7e00u;
    }
  }
};

}  // namespace quantgemm
