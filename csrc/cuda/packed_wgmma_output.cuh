// SPDX-License-Identifier: MIT
// From a warpgroup's sums (gemm_packed_wgmma.cuh) to y: rounded, turned, with a bias; by the copy engine
// where rows of y begin at multiples of 16 bytes, else, and to experts' slots, by the threads. Where blocks
// of a cluster share a tile's columns, each stores some of its tokens.
#pragma once
#include "packed_wgmma_stage.cuh"

namespace quantgemm::packed_wgmma {

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

  __device__ __forceinline__ Output(const GemmPackedArgs& args, const CUtensorMap& map,
                                    const Walk<P::kSlotSteps>& at, uint8_t* out)
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
    if (part > 0 && P::tokens_multiplied(output.tokens) < P::kTokens) return;
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

// A block's sums to `memory`: a thread's are `kMultipliers` pieces apart.
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
// Sums of the columns of all `parts` blocks, of which each stores its share of tokens. They lie where
// activations did, which all have been used: this is the only tile.
template <class P>
__device__ __forceinline__ void store_share(const Output<P>& output, const Walk<P::kSlotSteps>& at,
                                            uint32_t smem) {
  constexpr int kShares = P::kTokens / kStoreTokens;
  const int first = kShares * at.part / at.s.parts * kStoreTokens;
  const int end = kShares * (at.part + 1) / at.s.parts * kStoreTokens;
  if (first == end) return;
  output.begin();
#pragma unroll 1
  for (int token = first; token < end; token += kStoreTokens) {
    constexpr int kPieces = kStoreTokens / 8;
    const uint32_t from = smem + (token / 8 * P::kMultipliers + threadIdx.x) * int{sizeof(float4)};
    float v[kPieces / 2][8] = {};
#pragma unroll 1
    for (int part = 0; part < at.s.parts; part += 2) {  // two at a time: the way there is long
      float4 more[2][kPieces] = {};
#pragma unroll
      for (int other = 0; other < 2; ++other)
        if (part + other < at.s.parts) {
#pragma unroll
          for (int i = 0; i < kPieces; ++i)
            more[other][i] = load_there(address_in(from, (part + other) * at.s.mates + at.mate) +
                                        i * P::kMultipliers * int{sizeof(float4)});
        }
#pragma unroll
      for (int other = 0; other < 2; ++other)
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const float4 d = more[other][i];
          float* const sum = v[i / 2] + 4 * (i % 2);
          sum[0] += d.x, sum[1] += d.y, sum[2] += d.z, sum[3] += d.w;
        }
    }
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) v[i][e] += output.bias[e / 2 % 2];
      output.put(token - first + 16 * i, v[i]);
    }
  }
  output.send(first, end - first);
}

}  // namespace quantgemm::packed_wgmma
