// SPDX-License-Identifier: MIT
// Attention of one new token over the native key-value cache (kv_page.h): logits, softmax and output in
// one pass. A warp takes units of 64 tokens, pages or recent ones, for 8 query heads of a group:
//
//   logits  rows = tokens, columns = heads: a = 1 + code/2^bits straight from the code's bits,
//           b = query · scale of the page's channels; the shifts are one row more, added to all
//   softmax online; the weights, transposed as they lie, are b of the second product
//   output  rows = channels, columns = heads: a = 1 + code/2^bits, b = weight · scale of the token
#pragma once
#include <cuda_fp16.h>

#include "../kv_page.h"
#include "launch.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace quantgemm {

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = 32 * kAttentionWarps;
inline constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
}

// Codes i of a lane's words for one pair of columns as two halves 1 + code/2^bits.
template <int Bits, int I>
__device__ __forceinline__ uint32_t code_pair(const uint32_t* words) {
  if constexpr (Bits == 2) {
    const uint32_t w = words[0];
    return ((I < 4 ? w << (8 - 2 * (I < 4 ? I : 4)) : w >> (2 * (I < 4 ? 4 : I) - 8)) & 0x03000300u) |
           0x3c003c00u;
  } else {
    const uint32_t w = words[I / 4];
    constexpr int j = I % 4;
    return ((j < 2 ? w << (6 - 4 * (j < 2 ? j : 1)) : w >> (4 * (j < 2 ? 2 : j) - 6)) & 0x03c003c0u) |
           0x3c003c00u;
  }
}

// d[M] += codes of rows 16M … for the Tiles tiles of one block of 64 rows. words: of one step of 16
// columns, both halves.
template <int Bits, int M = 0>
__device__ __forceinline__ void multiply_codes(float (*d)[4], const uint32_t* words, const uint32_t (&b)[2]) {
  constexpr int kHalf = Bits / 2;  // words per pair of columns: 1 or 2
  const uint32_t a[4] = {code_pair<Bits, 2 * M>(words), code_pair<Bits, 2 * M + 1>(words),
                         code_pair<Bits, 2 * M>(words + kHalf), code_pair<Bits, 2 * M + 1>(words + kHalf)};
  mma_16x8x16(d[M], a, b[0], b[1], Half{});
  if constexpr (M < 3) multiply_codes<Bits, M + 1>(d, words, b);
}

