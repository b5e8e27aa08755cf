// SPDX-License-Identifier: MIT
// Chains of few sequences given logits, in one launch: a cluster of blocks owns a sequence. Its warps read the
// rows strip by strip (row_strips.cuh), position after position, the target's row and the draft's; what they
// keep of a strip goes to all blocks at once (st.async), and where all of a position has come, one warp of each
// block judges it while the others read on. So there is no launch between reading and judging, a row behind
// a refused draft is left out, and the stopping row is weighed by blocks that are there already.
// Limit: exponentials, 16 a clock and multiprocessor; of float32 DRAM.
#include "launch.h"
#include "row_strips.cuh"
#include "tensor_copy.cuh"
#include "verify_end.cuh"

namespace quantgemm {
namespace {

#ifndef QG_READERS
#define QG_READERS 23
#define QG_SLOTS 2
#define QG_LAG 4
#define QG_AHEAD 1
#endif
constexpr int kReaders = QG_READERS, kReadThreads = 32 * (kReaders + 1);  // and a warp that judges
constexpr int kSlots = QG_SLOTS, kSlotBytes = kChunkVectors * 32 * 16;    // a reader's chunks on their way
constexpr int kMostPositions = 16;
constexpr int kReadAhead = QG_AHEAD;  // groups in flight per warp where the row is weighed
// Rows of a position are asked for when the verdict on the position so many before it is there: by then the
// readers, which ask for chunks ahead, would wait for nothing else.
constexpr int kLag = QG_LAG;

// What is read of a sequence, row after row: the target's and the draft's of position 0, of position 1, ….
struct ReadRow {
  const void* data;
  int length, strip_length, strips;
  int position, index;  // of its first strip among all that are kept
};

// Of a sequence, in each block.
struct Progress {
  uint64_t arrived[kMostPositions];            // mbarriers: a position's strips, in bytes
  uint64_t filled[kReaders][kSlots];           // mbarriers: a chunk
  int2 chunks[kReaders][kSlots];               // where its strip goes; values, and kLast if the strip ends
  volatile int verdict;                        // drafts accepted so far, 256 · the position that stops
  int num_rows;                                // to be read
  ReadRow rows[2 * kMostPositions];
  float2 strips[kMostPositions][2][kMaxStrips];
};
constexpr int kLast = 1 << 16;

#if __CUDA_ARCH__ >= 900
extern __shared__ __align__(128) uint8_t ring[];  // [readers][slots] chunks

struct NoKeys {
  __device__ __forceinline__ bool wanted() const { return false; }
  __device__ __forceinline__ void put_group(int, uint32_t) const {}
  __device__ __forceinline__ void put_lanes(int, int, uint32_t) const {}
};

// Which strips a warp reads: of all rows behind each other each so many-th.
struct Walk {
  int row = 0, item;  // the strip among its row's
  __device__ __forceinline__ explicit Walk(const Progress& progress, int first) : item(first) { settle(progress); }
  __device__ __forceinline__ void settle(const Progress& progress) {
    while (row < progress.num_rows && item >= progress.rows[row].strips) item -= progress.rows[row].strips, ++row;
  }
};

template <class T>
struct Reader {
  Progress& progress;
  const int lane, warp, ranks, step;
  uint32_t chunks, barriers;             // of this warp
  uint32_t strips_there, arrived_there;  // in the block whose rank is the lane's number
  int asked = 0, taken = 0;              // chunks
  // What is asked for next.
  Walk ahead;
  const T* next;
  int left, position, index;  // values of its strip

  __device__ __forceinline__ Reader(Progress& progress, const Team& team)
      : progress(progress),
        lane(team.lane),
        warp(team.warp),
        ranks(team.ranks),
        step(team.ranks * kReaders),
        ahead(progress, team.piece_of(team.warp)) {
    chunks = shared_address(ring) + warp * kSlots * kSlotBytes;
    barriers = shared_address(progress.filled[warp]);
    const int to = lane < ranks ? lane : 0;
    const auto there = [&](const void* own) {
      uint32_t address = shared_address(own);
      asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(to));
      return address;
    };
    strips_there = there(progress.strips), arrived_there = there(progress.arrived);
    look_ahead();
  }

