// SPDX-License-Identifier: MIT
// Chains of few sequences given logits, in one launch: a cluster of blocks owns a sequence. Its warps read
// the rows strip by strip (row_strips.cuh), position after position, the target's row and the draft's; what
// they keep of a strip goes to all blocks at once (st.async), and where all of a position has come, one warp
// of each block judges it while the others read on. So there is no launch between reading and judging, a row
// behind a refused draft is left out, and the stopping row is weighed by blocks that are there already.
// Limit: exponentials, 16 a clock and multiprocessor; of float32 DRAM.
#include "launch.h"
#include "row_strips.cuh"
#include "tensor_copy.cuh"
#include "verify_end.cuh"

namespace quantgemm {
namespace {

constexpr int kReaders = 15, kReadThreads = 32 * (kReaders + 1);  // and a warp that judges
constexpr int kMostRanks = 8, kMostPositions = 16, kChunkBytes = kChunkVectors * 32 * 16;

#if __CUDA_ARCH__ >= 900
constexpr int kReadAhead = 2;  // groups in flight per warp where the row is weighed
// A position is read when the verdict on the position so many before it is there. With fewer readers wait for
// verdicts, with more of them too much is read in vain.
constexpr uint32_t kLag = 3;
constexpr uint32_t kNoVerdict = 256 * kMostPositions;
static_assert(2 * kMostPositions <= 32, "a lane knows a row");

// Of a sequence, in each block.
struct Progress {
  uint64_t arrived[kMostPositions];  // mbarriers: a position's strips, in bytes
  uint64_t filled[kReaders];         // mbarriers: a chunk
  volatile uint32_t verdict;         // drafts accepted so far, 256 · the position that stops
  float2 strips[kMostPositions][2][kMaxStrips];
};

extern __shared__ __align__(128) uint8_t chunks[];  // [readers]

// What is read of a sequence, row after row: the target's and the draft's of position 0, of position 1, …. A
// lane knows one of them; all strips are numbered through.
template <class T>
struct Reading {
  int lengths[2], strip_lengths[2], strips[2];
  int position;
  bool with_drafts, is_draft;
  const T* data;   // the lane's row
  int begin, end;  // its strips
  int last, all;   // position; strips. -1 and 0: nothing is read

  // What is known before the previous kernel has ended.
  __device__ __forceinline__ Reading(const VerifyArgs& args, int64_t sequence, int lane)
      : with_drafts(reads_drafts(args)) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lengths[i] = static_cast<int>(i ? args.draft_vocab : args.vocab);
      strip_lengths[i] = strip_length(lengths[i]);
      strips[i] = i && !with_drafts ? 0 : (lengths[i] + strip_lengths[i] - 1) / strip_lengths[i];
      keep_here(strips[i]), keep_here(strip_lengths[i]);
    }
    position = with_drafts ? lane / 2 : lane, is_draft = with_drafts && lane % 2 != 0;
    begin = position * (strips[0] + strips[1]) + (is_draft ? strips[0] : 0);
    keep_here(begin);
    data = is_draft ? static_cast<const T*>(args.draft) + sequence * args.draft_strides[0] +
                          position * args.draft_strides[1]
                    : static_cast<const T*>(args.target) + position * args.target_stride;
    keep_here(data);
  }
  __device__ __forceinline__ void open(const VerifyArgs& args, const Rows& rows, bool greedy) {
    last = greedy ? -1 : static_cast<int>(rows.drafts);
    all = last < 0 ? 0 : last * (strips[0] + strips[1]) + strips[0];
    if (!is_draft) data += rows.first * args.target_stride;
    begin = min(begin, all), end = min(begin + (is_draft ? strips[1] : strips[0]), all);
  }
  __device__ __forceinline__ int strips_of_position(int k) const {
    return strips[0] + (k < last ? strips[1] : 0);
  }
};

// A strip of what is read, by all lanes of a warp.
template <class T>
struct Strip {
  const T* data;  // its row
  int length;
  int begin, end;            // values
  uint32_t position, index;  // where it is kept

