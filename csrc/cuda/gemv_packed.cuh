// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for up to eight tokens, w packed. Limit: reading the weights. A thread block owns
// some strips of 16 rows; its warps share their batches of 256 columns evenly, in order, so that a warp meets
// few strips and leaves one sum of each in shared memory. Each warp keeps copies of its next batches under
// way in a ring of its own, from before the previous kernel ends. How work is divided does not depend on the
// tokens, so rows of y are the same in any batch; panels, runs of columns whose activations fit in shared
// memory, are those of eight tokens.
#pragma once
#include "gemv_packed_stage.cuh"
#include "launch.h"

namespace quantgemm::packed_gemv {

using packed_gemm::Pieces;

// A warp's way through its batches, panel by panel, strip by strip, a run of a strip's at a time.
template <class P>
struct Cursor {
  int panel = -1, left = 0, strip, batch;  // left in the panel

  // Of `strips · batches` units of a panel, warp w takes those from first_of(w) to first_of(w + 1) − 1.
  static __device__ __forceinline__ int first_of(int units, int w) { return units * w / P::kWarps; }
  static __device__ __forceinline__ int batches_of(const Split& split, int panel) {
    const int tiles = min(split.tiles - panel * split.panel_tiles, split.panel_tiles);
    return (tiles + P::B::kTiles - 1) / P::B::kTiles;
  }
  __device__ __forceinline__ void next_panel(const Split& split, int strips) {
    while (left == 0 && ++panel < split.panels) {
      const int warp = threadIdx.x / 32;
      const int batches = batches_of(split, panel), begin = first_of(strips * batches, warp);
      left = first_of(strips * batches, warp + 1) - begin;
      strip = begin / batches, batch = begin % batches;
    }
  }
  __device__ __forceinline__ int tile(const Split& split) const {
    return panel * split.panel_tiles + batch * P::B::kTiles;
  }
  __device__ __forceinline__ int run(const Split& split) const {
    return min(left, batches_of(split, panel) - batch);
  }
  __device__ __forceinline__ void skip_run(const Split& split, int strips) {
    left -= run(split), batch = 0, ++strip;
    if (left == 0) next_panel(split, strips);
  }
};

// The slots of warps that have nothing to do, in the middle of a strip. Panels from `first` on.
template <class P>
__device__ __forceinline__ void clear_slots(const Shared<P>& shared, const Split& split, int strips,
                                            int first) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int panel = first; panel < min(first + split.staged, split.panels); ++panel) {
    const int batches = Cursor<P>::batches_of(split, panel), units = strips * batches;
    const int begin = Cursor<P>::first_of(units, warp);
    if (units >= P::kWarps || begin < Cursor<P>::first_of(units, warp + 1)) continue;
    float* const slot = shared.slot(split, strips, panel - first, begin / batches, warp);
    for (int i = lane; i < split.columns * kStripRows; i += 32) slot[i] = 0;
  }
}

// total and what the warps left of a strip, in the order of panels, from `first` on, and of warps.
template <class P>
__device__ __forceinline__ float add_slots(float total, const Shared<P>& shared, const Split& split,
                                           int strips, int first, int strip, int within) {
  const int count = min(split.panels - first, split.staged);
#pragma unroll 1
  for (int panel = 0; panel < count; ++panel) {
    const int2 ends = shared.ends[panel * strips + strip];
    const float* const slots = shared.slot(split, strips, panel, strip, 0) + within;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < P::kWarps; ++w)  // all loads at once
      sum += w >= ends.x && w <= ends.y ? slots[w * split.columns * kStripRows] : 0.0f;
    total += sum;
  }
  return total;
}