  // index: of a strip
  __device__ __forceinline__ void send(int index, float2 sum) const {
    if (lane >= ranks) return;
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     strips_there + index * static_cast<uint32_t>(sizeof(float2))),
                 "r"(__float_as_uint(sum.x)), "r"(__float_as_uint(sum.y)),
                 "r"(arrived_there + index / (2 * kMaxStrips) * 8)
                 : "memory");
  }

  __device__ __forceinline__ void look_ahead() {
    if (ahead.row >= progress.num_rows) return;
    const ReadRow& row = progress.rows[ahead.row];
    const int begin = ahead.item * row.strip_length;
    next = static_cast<const T*>(row.data) + begin;
    left = min(row.strip_length, row.length - begin);
    position = row.position, index = row.index + ahead.item;
  }
  // The next chunk, unless the sequence stops too long before it. Not if that is not known: what the warp has
  // not read yet may be what the verdict waits for.
  __device__ __forceinline__ void ask() {
    if (ahead.row >= progress.num_rows || asked - taken == kSlots) return;
    if (position >= kLag) {
      const int verdict = __shfl_sync(~0u, progress.verdict, 0);
      if (verdict / 256 + kLag <= position) ahead.row = 2 * kMostPositions;
      if (verdict % 256 + kLag <= position) return;
    }
    const int count = min(left, kChunk<T>), slot = asked % kSlots;
    if (lane == 0) {
      const uint32_t bytes = count * static_cast<uint32_t>(sizeof(T)), barrier = barriers + 8 * slot;
      progress.chunks[warp][slot] = {index, count | (left == count ? kLast : 0)};
      mbarrier_arrive_expecting(barrier, bytes);
      copy_bulk(chunks + slot * kSlotBytes, next, bytes, barrier);
    }
    ++asked, next += count, left -= count;
    if (left > 0) return;
    ahead.item += step, ahead.settle(progress);
    look_ahead();
  }

  __device__ __forceinline__ void wait(int chunk) const {
    mbarrier_wait(barriers + 8 * (chunk % kSlots), (chunk / kSlots) & 1);
  }

  __device__ __forceinline__ void run(const Team& team, float slope) {
    const int first = team.piece_of(warp);
    int done = 0;  // strips
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) ask();
    StripSums sums;
    int begin = 0;  // of the chunk in its strip
#pragma unroll 1
    for (;;) {
      if (asked == taken) {
        if (ahead.row >= progress.num_rows) break;
        ask();
        continue;
      }
      wait(taken);
      const int2 what = progress.chunks[warp][taken % kSlots];
      if (what.x / (2 * kMaxStrips) > __shfl_sync(~0u, progress.verdict, 0) / 256) break;
      Chunk<T> chunk;
      chunk.load_shared(chunks + taken % kSlots * kSlotBytes, what.y % kLast, lane);
      __syncwarp();
      ++taken;
      ask();
      if (!sums.add(chunk, 0, 0, slope, true, lane, NoKeys{})) {
        Walk at(progress, first + done * step);
        const ReadRow& row = progress.rows[at.row];
        begin += at.item * row.strip_length;
        sums.add_slowly(RowView<T>(static_cast<const T*>(row.data), row.length), begin,
                        begin + what.y % kLast, slope, NoKeys{});
        begin -= at.item * row.strip_length;
      }
      begin += kChunk<T>;
      if (what.y < kLast) continue;
      send(what.x, sums.end(slope, true));
      sums = {}, begin = 0, ++done;
    }
    // What others expect of the positions behind the one that stops.
    Walk at(progress, first + done * step);
