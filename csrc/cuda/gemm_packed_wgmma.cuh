// SPDX-License-Identifier: MIT
// y[m, n] = x · wᵀ + bias for many tokens, w packed, on sm_90a. A warpgroup has 64 rows of w: its lanes
// decode their own fragments from shared memory, once for all tokens of a tile, and wgmma takes them from
// registers; while it multiplies a step of 64 columns the next one is decoded. One warp copies activations,
// blocks of a cluster that share tokens each a part for all of them; another copies weights. Where y has few
// tiles, blocks of a cluster share a tile's columns and add their sums up in the end. With experts
// (expert_routes.cuh), whose rows of x lie side by side by now, a group is a tile of tokens.
// Limit: the tensor cores, from 128 tokens on.
#pragma once
#include "dependent_launch.cuh"
#include "packed_wgmma_weights.cuh"
#include "wgmma.cuh"

namespace quantgemm::packed_wgmma {

// ---- y ----
// Sums of 16 tokens, as two tiles of an accumulator, to a warpgroup's [token][64 rows], 16-byte pieces
// swapped within a token. PTX ISA 9.7.14.5.16 (stmatrix), sm_90.
template <class T>
__device__ __forceinline__ void turn_sums(uint32_t out, int token, const float (&v)[8], T type) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = token + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = pack_pair(v[2 * i], v[2 * i + 1], type);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   out + row * 128 + 16 * (piece ^ (row % 8))),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
               : "memory");
}
// Eight rows of a token of a warpgroup's [tokens][64 rows], of which `rows` are there, to `to`.
template <class T>
__device__ __forceinline__ void store_eight(T* to, int64_t n, const uint8_t* out, int token, int piece,
                                            int rows) {
  const uint4 eight = *reinterpret_cast<const uint4*>(out + token * 128 + 16 * (piece ^ (token % 8)));
  if (n % 8 == 0) {
    if (8 * piece < rows) *reinterpret_cast<uint4*>(to + 8 * piece) = eight;
  } else {
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (8 * piece + e < rows) to[8 * piece + e].bits = static_cast<uint16_t>(words[e / 2] >> 16 * (e % 2));
  }
}

// Where a row group's part of a tile goes. All threads of one warpgroup, to which `out` belongs.
template <class P>
struct Output {
  using T = typename P::T;
  const CUtensorMap& map;  // of y, if its rows begin at multiples of 16 bytes
  const ExpertRoutes& routes;
  int64_t n, first_row, first_token;
  T* y;
  uint8_t* out;
  int group, tokens, rows;  // that are there
  float bias[2];
  ExpertGroup of;

