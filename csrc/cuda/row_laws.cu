// SPDX-License-Identifier: MIT
// Every row of logits read once: its maximum, Σ exp2((x - max)·slope), and where truncation is asked
// for, the largest key of each group of 256 and the cutoff (row_cutoff.cuh). A team of blocks owns a
// row, its warps take strips of it, the first block combines them. Limit: DRAM.
// Rows of a chain behind a refused draft decide nothing: its positions are done in waves, and a wave
// passes over the sequences that have stopped in an earlier one.
#include "launch.h"
#include "row_cutoff.cuh"
#include "team.cuh"
#include "verdict.cuh"

namespace quantgemm {
namespace {

struct Wave {
  int first, end;  // positions
};

// At most kMaxStrips strips, a multiple of 1024 long.
__host__ __device__ __forceinline__ int strip_length(int row_length) {
  constexpr int kStep = 1024;
  return (row_length + kStep * kMaxStrips - 1) / (kStep * kMaxStrips) * kStep;
}

// PTX max.NaN: NaN wins.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float max;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
  return max;
}
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b, Half) {
  uint32_t max;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b, BFloat16) {
  uint32_t max;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}

// The part of a strip that a warp has in registers, as it lies in memory.
template <class T>
struct Chunk {
  static constexpr int kVectors = 8, kPer = kPerVector<T>, kValues = kVectors * 32 * kPer;
  static constexpr int kGroups = kValues / kGroup, kGroupVectors = kVectors / kGroups;
  uint32_t words[kVectors][4];

  __device__ __forceinline__ void load(const RowView<T>& row, int begin, int end, int lane) {
    const T* const own = row.data + begin + lane * kPer;
    if (row.aligned && begin + kValues <= end) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint4 w = __ldg(reinterpret_cast<const uint4*>(own + v * 32 * kPer));
        words[v][0] = w.x, words[v][1] = w.y, words[v][2] = w.z, words[v][3] = w.w;
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) load_slowly(v, row, begin + (v * 32 + lane) * kPer, end);
    }
  }
  __device__ __forceinline__ void load_slowly(int v, const RowView<T>& row, int at, int end) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (kPer == 4) {
        words[v][w] = at + w < end ? __float_as_uint(row.at(at + w)) : 0xff800000u;
      } else {
        constexpr uint32_t kFill = std::is_same_v<T, Half> ? 0xfc00u : 0xff80u;
        const uint32_t low = at + 2 * w < end ? row.data[at + 2 * w].bits : kFill;
        const uint32_t high = at + 2 * w + 1 < end ? row.data[at + 2 * w + 1].bits : kFill;
        words[v][w] = low | high << 16;
      }
    }
  }

  __device__ __forceinline__ float value(int v, int e) const {
    if constexpr (kPer == 4) {
      return __uint_as_float(words[v][e]);
    } else {
      return to_float(T{static_cast<uint16_t>(words[v][e / 2] >> (16 * (e % 2)))});
    }
  }

  // Of a lane's values of group g; NaN wins.
  __device__ __forceinline__ float group_max(int g) const {
    if constexpr (kPer == 4) {
      float max = value(g * kGroupVectors, 0);
#pragma unroll
      for (int i = 1; i < 8; ++i) max = max_or_nan(max, value(g * kGroupVectors + i / 4, i % 4));
      return max;
    } else {
      uint32_t pair = words[g][0];
#pragma unroll
      for (int w = 1; w < 4; ++w) pair = max_or_nan(pair, words[g][w], T{});
      return max_or_nan(to_float(T{static_cast<uint16_t>(pair)}),
                        to_float(T{static_cast<uint16_t>(pair >> 16)}));
    }
  }
  __device__ float clean_group_max(int g) const {
    float max = minus_infinity();
#pragma unroll
    for (int i = 0; i < 8; ++i) max = fmaxf(max, clean_logit(value(g * kGroupVectors + i / kPer, i % kPer)));
    return max;
  }

  // Σ exp2((x - base)·slope) of a lane's values of [begin, end).
  template <bool Clean>
  __device__ __forceinline__ float sum(float base, float slope, int begin, int end) const {
    float part[4] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (begin + v * 32 * kPer >= end) continue;
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const float x = Clean ? clean_logit(value(v, e)) : value(v, e);
        part[e % 4] += relative_weight(x, base, slope);
      }
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

