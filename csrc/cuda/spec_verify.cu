// SPDX-License-Identifier: MIT
// Verification and the draw, one launch: a team of 1…8 blocks owns a sequence. Every warp finds the
// first position that stops (rejected, or the bonus) from a few gathered values (verdict.cuh), then
// all draw from that row together (row_team.cuh). Only the stopping row of p, and of q, is read.
#include "launch.h"
#include "row_team.cuh"
#include "verdict.cuh"

namespace quantgemm {
namespace {

// What a sequence ends with: `accepted` drafts, then a token.
struct Ending {
  int64_t accepted = -1;
  int token = -1;        // -1 where another warp knows it
  float logprob = 0.0f;  // where the token is known
  RowLaw law;
  bool is_point = false;  // a distribution of one token
};

template <class T>
__device__ Ending end_greedy(const VerifyArgs& args, Shared& shared, Team& team, const Rows& rows,
                             uint32_t& status) {
  for (int64_t k = 0;; ++k) {
    const RowView<T> row = target_row<T>(args, rows.first + k);
    const int best = argmax(shared, team, row, args.target_is_logits, status);
    const int64_t token = k < rows.drafts ? args.drafts[team.task * args.max_drafts + k] : -1;
    if (k < rows.drafts && token == best) continue;
    if (token < -1 || token >= args.vocab) status |= kBadToken;
    const float top = args.target_is_logits ? clean_logit(row.at(best)) : clean_probability(row.at(best));
    if (top == (args.target_is_logits ? minus_infinity() : 0.0f)) status |= kNoMass;
    return {k, best, 0.0f, {top, 0.0f, 1.0f, top}, true};
  }
}

__device__ __forceinline__ RowLaw broadcast(const RowLaw& law, int lane) {
  return {__shfl_sync(~0u, law.max, lane), __shfl_sync(~0u, law.slope, lane),
          __shfl_sync(~0u, law.scale, lane), __shfl_sync(~0u, law.cutoff, lane)};
}

// The first position that stops, for all lanes. The first block writes what was accepted before it.
template <class T>
__device__ Verdict find_stop(const VerifyArgs& args, const Team& team, const Rows& rows, const Parameters& s,
                             int64_t& accepted, uint32_t& status) {
  const int64_t columns = args.max_drafts + 1;
  for (int64_t first = 0;; first += 32) {
    const int64_t k = first + team.lane;
    const Draft d = gather_draft<T>(args, team.task, rows, k);
    if (first == 0 && needs_laws(args)) wait_for_previous_kernel();
    Verdict v = judge(args, team.task, k <= rows.drafts ? k : rows.drafts, d, s);
    const uint32_t stops = __ballot_sync(~0u, v.stops);
    const int here = stops ? __ffs(stops) - 1 : 32;
    status |= __reduce_or_sync(~0u, team.lane <= here ? v.status : 0);
    if (args.logprobs && team.rank == 0 && team.warp == 0 && team.lane < here)
      args.logprobs[team.task * columns + k] = logf(v.p_token);
    accepted = first + here;
    if (here == 32) continue;
    v.p_law = broadcast(v.p_law, here), v.q_law = broadcast(v.q_law, here);
    v.has_draft = __shfl_sync(~0u, static_cast<int>(v.has_draft), here);
    return v;
  }
}

template <class T, int Ahead>
__device__ Ending end_sampled(const VerifyArgs& args, Shared& shared, Team& team, const Rows& rows,
                              const Parameters& s, uint32_t& status) {
  int64_t accepted = 0;
  const Verdict last = find_stop<T>(args, team, rows, s, accepted, status);
  const RowView<T> p = target_row<T>(args, rows.first + accepted);
  Weights<T, Ahead> weights{p, RowView<T>(nullptr, 0), last.p_law, last.q_law, nullptr, -1, nullptr};
  if (last.p_law.cutoff != minus_infinity()) {
    const RowScratch scratch = scratch_of(args);
    weights.group_keys =
        scratch.group_keys + (team.task * (args.max_drafts + 1) + accepted) * scratch.num_groups;
  }
  if (last.has_draft) {
    if (args.draft != nullptr) {
      weights.q = draft_row<T>(args, team.task, accepted);
      weights.map = args.target_to_draft;
    } else {
      weights.one_hot = static_cast<int>(args.drafts[team.task * args.max_drafts + accepted]);
    }
  }
  const uint64_t fraction = token_noise(args, team.task, accepted, status);
  Pieces pieces = weigh(shared, team, weights, status);
  if (pieces.total == 0 && last.has_draft) {
    status |= kEmptyResidual;
    weights.q = RowView<T>(nullptr, 0), weights.one_hot = -1;
    pieces = weigh(shared, team, weights, status);
  }
  Ending out{accepted, -1, 0.0f, last.p_law, false};
  if (pieces.total == 0) {
    status |= kNoMass;
    out.token = argmax(shared, team, p, args.target_is_logits, status);
  } else {
    out.token = find_draw<T>(shared, team, weights, pieces, draw(fraction, pieces.total));
    if (out.token >= 0) out.logprob = logf(probability(p.at(out.token), last.p_law));
  }
  return out;
}

// grid: ranks blocks (one team) per sequence
template <class T, int Ahead>
__global__ void __launch_bounds__(kThreads, Ahead == 4 ? 1 : 2)
    spec_verify_kernel(const __grid_constant__ VerifyArgs args, int ranks) {
  __shared__ Shared shared;
  Team team(ranks);
  team.arrive();
  if (!needs_laws(args)) wait_for_previous_kernel();
  const int64_t b = team.task, columns = args.max_drafts + 1;
  uint32_t status = 0;
  const Parameters s = parameters_of(args.parameters, b, args.vocab, status);
  const Rows rows = rows_of(args, b, status);
  team.wait();
  Ending ending;
  if (rows.drafts >= 0 && !s.greedy) {
    ending = end_sampled<T, Ahead>(args, shared, team, rows, s, status);
  } else {
    wait_for_previous_kernel();
    if (rows.drafts >= 0) ending = end_greedy<T>(args, shared, team, rows, status);
  }
  if (args.probs != nullptr && rows.drafts >= 0) {
    const RowView<T> row = target_row<T>(args, rows.first + ending.accepted);
    for (int64_t i = team.rank * kThreads + threadIdx.x; i < args.vocab; i += ranks * kThreads)
      args.probs[b * args.vocab + i] =
          ending.is_point ? (i == ending.token ? 1.0f : 0.0f) : probability(row.at(i), ending.law);
  }
  const bool all_know = ending.is_point || (status & kNoMass);
  if (ending.token >= 0 && team.lane == 0 && (!all_know || (team.rank == 0 && team.warp == 0))) {
    args.tokens[b * columns + ending.accepted] = ending.token;
    if (args.logprobs) args.logprobs[b * columns + ending.accepted] = ending.logprob;
  }
  if (team.rank != 0) return;
  for (int64_t k = threadIdx.x; k < columns; k += kThreads) {
    if (k == ending.accepted) continue;
    const bool is_draft = k < ending.accepted;
    args.tokens[b * columns + k] = is_draft ? args.drafts[b * args.max_drafts + k] : -1;
    if (args.logprobs && (!is_draft || s.greedy)) args.logprobs[b * columns + k] = 0.0f;
  }
  if (threadIdx.x != 0) return;
  if (args.counts) args.counts[b] = ending.accepted + 1;
  args.status[b] = static_cast<int32_t>(status);
  const RowLaw& law = ending.law;
  if (args.cutoff) args.cutoff[b] = law.cutoff;
  if (args.lse) {
    const float lse = law.scale > 0.0f ? law.max / s.temperature - logf(law.scale) : minus_infinity();
    args.lse[b] = ending.is_point ? law.max : lse;
  }
}

}  // namespace

cudaError_t launch_spec_verify(const VerifyArgs& args, cudaStream_t stream) {
  if (args.num_sequences == 0) return cudaSuccess;
  if (needs_laws(args)) {
    const cudaError_t error = launch_row_laws(args, stream);
    if (error != cudaSuccess) return error;
  }
  if (args.mode != VerifyMode::kChain) return launch_verify_modes(args, stream);
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  const int ranks = ranks_for(args, device);
  visit_real(args.value_type, [&]<class T>(T) {
    // One block on a multiprocessor has room for more in flight.
    error = args.num_sequences * ranks <= device.multiprocessors
                ? launch_teams(spec_verify_kernel<T, 4>, args, ranks, device, stream)
                : launch_teams(spec_verify_kernel<T, 2>, args, ranks, device, stream);
  });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
