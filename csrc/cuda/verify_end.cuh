// SPDX-License-Identifier: MIT
// How a chain ends once it is known where it stops: the token that is drawn from the stopping row by all
// blocks of a team (row_team.cuh), and what is written of the sequence.
#pragma once
#include "row_team.cuh"
#include "verdict.cuh"

namespace quantgemm {

// What a sequence's last token is drawn from if it stops at a position; known before any law is.
template <class T>
struct StoppingRow {
  RowView<T> p, q;
  int one_hot;  // the drafted token where it is all that q has, else -1
  int64_t slot;

  StoppingRow() = default;
  __device__ StoppingRow(const VerifyArgs& args, int64_t sequence, const Rows& rows, int64_t k,
                         const Draft& d)
      : p(target_row<T>(args, rows.drafts >= 0 ? rows.first + k : 0)),
        q(nullptr, 0),
        one_hot(d.valid && args.draft == nullptr ? static_cast<int>(d.token) : -1),
        slot(sequence * (args.max_drafts + 1) + k) {
    if (d.valid && args.draft != nullptr) q = draft_row<T>(args, sequence, k);
    keep_here(p.data), keep_here(q.data);
  }
};

// Where a sequence stops, and how its last token is drawn. Found by a warp of each block.
template <class T, bool Logits, int Ahead>
struct Stop {
  Weights<T, Logits, Ahead> weights;
  Rows rows;
  float temperature;
  int64_t accepted;  // -1: not found yet
  // Of the 32 positions looked at last: noise of the drafts and of the token, and the drafts.
  uint64_t fractions[2][32];
  uint32_t noise_status[2][32];
  int64_t tokens[32];
  float p_tokens[32];
  uint64_t fraction;  // of the token where it stops
  uint32_t status;
  bool greedy, has_draft, bad;
  uint32_t num_kept;  // tokens of the row in a list, from which to draw; 0: there is none