template <int Count>
__device__ __forceinline__ void load_words(uint32_t (&words)[Count], const void* from, int stride) {
#pragma unroll
  for (int i = 0; i < Count / 4; ++i) {
    const uint4 v = __ldg(static_cast<const uint4*>(from) + i * stride);
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
}

template <class Real16, int Channels, int KeyBits, int ValueBits>
struct AttentionWarp {
  static constexpr int kSteps = Channels / 16;  // of keys; a page has four of values
  const KvAttentionArgs& args;
  int lane;
  int64_t row;            // sequence · heads + key-value head
  const Real16* query;    // of this lane's column, or null
  uint32_t q[kSteps][2];  // as halves
  float out[kSteps][4] = {};
  float shifts[4] = {};  // Σ weight · scale · shift: belongs to every row of out
  float maximum[2] = {-INFINITY, -INFINITY}, mass[2] = {};  // of two columns; mass of this lane's rows

  __device__ AttentionWarp(const KvAttentionArgs& a, int64_t r, int64_t first_head)
      : args(a), lane(threadIdx.x % 32), row(r) {
    const int64_t head = first_head + lane / 4;
    query = head < args.groups ? static_cast<const Real16*>(args.query) +
                                     (row * args.groups + head) * Channels + lane % 4 * 2
                               : nullptr;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        q[s][h] =
            query ? pack_pair(to_float(query[16 * s + 8 * h]), to_float(query[16 * s + 8 * h + 1]), Half{})
                  : 0u;
  }

  // Logits [4][4] of 64 tokens to weights, as b of the second product; out follows a new maximum.
  template <class Weight>
  __device__ __forceinline__ void softmax(float (&logits)[4][4], int num_tokens, uint32_t (&weights)[4][2]) {
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool is_there = 16 * m + 8 * (j / 2) + lane / 4 < num_tokens;
        logits[m][j] = is_there ? logits[m][j] * (args.scale * kLog2E) : -INFINITY;
        top[j % 2] = fmaxf(top[j % 2], logits[m][j]);
      }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      for (int step = 4; step < 32; step *= 2) top[c] = fmaxf(top[c], __shfl_xor_sync(~0u, top[c], step));
      // Nothing yet: any finite number will do.
      const float base = top[c] == -INFINITY ? 0.0f : top[c];
      const float factor = exp2f(maximum[c] - base);
      maximum[c] = top[c], top[c] = base, mass[c] *= factor;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) out[i][c] *= factor, out[i][c + 2] *= factor;
      shifts[c] *= factor, shifts[c + 2] *= factor;
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float p[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) p[j] = exp2f(logits[m][j] - top[j % 2]), mass[j % 2] += p[j];
#pragma unroll
      for (int h = 0; h < 2; ++h) weights[m][h] = transpose_8x8(pack_pair(p[2 * h], p[2 * h + 1], Weight{}));
    }
  }

  __device__ __forceinline__ void add_page(int64_t page) {
    const KvCacheArgs& c = args.cache;
    const int64_t at = page * c.heads + row % c.heads;
    const uint8_t* keys = c.key_pages + at * key_page_bytes(Channels, KeyBits);
    const uint8_t* values = c.value_pages + at * value_page_bytes(Channels, ValueBits);
    constexpr int kKeyWords = kSteps * KeyBits, kValueWords = Channels / 16 * ValueBits;
    uint32_t k_words[kKeyWords], v_words[kValueWords];
    load_words(k_words, keys + 16 * lane, 32);
    load_words(v_words, values + 16 * lane, 32);
    float logits[4][4], base[4] = {};
    uint32_t b[kSteps][2];
    {
      const uint8_t* fits = keys + page_codes_bytes(Channels, KeyBits) + lane % 4 * (Channels / 2);
      uint32_t scale[2 * kSteps], shift[2 * kSteps];
      load_words(scale, fits, 1);
      load_words(shift, fits + 2 * Channels, 1);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        b[s][0] = multiply_halves(q[s][0], scale[2 * s]),
        b[s][1] = multiply_halves(q[s][1], scale[2 * s + 1]);
        const uint32_t a[4] = {shift[2 * s], shift[2 * s], shift[2 * s + 1], shift[2 * s + 1]};
        mma_16x8x16(base, a, b[s][0], b[s][1], Half{});
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) logits[m][j] = base[j];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) multiply_codes<KeyBits>(logits, k_words + s * KeyBits, b[s]);
    uint32_t weights[4][2];
    softmax<Half>(logits, kPageTokens, weights);
    const uint8_t* fits = values + page_codes_bytes(Channels, ValueBits) + lane % 4 * (kPageTokens / 2);
    uint32_t scale[8], shift[8];
    load_words(scale, fits, 1);
    load_words(shift, fits + 2 * kPageTokens, 1);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      weights[s][0] = multiply_halves(weights[s][0], scale[2 * s]);
      weights[s][1] = multiply_halves(weights[s][1], scale[2 * s + 1]);
      const uint32_t a[4] = {shift[2 * s], shift[2 * s], shift[2 * s + 1], shift[2 * s + 1]};
      mma_16x8x16(shifts, a, weights[s][0], weights[s][1], Half{});
    }
#pragma unroll
    for (int block = 0; block < Channels / 64; ++block)
#pragma unroll
      for (int s = 0; s < 4; ++s)
        multiply_codes<ValueBits>(out + 4 * block, v_words + (block * 4 + s) * ValueBits, weights[s]);
  }

  // Up to 64 recent tokens, the index-th and following of parts.
  __device__ __forceinline__ void add_recent(const SequenceParts& parts, int64_t index) {
    const KvCacheArgs& c = args.cache;
    const int64_t count = parts.sinks + parts.ring_end - parts.ring_first - index;
    const int num_tokens = count < kPageTokens ? static_cast<int>(count) : kPageTokens;
    // Where this lane's token lane/4 + 8i begins, its columns 2c 2c+1 of every 8.
    int at[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t t = index + (8 * i + lane / 4 < num_tokens ? 8 * i + lane / 4 : 0);
      const int64_t position = t < parts.sinks ? t : c.sinks + parts.ring_first + t - parts.sinks;
      at[i] = static_cast<int>(recent_slot(c, position)) * Channels + lane % 4 * 2;
    }
    const auto* recent_keys = static_cast<const uint16_t*>(c.recent_keys) + row * c.recent * Channels;
    const auto* recent_values = static_cast<const uint16_t*>(c.recent_values) + row * c.recent * Channels;
    const auto load = [&](const uint16_t* x, int i, int column) {
      return __ldg(reinterpret_cast<const uint32_t*>(x + at[i] + column));
    };
    float logits[4][4] = {};
#pragma unroll 1
    for (int s = 0; s < kSteps; ++s) {
      const auto* own = reinterpret_cast<const uint32_t*>(query + 16 * s);
      const uint32_t b0 = query ? __ldg(own) : 0u, b1 = query ? __ldg(own + 4) : 0u;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t a[4] = {load(recent_keys, 2 * m, 16 * s), load(recent_keys, 2 * m + 1, 16 * s),
                               load(recent_keys, 2 * m, 16 * s + 8),
                               load(recent_keys, 2 * m + 1, 16 * s + 8)};
        mma_16x8x16(logits[m], a, b0, b1, Real16{});
      }
    }
    uint32_t weights[4][2];
    softmax<Real16>(logits, num_tokens, weights);
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 2 * s + j / 2;
          // A token that is not there has weight 0, but its slot may hold anything, NaN too.
          const uint32_t v = load(recent_values, i, 16 * m + 8 * (j % 2));
          a[j] = transpose_8x8(8 * i + lane / 4 < num_tokens ? v : 0u);
        }
        mma_16x8x16(out[m], a, weights[s][0], weights[s][1], Real16{});
      }
  }
};