  __device__ __forceinline__ Output(const GemmPackedArgs& args, const CUtensorMap& map, const Walk& at,
                                    uint8_t* out)
      : map(map),
        routes(args.routes),
        n(args.n),
        first_token(int64_t{at.token_tile} * P::kTokens),
        out(out),
        group(static_cast<int>(threadIdx.x) / kGroupThreads),
        of(at.group()) {
    const bool routed = routes.groups != nullptr;
    first_row = int64_t{at.row_tile} * kRows + group * kGroupRows;
    y = static_cast<T*>(args.y) + (routed ? 0 : first_token * n) + first_row;
    tokens = routed ? of.count : static_cast<int>(min(args.m - first_token, int64_t{P::kTokens}));
    const T* const biases = static_cast<const T*>(args.bias) + of.expert * n + first_row;
    rows = static_cast<int>(max(min(n - first_row, int64_t{kGroupRows}), int64_t{0}));
    const int own =
        static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      bias[half] = args.bias != nullptr && own + 8 * half < rows ? to_float(biases[own + 8 * half]) : 0.0f;
  }
  __device__ __forceinline__ bool is_first() const { return threadIdx.x % kGroupThreads == 0; }
  __device__ __forceinline__ void sync() const {
    if (group == 0)
      sync_some<1, kGroupThreads>();
    else
      sync_some<2, kGroupThreads>();
  }
  // `out` is free. Then sums are put there, and sent: tokens of the tile from `first` on, at most `count`.
  __device__ __forceinline__ void begin() const {
    if (is_first()) wait_for_stores();
    sync();
  }
  __device__ __forceinline__ void put(int token, const float (&v)[8]) const {
    turn_sums(shared_address(out), token, v, T{});
  }
  __device__ __forceinline__ void send(int first, int count) const {
    const bool whole_rows = n % 8 == 0;
    if (whole_rows) publish_to_copies();
    sync();
    if (!whole_rows) {
      const int thread = threadIdx.x % kGroupThreads;
#pragma unroll 1
      for (int token = thread / 8; token < min(tokens - first, count); token += kGroupThreads / 8)
        store_eight(y + (first + token) * n, n, out, token, thread % 8, rows);
    } else if (is_first() && rows > 0) {
      for (int token = 0; token < count && first + token < tokens; token += kStoreTokens)
        store_tile(map, 2 * static_cast<int>(first_row), static_cast<int>(first_token) + first + token,
                   shared_address(out) + token * 128);
      commit_stores();
    }
  }
  // The same for tokens that lie apart, of which each lane has the slot of one that its warp stores.
  __device__ __forceinline__ bool routed() const { return routes.groups != nullptr; }
  __device__ __forceinline__ int32_t slot_of(int token, int end) const {
    return token < min(tokens, end) ? routes.slots[of.first + token] : -1;
  }
  __device__ __forceinline__ float weight_of(int token) const {
    return routes.weights == nullptr || token >= tokens ? 0.0f
                                                        : routes.weights[routes.slots[of.first + token]];
  }
  __device__ __forceinline__ void send_apart(int32_t held) const {
    const int thread = threadIdx.x % kGroupThreads;
    sync();
#pragma unroll 1
    for (int i = 0; i < P::kSumTokens / 16; ++i) {
      const int32_t slot = __shfl_sync(~0u, held, 4 * i + thread % 32 / 8);
      if (slot >= 0) store_eight(y + slot * n, n, out, 16 * i + thread / 8, thread % 8, rows);
    }
  }
};

// Sums of tokens `token` … times their weights, of which each lane has one of 32.
__device__ __forceinline__ void weigh(float (&v)[8], float factor, int token) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = token + i / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
    const float by = __shfl_sync(~0u, factor, column % 32);
    v[i / 2 * 4 + i % 2] *= by, v[i / 2 * 4 + i % 2 + 2] *= by;
  }
}

template <class P>
using Sums = float[P::kSums][P::kSumTokens / 2];

template <class P>
__device__ __forceinline__ void store_tile_sums(const Output<P>& output, const Sums<P>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
  for (int part = 0; part < P::kSums; ++part) {
    const int first = part * P::kSumTokens;
    int32_t slot = -1;  // of one of the tokens that this warp stores
    float factors[P::kSumTokens / 32];
    if (output.routed()) {
      slot = output.slot_of(first + 16 * (lane / 4) + 4 * warp + lane % 4, first + P::kSumTokens);
#pragma unroll
      for (int i = 0; i < P::kSumTokens / 32; ++i) factors[i] = output.weight_of(first + 32 * i + lane);
    }
    output.begin();
#pragma unroll
    for (int q = 0; q < P::kSumTokens / 16; ++q) {
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = sums[part][8 * q + e] + output.bias[e / 2 % 2];
      if (output.routes.weights != nullptr) weigh(v, factors[q / 2], 16 * q);
      output.put(16 * q, v);
    }
    if (output.routed())
      output.send_apart(slot);
    else
      output.send(first, P::kSumTokens);
  }
}

