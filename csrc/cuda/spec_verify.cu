// SPDX-License-Identifier: MIT
// Verification and the draw, one launch: a cluster of 1…8 blocks owns a sequence. All its blocks find
// the first position that stops (rejected, or the bonus) from a few gathered values, then draw from
// that row together (row_team.cuh). Only the stopping row of p, and of q, is read as a whole.
#include "launch.h"
#include "row_team.cuh"

namespace quantgemm {
namespace {

// One position, by one warp. Position `drafts` has no draft: it stops with the bonus. What does not
// depend on each other is loaded together: this is a chain of round trips to memory.
template <class T>
__device__ Verdict judge(const VerifyArgs& args, int64_t sequence, const Rows& rows, int64_t k, int64_t token,
                         uint64_t fraction, const Parameters& s) {
  Verdict v{stored_law(), stored_law(), 0.0f, 0, true, false};
  if (k >= rows.drafts) token = -1;
  v.has_draft = token >= 0 && token < args.vocab;
  if (!v.has_draft && token != -1) v.status |= kBadToken;
  float x = 0.0f, y = 1.0f;
  bool has_q = false;
  if (v.has_draft) {
    x = target_row<T>(args, rows.first + k).at(token);
    if (args.draft != nullptr) y = draft_value<T>(args, sequence, k, token, has_q);
  }
  bool bad = false, q_bad = false;  // somewhere in the rows, which matters if one of them is drawn from
  v.p_law = target_law(args, sequence, k, s, bad);
  v.status |= bad && !v.has_draft ? kBadValue : 0;
  if (!v.has_draft) return v;
  v.q_law = draft_law(args, sequence, k, s, q_bad);
  if (is_bad_value(x, args.target_is_logits) || (has_q && is_bad_value(y, args.draft_is_logits)))
    v.status |= kBadValue;
  v.p_token = probability(x, v.p_law);
  const float q_token = has_q ? probability(y, v.q_law) : y;
  v.stops = !accepts(fraction, v.p_token, q_token);
  if (v.stops && (bad || q_bad)) v.status |= kBadValue;
  return v;
}

// What a sequence ends with: `accepted` drafts, then a token.
struct Ending {
  int64_t accepted, token;
  float logprob;
  RowLaw law;
  bool is_point;  // a distribution of one token
};

template <class T>
__device__ Ending end_greedy(const VerifyArgs& args, Shared& shared, const Team& team, const Rows& rows) {
  for (int64_t k = 0;; ++k) {
    const RowView<T> row = target_row<T>(args, rows.first + k);
    const int best = argmax(shared, team, row, args.target_is_logits);
    const int64_t token = k < rows.drafts ? args.drafts[team.sequence * args.max_drafts + k] : -1;
    if (k < rows.drafts && token == best) continue;
    if (threadIdx.x == 0 && (token < -1 || token >= args.vocab)) shared.status |= kBadToken;
    const float top = args.target_is_logits ? clean_logit(row.at(best)) : clean_probability(row.at(best));
    const bool no_mass = top == (args.target_is_logits ? minus_infinity() : 0.0f);
    if (threadIdx.x == 0 && no_mass) shared.status |= kNoMass;
    return {k, best, 0.0f, {top, 0.0f, 1.0f, top}, true};
  }
}

template <class T>
__device__ Ending end_sampled(const VerifyArgs& args, Shared& shared, const Team& team, const Rows& rows,
                              const Parameters& s) {
  int64_t accepted = 0;
  Verdict last;
  for (int64_t first = 0;; first += kWarps) {
    const int64_t k = first + team.warp;
    if (k <= rows.drafts) {
      uint32_t noise_status = 0;
      const int64_t token = k < args.max_drafts ? args.drafts[team.sequence * args.max_drafts + k] : -1;
      const uint64_t fraction = node_noise(args, team.sequence, k, k, 0, noise_status);
      Verdict v = judge<T>(args, team.sequence, rows, k, token, fraction, s);
      if (v.has_draft) v.status |= noise_status;
      if (team.lane == 0) shared.verdicts[team.warp] = v;
    }
    __syncthreads();
    const int here = static_cast<int>(rows.drafts + 1 - first < kWarps ? rows.drafts + 1 - first : kWarps);
    int stop = 0;
    uint32_t bits = 0;
    while (stop < here && !shared.verdicts[stop].stops) bits |= shared.verdicts[stop++].status;
    if (args.logprobs && team.rank == 0 && static_cast<int>(threadIdx.x) < stop)
      args.logprobs[team.sequence * (args.max_drafts + 1) + first + threadIdx.x] =
          logf(shared.verdicts[threadIdx.x].p_token);
    accepted += stop;
    if (stop < here) last = shared.verdicts[stop], bits |= last.status;
    if (threadIdx.x == 0) shared.status |= bits;
    __syncthreads();
    if (stop < here) break;
  }

  const RowView<T> p = target_row<T>(args, rows.first + accepted);
  Weights<T> weights{p, RowView<T>(nullptr, 0), last.p_law, last.q_law, nullptr, -1, nullptr};
  if (last.p_law.cutoff != minus_infinity()) {
    const RowScratch scratch = scratch_of(args);
    weights.group_keys =
        scratch.group_keys + (team.sequence * (args.max_drafts + 1) + accepted) * scratch.num_groups;
  }
  if (last.has_draft) {
    if (args.draft != nullptr) {
      weights.q = draft_row<T>(args, team.sequence, accepted);
      weights.map = args.target_to_draft;
    } else {
      weights.one_hot = static_cast<int>(args.drafts[team.sequence * args.max_drafts + accepted]);
    }
  }
  uint32_t noise_status = 0;
  const uint64_t fraction = token_noise(args, team.sequence, accepted, noise_status);
  int token;
  for (bool residual = last.has_draft;; residual = false) {
    token = draw_token(shared, team, weights, fraction);
    if (token >= 0 || !residual) break;
    if (threadIdx.x == 0) shared.status |= kEmptyResidual;
    weights.q = RowView<T>(nullptr, 0), weights.one_hot = -1;
    __syncthreads();
  }
  if (threadIdx.x == 0) shared.status |= noise_status;
  if (token < 0) {
    if (threadIdx.x == 0) shared.status |= kNoMass;
    __syncthreads();
    token = argmax(shared, team, p, args.target_is_logits);
    return {accepted, token, 0.0f, last.p_law, false};
  }
  const float logprob = team.rank == 0 ? logf(probability(p.at(token), last.p_law)) : 0.0f;
  return {accepted, token, logprob, last.p_law, false};
}

// What is read first lies in many small tensors: one round trip for all of them.
__device__ __forceinline__ void prefetch_inputs(const VerifyArgs& a, int64_t b) {
  const int i = threadIdx.x;
  const void* at = nullptr;
  if (i == 0) at = a.cu_rows + b;
  if (i == 1) at = a.seeds + b;
  if (i == 2) at = a.positions + b;
  if (i == 3) at = a.parameters.temperature + b;
  const bool given =
      (i == 0 && a.cu_rows) || (i > 0 && i < 3 && a.seeds) || (i == 3 && a.parameters.temperature);
  if (given) asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
  const int64_t k = (i - 32) * 16;
  if (i >= 32 && k < a.max_drafts) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(a.drafts + b * a.max_drafts + k));
  }
}