#pragma unroll 1
    while (at.row < progress.num_rows && progress.rows[at.row].position < progress.verdict / 256 + kLag) {
      send(progress.rows[at.row].index + at.item, {0.0f, 0.0f});
      at.item += step, at.settle(progress);
    }
  }
  // No copy is on its way.
  __device__ __forceinline__ void drain() {
#pragma unroll 1
    for (; taken < asked; ++taken) wait(taken);
  }
};

// By a warp: what is to be read.
template <class T>
__device__ __forceinline__ void list_rows(const VerifyArgs& args, Progress& progress, const Rows& rows,
                                          int64_t sequence, int lane, bool greedy) {
  const int last = greedy ? -1 : static_cast<int>(rows.drafts);  // position
  const bool with_drafts = args.draft && args.draft_is_logits && !args.draft_lse;
  const auto put = [&](int at, const RowView<T>& row, bool is_draft) {
    const int length = strip_length(row.length);
    progress.rows[at] = {row.data, row.length, length, (row.length + length - 1) / length, lane,
                         (2 * lane + is_draft) * kMaxStrips};
    return progress.rows[at].strips * static_cast<uint32_t>(sizeof(float2));
  };
  if (lane <= last) {
    uint32_t bytes = put(lane << with_drafts, target_row<T>(args, rows.first + lane), false);
    if (with_drafts && lane < last) bytes += put(2 * lane + 1, draft_row<T>(args, sequence, lane), true);
    mbarrier_arrive_expecting(shared_address(&progress.arrived[lane]), bytes);
  }
  if (lane == 0) progress.num_rows = last < 0 ? 0 : with_drafts ? 2 * last + 1 : last + 1;
}

// By a warp of each block, a lane per position: where the sequence stops.
template <class T, int Ahead>
__device__ __forceinline__ void judge_positions(const VerifyArgs& args, Stop<T, true, Ahead>& stop,
                                                LawTable& table, Progress& progress, const Team& team,
                                                const Rows& rows, const Parameters& s, uint32_t status) {
  const int lane = team.lane, last = s.greedy ? -1 : static_cast<int>(rows.drafts);
  const bool with_drafts = args.draft && args.draft_is_logits && !args.draft_lse;
  Draft d = gather_values<T>(args, team.task, rows, lane, draft_token(args, team.task, lane));
  const StoppingRow<T> row(args, team.task, rows, lane <= rows.drafts ? lane : 0, d);
  uint64_t fraction = 0;
  uint32_t noise_status = 0;
  if (d.valid) d.fraction = node_noise(args, team.task, lane, lane, 0, d.status);
  if (lane <= last) fraction = token_noise(args, team.task, lane, noise_status);
  Verdict v{};
  int here = 0;
#pragma unroll 1
  for (; here <= last; ++here) {
    mbarrier_wait(shared_address(&progress.arrived[here]), 0);
    const float2(&strips)[2][kMaxStrips] = progress.strips[here];
    const int length = static_cast<int>(args.vocab), draft_length = static_cast<int>(args.draft_vocab);
    const RowLaw p_law = join_strips(strips_of_lane(strips[0], length, lane), s.slope).law;
    RowLaw q_law{};
    if (with_drafts && here < last)
      q_law = join_strips(strips_of_lane(strips[1], draft_length, lane), s.slope).law;
    if (lane == here) {
      table.laws[0][lane] = p_law, table.laws[1][lane] = q_law;
      v = judge<true>(args, table, team.task, here, d, s);
    }
    const bool stops = __ballot_sync(~0u, lane == here && v.stops) != 0;
    if (lane == 0) {
      progress.verdict = stops ? 257 * here : 256 * kMostPositions + here + 1;
    }
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
  __shared__ SharedOf<kReaders> shared;
  __shared__ Stop<T, true, kReadAhead> stop;
  __shared__ LawTable table;
  __shared__ Progress progress;
  Team team(shape);
  prepare(shared, team);
  if (team.warp < kReaders) {
    if (team.lane < kSlots) mbarrier_init(shared_address(&progress.filled[team.warp][team.lane]), 1);
  } else {
    if (team.lane < kMostPositions) mbarrier_init(shared_address(&progress.arrived[team.lane]), 1);
    if (team.lane == 0) progress.verdict = 256 * kMostPositions;
  }
  publish_barriers();
  __syncthreads();
  team.arrive();
  wait_for_previous_kernel();
  let_next_kernel_start();
  uint32_t status = 0;
  const Rows rows = rows_of(args, team.task, status);
  const Parameters s = parameters_of(args.parameters, team.task, args.vocab, status);
  if (team.warp == kReaders) list_rows<T>(args, progress, rows, team.task, team.lane, s.greedy);
  __syncthreads();
  team.wait();
  Reader<T> reader(progress, team);
  if (team.warp < kReaders) {
    reader.run(team, s.slope);
  } else {
    judge_positions(args, stop, table, progress, team, rows, s, status);
  }
  __syncthreads();
  if (team.warp == kReaders) {
    // What other blocks still send comes into shared memory that is there.
    const int last = s.greedy ? -1 : static_cast<int>(rows.drafts), here = static_cast<int>(stop.accepted);
    for (int k = here + 1; k <= last && k < here + kLag; ++k)
      mbarrier_wait(shared_address(&progress.arrived[k]), 0);
    return;
  }
  finish(args, shared, stop, team, [&](uint32_t& bits) {
    return draw_from_row(args, shared, stop, team, progress.strips[stop.accepted][0], bits);
  });
  reader.drain();
#endif
}

}  // namespace