// Combined over a warp: (max, Σ relative to it). Each lane has its max, and its sum relative to base.
__device__ __forceinline__ float2 warp_join(float max, float base, float sum, float slope) {
  max = value_of_key(__reduce_max_sync(~0u, key_of(max)));
  sum = max == minus_infinity() ? 0.0f : sum * relative_weight(base, max, slope);
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return {max, sum};
}

// (max, Σ) of a strip, by a warp; the sum is negative if there is NaN or +inf. keep(g, key) is called
// for the largest key of each group g by one lane.
template <class T, class Fn>
__device__ __forceinline__ float2 read_strip(const RowView<T>& row, int begin, int end, float slope, int lane,
                                             bool with_keys, Fn keep) {
  float lane_max = minus_infinity(), base = -3.4028235e38f, sum = 0.0f;
  bool bad = false;
  for (; begin < end; begin += Chunk<T>::kValues) {
    Chunk<T> chunk;
    chunk.load(row, begin, end, lane);
    bool chunk_bad = false;
    float chunk_max = minus_infinity();
    uint32_t own_key = 0;
#pragma unroll
    for (int g = 0; g < Chunk<T>::kGroups; ++g) {
      float max = chunk.group_max(g);
      if (is_bad_value(max, true)) chunk_bad = true, max = chunk.clean_group_max(g);
      chunk_max = fmaxf(chunk_max, max);
      if (with_keys) {
        const uint32_t key = __reduce_max_sync(~0u, key_of(max));
        if (lane == g) own_key = key;
      }
    }
    if (lane < Chunk<T>::kGroups && with_keys && begin + lane * kGroup < end)
      keep(begin / kGroup + lane, own_key);
    lane_max = fmaxf(lane_max, chunk_max);
    const float next = fmaxf(base, chunk_max);
    sum *= relative_weight(base, next, slope);
    base = next;
    if (__any_sync(~0u, chunk_bad)) {
      sum += chunk.template sum<true>(base, slope, begin, end), bad = true;
    } else {
      sum += chunk.template sum<false>(base, slope, begin, end);
    }
  }
  const float2 strip = warp_join(lane_max, base, sum, slope);
  return {strip.x, bad ? -strip.y : strip.y};
}

