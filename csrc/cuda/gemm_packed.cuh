// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for some tokens, or a few of float32, w packed: every weight goes from memory
// straight into the registers of the lane whose tensor core fragment it is in. A thread block owns some
// strips of 16 rows; its warps share their batches of tiles evenly, in order, so that a warp meets few strips
// and leaves one sum of each in shared memory, and there is no barrier but at panels: runs of columns whose
// activations fit in shared memory, laid there as B fragments, with − kBias · Σ x of each group.
// Products are of bare codes; float32 scales meet the sums of groups. Limit: reading the weights.
#pragma once
#include "dependent_launch.cuh"
#include "launch.h"
#include "packed_pieces.cuh"

namespace quantgemm::packed_gemm {

constexpr int kReserved = 1024;   // of shared memory, for the system
constexpr int kFewestTiles = 16;  // of a panel, where shared memory is small

// sums += batch · x, tiles `tile` … of the panel.
template <class P, int TokenTiles>
__device__ __forceinline__ void multiply(float (&sums)[TokenTiles][4], const typename P::Batch& batch,
                                         const Shared<P>& shared, const Split& split, int tile, int count) {
  using Fragment = typename P::Fragment;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  BatchAffines<typename P::Format> affines[2];
  affines[0].prepare(batch, 0);
  affines[1].prepare(batch, 1);
  if constexpr (P::kOffset && Fragment::kBias != 0 &&
                TwoLevelFormat<typename P::Format>)  // offsets meet − kBias · Σ x
    affines[0].factors.offset *= -1.0f / Fragment::kBias,
        affines[1].factors.offset *= -1.0f / Fragment::kBias;
  const int pitch = static_cast<int>(Shared<P>::x_pitch(split));
  const uint4* x[TokenTiles];
#pragma unroll
  for (int t = 0; t < TokenTiles; ++t)  // a column that does not exist reads another: nobody takes its sum
    x[t] =
        reinterpret_cast<const uint4*>(shared.x + min(8 * t + r, split.columns - 1) * pitch) + tile * 8 + c;
  const float4* starts = shared.sums + tile * P::kGroups * (P::kColumns / 2) + c;
#pragma unroll
  for (int i = 0; i < P::Batch::kTiles; ++i) {
    if (i >= count) continue;
    float parts[TokenTiles][4];
    float4 start[TokenTiles];
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      uint4 b[TokenTiles];
#pragma unroll
      for (int t = 0; t < TokenTiles; ++t) b[t] = x[t][i * 8 + run * 4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int s = 2 * run + step, col = i * kTileCols + 16 * s;
        if (col % P::kGroup == 0) {
#pragma unroll
          for (int t = 0; t < TokenTiles; ++t) {
            if constexpr (Fragment::kBias != 0 || P::kOffset)
              start[t] = starts[col / P::kGroup * (P::kColumns / 2) + 4 * t];
            const float4 v = Fragment::kBias != 0 ? start[t] : make_float4(0, 0, 0, 0);
            parts[t][0] = v.x, parts[t][1] = v.y, parts[t][2] = v.z, parts[t][3] = v.w;
          }
        }
        uint32_t a[4];
        Fragment::make(batch, i, s, a);
#pragma unroll
        for (int t = 0; t < TokenTiles; ++t)
          mma_16x8x16(parts[t], a, step == 0 ? b[t].x : b[t].z, step == 0 ? b[t].y : b[t].w, typename P::T{});
        if ((col + 16) % P::kGroup != 0) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Affine affine = affines[half].get(batch, col, half);
          static_assert(!P::kOffset || (Fragment::kBias & (Fragment::kBias - 1)) == 0);  // exact
          if constexpr (P::kOffset && Fragment::kBias != 0 && !TwoLevelFormat<typename P::Format>)
            affine.offset *= -1.0f / Fragment::kBias;
#pragma unroll
          for (int t = 0; t < TokenTiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& sum = sums[t][2 * half + e];
              sum += affine.scale * parts[t][2 * half + e];
              if constexpr (P::kOffset) sum += affine.offset * (e == 0 ? start[t].x : start[t].y);
            }
        }
      }
    }
  }
}

