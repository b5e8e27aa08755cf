// SPDX-License-Identifier: MIT
// Attention of one new token over the native key-value cache (kv_page.h): logits, softmax and output in
// one pass. A warp takes pages for 8 query heads of a group, the next one on its way to shared memory:
//
//   logits  rows = tokens, columns = heads: a = the code's bits, b = query · scale of the page's channels;
//           the shifts are one row more, added to all
//   softmax online; the weights, transposed as they lie, are b of the second product
//   output  rows = channels, columns = heads: a = the code's bits, b = weight · scale of the token
#pragma once
#include "../kv_page.h"
#include "dependent_launch.cuh"
#include "launch.h"
#include "memory.cuh"
#include "ptx.cuh"
#include "sparse_kv_codes.cuh"

namespace quantgemm {

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = 32 * kAttentionWarps;
inline constexpr float kLog2E = 1.4426950408889634f;
// The largest weight is 2^-this when the maximum is raised, so that it need not be for a little more.
inline constexpr float kHeadroom = 2.0f;

// Blocks whose registers fit a multiprocessor.
inline constexpr int attention_blocks(int64_t channels) { return channels == 256 ? 2 : 4; }
// Shared memory of a block: a page for each warp.
inline int64_t attention_shared(int64_t channels, int key_bits, int value_bits) {
  return kAttentionWarps * (key_page_bytes(channels, key_bits) + value_page_bytes(channels, value_bits));
}

// A page's keys and values in shared memory.
template <int Channels, int KeyBits, int ValueBits>
struct Stage {
  static constexpr int kKeyBytes = 64 * Channels * KeyBits / 8 + 4 * Channels;
  static constexpr int kValueBytes = 64 * Channels * ValueBits / 8 + 4 * 64;
  uint8_t keys[kKeyBytes], values[kValueBytes];
};

template <class Real16, int Channels, int KeyBits, int ValueBits>
struct AttentionWarp {
  static constexpr int kSteps = Channels / 16;  // of keys; a page has four of values
  using Staged = Stage<Channels, KeyBits, ValueBits>;
  const KvAttentionArgs& args;
  Staged& stage;
  int lane;
  int64_t row;                       // sequence · heads + key-value head
  bytes_ptr key_pages, value_pages;  // of this head, with this lane's place in a page
  const Real16* query;               // of this lane's column, or null
  uint32_t q[kSteps][2];             // as halves
  float out[kSteps][4] = {};         // of codes in their units, so long as pages are added
  float shifts[2][4] = {};           // Σ weight · scale · shift, see add_shifts: belongs to every row of out
  float maximum[2] = {}, mass[2] = {};  // of two columns, at least that of logits; mass of this lane's rows
  bool is_empty = true;                 // nothing added

  __device__ AttentionWarp(const KvAttentionArgs& a, Staged& s, int64_t r, int64_t first_head)
      : args(a), stage(s), lane(threadIdx.x % 32), row(r) {
    const int64_t head = first_head + lane / 4;
    query = head < args.groups
                ? static_cast<const Real16*>(args.query) + (row * args.groups + head) * Channels
                : nullptr;
    const int64_t own = row % a.cache.heads;
    key_pages = a.cache.key_pages + own * Staged::kKeyBytes + 16 * lane;
    value_pages = a.cache.value_pages + own * Staged::kValueBytes + 16 * lane;
  }

  __device__ __forceinline__ void load_query() {
    const auto* own = reinterpret_cast<const uint32_t*>(query) + lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      const uint32_t pair = query ? __ldg(own + 4 * (first_group(i / 2) + i % 2 * 2)) : 0u;
      q[i / 2][i % 2] = pack_pair(to_float(Real16{static_cast<uint16_t>(pair)}),
                                  to_float(Real16{static_cast<uint16_t>(pair >> 16)}), Half{});
    }
  }