  // By a lane of each block, once what stops is known. group_keys: of a truncated p, else null.
  __device__ __forceinline__ void open_row(const StoppingRow<T>& row, const Verdict& v,
                                           const int64_t* target_to_draft, const uint32_t* group_keys) {
    weights.p = row.p, weights.q = row.q;
    weights.p_law = v.p_law, weights.q_law = v.q_law;
    weights.map = target_to_draft;
    weights.one_hot = row.one_hot;
    weights.group_keys = group_keys;
    weights.find_common(bad);
  }
};

// What a sequence ends with.
struct Ending {
  int token = -1;        // -1 where another warp knows it
  float logprob = 0.0f;  // where the token is known
  RowLaw law{};
  bool is_point = false, all_know = false;  // a distribution of one token; every warp knows it
};

// Nothing after position `last`. By a warp.
__device__ __forceinline__ void clear_after(const VerifyArgs& args, const Team& team, int64_t last) {
  const int64_t columns = args.max_drafts + 1;
  for (int64_t k = last + 1 + team.lane; k < columns; k += 32) {
    args.tokens[team.task * columns + k] = -1;
    if (args.logprobs) args.logprobs[team.task * columns + k] = 0.0f;
  }
}

// The accepted drafts of [first, end), of the 32 looked at last. By a warp.
template <class AnyStop>
__device__ __forceinline__ void write_drafts(const VerifyArgs& args, const Team& team, const AnyStop& stop,
                                             int64_t first, int64_t end) {
  const int64_t k = first + team.lane, columns = args.max_drafts + 1;
  if (k >= end) return;
  args.tokens[team.task * columns + k] = stop.tokens[team.lane];
  if (args.logprobs) args.logprobs[team.task * columns + k] = logf(stop.p_tokens[team.lane]);
}

struct Greedy {
  int token;
  float top;
  int64_t accepted;
  uint32_t status;
};
template <class T, int Warps, int Ranks>
__device__ __noinline__ Greedy walk_greedily(const VerifyArgs& args, SharedOf<Warps, Ranks>& shared,
                                             Team team, Rows rows) {
  Greedy out{0, 0.0f, 0, 0};
#pragma unroll 1
  for (;; ++out.accepted) {
    const int64_t k = out.accepted;
    const RowView<T> row = target_row<T>(args, rows.first + k);
    out.token = argmax(shared, team, row, args.target_is_logits, out.status);
    const int64_t token = k < rows.drafts ? args.drafts[team.task * args.max_drafts + k] : -1;
    if (k >= rows.drafts || token != out.token) {
      if (token < -1 || token >= args.vocab) out.status |= kBadToken;
      const float top = row.at(out.token);
      out.top = args.target_is_logits ? clean_logit(top) : clean_probability(top);
      if (out.top == (args.target_is_logits ? minus_infinity() : 0.0f)) out.status |= kNoMass;
      return out;
    }
    if (team.rank != 0 || threadIdx.x != 0) continue;
    args.tokens[team.task * (args.max_drafts + 1) + k] = token;
    if (args.logprobs) args.logprobs[team.task * (args.max_drafts + 1) + k] = 0.0f;
  }
}

// The last token, drawn from all of its row by all blocks. strips: of p's row, if it is one of logits.
template <class T, bool Logits, int Ahead, int Warps, int Ranks>
__device__ __forceinline__ Ending draw_from_row(const VerifyArgs& args, SharedOf<Warps, Ranks>& shared,
                                                Stop<T, Logits, Ahead>& stop, Team& team,
                                                const float2* strips, uint32_t& status) {
  auto& weights = stop.weights;
  Ending out;
  bool has_draft = stop.has_draft;
#pragma unroll 1
  for (;; has_draft = false) {
    out.token = kNowhere;
    if (Logits && !has_draft)
      out.token = find_by_strips<T>(shared, team, weights, weights.p_law, strips, stop.fraction);
    if (out.token == kNowhere) {
      const auto pieces = weigh(shared, team, weights, status);
      if (pieces.total != 0)
        out.token = find_draw<T>(shared, team, weights, pieces, draw(stop.fraction, pieces.total));
    }
    if (out.token != kNowhere || !has_draft) break;
    status |= kEmptyResidual;
    __syncthreads();
    if (threadIdx.x == 0) {
      weights.q.data = nullptr, weights.one_hot = -1;
      weights.find_common(stop.bad);
    }
    __syncthreads();
  }
  out.law = weights.p_law;
  if (out.token == kNowhere) {
    status |= kNoMass;
    out.token = argmax(shared, team, weights.p, args.target_is_logits, status);
    out.all_know = true;
  } else if (out.token >= 0) {
    const float x = weights.p.at(out.token);
    out.logprob = logf(Logits ? probability(x, out.law) : clean_probability(x));
  }
  return out;
}

// point: the token of a distribution of one, or -1.
template <int Warps, class T>
__device__ __noinline__ void write_probs(const VerifyArgs& args, Team team, RowView<T> row, RowLaw law,
                                         int point) {
  for (int64_t i = team.rank * 32 * Warps + threadIdx.x; i < args.vocab; i += team.ranks * 32 * Warps)
    args.probs[team.task * args.vocab + i] =
        point >= 0 ? (i == point ? 1.0f : 0.0f) : probability(row.at(i), law);
}

// A sequence that has stopped, but for its accepted drafts: its end, and what else is asked for.
// draw: the Ending of a sampled sequence.
template <int Warps, int Ranks, class T, bool Logits, int Ahead, class Draw>
__device__ __forceinline__ void finish(const VerifyArgs& args, SharedOf<Warps, Ranks>& shared,
                                       Stop<T, Logits, Ahead>& stop, Team& team, const Draw& draw) {
  const int64_t b = team.task, columns = args.max_drafts + 1;
  uint32_t status = stop.status;
  int64_t accepted = stop.accepted;
  Ending ending;
  if (stop.rows.drafts < 0) {
    accepted = -1;
  } else if (stop.greedy) {
    const Greedy greedy = walk_greedily<T>(args, shared, team, stop.rows);
    ending = {greedy.token, 0.0f, {greedy.top, 0.0f, 1.0f, greedy.top}, true, true};
    accepted = greedy.accepted, status |= greedy.status;
  } else {
    ending = draw(status);
  }
  if (args.probs != nullptr && accepted >= 0)
    write_probs<Warps>(args, team, target_row<T>(args, stop.rows.first + accepted), ending.law,
                       ending.is_point ? ending.token : -1);
  if (ending.token >= 0 && team.lane == 0 && (!ending.all_know || (team.rank == 0 && team.warp == 0))) {
    args.tokens[b * columns + accepted] = ending.token;
    if (args.logprobs) args.logprobs[b * columns + accepted] = ending.logprob;
  }
  if (team.rank != 0 || team.warp != 0) return;
  if (accepted >= 0 && !stop.greedy) write_drafts(args, team, stop, accepted & ~int64_t{31}, accepted);
  clear_after(args, team, accepted);
  if (team.lane != 0) return;
  if (args.counts) args.counts[b] = accepted + 1;
  args.status[b] = static_cast<int32_t>(status);
  const RowLaw& law = ending.law;
  if (args.cutoff) args.cutoff[b] = law.cutoff;
  if (args.lse) {
    const float lse = law.scale > 0.0f ? law.max / stop.temperature - logf(law.scale) : minus_infinity();
    args.lse[b] = ending.is_point ? law.max : lse;
  }
}

}  // namespace quantgemm