// grid: ranks blocks (one cluster) per sequence
template <class T>
__global__ void __launch_bounds__(kThreads, 2) spec_verify_kernel(VerifyArgs args, int ranks) {
  __shared__ Shared shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Team team{blockIdx.x / ranks, static_cast<int>(blockIdx.x) % ranks, ranks, lane, warp};
  const int64_t b = team.sequence, columns = args.max_drafts + 1;
  prefetch_inputs(args, b);
  uint32_t status = 0;
  const Parameters s = parameters_of(args.parameters, b, args.vocab, status);
  const Rows rows = rows_of(args, b, status);
  if (threadIdx.x == 0) shared.status = status;
  wait_for_previous_kernel();
  __syncthreads();
  Ending ending{-1, -1, 0.0f, {}, false};
  if (rows.drafts >= 0) {
    ending = s.greedy ? end_greedy<T>(args, shared, team, rows) : end_sampled<T>(args, shared, team, rows, s);
  }
  __syncthreads();
  if (args.probs != nullptr && rows.drafts >= 0) {
    const RowView<T> row = target_row<T>(args, rows.first + ending.accepted);
    for (int64_t i = team.rank * kThreads + threadIdx.x; i < args.vocab; i += ranks * kThreads)
      args.probs[b * args.vocab + i] =
          ending.is_point ? (i == ending.token ? 1.0f : 0.0f) : probability(row.at(i), ending.law);
  }
  if (team.rank != 0) return;
  for (int64_t k = threadIdx.x; k < columns; k += kThreads) {
    const bool is_draft = k < ending.accepted;
    args.tokens[b * columns + k] =
        is_draft ? args.drafts[b * args.max_drafts + k] : (k == ending.accepted ? ending.token : -1);
    if (args.logprobs == nullptr) continue;
    if (!is_draft) args.logprobs[b * columns + k] = k == ending.accepted ? ending.logprob : 0.0f;
    if (is_draft && s.greedy) args.logprobs[b * columns + k] = 0.0f;
  }
  if (threadIdx.x != 0) return;
  if (args.counts) args.counts[b] = ending.accepted + 1;
  args.status[b] = static_cast<int32_t>(shared.status);
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
  cudaError_t error = cudaSuccess;
  visit_real(args.value_type, [&]<class T>(T) { error = launch_teams(spec_verify_kernel<T>, args, stream); });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