  // One group of copies, empty for no page (-1).
  template <int Bytes>
  __device__ __forceinline__ void fetch(uint8_t* to, bytes_ptr from, int page) const {
    __syncwarp();  // all have read what was here
    if (page >= 0) {
      from += static_cast<uint64_t>(static_cast<uint32_t>(page)) *
              (static_cast<uint32_t>(args.cache.heads) * Bytes);
#pragma unroll
      for (int i = 0; i < Bytes; i += 512)
        if (i + 16 * lane < Bytes) cp_async16(shared_address(to + 16 * lane) + i, from + i);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void fetch_keys(int page) const {
    fetch<Staged::kKeyBytes>(stage.keys, key_pages, page);
  }
  __device__ __forceinline__ void fetch_values(int page) const {
    fetch<Staged::kValueBytes>(stage.values, value_pages, page);
  }

  // Logits, in powers of two and less `maximum`, of 16 · Tiles tokens to weights, as b of the second
  // product: of one tile or of the steps of a page (first_group).
  template <class Weight, int Tiles>
  __device__ __forceinline__ void softmax(float (&logits)[Tiles][4], uint32_t (&weights)[Tiles][2]) {
    float top[2] = {logits[0][0], logits[0][1]};
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) top[j % 2] = fmaxf(top[j % 2], logits[m][j]);
    if (is_empty || __any_sync(~0u, fmaxf(top[0], top[1]) > 0.0f)) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top[c] = fmaxf(top[c], __shfl_xor_sync(~0u, top[c], step));
        if (is_empty || top[c] > 0.0f) raise_maximum(logits, top[c] + kHeadroom, c);
      }
    }
    is_empty = false;
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      float p[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) p[j] = fast_exp2(logits[m][j]), mass[j % 2] += p[j];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t& w = Tiles == 1 ? weights[m][h] : weights[m / 2 * 2 + h][m % 2];
        w = transpose_8x8(pack_pair(p[2 * h], p[2 * h + 1], Weight{}));
      }
    }
  }
  template <int Tiles>
  __device__ __forceinline__ void raise_maximum(float (&logits)[Tiles][4], float by, int c) {
    const float factor = is_empty ? 0.0f : fast_exp2(-by);
    if (by == -INFINITY) by = 0.0f;  // nothing yet: any finite number will do
    maximum[c] += by, mass[c] *= factor;
#pragma unroll
    for (int m = 0; m < Tiles; ++m) logits[m][c] -= by, logits[m][c + 2] -= by;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) out[i][c] *= factor, out[i][c + 2] *= factor;
    shifts[0][c] *= factor, shifts[1][c + 2] *= factor;
  }

  // Σ b · shift over all columns. Shifts that came as one load are one operand, so
  // sums[0] is right in rows 0 … 7 and sums[1] in the others.
  template <int Steps>
  static __device__ __forceinline__ void add_shifts(float (&sums)[2][4], const uint8_t* fits,
                                                    const uint32_t (&b)[Steps][2]) {
#pragma unroll
    for (int s = 0; s < Steps; s += 2) {
      const uint4 v = *reinterpret_cast<const uint4*>(fits + 32 * s);
      const uint32_t shift[4] = {v.x, v.y, v.z, v.w};
      mma_16x8x16(sums[0], shift, b[s][0], b[s][1], Half{});
      mma_16x8x16(sums[1], shift, b[s + 1][0], b[s + 1][1], Half{});
    }
  }
  template <int Steps>
  static __device__ __forceinline__ void multiply_scales(uint32_t (&b)[Steps][2],
                                                         const uint32_t (&x)[Steps][2], const uint8_t* fits) {
#pragma unroll
    for (int s = 0; s < Steps; s += 2) {
      const uint4 v = *reinterpret_cast<const uint4*>(fits + 32 * s);
      b[s][0] = multiply_halves(x[s][0], v.x), b[s][1] = multiply_halves(x[s][1], v.z);
      b[s + 1][0] = multiply_halves(x[s + 1][0], v.y), b[s + 1][1] = multiply_halves(x[s + 1][1], v.w);
    }
  }

  // The page that is on its way here; then the next one is, or none (-1). Its keys come as soon as these
  // have been multiplied, its values after these.
  __device__ __forceinline__ void add_page(int next) {
    float logits[4][4] = {}, base[2][4] = {};
    uint32_t k_words[kSteps * KeyBits], b[kSteps][2];
    cp_async_wait<1>();
    __syncwarp();  // the other lanes' copies too
    const uint8_t* key_fits = stage.keys + page_codes_bytes(Channels, KeyBits) + lane % 4 * 16;
    multiply_scales(b, q, key_fits);
    add_shifts(base, key_fits + 2 * Channels, b);
    load_words(k_words, stage.keys + 16 * lane, 32);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) multiply_codes<KeyBits>(logits, k_words, s, b[s]);
    fetch_keys(next);
    const float scale = args.scale * kLog2E;
    const float shift[2] = {fmaf(base[0][0] + base[1][2], scale, -maximum[0]),
                            fmaf(base[0][1] + base[1][3], scale, -maximum[1])};
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        logits[m][j] = fmaf(logits[m][j], scale * code_unit(KeyBits, 2 * m + j / 2), shift[j % 2]);
    uint32_t weights[4][2], v_words[kSteps * ValueBits];
    softmax<Half>(logits, weights);
    cp_async_wait<1>();
    __syncwarp();  // the other lanes' copies too
    const uint8_t* fits = stage.values + page_codes_bytes(Channels, ValueBits) + lane % 4 * 16;
    multiply_scales(weights, weights, fits);
    add_shifts(shifts, fits + 2 * kPageTokens, weights);
    load_words(v_words, stage.values + 16 * lane, 32);
