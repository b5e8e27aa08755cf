// SPDX-License-Identifier: MIT
// One sparse page of the native cache (kv_sparse_page.h) by a thread block: 64 tokens of a head. Two lanes of
// a warp load a token, prune it and put it to shared memory; scales and codes are made from there.
#pragma once
#include "../kv_page.h"
#include "memory.cuh"
#include "sparse_kv_pack_dense.cuh"
#include "sparse_kv_prune.cuh"

namespace quantgemm {

// Extremes, sum and number of two channels' magnitudes, or of every other value of a token, side by side.
template <class Real16>
struct MagnitudePairs {
  uint32_t lo = ~0u, hi = 0, counts = 0;  // lo: less one, so that zeros are the largest
  float sum[2] = {};                      // of lower and upper halves, or all in the first

  template <bool IsOneGroup>
  __device__ __forceinline__ void add(uint32_t pair) {
    const uint32_t m = pair & 0x7fff7fffu;
    hi = __vmaxu2(hi, m), lo = __vminu2(lo, __vsub2(m, 0x00010001u));
    counts += (m + 0x7fff7fffu) >> 15 & 0x00010001u;
    sum[0] += to_float(Real16{static_cast<uint16_t>(m)});
    sum[IsOneGroup ? 0 : 1] += to_float(Real16{static_cast<uint16_t>(m >> 16)});
  }
};
__device__ __forceinline__ uint32_t half_at(uint32_t pair, int i) { return pair >> (16 * i) & 0xffffu; }

// Those of a key's channel, of the first and the last 32 tokens.
template <class Real16>
__device__ __forceinline__ uint16_t fit_sums(uint32_t lo, uint32_t hi, int count, float a, float b,
                                             int bits) {
  const SparseGroup group{to_float(Real16{static_cast<uint16_t>(lo + 1)}),
                          to_float(Real16{static_cast<uint16_t>(hi)}),
                          {a, b},
                          count};
  return fit_sparse_group(group, bits);
}

// All but the four largest magnitudes of eight values become zero; of equal ones the first stay.
__device__ __noinline__ uint4 first_four(uint4 values) {
  uint32_t w[4] = {values.x, values.y, values.z, values.w};
  int a[4], b[4];  // magnitude, then the first ones first
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = static_cast<int>((w[i / 2] >> (16 * (i % 2)) & 0x7fffu) * 8u) + 7 - i;
    b[i] = static_cast<int>((w[2 + i / 2] >> (16 * (i % 2)) & 0x7fffu) * 8u) + 3 - i;
  }
  int own[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) own[i] = a[i], own[4 + i] = b[i];
  const auto sort = [](int (&v)[4]) {  // the largest first
    const auto order = [&](int i, int j) {
      const int larger = max(v[i], v[j]), smaller = min(v[i], v[j]);
      v[i] = larger, v[j] = smaller;
    };
    order(0, 1), order(2, 3), order(0, 2), order(1, 3), order(1, 2);
  };
  sort(a), sort(b);
  const int fourth = min(min(max(a[0], b[3]), max(a[1], b[2])), min(max(a[2], b[1]), max(a[3], b[0])));
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] &= (own[2 * i] >= fourth ? 0xffffu : 0u) | (own[2 * i + 1] >= fourth ? 0xffff0000u : 0u);
  return make_uint4(w[0], w[1], w[2], w[3]);
}
// The same, quick where the fourth is larger than the fifth: values side by side in pairs.
__device__ __forceinline__ void keep_four(uint32_t* w) {
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = w[i] & 0x7fff7fffu;
  const auto order = [&](int i, int j) {
    const uint32_t larger = __vmaxu2(v[i], v[j]);
    v[j] = __vminu2(v[i], v[j]), v[i] = larger;
  };
  order(0, 1), order(2, 3), order(0, 2), order(1, 3), order(1, 2);  // even and odd ones by themselves
  const auto other = [](uint32_t x) { return __byte_perm(x, x, 0x1032); };
  const uint32_t third = other(v[3]), second = other(v[2]);
  uint32_t fourth = __vminu2(__vmaxu2(v[0], third), __vmaxu2(v[1], second));
  uint32_t fifth = __vmaxu2(__vminu2(v[0], third), __vminu2(v[1], second));
  fourth = __vminu2(fourth, other(fourth)), fifth = __vmaxu2(fifth, other(fifth));
  if ((fourth == fifth && fourth != 0) || fourth > 0x7c007c00u) {  // or no numbers, see Pruning
    const uint4 kept = first_four(make_uint4(w[0], w[1], w[2], w[3]));
    w[0] = kept.x, w[1] = kept.y, w[2] = kept.z, w[3] = kept.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w[i] &= __hgeu2_mask(__habs2(bit_cast<__half2>(w[i])), bit_cast<__half2>(fourth));
}

template <class Real16, int Channels, bool IsValue>
struct SparsePacker {
  static constexpr int kStride = Channels + 8;  // of tokens in shared memory: 16-byte pieces in other banks
  static constexpr int kWords = Channels / 4;   // of a thread's half of a token
  static constexpr int kFits = IsValue ? kPageTokens : Channels, kGroups = Channels / 8;
  struct KeyPart {
    float sum[2];
    uint32_t lo, hi, counts;
  };
  struct Room {
    alignas(16) uint16_t x[kPageTokens * kStride];
    alignas(16) uint32_t words[kPageTokens * kGroups + 32];  // codes, or records, or parts of fits
    float factors[kFits];                                    // SparseCoder's
    int before[kPackThreads / 32];
  };
  static_assert(sizeof(KeyPart) * Channels <= sizeof(Room::words));
  Room& room;
  PageFormat format;
  uint8_t* page;
  int thread;

  __device__ __forceinline__ void run(uint32_t (&pairs)[kWords]) {
    const int token = thread / 2, half = thread % 2;
    uint16_t* row = room.x + token * kStride;
    const auto each_vector = [&](auto&& f) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) f(reinterpret_cast<uint4*>(row)[2 * i + half], pairs + 4 * i);
    };
    const auto store = [&] {
      each_vector([](uint4& to, const uint32_t* w) { to = make_uint4(w[0], w[1], w[2], w[3]); });
    };
    if (format.kind == PageKind::kFourOfEight) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) keep_four(pairs + i);
      store();
    } else if (format.keep < Channels) {
      Pruning<kWords> pruning;
      pruning.find(pairs, format.keep);
      pruning.keep_largest(pairs);
      store();
      pruning.drop_excess(row, half);
      if (IsValue)
        each_vector([](const uint4& v, uint32_t* w) { w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w; });
    } else {
      store();
    }
    if constexpr (IsValue) {
      MagnitudePairs<Real16> m;
#pragma unroll
      for (int i = 0; i < kWords; ++i) m.template add<true>(pairs[i]);
      const auto other = [](auto x) { return __shfl_xor_sync(~0u, x, 1); };
      m.lo = __vminu2(m.lo, other(m.lo)), m.hi = __vmaxu2(m.hi, other(m.hi)), m.counts += other(m.counts);
      const float sum = other(m.sum[0]);
      if (half == 0)
        keep_fit(token, min(half_at(m.lo, 0), half_at(m.lo, 1)), max(half_at(m.hi, 0), half_at(m.hi, 1)),
                 static_cast<int>(half_at(m.counts, 0) + half_at(m.counts, 1)), m.sum[0], sum);
      __syncthreads();  // x and factors
    } else {
      __syncthreads();  // x
      fit_keys();
    }
    if (format.kind == PageKind::kBitmap)
      format.bits == 2 ? pack_bitmap<2>() : pack_bitmap<4>();
    else
      format.bits == 2 ? pack_planes<2>() : pack_planes<4>();
  }

 private:
  __device__ __forceinline__ void keep_fit(int k, uint32_t lo, uint32_t hi, int count, float a, float b) {
    const uint16_t scale = fit_sums<Real16>(lo, hi, count, a, b, format.bits);
    room.factors[k] = SparseCoder(scale, format.bits).factor;
    const int place = IsValue ? sparse_value_scale_place(k) : sparse_key_scale_place(k, Channels);
    reinterpret_cast<uint16_t*>(page + sparse_codes_bytes(Channels, format))[place] = scale;
  }

  // A thread takes 32 tokens of two channels, then a channel.
  __device__ __forceinline__ void fit_keys() {
    auto* parts = reinterpret_cast<KeyPart*>(room.words);
    constexpr int kPairs = Channels / 2;
    for (int item = thread; item < Channels; item += kPackThreads) {
      const auto* from =
          reinterpret_cast<const uint32_t*>(room.x + item / kPairs * 32 * kStride) + item % kPairs;
      MagnitudePairs<Real16> m;
#pragma unroll 8
      for (int t = 0; t < 32; ++t) m.template add<false>(from[t * (kStride / 2)]);
      parts[item] = {{m.sum[0], m.sum[1]}, m.lo, m.hi, m.counts};
    }
    __syncthreads();  // parts
    for (int k = thread; k < Channels; k += kPackThreads) {
      const KeyPart &a = parts[k / 2], &b = parts[k / 2 + kPairs];
      const int i = k % 2;
      keep_fit(k, min(half_at(a.lo, i), half_at(b.lo, i)), max(half_at(a.hi, i), half_at(b.hi, i)),
               static_cast<int>(half_at(a.counts, i) + half_at(b.counts, i)), a.sum[i], b.sum[i]);
    }
    __syncthreads();  // factors; parts have been read
  }

  __device__ __forceinline__ float at(int token, int channel) const {
    return to_float(Real16{room.x[token * kStride + channel]});
  }
  __device__ __forceinline__ uint32_t pair_at(int token, int channel) const {
    return *reinterpret_cast<const uint32_t*>(room.x + token * kStride + channel);
  }

  // Codes of what is set, one behind the other from the top of a word down, and which are.
  template <int Bits>
  struct Codes {
    uint32_t word = 0, mask = 0;
    __device__ __forceinline__ void add(uint32_t half_bits, float factor, int bit) {
      const float v = to_float(Real16{static_cast<uint16_t>(half_bits)});
      SparseCoder coder(0, Bits);
      coder.factor = factor;
      const uint32_t code = coder.code(v, Bits);
      if (v == 0.0f) return;
      word = __funnelshift_r(word, code, Bits), mask |= 1u << bit;
    }
    __device__ __forceinline__ uint32_t from_bottom() const {
      return __funnelshift_rc(word, 0u, 32 - __popc(mask) * Bits);
    }
  };

  // A thread has neighbouring words of the bitmap. Eight elements at a time have at most a word of codes.
  template <int Bits>
  __device__ __forceinline__ void pack_bitmap() {
    constexpr int kEach = Channels / 64, kCodeWords = kPageTokens * Channels * Bits / 32;
    for (int i = thread; i < kCodeWords; i += kPackThreads) room.words[i] = 0;
    uint32_t chunks[kEach][4], masks[kEach];
    int count = 0;
#pragma unroll
    for (int w = 0; w < kEach; ++w) {
      const int word = thread * kEach + w;
      const SparseElement first = IsValue ? bitmap_value_element(32 * word) : bitmap_key_element(32 * word);
      const int lane = first.lane, i = first.i, j = first.j;
      masks[w] = 0;
      float factors[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!IsValue)
          factors[e] = room.factors[sparse_key_origin({lane, i + e / 2, 0, j, e % 2}, Channels).channel];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Codes<Bits> codes;
        if constexpr (IsValue) {
          uint32_t pairs[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const SparseOrigin o = sparse_value_origin({lane, i, n / 2 * 4 + n % 2 + e / 2 * 2, j, e % 2});
            pairs[e] = pair_at(o.token, o.channel), factors[e] = room.factors[o.token];
          }
#pragma unroll
          for (int e = 0; e < 8; ++e) codes.add(half_at(pairs[e % 4], e / 4), factors[e % 4], e);
        } else {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            uint32_t pairs[2];
#pragma unroll
            for (int even = 0; even < 2; ++even) {
              const SparseOrigin o = sparse_key_origin({lane, i, 2 * n + x, j, even}, Channels);
              pairs[even] = pair_at(o.token, o.channel);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) codes.add(half_at(pairs[e % 2], e / 2), factors[e], 4 * x + e);
          }
        }
        chunks[w][n] = codes.from_bottom(), masks[w] |= codes.mask << (8 * n);
      }
      count += __popc(masks[w]);
      reinterpret_cast<uint32_t*>(page)[word] = masks[w];
    }
    // Where this thread's codes begin.
    int until = count;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, until, step);
      if (thread % 32 >= step) until += other;
    }
    if (thread % 32 == 31) room.before[thread / 32] = until;
    __syncthreads();  // before; words are zero
    int bit = (until - count) * Bits;
    for (int w = 0; w < thread / 32; ++w) bit += room.before[w] * Bits;
    uint32_t word = 0, *to = room.words + bit / 32;
    bit %= 32;
