// SPDX-License-Identifier: MIT
// SparsePacker: bits and codes of a bitmap page (kv_sparse_page.h).
#pragma once
#include "sparse_kv_pack.cuh"

namespace quantgemm {

// Of four bits: which bytes are to be taken, and behind that what their number of bits multiplies by (2 bits)
// or is. 4 bits: of each two the second one first.
template <int Bits>
struct ByteSelectors {
  uint32_t of[16] = {};

  constexpr ByteSelectors() {
    constexpr uint32_t kOrder = Bits == 4;
    for (uint32_t set = 0; set < 16; ++set) {
      uint32_t rank = 0;
      for (uint32_t i = 0; i < 4; ++i)
        if (set >> i & 1) of[set] |= i << 4 * (rank++ ^ kOrder);
      for (uint32_t i = rank; i < 4; ++i) of[set] |= 4u << 4 * (i ^ kOrder);
      of[set] |= (Bits == 2 ? 1u << rank * Bits : rank * Bits) << 16;
    }
  }
};
template <int Bits>
__device__ const ByteSelectors<Bits> kSelectors;

// A thread has of each word of its lane the byte of its warp.
template <class Real16, int Channels, bool IsValue, PageKind Kind>
template <int Bits, bool IsOdd>
__device__ __forceinline__ void SparsePacker<Real16, Channels, IsValue, Kind>::pack_bitmap() {
  const int warp = thread / 32, lane = thread % 32;
  const uint32_t selectors = kSelectors<Bits>.of[lane % 16];
  // Two elements each of four tokens or, of keys, of two: x_of(0) and x_of(1), even or not.
  const SparseOrigin o = origin(IsValue ? warp / 2 * 4 + warp % 2 : 2 * warp, 0, 0);
  constexpr int kNextX = (IsValue ? 16 : 8) * kStride, kEven = IsValue ? kStride : 32 * kBlocks;
  const uint16_t* from = room.x + o.token * kStride + o.channel;
  // Factors or limits of a pair of elements.
  using Factors = std::conditional_t<Bits == 2, uint32_t, float>;
  constexpr int kEach = Bits == 2 ? 1 : 2;
  const auto* factors =
      reinterpret_cast<const Factors*>(room.factors) + (IsValue ? o.token : o.channel / 2 * kEach);
  auto* masks_to = reinterpret_cast<uint16_t*>(room.bitmap.masks + lane) + warp;
  auto* chunks_to = reinterpret_cast<uint32_t*>(room.bitmap.chunks + lane * (Bits / 2)) + warp;
  // Words 2 · place and the next; place = 32 · step + lane. By turns four elements on, and to the next eight.
  constexpr int kTurns = IsValue ? 64 : 32;
  int next = 4;
#pragma unroll 1
  for (const uint16_t* const end = masks_to + 2 * kBlocks * 32 * 4; masks_to != end;) {
    uint32_t pairs[2][2][2];  // [n][even]
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int even = 0; even < 2; ++even) {
        const uint2 v = *reinterpret_cast<const uint2*>(from + n * kNextX + even * kEven);
        pairs[n][even][0] = v.x, pairs[n][even][1] = v.y;
      }
    struct alignas(8 * kEach) OfKeys {
      Factors of[2 * kEach];
    } own[2];
    if constexpr (!IsValue)
      for (int even = 0; even < 2; ++even)
        own[even] = *reinterpret_cast<const OfKeys*>(factors + even * (kEven / 2 * kEach));
    uint32_t masks[2], chunks[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      chunk<Bits, IsOdd>(pairs, i, IsValue ? factors : own[0].of + i * kEach,
                         IsValue ? factors + 1 : own[1].of + i * kEach, selectors, masks[i], chunks[i]);
    *masks_to = static_cast<uint16_t>(masks[0] + masks[1] * 256u);
    if constexpr (Bits == 2)
      *chunks_to = chunks[0] | chunks[1] << 16;
    else
      chunks_to[0] = chunks[0], chunks_to[4] = chunks[1];
    from += next, masks_to += 32 * 4, chunks_to += 32 * (Bits / 2) * 4;
    if (!IsValue) factors += next / 2 * kEach;
    next = kTurns - next;
  }
  __syncthreads();  // masks and chunks; x has been read
  join_chunks<Bits>();
}
// Element pairs p of eight bits of a bitmap: the bits, and the codes of what is set.
template <class Real16, int Channels, bool IsValue, PageKind Kind>
template <int Bits, bool IsOdd, class Factors>
__device__ __forceinline__ void SparsePacker<Real16, Channels, IsValue, Kind>::chunk(
    const uint32_t (&pairs)[2][2][2], int o, const Factors* first, const Factors* second, uint32_t selectors,
    uint32_t& mask, uint32_t& codes_of_set) const {
  uint32_t bits = 0, four[2], whole[2][4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t a = pairs[n][0][o], b = pairs[n][1][o];
    if (IsValue && n > 0) first += 16, second += 16;
    constexpr int kOther = IsValue ? 0 : 1;  // the factor of a pair's second element
    const uint32_t at = IsValue ? 0x20100201u << 2 * n : 0x08040201u << 4 * n;
    bits |= signs_by_turns(set_signs(a), set_signs(b)) & at;
    if constexpr (Bits == 2) {
      const uint32_t large = signs_by_turns(large_signs(a, *first), large_signs(b, *second));
      four[n] = chosen_bits(0x02020202u, signs_by_turns(a, b), large) & 0x03030303u;
    } else if constexpr (IsOdd) {
      const uint32_t of_a = lifted_codes<IsOdd>(a, first[0], first[kOther]);
      const uint32_t of_b = lifted_codes<IsOdd>(b, second[0], second[kOther]);
      four[n] = (of_a + of_b * 256u) ^ (kLifts & 0x0f0f0f0fu);
    } else {
      whole[n][0] = rounded(magnitude(half_at(a, 0)), first[0], IsValue && n > 0 ? 2 : 0);
      whole[n][1] = rounded(magnitude(half_at(b, 0)), second[0], IsValue && n > 0 ? 3 : 1);
      whole[n][2] = rounded(magnitude(half_at(a, 1)), first[kOther], IsValue && n == 0 ? 0 : 2);
      whole[n][3] = rounded(magnitude(half_at(b, 1)), second[kOther], IsValue && n == 0 ? 1 : 3);
    }
  }
  mask = __dp4a(bits, 0x01010101u, 0u);
  if constexpr (Bits == 4 && !IsOdd) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t (&low)[4] = whole[IsValue ? 0 : n], (&high)[4] = whole[IsValue ? 1 : n];
      const int from = IsValue ? 2 * n : 0;
      four[n] = nibbles(low[from], low[from + 1], high[IsValue ? from : 2], high[IsValue ? from + 1 : 3]);
    }
  } else if constexpr (IsValue) {
    const uint32_t low = __byte_perm(four[0], four[1], 0x5410), high = __byte_perm(four[0], four[1], 0x7632);
    four[0] = low, four[1] = high;
  }
  uint32_t packed[2], length = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t selector = __shfl_sync(~0u, selectors, static_cast<int>(mask >> 4 * n));
    const uint32_t bytes = pick_bytes(four[n], 0u, selector);
    if (n == 0) length = selector >> 16;
    if constexpr (Bits == 2)
      packed[n] = __dp4a(bytes, 0x40100401u, 0u);  // each two bits further
    else
      packed[n] = __byte_perm(bytes * 0x1001u, 0, 0x4431);
  }
  codes_of_set = Bits == 2 ? packed[0] + packed[1] * length : packed[0] | packed[1] << length;
}
// The chunks one behind the other. A thread has neighbouring pairs of words.
template <class Real16, int Channels, bool IsValue, PageKind Kind>
template <int Bits>
__device__ __forceinline__ void SparsePacker<Real16, Channels, IsValue, Kind>::join_chunks() {
  constexpr int kEach = Channels > kPackThreads ? Channels / kPackThreads : 1;
  constexpr int kChunks = 2 * Bits, kOfWord = kChunks / 2;  // of 32 bits, or 2 bits: two of 16 as one
  auto* codes = reinterpret_cast<uint32_t*>(room.x);
#pragma unroll
  for (int i = 0; i < kPageTokens * Channels * Bits / 128; i += kPackThreads)
    if (i + thread < kPageTokens * Channels * Bits / 128)
      reinterpret_cast<uint4*>(codes)[i + thread] = uint4{};
  uint32_t chunks[kEach][kChunks];
  unsigned ends[kEach][kChunks], length = 0;  // where chunks end, from the thread's beginning
#pragma unroll
  for (int n = 0; n < kEach; ++n) {
    const int pair = thread * kEach + n;
    if (pair >= Channels) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) chunks[n][i] = 0, ends[n][i] = 0;
      continue;
    }
    const uint2 masks = room.bitmap.masks[pair];
    const uint32_t words[2] = {__byte_perm(masks.x, masks.y, 0x6420), __byte_perm(masks.x, masks.y, 0x7531)};
    reinterpret_cast<uint2*>(page)[pair] = make_uint2(words[0], words[1]);
    if constexpr (Bits == 2) {
      const uint4 v = room.bitmap.chunks[pair];
      const uint32_t both[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // two to one
        const uint32_t a = both[i % 2 * 2], b = both[i % 2 * 2 + 1];
        const int first = 2 * __popc(words[i / 2] & 0xffu << 16 * (i % 2));
        chunks[n][i] = half_at(a, i / 2) | half_at(b, i / 2) << first;
      }
    } else {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint4 v = room.bitmap.chunks[2 * pair + w];
        chunks[n][4 * w] = v.x, chunks[n][4 * w + 1] = v.y, chunks[n][4 * w + 2] = v.z;
        chunks[n][4 * w + 3] = v.w;
      }
    }
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int i = 0; i < kOfWord; ++i)
        ends[n][kOfWord * w + i] =
            length + static_cast<unsigned>(Bits * __popc(words[w] & ~0u >> (32 - 32 / kOfWord * (i + 1))));
      length = ends[n][kOfWord * (w + 1) - 1];
    }
  }
  // Where this thread's codes begin.
  unsigned begin = length;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(~0u, begin, step);
    if (thread % 32 >= step) begin += other;
  }
  if (thread % 32 == 31) room.before[thread / 32] = begin;
  __syncthreads();  // before; codes are zero
  begin -= length;
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w)
    if (w < thread / 32) begin += room.before[w];
  if (Channels >= kPackThreads || thread < Channels) {
    uint32_t word = 0, *to = codes + begin / 32;
    unsigned bit = begin;  // shifts are modulo 32
#pragma unroll
    for (int n = 0; n < kEach * kChunks; ++n) {
      const uint32_t own = chunks[n / kChunks][n % kChunks];
      const unsigned next = begin + ends[n / kChunks][n % kChunks];
      word |= __funnelshift_l(0u, own, bit);
      atomicOr(to, word);  // full or not: a condition would be a branch
      if ((bit ^ next) & 32u) word = __funnelshift_l(own, 0u, bit), ++to;  // a chunk has 32 bits at most
      bit = next;
    }
    atomicOr(to, word);
  }
  __syncthreads();  // codes
  auto* out = reinterpret_cast<uint4*>(page + bitmap_bytes(Channels));
#pragma unroll 1
  for (int i = thread; i < kPageTokens * format.keep * Bits / 128; i += kPackThreads)
    out[i] = reinterpret_cast<const uint4*>(codes)[i];
}

}  // namespace quantgemm