// grid (teams of ranks blocks, one for a sequence; positions of the target's rows, then the draft's)
template <class T>
__global__ void __launch_bounds__(kLawThreads, 2)
    row_laws_kernel(const __grid_constant__ VerifyArgs args, Wave wave, int ranks) {
  __shared__ LawShared shared;
  const Team team(ranks);
  team.arrive();
  if (wave.first == 0) wait_for_previous_kernel();
  const int positions = wave.end - wave.first, layer = static_cast<int>(blockIdx.y);
  const bool is_draft = layer >= positions;
  const SlotRow info =
      row_of_slot(args, team.task, wave.first + (is_draft ? layer - positions : layer), is_draft);
  const Parameters& s = info.parameters;
  const bool reached = wave.first == 0 || all_accepted<T>(args, team, info.rows, s, wave.first);
  let_next_kernel_start();
  if (!info.exists || !reached) return;

  const RowScratch scratch = scratch_of(args);
  const RowView<T> row = view_of<T>(args, info);
  const int length = strip_length(row.length), num_strips = (row.length + length - 1) / length;
  uint32_t* const group_keys = scratch.group_keys + info.slot * scratch.num_groups;
  team.wait();
  for (int strip = team.rank * kLawWarps + team.warp; strip < num_strips; strip += ranks * kLawWarps) {
    const int begin = strip * length, end = begin + length < row.length ? begin + length : row.length;
    const float2 part =
        read_strip(row, begin, end, s.slope, team.lane, s.truncates(), [&](int g, uint32_t key) {
          group_keys[g] = key;
          *team.at_rank(&shared.group_keys[g], 0) = key;
        });
    if (team.lane == 0) *team.at_rank(&shared.strips[strip], 0) = part;
  }
  team.arrive();
  team.wait();
  if (team.rank != 0) return;

  float2 own[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int strip = team.lane + 32 * j;
    own[j] = strip < num_strips ? shared.strips[strip] : float2{minus_infinity(), 0.0f};
  }
  const bool bad = __any_sync(~0u, signbit(own[0].y) || signbit(own[1].y));
  const float base = fmaxf(fmaxf(own[0].x, own[1].x), -3.4028235e38f);
  const float2 sum = warp_join(fmaxf(own[0].x, own[1].x), base,
                               fabsf(own[0].y) * relative_weight(own[0].x, base, s.slope) +
                                   fabsf(own[1].y) * relative_weight(own[1].x, base, s.slope),
                               s.slope);
  const float scale = sum.y != 0.0f ? 1.0f / sum.y : 0.0f;
  RowLaw law{sum.y != 0.0f ? sum.x : 0.0f, s.slope, bad ? -scale : scale, minus_infinity()};
  if (s.truncates() && sum.x != minus_infinity()) truncate(law, shared, row, sum, s);
  if (threadIdx.x == 0) scratch.laws[info.slot] = law;
}

// A launch costs as much as some 10 MB. Little is read in one wave; else the first has enough to read
// to be worth it, and each next one twice as many positions.
constexpr int64_t kWaveBytes = 32 << 20, kOneWaveBytes = 128 << 20;

template <class T>
cudaError_t launch_waves(const VerifyArgs& args, const Device& device, cudaStream_t stream) {
  const bool drafts = args.draft && args.draft_is_logits && !args.draft_lse;
  const int layers = (args.target_is_logits ? 1 : 0) + (drafts ? 1 : 0);
  const int64_t bytes = args.num_sequences * args.vocab * static_cast<int64_t>(sizeof(T)) * layers;
  const int positions = static_cast<int>(args.max_drafts) + 1;
  const bool in_waves = args.mode == VerifyMode::kChain && positions * bytes > kOneWaveBytes;
  int64_t size = in_waves ? (kWaveBytes + bytes - 1) / bytes : positions;
  const int64_t longest = args.vocab > args.draft_vocab ? args.vocab : args.draft_vocab;
  const int length = strip_length(static_cast<int>(longest));
  const int num_strips = static_cast<int>((longest + length - 1) / length);
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < positions && error == cudaSuccess; first += size, size *= 2) {
    const int end = static_cast<int>(first + size < positions ? first + size : positions);
    const Wave wave{static_cast<int>(first), end};
    const auto rows = static_cast<unsigned>((end - wave.first) * (drafts ? 2 : 1));
    int ranks = 1;
    const int64_t blocks = args.num_sequences * (end - wave.first) * layers;
    while (device.major >= 9 && ranks < kMaxRanks && num_strips > ranks * kLawWarps &&
           blocks * ranks <= device.multiprocessors)
      ranks *= 2;
    const dim3 grid(static_cast<unsigned>(args.num_sequences * ranks), rows);
    DependentLaunch launch(grid, kLawThreads, device, stream, 0, ranks);
    error = cudaLaunchKernelEx(&launch.config, row_laws_kernel<T>, args, wave, ranks);
  }
  return error;
}

}  // namespace

int64_t verify_scratch_bytes(const VerifyArgs& args) {
  if (!needs_laws(args)) return 0;
  const RowScratch s = scratch_of(args);
  return 2 * s.slots * static_cast<int64_t>(sizeof(RowLaw) + (s.has_keys ? 4 * s.num_groups : 0));
}

cudaError_t launch_row_laws(const VerifyArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  visit_real(args.value_type, [&]<class T>(T) { error = launch_waves<T>(args, device, stream); });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
