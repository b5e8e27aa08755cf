// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for up to eight tokens, w packed. Limit: reading the weights. A thread block owns
// some strips of 16 rows and goes through their batches of 256 columns in order, a stage of kWarps batches at
// a time, each warp one of them, so that it reads long runs. One warp asks the copy engine for stages, from
// before the previous kernel ends; the others never count bytes. A warp leaves a sum of each strip in shared
// memory; a round of strips later the block adds them up. Which warp has which batch of a strip does not
// depend on the tokens, so rows of y are the same in any batch; panels, runs of columns whose activations fit
// in shared memory, are those of eight tokens.
#pragma once
#include "gemv_packed_stage.cuh"
#include "launch.h"

namespace quantgemm::packed_gemv {

using packed_gemm::Pieces;

// Batches of 256 columns of a panel.
template <class P>
__device__ __forceinline__ int batches_of(const Split& split, int panel) {
  const int tiles = min(split.tiles - panel * split.panel_tiles, split.panel_tiles);
  return (tiles + P::B::kTiles - 1) / P::B::kTiles;
}

// The way of one place of all stages through the batches of a block: round by round of strips, in it panel by
// panel, strip by strip; a stage has as many batches as there are warps, side by side.
template <class P>
struct Cursor {
  int first = 0, base = 0;  // where the panels that are staged at a time, and the round, begin
  int panel = 0, strip = 0, batch, batches;

