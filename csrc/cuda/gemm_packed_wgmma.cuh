// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for many tokens, w packed, on sm_90a. A warpgroup has 64 rows of w: its lanes
// decode their own fragments from shared memory, once for all tokens of a tile, and wgmma takes them from
// registers; while it multiplies a step of 64 columns the next one is decoded. One warp copies activations,
// blocks of a cluster that share tokens each a part for all of them; two copy weights. Where y has few
// tiles, blocks of a cluster share a tile's columns and add their sums up in the end; where blocks would not
// all have as many tiles, some are cut, and sums go by way of memory (packed_wgmma_cut.cuh). With experts
// (expert_routes.cuh), whose rows of x lie side by side by now, a group is a tile of tokens.
// Limit: the tensor cores, from 128 tokens on.
#pragma once
#include "dependent_launch.cuh"
#include "packed_wgmma_cut.cuh"
#include "packed_wgmma_weights.cuh"
#include "wgmma.cuh"

namespace quantgemm::packed_wgmma {

template <class P>
__device__ __forceinline__ void multiply(const GemmPackedArgs& args, const Schedule& s, const CUtensorMap& y,
                                         uint8_t* memory) {
  using T = typename P::T;
  const uint32_t smem = shared_address(memory);
  const int lane = threadIdx.x % 32, strip_of_tile = threadIdx.x / 32 % kStrips;
  const int group = threadIdx.x / kGroupThreads;
  // Steps of a slot have places side by side, `base` is the first one's, `last_base` that of the slot before.
  const uint32_t barriers = smem + P::kBarriersAt;
  uint32_t base = 0, last_base = 0;
  uint32_t turn = 0, ready = 0, ahead = 0;  // the next activations are, the next slot is
  Ring<P::kSlots> w{barriers + 16 * P::kFirstSlotBarrier};
  uint8_t* const out = memory + P::kOutAt + group * P::kOutBytes;
  const uint32_t scales = smem + P::kScalesAt + threadIdx.x / 32 * P::kScaleBytes;
  const auto strip_at = [&](int place) {
    return memory + P::kSlotsAt + place * P::kSlotBytes + strip_of_tile * P::kStripBytes;
  };
  constexpr bool kShort = P::kSlotSteps == 2;  // then the next slot is asked for as late as can be
  // So that steps are constants beside `base`.
  const auto barrier_of = [](uint32_t base, int step) {
    return base * (16 / P::kTogether) + 16 * (step / P::kTogether);
  };

  for (Walk<P::kSlotSteps> at(s, args.routes); at.valid(); at.next()) {
    Sums<P> sums = {};
    uint32_t a[2][P::kBatch][4];
    // Places that have been multiplied, to the blocks that copy there.
    const uint32_t released = address_in(barriers + 8, at.part * s.mates + lane % s.mates);
    const auto release = [&](uint32_t base, int step) {
      if (lane < s.mates) mbarrier_arrive_there(released + barrier_of(base, step));
    };

    // With sums of kParts times kSumTokens tokens.
    const auto multiply_slots = [&]<int kParts>(std::integral_constant<int, kParts>) {
      SlotWeights<P> weights, next;
      mbarrier_wait(w.full(), w.turn);
      weights.begin(strip_at(w.place), scales);
      weights.load(strip_at(w.place), scales, 0);
#pragma unroll 1
      for (int slot = at.first_slot; slot < at.last_slot; ++slot) {
        const uint64_t places = swizzled_rows(__shfl_sync(~0u, smem + base * P::kPlaceBytes, 0));
        const uint32_t base_after = base + P::kSlotSteps < P::kPlaces ? base + P::kSlotSteps : 0;
        const uint32_t turn_after = turn ^ (base_after == 0 ? 1 : 0);
        uint32_t decoded = 0;
        Ring<P::kSlots> after = w;  // the last slot is looked at twice
        if (slot + 1 < at.last_slot) after.step();
        const auto begin_next = [&] {
          mbarrier_wait_together(after.full(), after.turn, ahead, decoded);
          next.begin(strip_at(after.place), scales);
          next.load(strip_at(after.place), scales, 0);
          __syncwarp();
          if (lane == 0) mbarrier_arrive(w.empty());
          w.step();
        };
#pragma unroll
        for (int step = 0; step < P::kSlotSteps; ++step) {
          const bool is_last = step + 1 == P::kSlotSteps;
          // The next step's weights. The way to them is long, and what is decoded here may be so at any time.
          if (!is_last)
            weights.load(strip_at(w.place), scales, step + 1);
          else if (!kShort)
            begin_next();
          if (step + (kShort ? 1 : 2) == P::kSlotSteps) ahead = mbarrier_over(after.full(), after.turn);
#pragma unroll
          for (int first = 0; first < 4; first += P::kBatch) {  // fragments
            auto& batch = a[(4 * step + first) / P::kBatch % 2];
#pragma unroll
            for (int i = 0; i < P::kBatch; ++i)
              weights.decode(batch[i], step, first + i,
                             first + i == 0 && (step == 0 || P::Format::kGroup <= kTileCols));
            decoded = batch[P::kBatch - 1][3];
            if (first == 0 && step % P::kTogether == 0)
              mbarrier_wait_together(barriers + barrier_of(base, step), turn, ready, decoded);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < P::kBatch; ++i)
#pragma unroll
              for (int part = 0; part < kParts; ++part)
                wgmma(sums[part], batch[i],
                      places + (step * P::kPlaceBytes + part * P::kSumTokens * 128) / 16 + 2 * (first + i),
                      T{});
            wgmma_commit();
            if (kShort && is_last && first + P::kBatch == 4) begin_next();
            if (first == 0 && (step + 1) % P::kTogether == 0)
              ready =
                  mbarrier_over(barriers + (is_last ? barrier_of(base_after, 0) : barrier_of(base, step + 1)),
                                is_last ? turn_after : turn);
            wgmma_wait<1>();
            if (first == 0 && step % P::kTogether == 0) {  // all of the steps before are done
              if (step > 0)
                release(base, step - 1);
              else if (slot > at.first_slot)
                release(last_base, P::kSlotSteps - 1);
            }
          }
        }
        weights = next;
        last_base = base, base = base_after, turn = turn_after;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int part = 0; part < kParts; ++part) sums_are_ready(sums[part]);
    };
    if (P::tokens_multiplied(at.count(args.m, P::kTokens)) == P::kTokens)
      multiply_slots(std::integral_constant<int, P::kSums>{});
    else
      multiply_slots(std::integral_constant<int, 1>{});
    __syncwarp();
    release(last_base, P::kSlotSteps - 1);

    if (at.is_end()) {
      leave_for_others<P>(sums, s);
      continue;
    }
    const Output<P> output(args, y, at, out);
    if (at.is_beginning()) add_others<P>(sums, at);
    if (s.parts > 1) {
      sync_some<3, P::kMultipliers>();
      leave_sums<P>(sums, memory);
      sync_cluster();
      store_share<P>(output, at, smem);
    } else {
      store_tile_sums<P>(output, sums);
    }
  }
  if (threadIdx.x % kGroupThreads == 0) wait_for_stores();
}