  __device__ __forceinline__ Strip(const Reading<T>& work, int number) {
    const int at = __popc(__ballot_sync(~0u, number >= work.end));  // its row
    const bool is_draft = work.with_drafts && at % 2 != 0;
    const int strip = number - __shfl_sync(~0u, work.begin, at);
    data = reinterpret_cast<const T*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(work.data), at));
    length = is_draft ? work.lengths[1] : work.lengths[0];
    const int strip_length = is_draft ? work.strip_lengths[1] : work.strip_lengths[0];
    begin = strip * strip_length, end = min(begin + strip_length, length);
    position = work.with_drafts ? at >> 1 : at;
    index = (work.with_drafts ? at : 2 * at) * kMaxStrips + strip;
  }
};

constexpr int kNoStrip = 1 << 30;

// A warp that reads strips, a chunk at a time: while one is summed from registers the next is on its way.
template <class T>
struct Reader {
  const Reading<T>& work;
  Progress& progress;
  const int lane, ranks, step;
  uint32_t place, filled;                // for a chunk; its barrier
  uint32_t strips_there, arrived_there;  // in the block whose rank is the lane's number
  // What is asked for next.
  int number;  // of the strip
  const T* next;
  uint32_t left, position = 0, index;  // values of the strip; where it is kept
  // What is on its way.
  bool is_asked = false, is_last = false;  // of its strip
  uint32_t count = 0, into = 0, parity = 0;

  __device__ __forceinline__ Reader(const Reading<T>& work, Progress& progress, const Team& team)
      : work(work),
        progress(progress),
        lane(team.lane),
        ranks(team.ranks),
        step(team.ranks * kReaders),
        place(shared_address(chunks) + team.warp * kChunkBytes),
        filled(shared_address(&progress.filled[team.warp])),
        number(team.warp < kReaders ? team.piece_of(team.warp) : kNoStrip) {
    const int to = lane < ranks ? lane : 0;
    const auto there = [&](const void* own) {
      uint32_t address = shared_address(own);
      asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(to));
      return address;
    };
    strips_there = there(progress.strips), arrived_there = there(progress.arrived);
    look_ahead();
  }

  __device__ __forceinline__ void send(uint32_t index, float2 sum) const {
    if (lane >= ranks) return;
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     strips_there + index * static_cast<uint32_t>(sizeof(float2))),
                 "r"(__float_as_uint(sum.x)), "r"(__float_as_uint(sum.y)),
                 "r"(arrived_there + index / (2 * kMaxStrips) * 8)
                 : "memory");
  }

  __device__ __forceinline__ void look_ahead() {
    if (number >= work.all) return;
    const Strip<T> strip(work, number);
    next = strip.data + strip.begin, left = strip.end - strip.begin;
    position = strip.position, index = strip.index;
  }
  __device__ __forceinline__ uint32_t verdict() const { return __shfl_sync(~0u, progress.verdict, 0); }

  // The next chunk. None if the sequence stops before it, and none yet if too little is known: what the warp
  // has not read yet may be what the verdict waits for. verdict: as it was a moment ago, which does no harm.
  __device__ __forceinline__ void ask(uint32_t verdict) {
    if (verdict / 256 < position) number = work.all;
    if (number >= work.all || verdict % 256 + kLag <= position) return;
    count = min(left, static_cast<uint32_t>(kChunk<T>)), into = index;
    is_last = left == count, is_asked = true;
    if (lane == 0) {
      const uint32_t bytes = count * static_cast<uint32_t>(sizeof(T));
      mbarrier_arrive_expecting(filled, bytes);
      copy_bulk(place, next, bytes, filled);
    }
    next += count, left -= count;
    if (is_last) number += step, look_ahead();
  }
  // It has come.
  __device__ __forceinline__ void wait() {
    mbarrier_wait(filled, parity);
    is_asked = false, parity ^= 1;
  }

  // first: the number of the warp's first strip, which has been asked for.
  __device__ __forceinline__ void run(int first, float slope) {
    int done = first;  // the strip that is read
    StripSums sums;
    int begin = 0;  // of the chunk in its strip
#pragma unroll 1
    for (;;) {
      const uint32_t known = verdict();
      if (!is_asked) {
        if (number >= work.all) break;
        ask(known);
        continue;
      }
      const uint32_t to = into;
      const bool ends = is_last;
      if (to / (2 * kMaxStrips) > known / 256) break;
      wait();
      Chunk<T> chunk;
      chunk.load_shared(place, count, lane);
      __syncwarp();
      ask(known);
      if (!sums.add(chunk, 0, 0, slope, true, lane, KeysInScratch{})) {
        const Strip<T> strip(work, done);
        sums.add_slowly(RowView<T>(strip.data, strip.length), strip.begin + begin, strip.end, slope,
                        KeysInScratch{});
      }
      begin += kChunk<T>;
      if (!ends) continue;
      send(to, sums.end(slope, true));
      sums = {}, begin = 0, done += step;
    }
    // What others expect of the positions behind the one that stops.
#pragma unroll 1
    for (; done < work.all; done += step) {
      const Strip<T> strip(work, done);
      if (strip.position >= verdict() / 256 + kLag) break;
      send(strip.index, {0.0f, 0.0f});
    }
  }
};