// Until the oldest of a ring's copies is there.
template <class P>
__device__ __forceinline__ void wait_for_slot(int ring) {
  if (P::kDeepRing == 2 || ring == 2)
    cp_async_wait<1>();
  else if (ring == P::kRing)
    cp_async_wait<P::kRing - 1>();
  else
    cp_async_wait<P::kDeepRing - 1>();
}

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__(Plan<F, X, Tokens>::kThreads, 1)
    gemv_kernel(const __grid_constant__ GemmPackedArgs args, const __grid_constant__ Split split) {
  using P = Plan<F, X, Tokens>;
  using B = typename P::B;
  using L = PackedLayout<F>;
  constexpr int kBias = Fragment<F, X>::kBias;
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
  const uint8_t* const ring = reinterpret_cast<const uint8_t*>(memory) + warp * split.ring * B::kBytes;
  const uint32_t ring_address = shared_address(ring);
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
    Copier<F> copier{};
    int run_ahead = 0, tiles_ahead = 0;
    const auto aim = [&] {
      if (ahead.panel >= split.panels) return;
      copier.aim(strip_at(ahead.strip), args.k, ahead.tile(split) / B::kTiles);
      run_ahead = ahead.run(split), tiles_ahead = split.tiles - ahead.tile(split);
    };
    const auto fetch = [&](int at) {
      if (run_ahead > 0) {
        copier.copy(ring_address + at, tiles_ahead);
        tiles_ahead -= B::kTiles;
        if (--run_ahead == 0) {
          ahead.skip_run(split, strips);
          aim();
        }
      }
      cp_async_commit();
    };
    aim();
    const int ring_end = split.ring * B::kBytes;
#pragma unroll 1
    for (int at = 0; at < ring_end; at += B::kBytes) fetch(at);
    if (!routed) wait_for_previous_kernel();

    const int tokens = routed ? pieces.tokens : split.columns;
    float sums[Tokens][4] = {};
    int at = 0;
#pragma unroll 1
    for (int first = 0; first < split.panels; first += split.staged) {
      clear_slots(shared, split, strips, first);
      stage<P, kBias>(shared, x, args.k, split, first, tokens, row_of_x, !routed && first == 0);
      __syncthreads();
      const int end = min(first + split.staged, split.panels);
      const int token = Tokens == 1 ? 0 : min(lane / 4, split.columns - 1);  // of others nobody takes the sum
      const uint8_t* const zeros = shared.x + Shared<P>::x_pitch(split) - P::kBatchBytes;  // one token's
      const uint8_t* const own_x = shared.x + token * Shared<P>::x_pitch(split) + lane % 4 * 16;
#pragma unroll 1
      while (now.panel < end) {
        const int batch = now.tile(split) / B::kTiles - first * (split.panel_tiles / B::kTiles);
        const uint8_t* x_at = own_x + batch * P::kBatchBytes;
        const float* starts = shared.starts + batch * P::kSums * Tokens;
        const int run = now.run(split);
#pragma unroll 1
        for (int i = 0; i < run; ++i, x_at += P::kBatchBytes, starts += P::kSums * Tokens) {
          wait_for_slot<P>(split.ring);
          __syncwarp();
          multiply<F, X, Tokens>(sums, ring + at, x_at, zeros, starts);
          __syncwarp();
          fetch(at);
          at = at + B::kBytes == ring_end ? 0 : at + B::kBytes;
        }
        finish<Tokens>(sums, shared.slot(split, strips, now.panel - first, now.strip, warp), split.columns);
        int2& ends = shared.ends[(now.panel - first) * strips + now.strip];
        if (lane == 0 && now.batch == 0) ends.x = warp;
        if (lane == 0 && now.batch + run == Cursor<P>::batches_of(split, now.panel)) ends.y = warp;
        now.skip_run(split, strips);
      }
      __syncthreads();
      if (end == split.panels && first == 0) break;
#pragma unroll 1
      for (int i = threadIdx.x; i < strips * split.columns * kStripRows; i += P::kThreads) {
        const int strip = i / (split.columns * kStripRows), within = i % (split.columns * kStripRows);
        const float before = first == 0 ? 0.0f : shared.totals[i];
        shared.totals[i] = add_slots(before, shared, split, strips, first, strip, within);
      }
      __syncthreads();  // the slots are read, the activations used
    }

#pragma unroll 1
    for (int i = threadIdx.x; i < (strips >> gated) * Tokens * kStripRows; i += P::kThreads) {
      const int row = i % kStripRows, token = i / kStripRows % Tokens, own = i / kStripRows / Tokens;
      const int64_t output = static_cast<int64_t>(first_strip + own) * kStripRows + row;
      if (output >= args.n || token >= tokens) continue;
      float sum = 0, factor = 1;
#pragma unroll 1
      for (int strip = own << gated; strip < (own + 1) << gated; ++strip) {
        if (strip > own << gated) factor = silu(sum);
        const int within = token * kStripRows + row;
        sum = split.panels <= split.staged ? add_slots(0, shared, split, strips, 0, strip, within)
                                           : shared.totals[strip * split.columns * kStripRows + within];
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
  eight.columns = P::kPlannedTokens, eight.staged = 1, eight.ring = 2;
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
  const bool long_work = int64_t{split.each} * P::B::L::strip_bytes(args.k) << gated >= P::kLongWork;
  split.ring = long_work ? P::kDeepRing : P::kRing;
  if (Shared<P>::bytes(split, strips) > limit) split.ring = 2;
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