#pragma unroll
    for (int n = 0; n < 4 * kEach; ++n) {
      const uint32_t chunk = chunks[n / 4][n % 4];
      word |= chunk << bit;
      const int next = bit + __popc(masks[n / 4] >> (8 * (n % 4)) & 0xffu) * Bits;
      if (next >= 32) atomicOr(to++, word), word = __funnelshift_l(chunk, 0u, bit);
      bit = next % 32;
    }
    if (bit > 0) atomicOr(to, word);
    __syncthreads();  // words
    auto* codes = reinterpret_cast<uint4*>(page + bitmap_bytes(Channels));
    for (int i = thread; i < kPageTokens * format.keep * Bits / 128; i += kPackThreads)
      codes[i] = reinterpret_cast<const uint4*>(room.words)[i];
  }

  // So that 32 records that become planes together lie in 32 banks.
  static __device__ __forceinline__ int record_place(int token, int group) {
    const int x = token / 8;
    return token * kGroups + group + (IsValue ? x : x % 4 + x / 4 * 16);
  }

  // A record per group of eight: what is set and the codes. Then its bits, of 32 groups at a time, are
  // planes.
  template <int Bits>
  __device__ __forceinline__ void pack_planes() {
    constexpr int kPlanes = 8 + 4 * Bits, kStored = Channels == 64 ? kPlanes / 2 : kPlanes;
    static_assert(kPackThreads % kGroups == 0);
    const int group = thread % kGroups;  // of all that this thread makes
    float factors[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!IsValue) factors[i] = room.factors[8 * group + i];
#pragma unroll 2
    for (int token = thread / kGroups; token < kPageTokens; token += kPackThreads / kGroups) {
      const uint4 v = *reinterpret_cast<const uint4*>(room.x + token * kStride + 8 * group);
      const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
      const float of_token = IsValue ? room.factors[token] : 0.0f;
      Codes<Bits> codes;
#pragma unroll
      for (int i = 0; i < 8; ++i) codes.add(half_at(pairs[i / 2], i % 2), IsValue ? of_token : factors[i], i);
      uint32_t all = codes.from_bottom();
      if (__popc(codes.mask) < 4) {  // those of the second half move to the end (four_of_eight_rank)
        const uint32_t first = (1u << __popc(codes.mask & 15u) * Bits) - 1u;
        all = (all & first) | (all & ~first) << (4 - __popc(codes.mask)) * Bits;
      }
      room.words[record_place(token, group)] = codes.mask | all << 8;
    }
    __syncthreads();  // words
    const int bit = thread % 32, even = bit / 16, x = IsValue ? bit % 4 + bit / 8 % 2 * 4 : bit % 8;
    const int odd = IsValue ? bit / 4 % 2 : bit / 8 % 2;  // of j, or the second half of the planes
    const auto rotated = [](uint32_t w, int left) { return __funnelshift_l(w, w, left); };
    uint32_t keeps[5];
    int turns[5];
#pragma unroll
    for (int n = 0; n < 5; ++n) {
      const uint32_t lows[] = {0x0000ffffu, 0x00ff00ffu, 0x0f0f0f0fu, 0x33333333u, 0x55555555u};
      const bool is_upper = (bit & 16 >> n) != 0;
      keeps[n] = is_upper ? ~lows[n] : lows[n], turns[n] = is_upper ? 32 - (16 >> n) : 16 >> n;
    }
    for (int i = thread / 32; i < 32 * ((Channels + 127) / 128); i += kPackThreads / 32) {
      const int lane = i % 32, block = i / 32;
      const SparseElement e{lane, 0, x, Channels == 64 ? 0 : 2 * block + odd, even};
      const SparseOrigin o = IsValue ? sparse_value_origin(e) : sparse_key_origin(e, Channels);
      uint32_t own = room.words[record_place(o.token, o.channel / 8)];
      if (Channels == 64) own >>= odd * kStored;
#pragma unroll
      for (int n = 0; n < 5; ++n)  // bits transposed: of the half that another lane keeps it gives its own
        own = chosen_bits(keeps[n], own, rotated(__shfl_xor_sync(~0u, own, 16 >> n), turns[n]));
      if (bit < kStored)
        reinterpret_cast<uint32_t*>(page)[four_of_eight_word(lane, block * kPlanes + bit)] = own;
    }
  }
};

}  // namespace quantgemm