// Blocks that fit a multiprocessor.
inline constexpr int attention_blocks(int64_t channels) { return channels == 256 ? 2 : 4; }

// Grid: (splits, sequences · key-value heads, query heads / 8)
template <class Real16, int Channels, int KeyBits, int ValueBits>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks(Channels))
    attention_kernel(KvAttentionArgs args) {
  using Warp = AttentionWarp<Real16, Channels, KeyBits, ValueBits>;
  __shared__ float out[kAttentionWarps][8][Channels], maxima[kAttentionWarps][8], masses[kAttentionWarps][8];
  const KvCacheArgs& c = args.cache;
  const int thread = static_cast<int>(threadIdx.x), warp_index = thread / 32;
  const int64_t row = blockIdx.y, sequence = row / c.heads, first_head = 8 * int64_t{blockIdx.z};
  const SequenceParts parts = parts_of(c, c.lens[sequence]);
  const int64_t recent = parts.sinks + parts.ring_end - parts.ring_first;
  const int64_t units = parts.pages + (recent + kPageTokens - 1) / kPageTokens;
  const int64_t begin = units * blockIdx.x / args.split, end = units * (blockIdx.x + 1) / args.split;
  Warp warp(args, row, first_head);
  for (int64_t unit = begin + warp_index; unit < end; unit += kAttentionWarps) {
    if (unit < parts.pages) {
      const int64_t page = c.page_table[sequence * c.max_pages + unit];
      if (page >= 0 && page < c.num_pages) warp.add_page(page);
    } else {
      warp.add_recent(parts, (unit - parts.pages) * kPageTokens);
    }
  }

  // The warps' sums meet in shared memory.
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int step = 4; step < 32; step *= 2) warp.mass[j] += __shfl_xor_sync(~0u, warp.mass[j], step);
    const int column = warp.lane % 4 * 2 + j;
    if (warp.lane < 4)
      maxima[warp_index][column] = warp.maximum[j], masses[warp_index][column] = warp.mass[j];
#pragma unroll
    for (int m = 0; m < Warp::kSteps; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        out[warp_index][column][16 * m + 8 * h + warp.lane / 4] = warp.out[m][2 * h + j] + warp.shifts[j];
  }
  __syncthreads();
  for (int i = thread; i < 8 * (Channels + 2); i += kAttentionThreads) {
    const int column = i / (Channels + 2), d = i % (Channels + 2);
    if (first_head + column >= args.groups) break;
    float top = maxima[0][column];
    for (int w = 1; w < kAttentionWarps; ++w) top = fmaxf(top, maxima[w][column]);
    float sum = 0.0f;
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float factor = maxima[w][column] == -INFINITY ? 0.0f : exp2f(maxima[w][column] - top);
      if (factor != 0.0f || masses[w][column] != masses[w][column])
        sum += factor * (d < Channels ? out[w][column][d] : masses[w][column]);
    }
    const int64_t head = row * args.groups + first_head + column, heads = c.batch * c.heads * args.groups;
    args.partial[(blockIdx.x * heads + head) * (Channels + 2) + d] = d == Channels ? top : sum;
  }
}

template <int Channels>
cudaError_t launch_attention_of(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  const dim3 grid(static_cast<unsigned>(args.split), static_cast<unsigned>(c.batch * c.heads),
                  static_cast<unsigned>((args.groups + 7) / 8));
  const auto launch = [&]<int K, int V>(std::integral_constant<int, K>, std::integral_constant<int, V>) {
    if (c.type == Real::kFloat16)
      attention_kernel<Half, Channels, K, V><<<grid, kAttentionThreads, 0, stream>>>(args);
    else
      attention_kernel<BFloat16, Channels, K, V><<<grid, kAttentionThreads, 0, stream>>>(args);
  };
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  if (c.key_bits == 2)
    c.value_bits == 2 ? launch(Two{}, Two{}) : launch(Two{}, Four{});
  else
    c.value_bits == 2 ? launch(Four{}, Two{}) : launch(Four{}, Four{});
  return cudaGetLastError();
}

}  // namespace quantgemm
