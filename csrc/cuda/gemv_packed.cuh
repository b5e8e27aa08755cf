// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for up to eight tokens, w packed. Limit: reading the weights. A thread block owns
// some strips of 16 rows and goes through their batches of 256 columns in order, a stage of kWarps batches at
// a time, each warp one of them, so that it reads long runs. For every four warps another asks the copy
// engine for their batches, from before the previous kernel ends; the four never count bytes. A warp leaves a
// sum of each strip in shared memory; a round of strips later the block adds them up. Which warp has which
// batch of a strip does not depend on the tokens, so rows of y are the same in any batch; panels, runs of
// columns whose activations fit in shared memory, are those of eight tokens.
#pragma once
#include "gemv_packed_walk.cuh"
#include "launch.h"

namespace quantgemm::packed_gemv {

using packed_gemm::Pieces;

// sync_some, if all of these threads want it.
template <int Id, int Threads>
__device__ __forceinline__ void sync_some_if(bool wanted) {
  asm volatile("{ .reg .pred wanted; setp.ne.b32 wanted, %2, 0; @wanted bar.sync %0, %1; }" ::"n"(Id),
               "n"(Threads), "r"(static_cast<int>(wanted))
               : "memory");
}

// Sums of a row of a strip for some tokens.
template <class P>
struct RowSums {
  float of[P::kEach] = {};
  __device__ __forceinline__ void load(const float* from) {
    if constexpr (P::kEach == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from);
      of[0] = v.x, of[1] = v.y;
    } else {
      of[0] = *from;
    }
  }
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int j = 0; j < P::kEach; ++j) to[j] = of[j];
  }
  __device__ __forceinline__ void add(const RowSums& other) {
#pragma unroll
    for (int j = 0; j < P::kEach; ++j) of[j] += other.of[j];
  }
  // What the warps left of a strip of a round: in the order of panels, from `first` on, and of columns.
  __device__ __forceinline__ void add_warps(const float* sums, const Split& split, int first) {
    const int end = min(split.panels, first + split.staged);
#pragma unroll 1
    for (int panel = first; panel < end; ++panel, sums += split.round * P::kWarps * P::kStripSums) {
      RowSums some, next;
      if (split.whole_stages) {
#pragma unroll
        for (int w = 0; w < P::kWarps; ++w)  // all loads at once
          next.load(sums + w * P::kStripSums), some.add(next);
      } else {
        const int count = min(batches_of<P>(split, panel), P::kWarps);
#pragma unroll 1
        for (int w = 0; w < count; ++w) next.load(sums + w * P::kStripSums), some.add(next);
      }
      add(some);
    }
  }
};

// A row of y and some tokens, and what is added to their sums.
template <class P, class X>
struct Line {
  int count = 0;  // tokens from the first on that there are; those beyond kEach are others' as well
  int strip = 0, output = 0;
  X bias{kMinusZero}, residual[P::kEach];

  static constexpr uint16_t kMinusZero = 0x8000;  // which changes no sum
  __device__ __forceinline__ Line() {
#pragma unroll
    for (X& r : residual) r.bits = kMinusZero;
  }
};