  __device__ __forceinline__ Cursor(const Split& split, int strips, int place) {
    batch = place, batches = batches_of<P>(split, 0);
    settle(split, strips);
  }
  __device__ __forceinline__ bool at_end(const Split& split) const { return first >= split.panels; }
  __device__ __forceinline__ void next(const Split& split, int strips) {
    batch += P::kWarps;
    settle(split, strips);
  }
  __device__ __forceinline__ void settle(const Split& split, int strips) {
#pragma unroll 1
    while (batch >= batches && !at_end(split)) {
      batch -= batches;
      if (++strip < min(base + split.round, strips)) continue;
      if (++panel == min(first + split.staged, split.panels)) {
        base += split.round;
        if (base >= strips) base = 0, first += split.staged;
        panel = first;
      }
      strip = base, batches = batches_of<P>(split, panel);
    }
  }
};

// A place in the ring, and the parity of its barriers' phase.
struct Turn {
  int at = 0, parity = 0;
  __device__ __forceinline__ void next(int ring) {
    if (++at == ring) at = 0, parity ^= 1;
  }
};

// What the last warp does: asks for stages when there is room for them.
template <PackableFormat F, class P, class StripAt>
__device__ __forceinline__ void fill(const Shared<P>& shared, const Split& split, int strips, Turn& turn,
                                     const StripAt& strip_at) {
  using B = Batch<F>;
  const int place = threadIdx.x % 32, panel_batches = split.panel_tiles / B::kTiles;
  const int units = strips * ((split.tiles + B::kTiles - 1) / B::kTiles);
  Cursor<P> to(split, strips, place);
#pragma unroll 1
  for (int stage = 0; stage < units; stage += P::kWarps) {
    const uint32_t full = shared_address(shared.full + turn.at);
    mbarrier_wait(shared_address(shared.empty + turn.at), turn.parity ^ 1);
    const bool some = place < P::kWarps && !to.at_end(split), asks = some && (place == 0 || to.batch == 0);
    const int before = to.panel - to.first;  // panels
    const Run<F> run(strip_at(to.strip), split.tiles, to.panel * panel_batches + to.batch,
                     min(P::kWarps - place, to.batches - to.batch), place);
    const uint32_t target = shared_address(shared.ring + turn.at * B::kStage);
    run.clear_rest(asks, target);
    if (place < P::kWarps) {
      const int row = (before * split.round + to.strip - to.base) * P::kWarps + to.batch % P::kWarps;
      shared.notes[turn.at * P::kWarps + place] = {before * panel_batches + to.batch,
                                                   row * split.columns * kStripRows,
                                                   to.batch + P::kWarps >= to.batches};
      if constexpr (kCopyEngine)
        mbarrier_arrive_expecting(full, static_cast<uint32_t>(asks ? run.bytes() : 0));
    }
    run.copy(asks, target, full);
    if constexpr (!kCopyEngine) {
      __threadfence_block();  // notes and cleared heads, which are no copies
      mbarrier_arrive_after_copies(full);
    }
    to.next(split, strips);
    turn.next(split.ring);
  }
}

// total and what the warps left of a strip of a round: in the order of panels, from `first` on, and of
// columns.
template <class P>
__device__ __forceinline__ float add_sums(float total, const float* sums, const Split& split, int first) {
  const int count = min(split.panels - first, split.staged), step = split.columns * kStripRows;
#pragma unroll 1
  for (int panel = 0; panel < count; ++panel, sums += split.round * P::kWarps * step) {
    const int batches = batches_of<P>(split, first + panel);
    float sum = 0;
#pragma unroll
    for (int w = 0; w < P::kWarps; ++w)  // all loads at once
      sum += w < batches ? sums[w * step] : 0.0f;
    total += sum;
  }
  return total;
}

// What block number `block` of a product does.
template <PackableFormat F, class X, int Tokens, bool Experts>
__device__ __forceinline__ void multiply_strips(const GemmPackedArgs& args, const Split& split, int block,
                                                typename Norm<X, Tokens>::Memory& norm_memory) {
  using P = Plan<F, X, Tokens>;
  using B = typename P::B;
  using L = PackedLayout<F>;
  constexpr float kBias = Fragment<F, X>::kBias;
  extern __shared__ uint4 memory[];
  const Norm<X, Tokens> norm{static_cast<const X*>(args.norm_weight), args.norm_eps, norm_memory};
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const auto strip_bytes = static_cast<uint32_t>(L::strip_bytes(args.k));
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
  if (threadIdx.x < split.ring) {
    mbarrier_init(shared_address(shared.full + threadIdx.x), kCopyEngine ? P::kWarps : 32);
    mbarrier_init(shared_address(shared.empty + threadIdx.x), P::kWarps);
    publish_barriers();
  }
  __syncthreads();
  const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
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
  if (warp >= P::kWarps) {
    shrink_registers<P::kCopierRegisters>();
    if (warp > P::kWarps) return;
#pragma unroll 1
    while (!routed || pieces.strips > 0) {
      start();
      fill<F>(shared, split, strips, turn, strip_at);
      if (!routed) return read_ahead(args.ahead, args.ahead_bytes);
      pieces.next(split);
    }
    return;
  }
  grow_registers<P::kMultiplierRegisters>();
#pragma unroll 1
  while (!routed || pieces.strips > 0) {
    start();
    norm.template prefetch<P>(args.k);
    if (!routed) wait_for_previous_kernel();

    const int tokens = routed ? pieces.tokens : split.columns;
    float sums[Tokens][4] = {};
    int units = warp, until = 0;  // the warp's next, and all of the rounds so far
#pragma unroll 1
    for (int first = 0; first < split.panels; first += split.staged) {
      const bool let_next = !routed && first == 0;
      if (norm.weight == nullptr)
        stage<P, kBias>(shared, x, args.k, split, first, tokens, row_of_x, let_next);
      else
        stage_normalized<P, kBias>(shared, x, static_cast<int>(args.k), split, first, let_next, norm);
      sync_some<1, P::kThreads>();
      const bool final = first + split.staged >= split.panels;
      const int tiles = min(split.tiles - first * split.panel_tiles, split.staged * split.panel_tiles);
      const int token = Tokens == 1 ? 0 : min(lane / 4, split.columns - 1);  // of others nobody takes the sum
      const uint8_t* const own_x = shared.x + token * Shared<P>::x_pitch(split) + lane % 4 * 16 +
                                   (Tokens == 1 ? group_at<B::kSumSteps>(lane / 4) : 0);
      Activations of{};
#pragma unroll
      for (int i = 0; Tokens == 1 && i < 8; ++i) {
        of.own[i] = lane / 4 == i;
        keep_in_register(of.own[i]);
      }
#pragma unroll 1
      for (int base = 0; base < strips; base += split.round) {
        until += min(strips - base, split.round) * ((tiles + B::kTiles - 1) / B::kTiles);
#pragma unroll 1
        for (; units < until; units += P::kWarps) {
          mbarrier_wait(full + 8 * turn.at, turn.parity);
          const Note note = shared.notes[turn.at * P::kWarps + warp];
          of.at = own_x + note.batch * P::kBatchBytes;
          of.starts = shared.starts + note.batch * P::kSums * Tokens;
          multiply<F, X, Tokens>(sums, shared.ring + turn.at * B::kStage, warp, of);
          __syncwarp();
          if (lane == 0) mbarrier_arrive(empty + 8 * turn.at);
          turn.next(split.ring);
          if (note.last) finish<Tokens>(sums, shared.sums + note.sums, split.columns);
        }
        sync_some<1, P::kThreads>();
        const int own_strips = min(strips - base, split.round), step = split.columns * kStripRows;
        if (!final) {
#pragma unroll 1
          for (int i = threadIdx.x; i < own_strips * step; i += P::kThreads) {
            float& total = shared.totals[base * step + i];
            total = add_sums<P>(first == 0 ? 0.0f : total,
                                shared.sums + i / step * P::kWarps * step + i % step, split, first);
          }
        } else {
#pragma unroll 1
          for (int i = threadIdx.x; i < (own_strips >> gated) * Tokens * kStripRows; i += P::kThreads) {
            const int row = i % kStripRows, token = i / kStripRows % Tokens;
            const int own = (base >> gated) + i / kStripRows / Tokens;
            const int64_t output = static_cast<int64_t>(first_strip + own) * kStripRows + row;
            if (output >= args.n || token >= tokens) continue;
            float sum = 0, factor = 1;
#pragma unroll 1
            for (int strip = own << gated; strip < (own + 1) << gated; ++strip) {
              if (strip > own << gated) factor = silu(sum);
              const int within = token * kStripRows + row;
              sum = add_sums<P>(first == 0 ? 0.0f : shared.totals[strip * step + within],
                                shared.sums + (strip - base) * P::kWarps * step + within, split, first);
              if (sum != sum) {
                const X* const x_row = x + row_of_x(token) * args.k;
                sum = norm.weight == nullptr
                          ? packed_gemm::dot_decoded<F>(strip_at(strip), row, x_row, args.k)
                          : dot_normalized<F>(strip_at(strip), row, x_row, args.k, norm.weight,
                                              norm.memory.factors[token]);
              }
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
        }
        if (!final || base + split.round < strips) sync_some<1, P::kThreads>();  // sums are read, x is used
      }
    }
    if (!routed) return;
    if (units < (until + P::kWarps - 1) / P::kWarps * P::kWarps) {  // nothing for this warp in the last stage
      mbarrier_wait(full + 8 * turn.at, turn.parity);
      if (lane == 0) mbarrier_arrive(empty + 8 * turn.at);
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
  __shared__ typename Norm<X, Tokens>::Memory norm_memory;
  multiply_strips<F, X, Tokens, (Tokens > 1)>(args, split, static_cast<int>(blockIdx.x), norm_memory);
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
    if (Shared<typename P::Eight>::bytes(eight, strips) > limit) continue;
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
  const int limit = device.shared_per_block - kReservedShared - pieces_bytes -
                    static_cast<int>(sizeof(typename Norm<X, P::kPlannedTokens>::Memory));
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
  if (Shared<P>::bytes(split, strips) > limit) split.ring = 2;
  const int64_t room = limit - Shared<P>::bytes(split, strips), each = Shared<P>::round_bytes(split);
  const int64_t round = split.round + (room < 0 || each == 0 ? 0 : room / each / 2 * 2);
  split.round = round < strips ? static_cast<int>(round) : strips;
  split.pieces_at = static_cast<int>((Shared<P>::bytes(split, strips) + 15) / 16 * 16);
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