// Sums of the columns of all `parts` blocks, of which each stores its share of tokens. They lie where
// activations did, which all have been used: this is the only tile.
template <class P>
__device__ __forceinline__ void leave_sums(const Sums<P>& sums, uint8_t* memory) {
  auto* const own = reinterpret_cast<float4*>(memory) + threadIdx.x;
#pragma unroll
  for (int part = 0; part < P::kSums; ++part)
#pragma unroll
    for (int i = 0; i < P::kSumTokens / 8; ++i) {
      const float* d = sums[part] + 4 * i;
      own[(part * P::kSumTokens / 8 + i) * P::kMultipliers] = make_float4(d[0], d[1], d[2], d[3]);
    }
}
template <class P>
__device__ __forceinline__ void store_share(const Output<P>& output, const Walk& at, uint32_t smem) {
  const int share = P::kTokens / at.s.parts;
  output.begin();
#pragma unroll 1
  for (int token = 0; token < share; token += 16) {
    float v[8] = {};
    const uint32_t from =
        smem + ((at.part * share + token) / 8 * P::kMultipliers + threadIdx.x) * int{sizeof(float4)};
#pragma unroll 4
    for (int part = 0; part < at.s.parts; ++part) {
      const uint32_t there = address_in(from, part * at.s.mates + at.mate);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 more = load_there(there + e * P::kMultipliers * int{sizeof(float4)});
        v[4 * e] += more.x, v[4 * e + 1] += more.y, v[4 * e + 2] += more.z, v[4 * e + 3] += more.w;
      }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] += output.bias[e / 2 % 2];
    output.put(token, v);
  }
  output.send(at.part * share, share);
}