// A warp's way through its batches: panel by panel, strip by strip. Two batches are in registers in turn,
// so that each panel takes an even number of turns; the last of them may be empty.
template <class P>
struct Cursor {
  static constexpr int kBatchTiles = P::Batch::kTiles;
  int panel = -1, turn, count, strip, batch, batches;

  // Of `strips · batches` units of a panel, warp w takes those from first_of(w) to first_of(w + 1) − 1.
  static __device__ __forceinline__ int first_of(int units, int w) { return units * w / P::kWarps; }
  static __device__ __forceinline__ int batches_of(const Split& split, int panel) {
    const int tiles = min(split.tiles - panel * split.panel_tiles, split.panel_tiles);
    return (tiles + kBatchTiles - 1) / kBatchTiles;
  }
  __device__ __forceinline__ void next_panel(const Split& split, int strips) {
    turn = count = 0;
    while (count == 0 && ++panel < split.panels) {
      const int warp = threadIdx.x / 32;
      batches = batches_of(split, panel);
      const int begin = first_of(strips * batches, warp);
      count = first_of(strips * batches, warp + 1) - begin;
      strip = begin / batches, batch = begin % batches;
    }
  }
  __device__ __forceinline__ bool valid() const { return turn < count; }
  __device__ __forceinline__ bool ends_sum() const { return turn + 1 == count || batch + 1 == batches; }
  __device__ __forceinline__ void advance(const Split& split, int strips) {
    if (++batch == batches) batch = 0, ++strip;
    if (++turn == (count + 1) / 2 * 2) next_panel(split, strips);
  }
};

// totals[strip] += or = the sums that the panel's warps left, in the order of warps.
template <class P>
__device__ __forceinline__ float sum_of_slots(const Shared<P>& shared, const Split& split, int batches,
                                              int strips, int strip, int within) {
  const int units = strips * batches;
  const int first = (P::kWarps * (strip * batches + 1) - 1) / units,
            last = (P::kWarps * (strip + 1) * batches - 1) / units;  // warps of its first and last batch
  float sum = 0;
  for (int w = first; w <= last; ++w)
    if (units * w / P::kWarps < units * (w + 1) / P::kWarps)
      sum += shared.slots[(strip + w) * split.columns * kStripRows + within];
  return sum;
}

