// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for up to eight tokens, w packed. Limit: reading the weights. A thread block owns
// some strips of 16 rows; its warps share their batches of 256 columns evenly, in order, so that a warp meets
// few strips and leaves one sum of each in shared memory. Each warp keeps copies of its next batches under
// way in a ring of its own, from before the previous kernel ends. One token takes half a multiprocessor: the
// next kernel's ring fills meanwhile. How work is divided does not depend on the tokens, so rows of y are
// the same in any batch; panels, runs of columns whose activations fit in shared memory, are eight tokens'.
#pragma once
#include "dependent_launch.cuh"
#include "gemv_packed_batch.cuh"
#include "launch.h"
#include "packed_pieces.cuh"

namespace quantgemm::packed_gemv {

using packed_gemm::Pieces;

struct Split : packed_gemm::Split {
  int staged;      // panels whose activations are in shared memory at a time
  int each, more;  // strips of a block, and blocks that have one more
};

template <PackableFormat F, class X, int Tokens>
struct Plan {
  using B = Batch<F>;
  using Eight = Plan<F, X, 8>;
  static constexpr int kTokens = Tokens, kPlannedTokens = 8, kMostStrips = 64, kFewestBatches = 4;
  // Two blocks of a multiprocessor, with activations beside the rings.
  static constexpr int kMostRings = 104448;
#ifdef QG_WARPS
  static constexpr int kWarps = QG_WARPS;
#else
  static constexpr int kWarps = 32 * B::kBytes <= 102400 ? 16 : 28 * B::kBytes <= kMostRings ? 14 : 12;
#endif
  static constexpr int kThreads = 32 * kWarps;
#ifdef QG_RING
  static constexpr int kRing = Tokens == 1 ? QG_RING : 2;
#else
  static constexpr int kDeepRings = 90112;
  static constexpr int kRing = 3 * kWarps * B::kBytes > kDeepRings ? 2 : kDeepRings / (kWarps * B::kBytes);
#endif
  static constexpr int kBlocks =
      Tokens == 1 && kWarps * kRing * B::kBytes <= kMostRings ? 2 : 1;  // of a multiprocessor
  static constexpr int kSums = B::kCols / B::kSumCols;                  // of a batch
  static constexpr int kRingBytes = kRing * B::kBytes;                  // of a warp
  // Shared memory of a batch of activations, and of a strip's sums, per token.
  static constexpr int kBatchBytes = 2 * B::kCols, kSumBytes = 4 * kSums, kStripBytes = 4 * kStripRows;
};

// Where shared memory is divided.
template <class P>
struct Shared {
  uint8_t *ring, *x;      // [warps][kRing][slot]; [tokens][batches][8][4] uint4, x_pitch apart
  float *starts, *slots;  // [batches][kSums][kTokens]; [panels][strips + warps − 1][tokens][16 rows]
  int2* ends;             // [panels][strips]: warps of a strip's first and last batch