#pragma unroll
    for (int block = 0; block < Channels / 64; ++block)
#pragma unroll
      for (int s = 0; s < 4; ++s)
        multiply_codes<ValueBits>(out + 4 * block, v_words + block * 4 * ValueBits, s, weights[s]);
    fetch_values(next);
  }

  // Up to 16 recent tokens of parts, from the index-th or, if that is less than 0, the first. Before all
  // pages. count: of recent tokens; the 16 that end there leave each token that asks one to see.
  __device__ __forceinline__ void add_recent(const SequenceParts& parts, int64_t index, int64_t count) {
    const KvCacheArgs& c = args.cache;
    // This lane's tokens lane/4 and lane/4 + 8, any one in place of those that are not there.
    const uint16_t *keys[2], *values[2];
    bool is_there[2], is_seen[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t own = index + 8 * i + lane / 4, t = own < 0 ? 0 : own;
      is_there[i] = own >= 0;
#pragma unroll
      for (int j = 0; j < 2; ++j)
        is_seen[i][j] = is_there[i] && own < count - hidden_tokens(args, static_cast<int>(8 * blockIdx.z) +
                                                                             lane % 4 * 2 + j);
      const int64_t position = t < parts.sinks ? t : c.sinks + parts.ring_first + t - parts.sinks;
      const int64_t at = (row * c.recent + recent_slot(c, position)) * Channels;
      keys[i] = static_cast<const uint16_t*>(c.recent_keys) + at + lane % 4 * 8;
      values[i] = static_cast<const uint16_t*>(c.recent_values) + at + lane % 4 * 2;
    }
    // Lane c has channels 8c … 8c+7 of every 32, in keys as in the query: sums take them in any order.
    const auto load8 = [](const void* x) { return __ldg(static_cast<const uint4*>(x)); };
    uint32_t v[kSteps][4];
#pragma unroll
    for (int m = 0; m < kSteps; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        v[m][j] = __ldg(reinterpret_cast<const uint32_t*>(values[j / 2] + 16 * m + 8 * (j % 2)));
    float logits[1][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps / 2; ++s) {
      const uint4 low = load8(keys[0] + 32 * s), high = load8(keys[1] + 32 * s);
      const uint4 b = query ? load8(query + lane % 4 * 8 + 32 * s) : uint4{};
      const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
      mma_16x8x16(logits[0], first, b.x, b.y, Real16{});
      mma_16x8x16(logits[0], second, b.z, b.w, Real16{});
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      logits[0][j] =
          is_seen[j / 2][j % 2] ? fmaf(logits[0][j], args.scale * kLog2E, -maximum[j % 2]) : -INFINITY;
    uint32_t weights[1][2];
    softmax<Real16>(logits, weights);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      uint32_t a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // A token that is not there has weight 0, but its slot may hold anything, NaN too.
        a[j] = transpose_8x8(is_there[j / 2] ? v[m][j] : 0u);
      }
      mma_16x8x16(out[m], a, weights[0][0], weights[0][1], Real16{});
    }
  }

  // To units of codes.
  __device__ __forceinline__ void begin_pages() {
#pragma unroll
    for (int m = 0; m < kSteps; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[m][j] *= 1.0f / code_unit(ValueBits, 2 * m + j / 2);
  }
};