// What block number `block` of a product does.
template <PackableFormat F, class X, int Tokens, bool Experts>
__device__ __forceinline__ void multiply_strips(const GemmPackedArgs& args, const Split& split, int block) {
  using P = Plan<F, X, Tokens>;
  using B = typename P::B;
  using L = PackedLayout<F>;
  constexpr float kBias = Fragment<F, X>::kBias;
  constexpr int kLines = P::kStripSums / P::kEach;  // threads that a strip's sums want
  extern __shared__ uint4 memory[];
  const X* const norm = kHasNorm<X> ? static_cast<const X*>(args.norm_weight) : nullptr;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const auto strip_bytes = static_cast<uint32_t>(split.strip_bytes);
  const X* const x = static_cast<const X*>(args.x);
  const bool routed = Experts && args.routes.ids != nullptr;
  Pieces& pieces = *reinterpret_cast<Pieces*>(reinterpret_cast<uint8_t*>(memory) + split.pieces_at);
  int first_strip = split.each * block + min(block, split.more), strips = split.each + (block < split.more);
  const int gated = args.up_at != 0;
  bytes_ptr w = args.packed;
  if (routed) {  // what to read depends on ids
    wait_for_previous_kernel();
    let_next_kernel_start();
    pieces.begin(args.routes, split);
  }
  const Shared<P> shared(memory, split);
  const int quarter = warp < P::kWarps ? warp / 4 : warp - P::kWarps;
  const uint32_t full = shared_address(shared.full + quarter), empty = shared_address(shared.empty + quarter);
  Turn turn;
  const auto start = [&] {  // a piece
    if (routed) {
      first_strip = pieces.first_strip, strips = pieces.strips;
      w = args.packed + pieces.expert * args.routes.expert_bytes;
    }
    w += int64_t{first_strip} * strip_bytes;
    strips <<= gated;  // of w and up in turn
  };
  const auto strip_at = [&](int strip) {
    return w + static_cast<uint64_t>(static_cast<uint32_t>(strip >> gated)) * strip_bytes +
           (strip & gated ? args.up_at : 0);
  };
  const auto row_of_x = [&](int token) {
    return int64_t{routed ? pieces.slots[token] / args.routes.slots_per_row : token};
  };
  const auto row_of_y = [&](int token) { return int64_t{routed ? pieces.slots[token] : token}; };
  if (warp >= P::kWarps) {
    shrink_registers<P::kCopierRegisters>();
    if (warp >= P::kWarps + P::kQuarters) return;
    if (routed) meet_makers<P>();
#pragma unroll 1
    while (!routed || pieces.strips > 0) {
      start();
      fill<F>(shared, split, strips, quarter, turn, strip_at, !routed);
      if (!routed && quarter == 0) read_ahead(args.ahead, args.ahead_bytes);
      if (!routed) return;
      pieces.next(split);
    }
    return;
  }
  make_barriers<P>(shared, split, warp);
  grow_registers<P::kMultiplierRegisters>();
  sync_some<1, P::kThreads>();
#pragma unroll 1
  while (!routed || pieces.strips > 0) {
    start();
    prefetch_norm<P>(norm, args.k);
    const int tokens = routed ? pieces.tokens : split.columns;
    Sums<Tokens> sums;
    Activations<Tokens> of{};
    if constexpr (Tokens == 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        of.own[i] = lane / 4 == i;
        keep_in_register(of.own[i]);
      }
    }
    const auto own_x = [&] {
      if constexpr (Tokens == 1)
        return shared.x + lane % 4 * 16 + group_at<B::kSumSteps>(lane / 4);
      else
        return matrix_row(shared, split);
    }();
    int units = warp, until = 0;  // the warp's next, and all of the rounds so far
#pragma unroll 1
    for (int first = 0; first < split.panels; first += split.staged) {
      const bool begins = !routed && first == 0;
      if constexpr (Tokens == 1)
        stage_one<P, kBias>(shared, x, static_cast<int>(args.k), split, first, begins, norm);
      else
        stage_rows<P, kBias>(shared, x, static_cast<int>(args.k), split, first, tokens, row_of_x, begins,
                             norm);
      __syncwarp();
      if (first == 0 && lane == 0) mbarrier_arrive(shared_address(shared.has_x + quarter));
      const bool final = first + split.staged >= split.panels;
      const int tiles = min(split.tiles - first * split.panel_tiles, split.staged * split.panel_tiles);
      // Where stages are parts of a strip and panel, a warp's batches are those whose activations it staged.
      constexpr int kStageTiles = P::kWarps * B::kTiles;
      sync_some_if<1, P::kThreads>(split.panel_tiles % kStageTiles != 0 || tiles % kStageTiles != 0);
#pragma unroll 1
      for (int base = 0; base < strips; base += split.round) {
        const int own_strips = min(strips - base, split.round), lines = (own_strips >> gated) * kLines;
        until += own_strips * ((tiles + B::kTiles - 1) / B::kTiles);
        const auto line_at = [&](int i) {
          Line<P, X> line;
          const int within = i % kLines * P::kEach, token = within % Tokens,
                    strip = (base >> gated) + i / kLines;
          const int64_t output = static_cast<int64_t>(first_strip + strip) * kStripRows + within / Tokens;
          if (!final || i >= lines || output >= args.n) return line;
          line.count = tokens - token, line.strip = strip << gated, line.output = static_cast<int>(output);
          if (args.bias != nullptr)
            line.bias = static_cast<const X*>(args.bias)[(routed ? pieces.expert * args.n : 0) + output];
#pragma unroll
          for (int j = 0; j < P::kEach; ++j)
            if (args.residual != nullptr && j < line.count)
              line.residual[j] = static_cast<const X*>(args.residual)[row_of_y(token + j) * args.n + output];
          return line;
        };
        Line<P, X> line;
        if constexpr (Tokens == 1)
          line = line_at(threadIdx.x);  // while others wait; eight tokens lack registers
#pragma unroll 1
        for (; units < until; units += P::kWarps) {
          mbarrier_wait(full + turn.at * P::kTurnBytes, turn.parity);
          const Note note = shared.notes[turn.at * P::kWarps + warp];
          of.at = own_x + note.batch * P::kBatchBytes;
          of.starts = shared.starts + note.batch * P::kSums * Tokens;
          multiply<F, X, Tokens>(sums, shared.ring + turn.at * B::kStage, warp, of);
          __syncwarp();
          if (lane == 0) mbarrier_arrive(empty + turn.at * P::kTurnBytes);
          turn.next(split.ring);
          if (note.last) finish<Tokens>(sums, shared.sums + note.sums);
        }
        sync_some<1, P::kThreads>();
        if (!final) {
#pragma unroll 1
          for (int i = threadIdx.x; i < own_strips * kLines; i += P::kThreads) {
            const int within = i % kLines * P::kEach, strip = i / kLines;
            float* const total = shared.totals + (base + strip) * P::kStripSums + within;
            RowSums<P> sum;
            if (first > 0) sum.load(total);
            sum.add_warps(shared.sums + strip * P::kWarps * P::kStripSums + within, split, first);
            sum.store(total);
          }
        } else {
          static_assert(P::kThreads % kLines == 0);  // so that a thread has lines of the same tokens
          float factors[P::kEach];
#pragma unroll
          for (float& factor : factors) factor = 1;
          if (norm != nullptr && static_cast<int>(threadIdx.x) < lines)
            norm_factors<P>(factors, shared, split, threadIdx.x * P::kEach % Tokens, args.k, args.norm_eps);
#pragma unroll 1
          for (int i = threadIdx.x; i < lines; i += P::kThreads) {
            if (Tokens > 1 || i >= P::kThreads) line = line_at(i);
            const int within = i % kLines * P::kEach, token = within % Tokens;
            if (line.count <= 0) continue;
            RowSums<P> sum, gate;
#pragma unroll 1
            for (int strip = line.strip; strip <= line.strip + gated; ++strip) {
              gate = sum, sum = {};
              if (first > 0) sum.load(shared.totals + strip * P::kStripSums + within);
              sum.add_warps(shared.sums + (strip - base) * P::kWarps * P::kStripSums + within, split, first);
#pragma unroll
              for (int j = 0; j < P::kEach; ++j) {
                if (sum.of[j] == sum.of[j] || j >= line.count) continue;
                const X* const x_row = x + row_of_x(token + j) * args.k;
                sum.of[j] = norm == nullptr
                                ? packed_gemm::dot_decoded<F>(strip_at(strip), within / Tokens, x_row, args.k)
                                : dot_weighted<F>(strip_at(strip), within / Tokens, x_row, args.k, norm);
              }
            }
#pragma unroll
            for (int j = 0; j < P::kEach; ++j) {
              if (j >= line.count) continue;
              float y = sum.of[j] * factors[j];
              if (gated) y *= silu(gate.of[j] * factors[j]);
              y += to_float(line.bias);
              const int64_t y_row = row_of_y(token + j);
              if (routed && args.routes.weights != nullptr) y *= args.routes.weights[y_row];
              y += to_float(line.residual[j]);
              store1(static_cast<X*>(args.y) + y_row * args.n + line.output, y);
            }
          }
        }
        if (!final || base + split.round < strips) sync_some<1, P::kThreads>();  // sums are read, x is used
      }
    }
    if (!routed) return;
    if (units < (until + P::kWarps - 1) / P::kWarps * P::kWarps) {  // nothing for this warp in the last stage
      mbarrier_wait(full + turn.at * P::kTurnBytes, turn.parity);
      __syncwarp();  // all lanes have seen it
      if (lane == 0) mbarrier_arrive(empty + turn.at * P::kTurnBytes);
      turn.next(split.ring);
    }
    pieces.next(split);
  }
  if (args.routes.groups == nullptr)
    for (int64_t slot = blockIdx.x; slot < args.routes.num_slots; slot += gridDim.x)
      if (expert_of(args.routes, slot) < 0)
        clear_row(static_cast<X*>(args.y) + slot * args.n, args.n, threadIdx.x, P::kThreads);
}

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__(Plan<F, X, Tokens>::kAllThreads, 1)
    gemv_kernel(const __grid_constant__ GemmPackedArgs args, const __grid_constant__ Split split) {
  multiply_strips<F, X, Tokens, (Tokens > 1)>(args, split, static_cast<int>(blockIdx.x));
}

