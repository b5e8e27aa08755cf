// SPDX-License-Identifier: MIT
// Attention over the native key-value cache whose keys and values are in pages of different kinds: one kernel
// for all pairs of formats. A block takes pages, the next one on its way to shared memory; each of its warps
// unpacks 16 tokens of a page (sparse_kv_unpack.cuh) and attends to these with 8 query heads of a group:
//
//   logits  rows = tokens, columns = heads: a = keys, b = queries
//   softmax online, each warp for itself; the weights, transposed as they lie, are b of the second product
//   output  rows = channels, columns = heads: a = values
#include "../kv_page.h"
#include "dependent_launch.cuh"
#include "launch.h"
#include "memory.cuh"
#include "ptx.cuh"
#include "sparse_kv_unpack.cuh"

namespace quantgemm {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr float kLog2e = 1.4426950408889634f;
// The maximum is raised by so much more than it must be, so that it need not be for a little more.
constexpr float kHeadroom = 2.0f;

constexpr int most_blocks(int64_t channels) { return channels == 256 ? 2 : 4; }

// Shared memory, in bytes: selectors for keys and values, queries, two pages of each, tiles of the warps.
// What a page that is no page says may lead as far as the tiles go, no further. The tiles' room is later that
// of sums.
struct Room {
  int64_t queries, pages, stage, tiles, all;
  QG_HD explicit Room(const KvCacheArgs& c)
      : queries(2048),
        pages(queries + 16 * c.channels),
        stage(whole_keys_bytes(c.channels, c.key_format) + value_page_bytes(c.channels, c.value_format)),
        tiles(pages + 2 * stage),
        all(tiles + kWarps * 32 * c.channels) {}
};

template <class Real16, int Channels>
struct MixedWarp {
  static constexpr int kSteps = Channels / 16;
  const KvAttentionArgs& args;
  uint4* tile;           // keys, then values, of 16 tokens
  const uint2* queries;  // [step][lane] as b, of the block
  const Real16* query;   // of this lane's column, or null
  int64_t row;           // sequence · heads + key-value head
  int first_head;
  unsigned warp, lane;
  float out[kSteps][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, mass[2] = {};  // of two columns; mass of this lane's rows

  // Logits of the tile's tokens from a tile of keys. Type: of tile and b.
  template <class Type, class B>
  __device__ __forceinline__ void multiply_keys(float (&logits)[4], B&& b) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t a[4];
      load_matrices<false>(a, tile + key_piece<Channels>(lane % 16, 2 * s + lane / 16));
      const uint2 q = b(s);
      mma_16x8x16(logits, a, q.x, q.y, Type{});
    }
  }
  // Logits, in powers of two, to weights; -infinity for a token that is not seen.
  template <class Type>
  __device__ __forceinline__ void softmax(float (&logits)[4], uint32_t (&weights)[2]) {
    bool is_above = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) is_above |= logits[j] > maximum[j % 2];
    if (__any_sync(~0u, is_above)) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float top = fmaxf(logits[c], logits[c + 2]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        const float raised = top > maximum[c] ? top + kHeadroom : maximum[c];
        const float factor = raised == maximum[c] ? 1.0f : fast_exp2(maximum[c] - raised);
        maximum[c] = raised, mass[c] *= factor;
#pragma unroll
        for (int m = 0; m < kSteps; ++m) out[m][c] *= factor, out[m][c + 2] *= factor;
      }
    }
    float p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float top = maximum[j % 2];
      p[j] = fast_exp2(logits[j] - (top == -INFINITY ? 0.0f : top)), mass[j % 2] += p[j];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) weights[h] = transpose_8x8(pack_pair(p[2 * h], p[2 * h + 1], Type{}));
  }

  // A page in shared memory.
  __device__ __forceinline__ void add_page(const uint8_t* keys, const uint32_t* tables) {
    const KvCacheArgs& c = args.cache;
    const uint8_t *key_fits = keys + codes_bytes(Channels, c.key_format),
                  *values = keys + whole_keys_bytes(Channels, c.key_format),
                  *value_fits = values + codes_bytes(Channels, c.value_format);
    PageUnpacker<Channels, false>{keys, key_fits, tables, tile, warp, lane}.run(c.key_format);
    __syncwarp();
    float logits[4] = {};
    multiply_keys<Half>(logits, [&](int s) { return queries[32 * s + lane]; });
    __syncwarp();  // keys have been read
    PageUnpacker<Channels, true>{values, value_fits, tables + 256, tile, warp, lane}.run(c.value_format);
    uint32_t weights[2];
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] *= args.scale * kLog2e;
    softmax<Half>(logits, weights);
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      uint32_t a[4];
      load_matrices<false>(a, tile + value_piece(16 * m + lane % 16, lane / 16));
      mma_16x8x16(out[m], a, weights[0], weights[1], Half{});
    }
    __syncwarp();  // values have been read
  }

  // Tokens 16·chunk … of `count` recent ones of parts, whose ring begins at first_slot.
  __device__ __forceinline__ void add_recent(const SequenceParts& parts, int first_slot, int chunk,
                                             int count) {
    const KvCacheArgs& c = args.cache;
    const int sinks = static_cast<int>(parts.sinks), ring = static_cast<int>(ring_slots(c));
    const auto load_tile = [&](const void* from) {
      const auto* tokens = static_cast<const uint4*>(from) + row * c.recent * (Channels / 8);
#pragma unroll
      for (int i = 0; i < Channels / 16; ++i) {
        const unsigned token = (32 * i + lane) / (Channels / 8), piece = (32 * i + lane) % (Channels / 8);
        const int t = 16 * chunk + static_cast<int>(token), at = first_slot + t - sinks;
        const int64_t slot = t < sinks ? t : c.sinks + (at < ring ? at : at - ring);
        // A token that is not there has weight 0, but its slot may hold anything, NaN too.
        tile[key_piece<Channels>(token, piece)] =
            t < count ? __ldg(tokens + slot * (Channels / 8) + piece) : uint4{};
      }
      __syncwarp();
    };
    load_tile(c.recent_keys);
    float logits[4] = {};
    multiply_keys<Real16>(logits, [&](int s) {
      const auto* own = reinterpret_cast<const uint32_t*>(query) + 8 * s + lane % 4;
      return query ? make_uint2(__ldg(own), __ldg(own + 4)) : uint2{};
    });
    __syncwarp();  // keys have been read
    load_tile(c.recent_values);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int own = static_cast<int>(lane), t = 16 * chunk + own / 4 + j / 2 * 8,
                column = first_head + own % 4 * 2 + j % 2;
      logits[j] = t < count - hidden_tokens(args, column) ? logits[j] * args.scale * kLog2e : -INFINITY;
    }
    uint32_t weights[2];
    softmax<Real16>(logits, weights);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      uint32_t a[4];
      load_matrices<true>(a, tile + key_piece<Channels>(lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2));
      mma_16x8x16(out[m], a, weights[0], weights[1], Real16{});
    }
    __syncwarp();  // values have been read
  }
};