// Few enough sequences that a cluster for each has its place at once, and rows that the copy engine takes.
static TeamShape reading_team(const VerifyArgs& args, const Device& device) {
  int ranks = kMaxTeam;
  const auto fits = [&](int r) {
    const int percent = r > 4 ? 75 : 90;
    return args.num_sequences * r <= device.multiprocessors * percent / 100;
  };
  while (ranks > 1 && !fits(ranks)) --ranks;
  return TeamShape::of(ranks, kReaders, args.vocab);
}

bool is_read_and_verified(const VerifyArgs& args, const Device& device) {
  const int64_t size = args.value_type == Real::kFloat32 ? 4 : 2;
  const auto in_vectors = [&](const void* data, int64_t stride, int64_t length) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size % 16 == 0 && length * size % 16 == 0;
  };
  if (args.mode != VerifyMode::kChain || !args.target_is_logits || laws_are_stored(args)) return false;
  if (!launches_overlap(device) || args.max_drafts < 1 || args.max_drafts >= kMostPositions) return false;
  if (!in_vectors(args.target, args.target_stride, args.vocab)) return false;
  if (args.draft && args.draft_is_logits && !args.draft_lse &&
      !(in_vectors(args.draft, args.draft_strides[0], args.draft_vocab) &&
        in_vectors(args.draft, args.draft_strides[1], args.draft_vocab)))
    return false;
  return reading_team(args, device).ranks > 3;
}

cudaError_t launch_read_and_verify(const VerifyArgs& args, const Device& device, cudaStream_t stream) {
  const TeamShape shape = reading_team(args, device);
  const unsigned ranks = static_cast<unsigned>(shape.ranks);
  constexpr int kRingBytes = kReaders * kSlots * kSlotBytes;
  cudaError_t error = cudaSuccess;
  visit_real(args.value_type, [&]<class T>(T) {
    auto* const kernel = read_and_verify_kernel<T>;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes);
    if (error != cudaSuccess) return;
    DependentLaunch launch(dim3(static_cast<unsigned>(args.num_sequences), ranks), kReadThreads, device, stream,
                           kRingBytes);
    launch.in_clusters(1, ranks);
    error = cudaLaunchKernelEx(&launch.config, kernel, args, shape);
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