// How a product is divided: panels as eight tokens need them. No panels that fit: false.
template <class P>
bool plan(Split& split, int strips, int limit) {
  Split eight = split;
  eight.columns = P::kPlannedTokens, eight.staged = 1, eight.ring = 2;
  const int batches = (split.tiles + P::B::kTiles - 1) / P::B::kTiles;
  for (int panels = 1; panels <= (batches > 1 ? batches : 1); ++panels) {
    const int each = (batches + panels - 1) / panels;
    if (panels > 1 && each < P::kFewestBatches) return false;
    if (panels > 1 && (panels - 1) * each >= batches) continue;
    eight.panels = panels, eight.panel_tiles = each * P::B::kTiles;
    if (Shared<typename P::Eight>::place(eight, strips) > limit) continue;
    split.panels = panels, split.panel_tiles = eight.panel_tiles;
    return true;
  }
  return false;
}

struct Division {
  Split split{};
  int blocks = 0, bytes = 0;  // 0: there is no room for the panels; shared memory of a block
};

// Among so many multiprocessors.
template <PackableFormat F, class X, int Tokens>
Division divide(const GemmPackedArgs& args, const Device& device, int multiprocessors) {
  using P = Plan<F, X, Tokens>;
  Division made;
  auto& [split, blocks, bytes] = made;
  split.strips = static_cast<int>((args.n + kStripRows - 1) / kStripRows);
  split.tiles = static_cast<int>(P::B::L::tiles(args.k));
  const bool routed = args.routes.ids != nullptr;
  split.columns = routed ? args.routes.tile : static_cast<int>(args.m);
  split.staged = P::kPlannedTokens / Tokens;
  const int pieces_bytes = routed ? static_cast<int>(sizeof(Pieces)) : 0, gated = args.up_at != 0;
  split.normed = kHasNorm<X> && args.norm_weight != nullptr;
  const int limit = device.shared_per_block - kReservedShared - pieces_bytes;
  int strips = 0;
  for (int most = P::kMostStrips >> gated; blocks == 0 && most > 0; most /= 2) {
    int some = split.strips < multiprocessors && !routed ? split.strips : multiprocessors;
    while (!routed && (split.strips + some - 1) / some > most) some += multiprocessors;
    split.most_strips = most;
    strips = (routed ? most : (split.strips + some - 1) / some) << gated;
    split.round = strips < P::kFewestRound ? strips : P::kFewestRound;
    if (plan<P>(split, strips, limit)) blocks = some;
  }
  if (blocks == 0) return made;
  split.each = split.strips / blocks, split.more = split.strips % blocks;
  const bool long_work = int64_t{split.each} * P::B::L::strip_bytes(args.k) << gated >= P::kLongWork;
  split.ring = long_work ? P::kDeepRing : P::kRing;
  if (Shared<P>::place(split, strips) > limit) split.ring = 2;
  const int64_t room = limit - Shared<P>::place(split, strips), each = Shared<P>::round_bytes(split);
  const int64_t round = split.round + (room < 0 || each == 0 ? 0 : room / each / 2 * 2);
  split.round = round < strips ? static_cast<int>(round) : strips;
  split.pieces_at = static_cast<int>((Shared<P>::place(split, strips) + 15) / 16 * 16);
  split.strip_bytes = static_cast<int>(P::B::L::strip_bytes(args.k));
  const int last_tiles = split.tiles - (split.panels - 1) * split.panel_tiles;  // the fewest
  split.whole_stages = (last_tiles + P::B::kTiles - 1) / P::B::kTiles >= P::kWarps;
  bytes = split.pieces_at + pieces_bytes;
  return made;
}

template <class Kernel>
cudaError_t give_shared_memory(Kernel kernel, int bytes) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return status != cudaSuccess
             ? status
             : cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
}

// args.m up to Tokens.
template <PackableFormat F, class X, int Tokens>
cudaError_t launch(const GemmPackedArgs& args, const Device& device, cudaStream_t stream) {
  const auto [split, blocks, bytes] = divide<F, X, Tokens>(args, device, device.multiprocessors);
  if (blocks == 0) return cudaErrorNotSupported;
  const auto kernel = gemv_kernel<F, X, Tokens>;
  const cudaError_t status = give_shared_memory(kernel, bytes);
  if (status != cudaSuccess) return status;
  // The first weights are on their way while the launch before this one ends; the kernel waits for that
  // launch before it reads x or writes y.
  const DependentLaunch launch(static_cast<unsigned>(blocks), Plan<F, X, Tokens>::kAllThreads, device, stream,
                               bytes);
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
