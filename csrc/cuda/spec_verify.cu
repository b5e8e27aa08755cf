// SPDX-License-Identifier: MIT
// Verification and the draw, one launch: a team of 1…6 blocks owns a sequence. The first warp of each
// finds the position that stops (rejected, or the bonus) from a few gathered values (verdict.cuh), then
// all draw from that row together (row_team.cuh). Only the stopping row of p, and of q, is read.
// Limit at small batches: fetching instructions that run once. So they are few, and loops are rolled.
#include "launch.h"
#include "row_kept.cuh"
#include "row_team.cuh"
#include "verdict.cuh"

namespace quantgemm {
namespace {

constexpr int kFewAhead = 2;  // groups in flight per warp where blocks are few

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

// Where a sequence stops, and how its last token is drawn. Found by the first warp of each block.
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

  // By a lane of each block, once what stops is known.
  __device__ __forceinline__ void open_row(const RowScratch& scratch, const StoppingRow<T>& row,
                                           const RowLaw& p_law, const RowLaw& q_law,
                                           const int64_t* target_to_draft) {
    weights.p = row.p, weights.q = row.q;
    weights.p_law = p_law, weights.q_law = q_law;
    weights.map = target_to_draft;
    weights.one_hot = row.one_hot;
    weights.group_keys = Logits && p_law.cutoff != minus_infinity()
                             ? scratch.group_keys + row.slot * scratch.num_groups
                             : nullptr;
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
      const Verdict v = judge<Logits>(args, table, team.task, k <= rows.drafts ? k : rows.drafts, d, s);
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
          stop.open_row(scratch, row, v.p_law, v.q_law, args.target_to_draft);
        }
      }
    }
    __syncthreads();
    if (stop.accepted >= 0) return;
  }
}

struct Greedy {
  int token;
  float top;
  int64_t accepted;
  uint32_t status;
};
template <class T>
__device__ __noinline__ Greedy walk_greedily(const VerifyArgs& args, Shared& shared, Team team, Rows rows) {
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

template <class T, bool Logits, int Ahead>
__device__ __forceinline__ Ending end_sampled(const VerifyArgs& args, const RowScratch& scratch,
                                              Shared& shared, Stop<T, Logits, Ahead>& stop, Team& team,
                                              uint32_t& status) {
  auto& weights = stop.weights;
  Ending out;
  if (Logits && stop.num_kept > 0) {
    out.token = kElsewhere, out.law = weights.p_law;
    if (team.rank != 0) return out;
    __shared__ KeptShared kept_shared;
    const int64_t slot = team.task * (args.max_drafts + 1) + stop.accepted;
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
  } else {
    bool has_draft = stop.has_draft;
#pragma unroll 1
    for (;; has_draft = false) {
      out.token = kNowhere;
      if (Logits && !has_draft) {
        const int64_t slot = team.task * (args.max_drafts + 1) + stop.accepted;
        const float2* const strips = scratch.strips + slot * kMaxStrips;
        out.token = find_by_strips<T>(shared, team, weights, weights.p_law, strips, stop.fraction);
      }
      if (out.token == kNowhere) {
        const Pieces pieces = weigh(shared, team, weights, status);
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
template <class T>
__device__ __noinline__ void write_probs(const VerifyArgs& args, Team team, RowView<T> row, RowLaw law,
                                         int point) {
  for (int64_t i = team.rank * kThreads + threadIdx.x; i < args.vocab; i += team.ranks * kThreads)
    args.probs[team.task * args.vocab + i] =
        point >= 0 ? (i == point ? 1.0f : 0.0f) : probability(row.at(i), law);
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
    ending = end_sampled(args, scratch, shared, stop, team, status);
  }
  if (args.probs != nullptr && accepted >= 0)
    write_probs(args, team, target_row<T>(args, stop.rows.first + accepted), ending.law,
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

}  // namespace

cudaError_t launch_spec_verify(const VerifyArgs& args, cudaStream_t stream) {
  if (args.num_sequences == 0) return cudaSuccess;
  if (has_only_rows(args)) return launch_sample_rows(args, stream);
  if (needs_laws(args)) {
    const cudaError_t error = launch_row_laws(args, stream);
    if (error != cudaSuccess) return error;
  }
  if (args.mode != VerifyMode::kChain) return launch_verify_modes(args, stream);
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
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