  static __host__ __device__ int batches(const Split& split) {
    const int panel = split.panel_tiles / P::B::kTiles;
    return panel * (split.panels < split.staged ? split.panels : split.staged);
  }
  // Half of what all banks hold remains: two tokens that are read together lie in different banks.
  static __host__ __device__ int x_pitch(const Split& split) { return batches(split) * P::kBatchBytes + 64; }
  static __host__ __device__ int64_t bytes(const Split& split, int strips) {
    return int64_t{P::kWarps} * P::kRingBytes + int64_t{split.columns} * x_pitch(split) +
           batches(split) * P::kSumBytes * P::kTokens +
           int64_t{split.panels} * (8 * strips + (strips + P::kWarps - 1) * P::kStripBytes * split.columns);
  }
  __device__ Shared(uint4* base, const Split& split, int strips) {
    ring = reinterpret_cast<uint8_t*>(base);
    x = ring + P::kWarps * P::kRingBytes;
    starts = reinterpret_cast<float*>(x + split.columns * x_pitch(split));
    slots = starts + batches(split) * P::kSums * P::kTokens;
    ends =
        reinterpret_cast<int2*>(slots + split.panels * (strips + P::kWarps - 1) * split.columns * kStripRows);
  }
  __device__ float* slot(const Split& split, int strips, int panel, int strip, int warp) const {
    return slots + (panel * (strips + P::kWarps - 1) + strip + warp) * split.columns * kStripRows;
  }
};

// Activations of `panels` panels from `first` on, and zeros behind k. Four lanes hold a run of 32 columns.
// row_of(token) is a token's row of x.
template <class P, int Bias, class X, class RowOf>
__device__ __forceinline__ void stage(const Shared<P>& shared, const X* x, int64_t k, const Split& split,
                                      int first, int tokens, const RowOf& row_of) {
  constexpr int kAtOnce = 4;  // loads under way: of a token's columns, or of tokens
  constexpr int kNext = P::kTokens == 1 ? P::kThreads : 0, kNextToken = P::kTokens == 1 ? 0 : 1;
  const int tiles = (split.tiles + 3) / 4 * 4 - first * split.panel_tiles;
  const int lanes = 8 * min(tiles, split.staged * split.panel_tiles), pitch = Shared<P>::x_pitch(split);
  const int64_t first_col = int64_t{first} * split.panel_tiles * kTileCols;
#pragma unroll 1
  for (int base = threadIdx.x; base - static_cast<int>(threadIdx.x % 32) < lanes;
       base += kNext == 0 ? P::kThreads : kAtOnce * kNext)
#pragma unroll 1
    for (int base_token = 0; base_token < tokens; base_token += kNext == 0 ? kAtOnce : 1) {
      uint32_t words[kAtOnce][4] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j * kNext, token = base_token + j * kNextToken;
        const int64_t col = first_col + 8 * (i & ~3);
        if (i >= lanes || token >= tokens || col >= k) continue;
        const X* from = x + row_of(token) * k + col + 2 * (i % 4);
#pragma unroll
        for (int w = 0; w < 4; ++w) words[j][w] = *reinterpret_cast<const uint32_t*>(from + 8 * w);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = base + j * kNext, token = base_token + j * kNextToken;
        const auto sum_of = [&](int w) { return packed_gemm::sum_of_pair(words[j][w], X{}); };
        float early = sum_of(0) + sum_of(1), late = sum_of(2) + sum_of(3);
        if constexpr (P::B::kSumCols == 32) early += late;
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2) {
          early += __shfl_xor_sync(~0u, early, bit);
          if constexpr (P::B::kSumCols == 16) late += __shfl_xor_sync(~0u, late, bit);
        }
        if (i >= lanes || token >= tokens) continue;
        *reinterpret_cast<uint4*>(shared.x + token * pitch + i * 16) =
            make_uint4(words[j][0], words[j][1], words[j][2], words[j][3]);
        constexpr float kStart = Bias == 0 ? 1.0f : -1.0f * Bias;
        float* starts = shared.starts + i / 4 * (32 / P::B::kSumCols) * P::kTokens + token;
        if (i % 4 == 0) *starts = kStart * early;
        if (P::B::kSumCols == 16 && i % 4 == 0) starts[P::kTokens] = kStart * late;
      }
    }
}

// A warp's way through its batches: panel by panel, strip by strip.
template <class P>
struct Cursor {
  int panel = -1, left = 0, strip, batch, batches;

  // Of `strips · batches` units of a panel, warp w takes those from first_of(w) to first_of(w + 1) − 1.
  static __device__ __forceinline__ int first_of(int units, int w) { return units * w / P::kWarps; }
  static __device__ __forceinline__ int batches_of(const Split& split, int panel) {
    const int tiles = min(split.tiles - panel * split.panel_tiles, split.panel_tiles);
    return (tiles + P::B::kTiles - 1) / P::B::kTiles;
  }
  __device__ __forceinline__ void next_panel(const Split& split, int strips) {
    while (left == 0 && ++panel < split.panels) {
      const int warp = threadIdx.x / 32;
      batches = batches_of(split, panel);
      const int begin = first_of(strips * batches, warp);
      left = first_of(strips * batches, warp + 1) - begin;
      strip = begin / batches, batch = begin % batches;
    }
  }
  __device__ __forceinline__ bool ends_sum() const { return left == 1 || batch + 1 == batches; }
  // True if the next batch does not lie behind this one.
  __device__ __forceinline__ bool advance(const Split& split, int strips) {
    const bool end = ++batch == batches, last = --left == 0;
    if (end) batch = 0, ++strip;
    if (last) next_panel(split, strips);
    return end || last;
  }
};

