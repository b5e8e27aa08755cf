// SPDX-License-Identifier: MIT
// Verification and the draw, one launch: a team of 1…6 blocks owns a sequence. The first warp of each
// finds the position that stops (rejected, or the bonus) from a few gathered values (verdict.cuh), then
// all draw from that row together (row_team.cuh). Only the stopping row of p, and of q, is read.
// Limit at small batches: fetching instructions that run once. So they are few, and loops are rolled.
#include "launch.h"
#include "row_kept.cuh"
#include "verify_end.cuh"

namespace quantgemm {
namespace {

constexpr int kFewAhead = 2;  // groups in flight per warp where blocks are few

// Positions are looked at 32 in one go, one per lane. What is known at once is shared out: the first
// warp gathers values, the next two find the noise of the drafts and of the token, the fourth looks at
// the parameters, and whoever is free joins the laws. Then the first one judges.
template <class T, bool Logits, int Ahead>
__device__ __forceinline__ void find_stop(const VerifyArgs& args, const RowScratch& scratch,
                                          Stop<T, Logits, Ahead>& stop, LawTable& table, const Team& team) {
  const int64_t columns = args.max_drafts + 1;
  Rows rows{};
  uint32_t status = 0;
  Parameters s{};
  if (Logits || team.warp == 3) {
    uint32_t bits = 0;
    s = parameters_of(args.parameters, team.task, args.vocab, bits);
    if (threadIdx.x == 3 * 32) stop.greedy = s.greedy, stop.temperature = s.temperature, stop.status = bits;
  }
#pragma unroll 1
  for (int64_t first = 0;; first += 32) {
    const int64_t k = first + team.lane;
    Draft d{};
    StoppingRow<T> row;
    if (team.warp == 0) {
      const int64_t token = draft_token(args, team.task, k);  // in the same round trip as cu_rows
      if (first == 0) rows = rows_of(args, team.task, status);
      d = gather_values<T>(args, team.task, rows, k, token);
      row = {args, team.task, rows, k <= rows.drafts ? k : 0, d};
    } else if (team.warp < 3 && k < columns) {
      const bool of_draft = team.warp == 1;
      uint32_t bits = 0;
      stop.fractions[team.warp - 1][team.lane] =
          noise_at(args, team.task, of_draft ? k : args.max_drafts, k,
                   of_draft ? static_cast<uint32_t>(kAcceptDomain) : args.token_domain,
                   of_draft ? 0 : args.turn, bits);
      stop.noise_status[team.warp - 1][team.lane] = bits;
    }
    if constexpr (Logits) {
      const int64_t some = columns - first < 32 ? columns - first : 32;
      fill_laws(args, scratch, table, team.task, first, static_cast<int>(some), s.slope);
      if (first == 0) {
        if (needs_laws(args)) wait_for_previous_kernel();
        let_next_kernel_start();
      }
    }
    __syncthreads();
    if (team.warp == 0) {
      if (d.valid) d.fraction = stop.fractions[0][team.lane], d.status |= stop.noise_status[0][team.lane];
      const Verdict v = judge<Logits>(args, table.laws[0][team.lane], table.laws[1][team.lane], team.task,
                                      k <= rows.drafts ? k : rows.drafts, d, s);
      const bool judges = rows.drafts >= 0 && !stop.greedy;
      const uint32_t stops = __ballot_sync(~0u, v.stops);
      const int here = judges ? (stops ? __ffs(stops) - 1 : 32) : 0;
      if (judges) status |= __reduce_or_sync(~0u, team.lane <= here ? v.status : 0);
      stop.tokens[team.lane] = d.token;
      stop.p_tokens[team.lane] = v.p_token;
      if (here == 32 && team.rank == 0) write_drafts(args, team, stop, first, first + 32);
      if (team.lane == (here & 31)) {
        stop.rows = rows, stop.accepted = here < 32 ? first + here : -1;
        stop.has_draft = v.has_draft, stop.bad = v.bad;
        // Where q is stored as probabilities, more of its row is looked at for NaN.
        const bool listed = Logits && scratch.has_kept && args.target_is_logits &&
                            (args.draft == nullptr || args.draft_is_logits) && k <= rows.drafts;
        stop.num_kept = listed ? table.num_kept[team.lane] : 0;
        if (here < 32) stop.status |= status;
        if (here < 32 && judges) {
          stop.status |= stop.noise_status[1][team.lane], stop.fraction = stop.fractions[1][team.lane];
          const bool truncated = Logits && v.p_law.cutoff != minus_infinity();
          stop.open_row(row, v, args.target_to_draft,
                        truncated ? scratch.group_keys + row.slot * scratch.num_groups : nullptr);
        }
      }
    }
    __syncthreads();
    if (stop.accepted >= 0) return;
  }
}

template <class T, bool Logits, int Ahead>
__device__ __forceinline__ Ending end_sampled(const VerifyArgs& args, const RowScratch& scratch,
                                              Shared& shared, Stop<T, Logits, Ahead>& stop, Team& team,
                                              uint32_t& status) {
  const int64_t slot = team.task * (args.max_drafts + 1) + stop.accepted;
  if (Logits && stop.num_kept > 0) {
    auto& weights = stop.weights;
    Ending out;
    out.token = kElsewhere, out.law = weights.p_law;
    if (team.rank != 0) return out;
    __shared__ KeptShared kept_shared;
    const Kept* const kept = scratch.kept + slot * kMaxKept;
    KeptToken found;
#pragma unroll 1
    for (bool takes = stop.has_draft;; takes = false) {
      found = draw_from_kept<kThreads>(kept_shared, weights, kept, stop.num_kept, takes, stop.fraction);
      if (found.token >= 0 || !takes) break;
      status |= kEmptyResidual;
    }
    if (team.warp == 0) out.token = found.token, out.logprob = logf(found.p);
    return out;
  }
  return draw_from_row(args, shared, stop, team, scratch.strips + slot * kMaxStrips, status);
}

// The most threads of a block, by which the compiler shares out registers. With the 96 that 640 leave to
// each, a block of 16-bit logits finds a place where one block still reads strips; but two of them do not
// fit.
template <class T, bool Logits, int Ahead>
constexpr int kMostThreads = Logits && Ahead > 1 && sizeof(T) == 2 ? 640 : kThreads;

// Logits: of the target or the draft, else all are probabilities. grid (sequences, blocks of a team)
template <class T, bool Logits, int Ahead>
__global__ void __launch_bounds__(kMostThreads<T, Logits, Ahead>, Ahead > 1 ? 1 : 2)
    spec_verify_kernel(const __grid_constant__ VerifyArgs args, TeamShape shape,
                       const __grid_constant__ RowScratch scratch) {
  __shared__ Shared shared;
  __shared__ LawTable table;
  __shared__ Stop<T, Logits, Ahead> stop;
  Team team(shape);
  prepare(shared, team);
  team.arrive();
  if (!Logits || !needs_laws(args)) wait_for_previous_kernel();
  if constexpr (!Logits) let_next_kernel_start();
  // Where strips are waited for there is time to meet before; it also empties the L1.
  if constexpr (Logits) team.wait();
  find_stop(args, scratch, stop, table, team);
  if constexpr (!Logits) team.wait();
  finish(args, shared, stop, team,
         [&](uint32_t& status) { return end_sampled(args, scratch, shared, stop, team, status); });
}

}  // namespace

cudaError_t launch_spec_verify(const VerifyArgs& args, cudaStream_t stream) {
  if (args.num_sequences == 0) return cudaSuccess;
  if (has_only_rows(args)) return launch_sample_rows(args, stream);
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  if (is_read_and_verified(args, device)) return launch_read_and_verify(args, device, stream);
  if (needs_laws(args)) error = launch_row_laws(args, stream);
  if (error != cudaSuccess) return error;
  if (args.mode != VerifyMode::kChain) return launch_verify_modes(args, stream);
  const TeamShape shape = team_for(args, device);
  const RowScratch scratch = scratch_of(args);
  visit_real(args.value_type, [&]<class T>(T) {
    const auto launch = [&]<bool Logits>() {
      // One block on a multiprocessor has room for more in flight.
      return args.num_sequences * shape.ranks <= device.multiprocessors
                 ? launch_teams(spec_verify_kernel<T, Logits, kFewAhead>, args, shape, device, stream,
                                scratch)
                 : launch_teams(spec_verify_kernel<T, Logits, 1>, args, shape, device, stream, scratch);
    };
    const bool logits = args.target_is_logits || (args.draft && args.draft_is_logits);
    error = logits ? launch.template operator()<true>() : launch.template operator()<false>();
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