// By a warp of each block, a lane per position: where the sequence stops.
template <class T, int Ahead>
__device__ __forceinline__ void judge_positions(const VerifyArgs& args, Stop<T, true, Ahead>& stop,
                                                Progress& progress, const Team& team, const Rows& rows,
                                                uint32_t status, const Reading<T>& work) {
  const int lane = team.lane, last = work.last;
  const Parameters s = parameters_of(args.parameters, team.task, args.vocab, status);
  const Draft d = gather_draft<T>(args, team.task, rows, lane);
  const StoppingRow<T> row(args, team.task, rows, lane <= rows.drafts ? lane : 0, d);
  uint64_t fraction = 0;
  uint32_t noise_status = 0;
  if (lane <= last) fraction = token_noise(args, team.task, lane, noise_status);
  Verdict v{};
  int here = 0;
#pragma unroll 1
  for (; here <= last; ++here) {
    mbarrier_wait(shared_address(&progress.arrived[here]), 0);
    const float2(&strips)[2][kMaxStrips] = progress.strips[here];
    const RowLaw p_law = join_strips(strips_of_lane(strips[0], work.lengths[0], lane), s.slope).law;
    RowLaw q_law{};
    if (work.strips[1] > 0 && here < last)
      q_law = join_strips(strips_of_lane(strips[1], work.lengths[1], lane), s.slope).law;
    if (lane == here) v = judge<true>(args, p_law, q_law, team.task, here, d, s);
    const bool stops = __ballot_sync(~0u, lane == here && v.stops) != 0;
    if (lane == 0) progress.verdict = stops ? 257 * here : kNoVerdict + here + 1;
    if (stops) break;
  }
  if (last >= 0) status |= __reduce_or_sync(~0u, lane <= here ? v.status : 0);
  stop.tokens[lane] = d.token;
  stop.p_tokens[lane] = v.p_token;
  if (lane != here) return;
  stop.rows = rows, stop.accepted = here, stop.greedy = s.greedy, stop.temperature = s.temperature;
  stop.has_draft = v.has_draft, stop.bad = v.bad, stop.status = status | noise_status;
  stop.fraction = fraction;
  if (last >= 0) stop.open_row(row, v, args.target_to_draft, nullptr);
}
#endif

