// SPDX-License-Identifier: MIT
// A token for each row of logits. In one launch (sm_90): a cluster of 1…8 blocks reads a row strip by strip,
// and what is kept of it goes straight into the shared memory of the cluster's first block, which finds the
// cutoff and the token. Or in two, where that would keep others from reading: rows are read, and what is kept
// of them stays in the scratch memory (row_laws.cuh); then a block ends each.
#include "launch.h"
#include "row_strips.cuh"
#include "row_team.cuh"
#include "row_truncated.cuh"
#include "verdict.cuh"

namespace quantgemm {
namespace {

// What a cluster's first block gets: [strips][keys of lanes][keys of groups], as many as the row has.
struct Inbox {
  int num_strips, num_chunks, num_groups;  // without truncation the last two are 0
  int bytes_sent;

  template <class T>
  static Inbox of(const VerifyArgs& args, T) {
    const int length = static_cast<int>(args.vocab), strip = strip_length(length);
    const bool truncates = args.parameters.top_k || args.parameters.top_p || args.parameters.min_p;
    Inbox out{(length + strip - 1) / strip, 0, 0, 0};
    if (truncates) out.num_chunks = lanes_of<T>(length) / 32, out.num_groups = (length + kGroup - 1) / kGroup;
    out.bytes_sent = 8 * out.num_strips + 64 * out.num_chunks + 4 * out.num_groups;
    return out;
  }
  static constexpr int kLaneKeys = kMaxStrips * sizeof(float2);  // where they begin
  static constexpr int kMostBytes =                              // of any row
      kLaneKeys + 2 * lanes_of<float>(kMaxVocab) + 4 * ((kMaxVocab + kGroup - 1) / kGroup);
  __host__ __device__ int group_keys() const { return kLaneKeys + 64 * num_chunks; }
  int bytes() const { return group_keys() + 4 * num_groups; }
};

#if __CUDA_ARCH__ >= 900
extern __shared__ __align__(16) uint8_t inbox_bytes[];

// The way to it, by stores that count themselves where they arrive.
struct ToInbox {
  uint32_t strips, lanes, groups, arrivals;  // addresses there; lanes 0: no keys are wanted