// Grid: (splits, sequences · key-value heads, query heads / 8).
template <class Real16, int Channels>
__global__ void __launch_bounds__(kThreads, most_blocks(Channels))
    mixed_attention_kernel(KvAttentionArgs args) {
  extern __shared__ uint4 shared[];
  __shared__ float maxima[kWarps][8], masses[kWarps][8];
  const KvCacheArgs& c = args.cache;
  const Room room(c);
  auto* bytes = reinterpret_cast<uint8_t*>(shared);
  auto* tables = reinterpret_cast<uint32_t*>(bytes);
  auto* queries = reinterpret_cast<uint2*>(bytes + room.queries);
  const unsigned thread = threadIdx.x, warp_index = thread / 32, lane = thread % 32;
  const int64_t row = blockIdx.y, sequence = row / c.heads, head = row % c.heads;
  const int first_head = static_cast<int>(8 * blockIdx.z);
  const auto query_of = [&](unsigned column) {
    const int64_t own = first_head + column;
    return own < args.groups ? static_cast<const Real16*>(args.query) + (row * args.groups + own) * Channels
                             : nullptr;
  };
  MixedWarp<Real16, Channels> warp{
      args,       reinterpret_cast<uint4*>(bytes + room.tiles) + warp_index * 2 * Channels,
      queries,    query_of(lane / 4),
      row,        first_head,
      warp_index, lane};
  make_selectors(tables, c.key_format, false);
  make_selectors(tables + 256, c.value_format, true);
  wait_for_previous_kernel();

  // Pages in equal parts to the blocks, recent tokens to all of their warps.
  const SequenceParts parts = parts_of(c, c.lens[sequence]);
  const int begin = static_cast<int>(parts.pages * blockIdx.x / args.split),
            end = static_cast<int>(parts.pages * (blockIdx.x + 1) / args.split);
  int entries = -1;  // lanes have 32 neighbouring entries of the table
  const int together = pages_together(c.key_format);
  // The page with number i, at once with the first and the last of those that share the keys' fits.
  const auto pages_at = [&](int i) {
    if (i == begin || i % 32 == 0) {
      const int own = i - i % 32 + static_cast<int>(lane);
      entries = own < parts.pages ? __ldg(c.page_table + sequence * c.max_pages + own) : -1;
      if (entries >= c.num_pages) entries = -1;
    }
    const int at = i % 32, first = at & ~(together - 1);
    int3 pages = {__shfl_sync(~0u, entries, at), __shfl_sync(~0u, entries, first),
                  __shfl_sync(~0u, entries, first + together - 1)};
    if (i >= end || pages.y < 0 || pages.z < 0) pages.x = -1;
    return pages;
  };
  const int key_bytes = static_cast<int>(key_page_bytes(Channels, c.key_format)),
            value_bytes = static_cast<int>(value_page_bytes(Channels, c.value_format)),
            key_codes = static_cast<int>(codes_bytes(Channels, c.key_format)),
            whole_keys = static_cast<int>(whole_keys_bytes(Channels, c.key_format));
  const auto stage = [&](int i) { return bytes + room.pages + (i - begin) % 2 * room.stage; };
  const auto fetch = [&](int i, int3 those) {
    if (those.x >= 0) {
      const auto copy = [&](uint8_t* to, const uint8_t* from, int size) {
        for (int at = static_cast<int>(16 * thread); at < size; at += 16 * kThreads)
          cp_async16(shared_address(to + at), from + at);
      };
      const auto keys = [&](int page) { return c.key_pages + (page * c.heads + head) * key_bytes; };
      uint8_t* to = stage(i);
      copy(to, keys(those.x), together == 1 ? key_bytes : key_codes);
      if (together > 1 && thread < Channels / 4) {  // scales and shifts
        const unsigned at = 16 * thread, is_shift = at >= 2 * Channels;
        cp_async16(shared_address(to + key_codes + at),
                   keys(is_shift ? those.z : those.y) + key_codes + (at - is_shift * 2 * Channels));
      }
      copy(to + whole_keys, c.value_pages + (those.x * c.heads + head) * value_bytes, value_bytes);
    }
    cp_async_commit();
  };
  const int3 first_pages = pages_at(begin);
  fetch(begin, first_pages);
  bool is_there = first_pages.x >= 0;
  for (unsigned i = thread; i < 2 * Channels; i += kThreads) {  // as halves
    const auto* own = reinterpret_cast<const uint32_t*>(query_of(i % 32 / 4)) + i / 32 * 8 + i % 4;
    const auto pair = [&](unsigned at) {
      const uint32_t x = query_of(i % 32 / 4) ? __ldg(own + at) : 0u;
      return pack_pair(to_float(Real16{static_cast<uint16_t>(x)}),
                       to_float(Real16{static_cast<uint16_t>(x >> 16)}), Half{});
    };
    queries[i] = make_uint2(pair(0), pair(4));
  }
  const int64_t warps = args.split * kWarps;
  const int recent = static_cast<int>(parts.sinks + parts.ring_end - parts.ring_first);
  const int first_slot = static_cast<int>(parts.ring_first % ring_slots(c));
  const int64_t chunks = (recent + 15) / 16;
#pragma unroll 1
  for (int64_t i = int64_t{warp_index} * args.split + blockIdx.x; i < chunks; i += warps)
    warp.add_recent(parts, first_slot, static_cast<int>(i), recent);
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const int3 next = pages_at(i + 1);
    cp_async_wait<0>();
    __syncthreads();  // the page is there (with tables and queries), and the one before has been read
    fetch(i + 1, next);
    if (is_there) warp.add_page(stage(i), tables);
    is_there = next.x >= 0;
  }
  let_next_kernel_start();

  // The warps' sums meet in shared memory, each in its own tile first.
  cp_async_wait<0>();
  auto& sums = *reinterpret_cast<float (*)[kWarps][8][Channels]>(bytes + room.tiles);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int step = 4; step < 32; step *= 2) warp.mass[j] += __shfl_xor_sync(~0u, warp.mass[j], step);
    const unsigned column = lane % 4 * 2 + j;
    if (lane < 4) maxima[warp_index][column] = warp.maximum[j], masses[warp_index][column] = warp.mass[j];