// What the warps left of a strip, in the order of panels and warps.
template <class P>
__device__ __forceinline__ float sum_of_slots(const Shared<P>& shared, const Split& split, int strips,
                                              int strip, int within) {
  float total = 0;
#pragma unroll 1
  for (int panel = 0; panel < split.panels; ++panel) {
    const int units = strips * Cursor<P>::batches_of(split, panel);
    const int2 ends = shared.ends[panel * strips + strip];
    float sum = 0;
#pragma unroll 1
    for (int w = ends.x; w <= ends.y; ++w)
      if (Cursor<P>::first_of(units, w) < Cursor<P>::first_of(units, w + 1))
        sum += shared.slot(split, strips, panel, strip, w)[within];
    total += sum;
  }
  return total;
}

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__(Plan<F, X, Tokens>::kThreads, Plan<F, X, Tokens>::kBlocks)
    gemv_kernel(const __grid_constant__ GemmPackedArgs args, const __grid_constant__ Split split) {
  using P = Plan<F, X, Tokens>;
  using B = typename P::B;
  using L = PackedLayout<F>;
  constexpr int kBias = PackedFragment<F, X, false>::kBias;
  extern __shared__ uint4 memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strip_bytes = L::strip_bytes(args.k);
  const X* const x = static_cast<const X*>(args.x);
  const bool routed = Tokens > 1 && args.routes.ids != nullptr;
  Pieces& pieces = *reinterpret_cast<Pieces*>(reinterpret_cast<uint8_t*>(memory) + split.pieces_at);
  const int block = static_cast<int>(blockIdx.x);
  int first_strip = split.each * block + min(block, split.more), strips = split.each + (block < split.more);
  const int gated = args.up_at != 0;
  bytes_ptr w = args.packed;
  if (routed) {  // what to read depends on ids
    wait_for_previous_kernel();
    let_next_kernel_start();
    pieces.begin(args.routes, split);
  }
  const uint8_t* const ring = reinterpret_cast<const uint8_t*>(memory) + warp * P::kRingBytes;
  const uint32_t ring_address = shared_address(ring);
  Copier<F> copier(args.k);
#pragma unroll 1
  do {
    if (routed) {
      first_strip = pieces.first_strip, strips = pieces.strips;
      if (strips == 0) break;
      w = args.packed + pieces.expert * args.routes.expert_bytes;
    }
    w += first_strip * strip_bytes;
    strips <<= gated;  // of w and up in turn
    const Shared<P> shared(memory, split, strips);
    const auto strip_at = [&](int strip) {
      return w + (strip >> gated) * strip_bytes + (strip & gated ? args.up_at : 0);
    };
    const auto row_of_x = [&](int token) {
      return int64_t{routed ? pieces.slots[token] / args.routes.slots_per_row : token};
    };

    Cursor<P> now, ahead;
    now.next_panel(split, strips);
    ahead = now;
    int tiles_ahead = 0;
    const auto aim = [&] {
      if (ahead.panel >= split.panels) return;
      const int tile = ahead.panel * split.panel_tiles + ahead.batch * B::kTiles;
      copier.aim(strip_at(ahead.strip), args.k, tile / B::kTiles);
      tiles_ahead = split.tiles - tile;
    };
    const auto fetch = [&](int at) {
      if (ahead.panel < split.panels) {
        copier.copy(ring_address + at, tiles_ahead);
        tiles_ahead -= B::kTiles;
        if (ahead.advance(split, strips)) aim();
      }
      cp_async_commit();
    };
    aim();
#pragma unroll 1
    for (int at = 0; at < P::kRingBytes; at += B::kBytes) fetch(at);
    if (!routed) wait_for_previous_kernel();

    const int tokens = routed ? pieces.tokens : split.columns;
    float sums[Tokens][4] = {};
    int at = 0, began = now.batch;
#pragma unroll 1
    for (int first = 0; first < split.panels; first += split.staged) {
      if (first > 0) __syncthreads();  // the activations before these are used
      stage<P, kBias>(shared, x, args.k, split, first, tokens, row_of_x);
      __syncthreads();
      if (!routed && first == 0) let_next_kernel_start();  // whose copies would have been in our way
      const int end = min(first + split.staged, split.panels);
      const int token = Tokens == 1 ? 0 : min(lane / 4, split.columns - 1);  // of others nobody takes the sum
      const uint8_t* const own_x = shared.x + token * Shared<P>::x_pitch(split) + lane % 4 * 16;
#pragma unroll 1
      while (now.panel < end) {
        cp_async_wait<P::kRing - 1>();
        __syncwarp();
        const int batch = (now.panel - first) * (split.panel_tiles / B::kTiles) + now.batch;
        multiply<F, X, Tokens>(sums, ring + at, own_x + batch * P::kBatchBytes,
                               shared.starts + batch * P::kSums * Tokens);
        __syncwarp();
        fetch(at);
        if (now.ends_sum()) {
          finish<Tokens>(sums, shared.slot(split, strips, now.panel, now.strip, warp), split.columns);
          int2& ends = shared.ends[now.panel * strips + now.strip];
          if (lane == 0 && began == 0) ends.x = warp;
          if (lane == 0 && now.batch + 1 == now.batches) ends.y = warp;
          now.advance(split, strips);
          began = now.batch;
        } else {
          now.advance(split, strips);
        }
        at = at + B::kBytes == P::kRingBytes ? 0 : at + B::kBytes;
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int i = threadIdx.x; i < (strips >> gated) * Tokens * kStripRows; i += P::kThreads) {
      const int row = i % kStripRows, token = i / kStripRows % Tokens, own = i / kStripRows / Tokens;
      const int64_t output = static_cast<int64_t>(first_strip + own) * kStripRows + row;
      if (output >= args.n || token >= tokens) continue;
      float sum = 0, factor = 1;
#pragma unroll 1
      for (int strip = own << gated; strip < (own + 1) << gated; ++strip) {
        if (strip > own << gated) factor = silu(sum);
        sum = sum_of_slots(shared, split, strips, strip, token * kStripRows + row);
        if (sum != sum)
          sum = packed_gemm::dot_decoded<F>(strip_at(strip), row, x + row_of_x(token) * args.k, args.k);
      }
      if (gated) sum *= factor;
      const X* const bias = static_cast<const X*>(args.bias) + (routed ? pieces.expert * args.n : 0);
      if (args.bias != nullptr) sum += to_float(bias[output]);
      const int64_t y_row = routed ? pieces.slots[token] : token;
      if (args.routes.weights != nullptr) sum *= args.routes.weights[y_row];
      if (args.residual != nullptr)
        sum += to_float(static_cast<const X*>(args.residual)[y_row * args.n + output]);
      store1(static_cast<X*>(args.y) + y_row * args.n + output, sum);
    }
    if (!routed) break;
    pieces.next(split);
  } while (true);
  if (routed && args.routes.groups == nullptr)
    for (int64_t slot = blockIdx.x; slot < args.routes.num_slots; slot += gridDim.x)
      if (expert_of(args.routes, slot) < 0)
        clear_row(static_cast<X*>(args.y) + slot * args.n, args.n, threadIdx.x, P::kThreads);
}

// How a product is divided: panels as eight tokens need them. No panels that fit: false.
template <class P>
bool plan(Split& split, int strips, int limit) {
  Split eight = split;
  eight.columns = P::kPlannedTokens, eight.staged = 1;
  const int batches = (split.tiles + P::B::kTiles - 1) / P::B::kTiles;
  for (int panels = batches > 0 ? 1 : 0; panels <= batches; ++panels) {
    const int each = panels > 0 ? (batches + panels - 1) / panels : 0;
    if (panels > 1 && each < P::kFewestBatches) return false;
    if (panels > 1 && (panels - 1) * each >= batches) continue;
    eight.panels = panels, eight.panel_tiles = each * P::B::kTiles;
    if (Shared<typename P::Eight>::bytes(eight, strips) > limit) continue;
    split.panels = panels, split.panel_tiles = eight.panel_tiles;
    return true;
  }
  return false;
}

// args.m up to Tokens.
template <PackableFormat F, class X, int Tokens>
cudaError_t launch(const GemmPackedArgs& args, const Device& device, cudaStream_t stream) {
  using P = Plan<F, X, Tokens>;
  Split split{};
  split.strips = static_cast<int>((args.n + kStripRows - 1) / kStripRows);
  split.tiles = static_cast<int>(P::B::L::tiles(args.k));
  const bool routed = args.routes.ids != nullptr;
  split.columns = routed ? args.routes.tile : static_cast<int>(args.m);
  split.staged = P::kPlannedTokens / Tokens;
  const int pieces_bytes = routed ? static_cast<int>(sizeof(Pieces)) : 0, gated = args.up_at != 0;
  const int limit = device.shared_per_block - kReservedShared - pieces_bytes;
  int blocks = 0, strips = 0;
  for (int most = P::kMostStrips >> gated; blocks == 0 && most > 0; most /= 2) {
    int some = split.strips < device.multiprocessors && !routed ? split.strips : device.multiprocessors;
    while (!routed && (split.strips + some - 1) / some > most) some += device.multiprocessors;
    split.most_strips = most;
    strips = (routed ? most : (split.strips + some - 1) / some) << gated;
    if (plan<P>(split, strips, limit)) blocks = some;
  }
  if (blocks == 0) return cudaErrorNotSupported;
  split.each = split.strips / blocks, split.more = split.strips % blocks;
  split.pieces_at = static_cast<int>((Shared<P>::bytes(split, strips) + 15) / 16 * 16);
  const int bytes = split.pieces_at + pieces_bytes;

  const auto kernel = gemv_kernel<F, X, Tokens>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (status != cudaSuccess) return status;
  // The first weights are on their way while the launch before this one ends; the kernel waits for that
  // launch before it reads x or writes y.
  const DependentLaunch launch(static_cast<unsigned>(blocks), P::kThreads, device, stream, bytes);
  return cudaLaunchKernelEx(&launch.config, kernel, args, split);
}

// args.m up to Tokens, any format.
template <class X, int Tokens>
cudaError_t launch_tokens(const GemmPackedArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) status = launch<F, X, Tokens>(args, device, stream);
  });
  return status;
}

}  // namespace quantgemm::packed_gemv