  __device__ __forceinline__ ToInbox(const Inbox& inbox, const uint64_t* own_arrivals)
      : strips(there(inbox_bytes)), arrivals(there(own_arrivals)) {
    lanes = inbox.num_chunks > 0 ? strips + Inbox::kLaneKeys : 0;
    groups = strips + static_cast<uint32_t>(inbox.group_keys());
  }
  static __device__ __forceinline__ uint32_t there(const void* own) {
    uint32_t address = shared_address(own);
    asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
    return address;
  }
  __device__ __forceinline__ void send(uint32_t to, uint32_t word) const {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(word), "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ bool wanted() const { return lanes != 0; }
  __device__ __forceinline__ void put_group(int i, uint32_t key) const { send(groups + 4 * i, key); }
  __device__ __forceinline__ void put_lanes(int chunk, int lane, uint32_t key) const {
    const uint32_t next = __shfl_down_sync(~0u, key, 1);
    if (lane % 2 == 0) send(lanes + 64 * chunk + 2 * lane, key >> 16 | (next & 0xffff0000u));
  }
};
__device__ __forceinline__ void put_strip(const ToInbox& inbox, int i, float2 sum) {
  inbox.send(inbox.strips + 8 * i, __float_as_uint(sum.x));
  inbox.send(inbox.strips + 8 * i + 4, __float_as_uint(sum.y));
}

// By the first block, before the cluster meets.
__device__ __forceinline__ void open_inbox(uint64_t& arrivals, int bytes) {
  if (threadIdx.x == 0) {
    const uint32_t barrier = shared_address(&arrivals);
    mbarrier_init(barrier, 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
}
// All of it has come.
__device__ __forceinline__ void wait_for_inbox(const uint64_t& arrivals) {
  for (uint32_t done = 0; !done;)
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;"
        " selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(shared_address(&arrivals))
        : "memory");
}
#endif

// The law that a token was drawn from, or the token of a distribution of one.
struct Ended {
  RowLaw law;
  int token;  // else -1
};
template <class T, int Warps>
struct EndShared {
  SharedOf<Warps> team;
  Weights<T, true, 1> weights;
  uint64_t fraction;
  uint32_t noise_status, largest;
  Ended ended;
};

// By a warp; for the others behind a barrier.
template <class T, int Warps>
__device__ __forceinline__ void find_noise(const VerifyArgs& args, EndShared<T, Warps>& shared, int64_t b) {
  uint32_t status = 0;
  const uint64_t fraction = token_noise(args, b, 0, status);
  if (threadIdx.x % 32 == 0) shared.fraction = fraction, shared.noise_status = status;
  __syncwarp();
}

// What else there is to know of a row that has not been read.
struct Known {
  Rows rows;
  Parameters parameters;
  uint32_t status = 0;

  __device__ __forceinline__ Known(const VerifyArgs& args, int64_t b) {
    rows = rows_of(args, b, status);
    parameters = parameters_of(args.parameters, b, args.vocab, status);
  }
};

// The end of a row, by a block: its token and what else is asked for. `ended` is there behind a barrier.
// Follows: reads what is kept of the row behind a wait for the previous kernel, of which nobody has waited
// yet.
template <bool Follows, class T, int Warps>
__device__ __forceinline__ void end_row(const VerifyArgs& args, EndShared<T, Warps>& shared,
                                        const RowKeys& keys, const Known& known, int64_t b) {
  const Parameters& s = known.parameters;
  const bool truncates = known.rows.drafts >= 0 && !s.greedy && s.truncates();
  if (Follows && !truncates) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  Team team(TeamShape::of(1, Warps, args.vocab));
  team.task = b, team.rank = 0;
  uint32_t status = known.status;
  RowLaw law{};
  int token = -1;
  float p = 0.0f, logprob = 0.0f;  // of the token
  bool all_know = true, is_point = false;
  if (known.rows.drafts >= 0) {
    const RowView<T> row = target_row<T>(args, known.rows.first);
    if (truncates) {
      const LawAndToken found =
          law_of_row<32 * Warps, true, Follows>(keys, row, s, &shared.fraction, nullptr);
      law = found.law, token = found.drawn.token, p = found.drawn.p;
    } else {
      law = join_strips(strips_of_lane(keys.strips, row.length, team.lane), s.slope).law;
    }
    const bool bad = signbit(law.scale);
    law.scale = fabsf(law.scale);
    if (bad) status |= kBadValue;
    bool is_largest = s.greedy;
    if (!s.greedy && token < 0) {
      if (threadIdx.x == 0) {
        auto& w = shared.weights;
        w.p = row, w.q = RowView<T>(nullptr, 0), w.p_law = law, w.q_law = law;
        w.map = nullptr, w.one_hot = -1;
        w.group_keys = law.cutoff != minus_infinity() ? keys.groups : nullptr;
        w.find_common(bad);
      }
      __syncthreads();
      const uint64_t fraction = shared.fraction;
      token = find_by_strips<T>(shared.team, team, shared.weights, law, keys.strips, fraction);
      if (token == kNowhere) {
        const auto pieces = weigh(shared.team, team, shared.weights, status);
        if (pieces.total != 0)
          token = find_draw<T>(shared.team, team, shared.weights, pieces, draw(fraction, pieces.total));
      }
      if (token >= 0) p = probability(row.at(token), law);
      is_largest = all_know = token == kNowhere;
    }
    if (!s.greedy) status |= shared.noise_status;
    if (is_largest) {
      token = index_of_largest<32 * Warps>(shared.largest, keys.strips, row);
      const float top = clean_logit(row.at(token));
      if (s.greedy) law = {top, 0.0f, 1.0f, top}, is_point = true;
      if (!s.greedy || top == minus_infinity()) status |= kNoMass;
    } else if (token >= 0) {
      logprob = logf(p);
    }
  }
  if (team.lane == 0 && (all_know ? team.warp == 0 : token >= 0)) {
    args.tokens[b] = token;
    if (args.logprobs) args.logprobs[b] = logprob;
  }
  if (threadIdx.x != 0) return;
  if (args.counts) args.counts[b] = known.rows.drafts + 1;
  args.status[b] = static_cast<int32_t>(status);
  if (args.cutoff) args.cutoff[b] = law.cutoff;
  if (args.lse) {
    const float lse = law.scale > 0.0f ? law.max / s.temperature - logf(law.scale) : minus_infinity();
    args.lse[b] = is_point ? law.max : lse;
  }
  shared.ended = {law, is_point ? token : -1};
}

// The row's probabilities, by `threads` threads of one or more blocks.
template <class T>
__device__ __forceinline__ void write_part(const VerifyArgs& args, const Ended& ended, const RowView<T>& row,
                                           int64_t b, int first, int threads) {
  constexpr int kAhead = 8;  // values in flight per thread
  const Ended how = ended;
  float* const out = args.probs + b * args.vocab;
#pragma unroll 1
  for (int i = first + static_cast<int>(threadIdx.x); i < row.length; i += kAhead * threads) {
    float x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) x[j] = i + j * threads < row.length ? row.at(i + j * threads) : 0.0f;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int at = i + j * threads;
      if (at >= row.length) break;
      out[at] = how.token >= 0 ? (at == how.token ? 1.0f : 0.0f) : probability(x[j], how.law);
    }
  }
}
#if __CUDA_ARCH__ >= 900
// By all blocks of a cluster.
template <class T>
__device__ __noinline__ void write_row(const VerifyArgs& args, const Ended& of_first, RowView<T> row,
                                       int64_t b, int rank, int ranks) {
  cooperative_groups::this_cluster().sync();
  const Ended ended = *cooperative_groups::this_cluster().map_shared_rank(&of_first, 0);
  cooperative_groups::this_cluster().sync();  // before it the first block may not leave
  write_part(args, ended, row, b, rank * kStripThreads, ranks * kStripThreads);
}
#endif

// What a warp that reads strips of a row wants to know: no more, since all warps do this. Greedy rows are
// read too, for their largest value.
template <class T>
struct Reader {
  Rows rows;
  RowView<T> row;
  float temperature;
  int64_t top_k;