// grid (sequences, blocks of a team)
template <class T>
__global__ void __launch_bounds__(kReadThreads, 1)
    read_and_verify_kernel(const __grid_constant__ VerifyArgs args, TeamShape shape) {
#if __CUDA_ARCH__ >= 900
  __shared__ SharedOf<kReaders, kMostRanks> shared;
  __shared__ Stop<T, true, kReadAhead> stop;
  __shared__ Progress progress;
  Team team(shape);
  prepare(shared, team);
  if (team.warp < kReaders) {
    if (team.lane == 0) mbarrier_init(shared_address(&progress.filled[team.warp]), 1);
  } else {
    if (team.lane < kMostPositions) mbarrier_init(shared_address(&progress.arrived[team.lane]), 1);
    if (team.lane == 0) progress.verdict = kNoVerdict;
  }
  publish_barriers();
  __syncthreads();
  team.arrive();
  Reading<T> work(args, team.task, team.lane);
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t status = 0;
  const float temperature = args.parameters.temperature ? args.parameters.temperature[team.task] : 1.0f;
  const Rows rows = rows_of(args, team.task, status);
  work.open(args, rows, !(temperature > 0.0f && temperature <= 3.4028235e38f));
  Reader<T> reader(work, progress, team);
  reader.ask(kNoVerdict);
  team.wait();
  if (team.warp < kReaders) {
    reader.run(team.piece_of(team.warp), slope_of(temperature));
  } else {
    if (team.lane <= work.last)
      mbarrier_arrive_expecting(shared_address(&progress.arrived[team.lane]),
                                static_cast<uint32_t>(sizeof(float2)) * work.strips_of_position(team.lane));
    judge_positions(args, stop, progress, team, rows, status, work);
  }
  __syncthreads();
  if (team.warp == kReaders) {
    // What other blocks still send comes into shared memory that is there.
    const int here = static_cast<int>(stop.accepted);
    for (int k = here + 1; k <= work.last && k < here + static_cast<int>(kLag); ++k)
      mbarrier_wait(shared_address(&progress.arrived[k]), 0);
    return;
  }
  finish(args, shared, stop, team, [&](uint32_t& bits) {
    return draw_from_row(args, shared, stop, team, progress.strips[stop.accepted][0], bits);
  });
  if (reader.is_asked) reader.wait();  // nothing may come into shared memory that is no longer there
#endif
}

// As many blocks for each sequence as have their places at once; st.async wants a cluster. So many hundredths
// of the multiprocessors can be in clusters of each size, as an H200's (team_for) by which they are rounded.
TeamShape reading_team(const VerifyArgs& args, const Device& device) {
  constexpr int kPercent[kMostRanks + 1] = {0, 0, 100, 88, 91, 84, 78, 80, 91};
  int ranks = kMostRanks;
  while (ranks > 2 && args.num_sequences * ranks > device.multiprocessors * kPercent[ranks] / 100) --ranks;
  return TeamShape::of(ranks, kReaders, args.vocab);
}

}  // namespace

bool is_read_and_verified(const VerifyArgs& args, const Device& device) {
  const int64_t size = args.value_type == Real::kFloat32 ? 4 : 2;
  const auto in_vectors = [&](const void* data, int64_t stride, int64_t length) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0 && length * size % 16 == 0;
  };
  if (args.mode != VerifyMode::kChain || !args.target_is_logits || laws_are_stored(args)) return false;
  if (!launches_overlap(device) || args.max_drafts < 1 || args.max_drafts >= kMostPositions) return false;
  if (!in_vectors(args.target, args.target_stride, args.vocab)) return false;
  // Measured: by launches behind each other many sequences are as fast or faster, and those of which much is
  // read where only few blocks would do it.
  if (!reads_drafts(args)) return args.num_sequences >= 2 && args.num_sequences <= 128;
  if (!in_vectors(args.draft, args.draft_strides[0], args.draft_vocab) ||
      !in_vectors(args.draft, args.draft_strides[1], args.draft_vocab))
    return false;
  const int ranks = reading_team(args, device).ranks;
  return ranks >= 4 && args.num_sequences * ranks * 100 >= device.multiprocessors * (size == 4 ? 45 : 64);
}

cudaError_t launch_read_and_verify(const VerifyArgs& args, const Device& device, cudaStream_t stream) {
  const TeamShape shape = reading_team(args, device);
  const unsigned ranks = static_cast<unsigned>(shape.ranks);
  constexpr int kBytes = kReaders * kChunkBytes;
  cudaError_t error = cudaSuccess;
  visit_real(args.value_type, [&]<class T>(T) {
    auto* const kernel = read_and_verify_kernel<T>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return;
    DependentLaunch launch(dim3(static_cast<unsigned>(args.num_sequences), ranks), kReadThreads, device,
                           stream, kBytes);
    launch.in_clusters(1, ranks);
    error = cudaLaunchKernelEx(&launch.config, kernel, args, shape);
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