// Grid: (splits, sequences · key-value heads, query heads / 8). Shared memory: a stage per warp.
template <class Real16, int Channels, int KeyBits, int ValueBits>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks(Channels))
    attention_kernel(KvAttentionArgs args) {
  using Warp = AttentionWarp<Real16, Channels, KeyBits, ValueBits>;
  extern __shared__ uint4 room[];
  const KvCacheArgs& c = args.cache;
  const int thread = static_cast<int>(threadIdx.x), warp_index = thread / 32;
  const int64_t row = blockIdx.y, sequence = row / c.heads, first_head = 8 * int64_t{blockIdx.z};
  Warp warp(args, reinterpret_cast<typename Warp::Staged*>(room)[warp_index], row, first_head);
  wait_for_previous_kernel();
  const SequenceParts parts = parts_of(c, c.lens[sequence]);

  // Pages and recent tokens in equal parts to the warps of all splits.
  const int64_t warps = args.split * kAttentionWarps,
                own = int64_t{blockIdx.x} * kAttentionWarps + warp_index;
  const int begin = static_cast<int>(parts.pages * own / warps),
            end = static_cast<int>(parts.pages * (own + 1) / warps);
  const int32_t* table = c.page_table + sequence * c.max_pages;
  int entries = -1;  // lane i has an entry of the table
  const auto page_at = [&](int i) {
    if ((i - begin) % 32u == 0) entries = i + warp.lane < end ? __ldg(table + i + warp.lane) : -1;
    const int page = __shfl_sync(~0u, entries, (i - begin) % 32u);
    return i < end && page < c.num_pages ? page : -1;
  };
  int page = page_at(begin);
  warp.fetch_keys(page), warp.fetch_values(page);
  warp.load_query();
  const int64_t recent = parts.sinks + parts.ring_end - parts.ring_first, chunks = (recent + 15) / 16;
#pragma unroll 1
  for (int64_t i = chunks * own / warps; i < chunks * (own + 1) / warps; ++i)
    warp.add_recent(parts, recent - 16 * (chunks - i), recent);
  warp.begin_pages();
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const int next = page_at(i + 1);
    if (page >= 0)
      warp.add_page(next);
    else
      warp.fetch_keys(next), warp.fetch_values(next);
    page = next;
  }
  let_next_kernel_start();
  cp_async_wait<0>();
  __syncthreads();  // from here on the room is that of the sums

  // The warps' sums meet in shared memory.
  auto& out = *reinterpret_cast<float (*)[kAttentionWarps][8][Channels]>(room);
  __shared__ float maxima[kAttentionWarps][8], masses[kAttentionWarps][8];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int step = 4; step < 32; step *= 2) warp.mass[j] += __shfl_xor_sync(~0u, warp.mass[j], step);
    const int column = warp.lane % 4 * 2 + j;
    if (warp.lane < 4) {
      maxima[warp_index][column] = warp.is_empty ? -INFINITY : warp.maximum[j];
      masses[warp_index][column] = warp.mass[j];
    }
    const float shift = warp.shifts[0][j] + warp.shifts[1][j + 2];
#pragma unroll
    for (int m = 0; m < Warp::kSteps; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        out[warp_index][column][16 * m + 8 * h + warp.lane / 4] =
            fmaf(warp.out[m][2 * h + j], code_unit(ValueBits, 2 * m + h), shift);
  }
  __syncthreads();
  const int64_t heads = c.batch * c.heads * args.groups, left = args.groups - first_head;
  for (int column = 0; column < (left < 8 ? left : 8); ++column) {
    float top = maxima[0][column], factors[kAttentionWarps], mass = 0.0f;
    for (int w = 1; w < kAttentionWarps; ++w) top = fmaxf(top, maxima[w][column]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      factors[w] = maxima[w][column] == -INFINITY ? 0.0f : fast_exp2(maxima[w][column] - top);
      mass += factors[w] * masses[w][column];
    }
    float* partial =
        args.partial + (blockIdx.x * heads + row * args.groups + first_head + column) * (Channels + 2);
    for (int d = thread; d < Channels; d += kAttentionThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w)
        sum += factors[w] == 0.0f ? 0.0f : factors[w] * out[w][column][d];
      partial[d] = sum;
    }
    if (thread == 0) partial[Channels] = top, partial[Channels + 1] = mass;
  }
}

template <int Channels>
cudaError_t launch_attention_of(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const dim3 grid(static_cast<unsigned>(args.split), static_cast<unsigned>(c.batch * c.heads),
                  static_cast<unsigned>((args.groups + 7) / 8));
  const auto launch = [&]<int K, int V>(std::integral_constant<int, K>, std::integral_constant<int, V>) {
    constexpr int kBytes = kAttentionWarps * static_cast<int>(sizeof(Stage<Channels, K, V>));
    static_assert(kBytes >= 4 * kAttentionWarps * 8 * Channels, "the sums take the place of the stages");
    const auto kernel = c.type == Real::kFloat16 ? attention_kernel<Half, Channels, K, V>
                                                 : attention_kernel<BFloat16, Channels, K, V>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (status == cudaSuccess)
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (status != cudaSuccess) return status;
    const DependentLaunch launch(grid, kAttentionThreads, device, stream, kBytes);
    return cudaLaunchKernelEx(&launch.config, kernel, args);
  };
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  if (c.key_bits == 2) return c.value_bits == 2 ? launch(Two{}, Two{}) : launch(Two{}, Four{});
  return c.value_bits == 2 ? launch(Four{}, Two{}) : launch(Four{}, Four{});
}

}  // namespace quantgemm