  __device__ __forceinline__ Reader(const VerifyArgs& args, int64_t b) {
    temperature = args.parameters.temperature ? args.parameters.temperature[b] : 1.0f;
    top_k = args.parameters.top_k ? args.parameters.top_k[b] : 0;
    uint32_t status = 0;
    rows = rows_of(args, b, status);
    row = target_row<T>(args, rows.drafts >= 0 ? rows.first : 0);
  }
  __device__ __forceinline__ float slope() const {
    return slope_of(temperature > 0.0f && temperature <= 3.4028235e38f ? temperature : 1.0f);
  }
  __device__ __forceinline__ bool sums() const { return needs_sums(top_k, row.length); }
};

// grid (2^share blocks of a cluster · sequences). Places: for its blocks on a multiprocessor. Where few are
// enough the end of a row need not do with a reader's registers.
constexpr int kFewPlaces = 2;
template <class T, bool Streams, int Places>
__global__ void __launch_bounds__(kStripThreads, Places)
    sample_rows_kernel(const __grid_constant__ VerifyArgs args, const __grid_constant__ Inbox inbox,
                       int share) {
#if __CUDA_ARCH__ >= 900
  __shared__ EndShared<T, kStripWarps> shared;
  __shared__ uint64_t arrivals;  // mbarrier: how many bytes have come
  const int64_t b = blockIdx.x >> share;
  Team team(TeamShape{1 << share, 0, 0});
  team.task = b, team.rank = static_cast<int>(blockIdx.x) & ((1 << share) - 1);
  if (team.rank == 0) open_inbox(arrivals, inbox.bytes_sent);
  team.arrive();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Reader<T> reader(args, b);
  if (team.rank == 0 && team.warp == kStripWarps - 1) find_noise(args, shared, b);
  team.wait();
  // The first block has the last strips, of which there may be fewer.
  if (reader.rows.drafts >= 0) {
    const ToInbox to(inbox, &arrivals);
    read_strips<Streams>(reader.row, (team.ranks - 1 - team.rank) * kStripWarps + team.warp,
                         team.ranks * kStripWarps, reader.slope(), reader.sums(), to, to);
  }
  if (team.rank == 0) {
    const Known known(args, b);  // not before: readers have no registers for it
    __syncthreads();
    if (known.rows.drafts >= 0) wait_for_inbox(arrivals);
    const RowKeys keys{reinterpret_cast<float2*>(inbox_bytes),
                       reinterpret_cast<const uint32_t*>(inbox_bytes + inbox.group_keys()),
                       reinterpret_cast<const uint16_t*>(inbox_bytes + Inbox::kLaneKeys)};
    end_row<false>(args, shared, keys, known, b);
  }
  if (args.probs != nullptr && reader.rows.drafts >= 0)
    write_row(args, shared.ended, reader.row, b, team.rank, team.ranks);
#endif
}

// In two launches. grid (2^share blocks for a row · sequences)
template <class T, bool Streams>
__global__ void __launch_bounds__(kStripThreads, 4)
    read_rows_kernel(const __grid_constant__ VerifyArgs args, const __grid_constant__ RowScratch scratch,
                     int share) {
  const int64_t b = blockIdx.x >> share;
  const int part = static_cast<int>(blockIdx.x) & ((1 << share) - 1);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Reader<T> reader(args, b);
  if (reader.rows.drafts < 0) return;
  read_strips<Streams>(reader.row, part * kStripWarps + static_cast<int>(threadIdx.x) / 32,
                       kStripWarps << share, reader.slope(), reader.sums(), scratch.strips + b * kMaxStrips,
                       keys_of(scratch, b));
}

// grid (sequences)
template <class T>
__global__ void __launch_bounds__(kLawThreads, 2)
    end_rows_kernel(const __grid_constant__ VerifyArgs args, const __grid_constant__ RowScratch scratch) {
  __shared__ EndShared<T, kLawThreads / 32> shared;
  const int64_t b = blockIdx.x;
  const Known known(args, b);
  if (threadIdx.x / 32 == kLawThreads / 32 - 1) find_noise(args, shared, b);
  end_row<true>(args, shared, keys_of_slot(scratch, b), known, b);
  if (args.probs == nullptr || known.rows.drafts < 0) return;
  __syncthreads();
  write_part(args, shared.ended, target_row<T>(args, known.rows.first), b, 0, kLawThreads);
}

// Where many rows are truncated their ends take longer than reading, and hold places that readers want, of
// 16-bit values, which are read in half the time, from fewer rows on; of many of these so do all.
bool takes_one_launch(const VerifyArgs& args, const Device& device) {
  constexpr int64_t kMostClusters = 1 << 27;  // a grid has less than 2^31 blocks
  const bool truncation = args.parameters.top_k || args.parameters.top_p || args.parameters.min_p;
  const bool wide = args.value_type == Real::kFloat32;
  int64_t most = truncation && !wide ? 32 : 64;
  if (wide && !truncation) most = kMostClusters;
  return launches_overlap(device) && args.num_sequences <= most;
}

template <class T>
cudaError_t launch_in_one(const VerifyArgs& args, bool streams, const Device& device, cudaStream_t stream) {
  const Inbox inbox = Inbox::of(args, T{});
  int share = 1;  // st.async wants a cluster, even of a row that one block reads
  while (kStripWarps << share < inbox.num_strips) ++share;
  static_assert(kStripWarps * 8 == kMaxStrips);  // any device's clusters have 8 blocks
  const int64_t blocks = args.num_sequences << share;
  auto* kernel = streams ? sample_rows_kernel<T, true, 4> : sample_rows_kernel<T, false, 4>;
  if (!streams && blocks <= device.multiprocessors) kernel = sample_rows_kernel<T, false, kFewPlaces>;
  if (inbox.bytes() > 16 << 10) {  // with the block's own more than a kernel may have unasked
    // The same for all rows: another thread may set it for its own before this one launches.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Inbox::kMostBytes);
    if (error != cudaSuccess) return error;
  }
  DependentLaunch launch(dim3(static_cast<unsigned>(blocks)), kStripThreads, device, stream, inbox.bytes(),
                         1 << share);
  return cudaLaunchKernelEx(&launch.config, kernel, args, inbox, share);
}

template <class T>
cudaError_t launch_in_two(const VerifyArgs& args, bool streams, const Device& device, cudaStream_t stream) {
  const RowScratch scratch = scratch_of(args);
  const int share = share_for(static_cast<int>(args.vocab), args.num_sequences, device.multiprocessors);
  auto* const kernel = streams ? read_rows_kernel<T, true> : read_rows_kernel<T, false>;
  DependentLaunch read(dim3(static_cast<unsigned>(args.num_sequences << share)), kStripThreads, device,
                       stream);
  const cudaError_t error = cudaLaunchKernelEx(&read.config, kernel, args, scratch, share);
  if (error != cudaSuccess) return error;
  DependentLaunch end(dim3(static_cast<unsigned>(args.num_sequences)), kLawThreads, device, stream);
  return cudaLaunchKernelEx(&end.config, end_rows_kernel<T>, args, scratch);
}

}  // namespace

cudaError_t launch_sample_rows(const VerifyArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  visit_real(args.value_type, [&]<class T>(T) {
    // More than the L2 keeps: what is read leaves it first.
    constexpr int64_t kStreamBytes = 32 << 20;
    const bool streams = args.num_sequences * args.vocab * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    error = takes_one_launch(args, device) ? launch_in_one<T>(args, streams, device, stream)
                                           : launch_in_two<T>(args, streams, device, stream);
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