template <PackableFormat F, class X, int TokenTiles>
__global__ void __launch_bounds__(Plan<F, X, TokenTiles>::kThreads, 1)
    packed_kernel(const __grid_constant__ GemmPackedArgs args, const Split split) {
  using P = Plan<F, X, TokenTiles>;
  using L = PackedLayout<F>;
  constexpr int kBatchTiles = P::Batch::kTiles;
  extern __shared__ uint4 memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t strip_bytes = L::strip_bytes(args.k);
  const X* const x = static_cast<const X*>(args.x);
  const bool routed = args.routes.ids != nullptr;
  Pieces& pieces = *reinterpret_cast<Pieces*>(reinterpret_cast<uint8_t*>(memory) + split.pieces_at);
  auto first_strip = static_cast<int>(int64_t{split.strips} * blockIdx.x / gridDim.x);
  int strips = static_cast<int>(int64_t{split.strips} * (blockIdx.x + 1) / gridDim.x) - first_strip;
  const int gated = args.up_at != 0;
  bytes_ptr w = args.packed;
  if (routed) {  // what to read depends on ids
    wait_for_previous_kernel();
    let_next_kernel_start();
    pieces.begin(args.routes, split);
  }
#pragma unroll 1
  do {
    if (routed) {
      first_strip = pieces.first_strip, strips = pieces.strips;
      if (strips == 0) break;
      w = args.packed + pieces.expert * args.routes.expert_bytes;
    }
    w += first_strip * strip_bytes;
    strips <<= gated;  // of w and up in turn
    const auto strip_at = [&](int strip) {
      return w + (strip >> gated) * strip_bytes + (strip & gated ? args.up_at : 0);
    };
    const Shared<P> shared(memory, split, strips);
    const auto row_of_x = [&](int token) {
      return int64_t{routed ? pieces.slots[token] / args.routes.slots_per_row : token};
    };

    Cursor<P> now, ahead;
    now.next_panel(split, strips);
    ahead = now;
    typename P::Batch batches[2];
    const auto fetch = [&](typename P::Batch& batch) {
      if (ahead.panel == split.panels) return;
      const int tile = ahead.panel * split.panel_tiles + ahead.batch * kBatchTiles;
      if (ahead.valid()) batch.load(strip_at(ahead.strip), args.k, tile, split.tiles - tile);
      ahead.advance(split, strips);
    };
    fetch(batches[0]);
    fetch(batches[1]);
    if (!routed) {
      wait_for_previous_kernel();
      let_next_kernel_start();
    }

    float sums[TokenTiles][4] = {};
    const auto consume = [&](typename P::Batch& batch) {
      if (now.valid()) {
        const int tile = now.batch * kBatchTiles;
        multiply<P, TokenTiles>(sums, batch, shared, split, tile,
                                split.tiles - now.panel * split.panel_tiles - tile);
        if (now.ends_sum()) {
          float* slot = shared.slots + (now.strip + warp) * split.columns * kStripRows + lane / 4;
#pragma unroll
          for (int t = 0; t < TokenTiles; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int column = 8 * t + lane % 4 * 2 + e % 2;
              if (column < split.columns) slot[column * kStripRows + e / 2 * 8] = sums[t][e];
              sums[t][e] = 0;
            }
        }
      }
      fetch(batch);
      now.advance(split, strips);
    };
    int last_batches = 1;
#pragma unroll 1
    for (int panel = 0; panel < split.panels; ++panel) {
      const int tokens = routed ? pieces.tokens : split.columns / P::kPerToken;
      stage<P>(shared, x, args.k, split, panel * split.panel_tiles, tokens, row_of_x);
      __syncthreads();
#pragma unroll 1
      while (now.panel == panel) {
        consume(batches[0]);
        consume(batches[1]);
      }
      __syncthreads();  // the panel's activations are used, its slots written
      last_batches = Cursor<P>::batches_of(split, panel);
      if (panel + 1 == split.panels) break;
#pragma unroll 1
      for (int i = threadIdx.x; i < strips * split.columns * kStripRows; i += P::kThreads) {
        const int strip = i / (split.columns * kStripRows), within = i % (split.columns * kStripRows);
        const float sum = sum_of_slots(shared, split, last_batches, strips, strip, within);
        shared.totals[i] = panel == 0 ? sum : shared.totals[i] + sum;
      }
      // The next panel's activations may be written at once: its slots are, after the barrier behind them.
    }

    const int tokens = routed ? pieces.tokens : split.columns / P::kPerToken;
#pragma unroll 1
    for (int i = threadIdx.x; i < (strips >> gated) * tokens * kStripRows; i += P::kThreads) {
      const int row = i % kStripRows, token = i / kStripRows % tokens, own = i / kStripRows / tokens;
      const int64_t output = static_cast<int64_t>(first_strip + own) * kStripRows + row;
      if (output >= args.n) continue;
      float sum = 0, factor = 1;
#pragma unroll 1
      for (int strip = own << gated; strip < (own + 1) << gated; ++strip) {
        if (strip > own << gated) factor = silu(sum);
        sum = 0;
        for (int p = 0; p < P::kPerToken; ++p) {
          const int within = (token * P::kPerToken + p) * kStripRows + row;
          if (split.panels > 1) sum += shared.totals[strip * split.columns * kStripRows + within];
          if (split.panels > 0) sum += sum_of_slots(shared, split, last_batches, strips, strip, within);
        }
        if (sum != sum) sum = dot_decoded<F>(strip_at(strip), row, x + row_of_x(token) * args.k, args.k);
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

// args.m up to Plan::kTokens.
template <PackableFormat F, class X, int TokenTiles>
cudaError_t launch(const GemmPackedArgs& args, const Device& device, cudaStream_t stream) {
  using P = Plan<F, X, TokenTiles>;
  Split split{};
  split.strips = static_cast<int>((args.n + kStripRows - 1) / kStripRows);
  split.tiles = static_cast<int>(P::L::tiles(args.k));
  const bool routed = args.routes.ids != nullptr;
  split.columns = (routed ? args.routes.tile : static_cast<int>(args.m)) * P::kPerToken;
  const int pieces_bytes = routed ? static_cast<int>(sizeof(Pieces)) : 0;
  const int gated = args.up_at != 0;
  const auto tiles_beside = [&](int strips) {  // whole batches that fit in shared memory with so many strips
    const int left = device.shared_per_block - kReserved - pieces_bytes - 64 * P::kPlannedColumns -
                     ((2 << gated) * strips + P::kWarps - 1) * P::kStripBytes * P::kPlannedColumns;
    return left / ((P::kTileBytes + P::kTileSumBytes) * P::kPlannedColumns) / P::Batch::kTiles *
           P::Batch::kTiles;
  };
  int most_strips = P::kMostStrips >> gated;
  while (most_strips > 1 && tiles_beside(most_strips) < kFewestTiles) most_strips /= 2;
  const int most_tiles = tiles_beside(most_strips);
  if (most_tiles <= 0) return cudaErrorNotSupported;
  split.panels = (split.tiles + most_tiles - 1) / most_tiles;
  if (split.panels > 0) {
    split.panel_tiles = (split.tiles + split.panels - 1) / split.panels;
    split.panel_tiles = (split.panel_tiles + P::Batch::kTiles - 1) / P::Batch::kTiles * P::Batch::kTiles;
  }
  split.most_strips = most_strips;
  int blocks = split.strips < device.multiprocessors && !routed ? split.strips : device.multiprocessors;
  while (!routed && (split.strips + blocks - 1) / blocks > most_strips) blocks += device.multiprocessors;
  const int strips = routed ? most_strips : (split.strips + blocks - 1) / blocks;
  split.pieces_at = static_cast<int>((Shared<P>::bytes(split, strips << gated) + 15) / 16 * 16);
  const int bytes = split.pieces_at + pieces_bytes;

  const auto kernel = packed_kernel<F, X, TokenTiles>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // The first weights are on their way while the launch before this one ends; the kernel waits for that
  // launch before it reads x or writes y.
  const DependentLaunch launch(static_cast<unsigned>(blocks), P::kThreads, device, stream, bytes);
  return cudaLaunchKernelEx(&launch.config, kernel, args, split);
}

// Any m, in passes of Plan::kTokens tokens.
template <class X, int TokenTiles>
cudaError_t launch_passes(const GemmPackedArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) {
      constexpr int64_t kTokens = Plan<F, X, TokenTiles>::kTokens;
      if (args.routes.ids != nullptr) {  // groups are passes
        if (args.routes.tile <= kTokens) status = launch<F, X, TokenTiles>(args, device, stream);
        return;
      }
      for (int64_t token = 0; token < args.m; token += kTokens) {
        GemmPackedArgs pass = args;
        pass.m = args.m - token < kTokens ? args.m - token : kTokens;
        pass.x = static_cast<const X*>(args.x) + token * args.k;
        pass.y = static_cast<X*>(args.y) + token * args.n;
        if (args.residual != nullptr) pass.residual = static_cast<const X*>(args.residual) + token * args.n;
        status = launch<F, X, TokenTiles>(pass, device, stream);
        if (status != cudaSuccess) return;
      }
    }
  });
  return status;
}

}  // namespace quantgemm::packed_gemm