template <PackableFormat F, class X, int Tokens, bool Ragged>
__global__ void __launch_bounds__((Tile<F, X, Tokens, Ragged>::kThreads), 1)
    wgmma_kernel([[maybe_unused]] const __grid_constant__ GemmPackedArgs args,
                 [[maybe_unused]] const Schedule schedule,
                 [[maybe_unused]] const __grid_constant__ CUtensorMap x,
                 [[maybe_unused]] const __grid_constant__ CUtensorMap few,
                 [[maybe_unused]] const __grid_constant__ CUtensorMap y) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Tile<F, X, Tokens, Ragged>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const memory = dynamic + (-shared_address(dynamic) & 1023);
  const uint32_t smem = shared_address(memory), barriers = smem + P::kBarriersAt;
  if (threadIdx.x < P::kBarriers) {
    const bool counts_tokens = threadIdx.x < P::kFirstSlotBarrier;
    mbarrier_init(barriers + 16 * threadIdx.x, counts_tokens ? 1 : 32 * kRowGroups);
    mbarrier_init(barriers + 16 * threadIdx.x + 8,
                  counts_tokens ? kStrips * schedule.mates : P::kMultipliers / 32);
    publish_barriers();
  }
  // Which weights to copy may depend on the previous kernel, never what they are; and who has seen
  // activations comes behind it.
  const bool alone = schedule.ranks() == 1, routed = args.routes.groups != nullptr;
  const int copier = static_cast<int>(threadIdx.x) - P::kMultipliers;
  if (routed) wait_for_previous_kernel();
  const WeightCopies<P> weights{args, schedule, smem, (copier - 64) / 32};
  if (copier >= 64) weights.copy_first();
  if (copier == 0) expect_copies(x);
  alone ? __syncthreads() : sync_cluster();
  if (copier == 0 || routed) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __syncwarp();  // registers are moved by whole warps
  if (copier < 0) {
    grow_registers<P::kMultiplierRegisters>();
    multiply<P>(args, schedule, y, memory);
  } else {
    shrink_registers<P::kCopierRegisters>();
    if (copier == 0)
      copy_activations<P>(args, schedule, x, few, smem);
    else if (copier >= 64)
      weights.copy_others();
    else if (copier >= 32 && schedule.cut_tiles > 0)
      pass_sums<P>(schedule);
    __syncwarp();
    if (schedule.parts > 1) sync_cluster();  // with the sums' exchange
  }
  if (!alone) sync_cluster();  // nobody copies to a block that has ended, or reads its sums
#endif
}

template <PackableFormat F, class X, int Tokens, bool Ragged>
cudaError_t launch(const GemmPackedArgs& args, const Schedule& schedule, const CUtensorMap& x,
                   const CUtensorMap& few, const CUtensorMap& y, const Device& device, cudaStream_t stream) {
  const auto kernel = wgmma_kernel<F, X, Tokens, Ragged>;
  constexpr int kBytes = Tile<F, X, Tokens, Ragged>::kBytes;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(schedule.clusters * schedule.ranks(), Tile<F, X, Tokens, Ragged>::kThreads,
                               device, stream, kBytes, schedule.ranks());
  return cudaLaunchKernelEx(&launch.config, kernel, args, schedule, x, few, y);
}

template <class X, int Tokens, bool Ragged = false>
cudaError_t launch_type(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                        cudaStream_t stream) {
  CUtensorMap x, few{}, y{};
  const bool routed = args.routes.groups != nullptr;
  const ByteMatrix rows{args.x, args.m, 2 * args.k, 2 * args.k};
  cudaError_t status = describe_tiles(x, rows, Tokens / schedule.mates);
  if (status == cudaSuccess && (routed || args.m % Tokens != 0))
    status = describe_tiles(few, rows, kFewTokens);
  if (status == cudaSuccess && args.n % 8 == 0 && !routed)
    status = describe_tiles(y, {args.y, args.m, 2 * args.n, 2 * args.n}, kStoreTokens);
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>)
      status = launch<F, X, Tokens, Ragged>(args, schedule, x, few, y, device, stream);
  });
  return status;
}

}  // namespace quantgemm::packed_wgmma