template <class P>
__device__ __forceinline__ void multiply(const GemmPackedArgs& args, const Schedule& s, const CUtensorMap& y,
                                         uint8_t* memory) {
  using T = typename P::T;
  const uint32_t smem = shared_address(memory);
  const int lane = threadIdx.x % 32, strip_of_tile = threadIdx.x / 32 % kStrips;
  const int group = threadIdx.x / kGroupThreads;
  // Steps of a slot have places side by side, `base` is the first one's.
  const uint32_t barriers = smem + P::kBarriersAt;
  int base = 0;
  uint32_t turn = 0;
  bool ready = false;  // the next step's activations
  Ring<P::kSlots> w{barriers + 16 * P::kPlaces};
  uint8_t* const out = memory + P::kOutAt + group * P::kOutBytes;
  const auto strip_at = [&](int place) {
    return memory + P::kSlotsAt + place * P::kSlotBytes + strip_of_tile * P::kStripBytes;
  };

  for (Walk at(s, args.routes, s.slots(P::kSlotSteps)); at.valid(); at.next()) {
    Sums<P> sums = {};
    uint32_t a[P::kFragments][4];
    // A place that has been multiplied, to the blocks that copy there.
    const uint32_t released = address_in(barriers + 8, at.part * s.mates + lane % s.mates);
    const auto release = [&](int place) {
      if (lane < s.mates) mbarrier_arrive_there(released + 16 * place);
    };
    const auto before = [&] { return (base == 0 ? P::kPlaces : base) - 1; };  // the slot

    SlotWeights<P> weights, next;
    mbarrier_wait(w.full(), w.turn);
    weights.begin(strip_at(w.place));
    weights.load(strip_at(w.place), 0);
#pragma unroll 1
    for (int slot = at.first_slot; slot < at.last_slot; ++slot) {
      const uint32_t places = __shfl_sync(~0u, smem + base * P::kPlaceBytes, 0);
      const int base_after = base + P::kSlotSteps < P::kPlaces ? base + P::kSlotSteps : 0;
      const uint32_t turn_after = turn ^ (base_after == 0 ? 1 : 0);
#pragma unroll
      for (int step = 0; step < P::kSlotSteps; ++step) {
        const bool is_last = step + 1 == P::kSlotSteps;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights.decode(a[i % P::kFragments], step, i,
                         i == 0 && (step == 0 || P::Format::kGroup <= kTileCols));
          if (i == 0 && !ready) mbarrier_wait_together(barriers + 16 * (base + step), turn);
          const uint64_t tokens = swizzled_rows(places + step * P::kPlaceBytes) + 2 * i;
          wgmma_fence();
#pragma unroll
          for (int part = 0; part < P::kSums; ++part)
            wgmma(sums[part], a[i % P::kFragments], tokens + part * (P::kSumTokens * 128 / 16), T{});
          wgmma_commit();
          // What comes next, while there is much to multiply.
          if (i == 1 && !is_last) weights.load(strip_at(w.place), step + 1);
          if (i == 3 && is_last) {  // the last slot is looked at twice
            Ring<P::kSlots> after = w;
            if (slot + 1 < at.last_slot) after.step();
            mbarrier_wait_together(after.full(), after.turn);
            next.begin(strip_at(after.place));
            next.load(strip_at(after.place), 0);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(w.empty());
            w.step();
          }
          if (i == 2)
            ready = mbarrier_over(barriers + 16 * (is_last ? base_after : base + step + 1),
                                  is_last ? turn_after : turn);
          wgmma_wait<P::kFragments / 2>();
          if (i == P::kFragments / 2) {  // all of the step before are done
            if (step > 0)
              release(base + step - 1);
            else if (slot > at.first_slot)
              release(before());
          }
        }
      }
      weights = next;
      base = base_after, turn = turn_after;
    }
    wgmma_wait<0>();
#pragma unroll
    for (auto& part : sums) sums_are_ready(part);
    __syncwarp();
    release(before());

    const Output<P> output(args, y, at, out);
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

template <PackableFormat F, class X, int Tokens>
__global__ void __launch_bounds__((Tile<F, X, Tokens>::kThreads), 1)
    wgmma_kernel([[maybe_unused]] const __grid_constant__ GemmPackedArgs args,
                 [[maybe_unused]] const Schedule schedule,
                 [[maybe_unused]] const __grid_constant__ CUtensorMap x,
                 [[maybe_unused]] const __grid_constant__ CUtensorMap y) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using P = Tile<F, X, Tokens>;
  extern __shared__ __align__(128) uint8_t dynamic[];
  uint8_t* const memory = dynamic + (-shared_address(dynamic) & 1023);
  const uint32_t smem = shared_address(memory), barriers = smem + P::kBarriersAt;
  if (threadIdx.x < P::kPlaces + P::kSlots) {
    const bool counts_tokens = threadIdx.x < P::kPlaces;
    mbarrier_init(barriers + 16 * threadIdx.x, counts_tokens ? 1 : 32 * kRowGroups);
    mbarrier_init(barriers + 16 * threadIdx.x + 8,
                  counts_tokens ? kStrips * schedule.mates : P::kMultipliers / 32);
    publish_barriers();
  }
  const bool alone = schedule.ranks() == 1;
  alone ? __syncthreads() : sync_cluster();
  const int copier = static_cast<int>(threadIdx.x) - P::kMultipliers;
  // Which weights to copy may depend on the previous kernel, never what they are.
  if (copier < 64 || args.routes.groups != nullptr) {
    if (copier == 0) expect_copies(x);
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  if (copier < 0) {
    grow_registers<P::kMultiplierRegisters>();
    multiply<P>(args, schedule, y, memory);
  } else {
    shrink_registers<P::kCopierRegisters>();
    if (copier == 0)
      copy_activations<P>(args, schedule, x, smem);
    else if (copier >= 64)
      copy_weights<P>(args, schedule, smem, (copier - 64) / 32);
    __syncwarp();
    if (schedule.parts > 1) sync_cluster();  // with the sums' exchange
  }
  if (!alone) sync_cluster();  // nobody copies to a block that has ended, or reads its sums
#endif
}

template <PackableFormat F, class X, int Tokens>
cudaError_t launch(const GemmPackedArgs& args, const Schedule& schedule, const CUtensorMap& x,
                   const CUtensorMap& y, const Device& device, cudaStream_t stream) {
  const auto kernel = wgmma_kernel<F, X, Tokens>;
  constexpr int kBytes = Tile<F, X, Tokens>::kBytes;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(schedule.clusters * schedule.ranks(), Tile<F, X, Tokens>::kThreads, device,
                               stream, kBytes, schedule.ranks());
  return cudaLaunchKernelEx(&launch.config, kernel, args, schedule, x, y);
}

template <class X, int Tokens>
cudaError_t launch_type(const GemmPackedArgs& args, const Schedule& schedule, const Device& device,
                        cudaStream_t stream) {
  CUtensorMap x, y{};
  cudaError_t status = describe_tiles(x, {args.x, args.m, 2 * args.k, 2 * args.k}, Tokens / schedule.mates);
  if (status == cudaSuccess && args.n % 8 == 0 && args.routes.groups == nullptr)
    status = describe_tiles(y, {args.y, args.m, 2 * args.n, 2 * args.n}, kStoreTokens);
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) status = launch<F, X, Tokens>(args, schedule, x, y, device, stream);
  });
  return status;
}

}  // namespace quantgemm::packed_wgmma
