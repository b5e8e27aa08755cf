// SPDX-License-Identifier: MIT
// The way of a thread block through the batches of its strips (gemv_packed.cuh), and the warps that ask for
// them: each for those of four warps that multiply, which so wait for few bytes at a time.
#pragma once
#include "gemv_packed_stage.cuh"

namespace quantgemm::packed_gemv {

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

// Barriers, by the warps that multiply: each makes some, for one lane after the other takes long. They wait
// for each other alone; those that copy meet_makers().
template <class P>
__device__ __forceinline__ void make_barriers(const Shared<P>& shared, const Split& split, int warp) {
  static_assert(Shared<P>::kMostRing <= 4);
  const int quarter = warp / 4, place = warp % 4, at = place * P::kQuarters + quarter;
  if (threadIdx.x % 32 == 0) {
    if (place == 0) mbarrier_init(shared_address(shared.has_x + quarter), 4);
    if (place < split.ring) {
      mbarrier_init(shared_address(shared.full + at), kCopyEngine ? 4 : 32);
      mbarrier_init(shared_address(shared.empty + at), 4);
    }
    publish_barriers();
  }
  __syncwarp();
  asm volatile("bar.arrive 2, %0;" ::"n"(P::kThreads + 32 * P::kQuarters) : "memory");
}
template <class P>
__device__ __forceinline__ void meet_makers() {
  sync_some<2, P::kThreads + 32 * P::kQuarters>();
}

// Whether the phase 0 of a barrier has ended.
__device__ __forceinline__ bool is_over(const uint64_t* barrier) {
  uint32_t over;
  asm volatile(
      "{ .reg .pred over; mbarrier.test_wait.parity.shared.b64 over, [%1], 0; selp.u32 %0, 1, 0, over; }"
      : "=r"(over)
      : "r"(shared_address(barrier))
      : "memory");
  return over;
}

// What the warp behind those that multiply does for a quarter of them: asks for their parts of stages when
// there is room. `begins`: these are the kernel's first and only strips. Then it meets the others only when
// it has computed what it can, and until x is there asks for a part at a time: memory has no more on its way
// than it can work on, and x does not wait behind weights.
template <PackableFormat F, class P, class StripAt>
__device__ __forceinline__ void fill(const Shared<P>& shared, const Split& split, int strips, int quarter,
                                     Turn& turn, const StripAt& strip_at, bool begins) {
  using B = Batch<F>;
  const int lane = threadIdx.x % 32, place = quarter * 4 + lane % 4;
  const int panel_batches = split.panel_tiles / B::kTiles;
  const int units = strips * ((split.tiles + B::kTiles - 1) / B::kTiles);
  Cursor<P> to(split, strips, place);
#pragma unroll 1
  for (int stage = 0; stage < units; stage += P::kWarps) {
    uint64_t* const barrier = shared.full + turn.at * P::kQuarters + quarter;
    const uint32_t full = shared_address(barrier), target = shared_address(shared.ring + turn.at * B::kStage);
    const bool own = lane < 4, asks = own && !to.at_end(split) && (lane == 0 || to.batch == 0);
    const int before = to.panel - to.first;  // panels
    const Run<F> run(strip_at(to.strip), split.tiles, to.panel * panel_batches + to.batch,
                     min(4 - lane, to.batches - to.batch), place);
    if (begins && stage == 0) meet_makers<P>();
    if (kCopyEngine && begins && turn.parity == 0 && turn.at * P::kQuarters + quarter >= P::kBeforeX)
      while (!is_over(shared.has_x + quarter) && !is_over(barrier - P::kBeforeX)) continue;
    mbarrier_wait(shared_address(shared.empty + turn.at * P::kQuarters + quarter), turn.parity ^ 1);
    run.clear_rest(asks, target);
    run.copy(asks, target, full);
    if (own) {
      const int row = (before * split.round + to.strip - to.base) * P::kWarps + to.batch % P::kWarps;
      shared.notes[turn.at * P::kWarps + place] = {before * panel_batches + to.batch, row * P::kStripSums,
                                                   to.batch + P::kWarps >= to.batches};
      if constexpr (kCopyEngine)  // its phase lasts until then, whatever has arrived
        mbarrier_arrive_expecting(full, static_cast<uint32_t>(asks ? run.bytes() : 0));
    }
    if constexpr (!kCopyEngine) {
      __threadfence_block();  // notes and cleared heads, which are no copies
      mbarrier_arrive_after_copies(full);
    }
    to.next(split, strips);
    turn.next(split.ring);
  }
}

}  // namespace quantgemm::packed_gemv