#pragma unroll
    for (int m = 0; m < warp.kSteps; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        sums[warp_index][column][16 * m + 8 * h + lane / 4] = warp.out[m][2 * h + j];
  }
  __syncthreads();
  const int64_t heads = c.batch * c.heads * args.groups, left = args.groups - first_head;
  for (int column = 0; column < (left < 8 ? left : 8); ++column) {
    float top = maxima[0][column], factors[kWarps], mass = 0.0f;
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, maxima[w][column]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      factors[w] = maxima[w][column] == -INFINITY ? 0.0f : fast_exp2(maxima[w][column] - top);
      mass += factors[w] * masses[w][column];
    }
    float* partial =
        args.partial + (blockIdx.x * heads + row * args.groups + first_head + column) * (Channels + 2);
    for (unsigned d = thread; d < Channels; d += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += factors[w] * sums[w][column][d];
      partial[d] = sum;
    }
    if (thread == 0) partial[Channels] = top, partial[Channels + 1] = mass;
  }
}

}  // namespace

int64_t sparse_kv_attention_mixed_split(const KvAttentionArgs& args) {
  const KvCacheArgs& c = args.cache;
  // No more than one wave of blocks, and a page or more for each.
  const Device device = current_device();
  int64_t blocks = device.shared_per_multiprocessor / (Room(c).all + 256 + kReservedShared);
  blocks = blocks < 1 ? 1 : (blocks < most_blocks(c.channels) ? blocks : most_blocks(c.channels));
  // As for one token: the sums of several are the same bit for bit.
  const int64_t rows = c.batch * c.heads * ((args.groups / args.tokens + 7) / 8), most = c.max_pages + 1;
  const int64_t wave = blocks * device.multiprocessors / (rows > 0 ? rows : 1);
  const int64_t split = wave < most ? wave : most;
  return split < 1 ? 1 : split;
}

cudaError_t launch_sparse_kv_attention_mixed(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  const int shared_bytes = static_cast<int>(Room(c).all);
  const dim3 grid(static_cast<unsigned>(args.split), static_cast<unsigned>(c.batch * c.heads),
                  static_cast<unsigned>((args.groups + 7) / 8));
  const auto launch = [&](auto channels) {
    const auto kernel = c.type == Real::kFloat16 ? mixed_attention_kernel<Half, channels.value>
                                                 : mixed_attention_kernel<BFloat16, channels.value>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return;
    const DependentLaunch first(grid, kThreads, device, stream, shared_bytes);
    status = cudaLaunchKernelEx(&first.config, kernel, args);
  };
  status = cudaErrorInvalidValue;
  if (c.channels == 64) launch(std::integral_constant<int, 64>{});
  if (c.channels == 128) launch(std::integral_constant<int, 128>{});
  if (c.channels == 256) launch(std::integral_constant<int, 256>{});
  return status;
}

}  // namespace quantgemm
