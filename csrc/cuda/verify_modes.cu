// SPDX-License-Identifier: MIT
// Trees and blocks of drafts, one launch: a team of blocks owns a sequence (row_team.cuh) and decides
// step by step, all its threads alike. A tree reads its row again for every sibling it refuses. A
// block is judged from its last draft back, so that only the positions behind those kept are read.
#include "launch.h"
#include "row_team.cuh"
#include "verdict.cuh"

namespace quantgemm {
namespace {

// What a refused draft takes from the weights of its row: mass·q.
struct Taken {
  int draft, token;
  float mass;
  RowLaw law;
  bool bad;  // NaN or +inf somewhere in its row
};

// Shared memory of a team that the two modes need besides Shared.
struct Joint {
  int parents[kMaxJointDrafts];  // -2: none
  Taken taken[kMaxJointDrafts];
  float p_token[kMaxJointDrafts], q_token[kMaxJointDrafts], shares[kMaxJointDrafts + 1];
  int length;
};

// share·p, less what refused drafts have taken in turn. The shape of Weights in row_team.cuh.
template <class T>
struct LayeredWeights {
  const VerifyArgs& args;
  int64_t sequence;
  RowView<T> p;
  RowLaw law;
  float share;
  const Taken* taken;
  int num_taken;
  const uint32_t* group_keys;  // of a truncated p, or null
  const float2* strips;        // of a row of logits

  __device__ float mapped_q(const RowView<T>& q, const RowLaw& q_law, int i) const {
    const int64_t j = args.target_to_draft ? args.target_to_draft[i] : i;
    return j >= 0 && j < q.length ? probability(q.at(j), q_law) : 0.0f;
  }

  // A single weight.
  __device__ float at(int i) const {
    float w = multiply(probability(p.at(i), law), share);
    for (int n = 0; n < num_taken; ++n) {
      const Taken& t = taken[n];
      const float q =
          args.draft == nullptr ? 0.0f : mapped_q(draft_row<T>(args, sequence, t.draft), t.law, i);
      w = args.draft == nullptr && i == t.token ? 0.0f : residual(w, multiply(q, t.mass));
    }
    return w;
  }

  __device__ __forceinline__ void group(float (&r)[8], int begin, int lane, bool& bad) const {
    load_group(r, p, begin, lane, law.slope == 0.0f ? 0.0f : minus_infinity());
#pragma unroll
    for (float& x : r) {
      bad |= law.slope == 0.0f && is_bad_value(x, false);
      x = multiply(probability(x, law), share);
    }
    for (int n = 0; n < num_taken; ++n) {
      const Taken& t = taken[n];
      float y[8];
      if (args.draft == nullptr) {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (begin + index_in_group<T>(lane, e) == t.token) r[e] = 0.0f;
        continue;
      }
      const RowView<T> q = draft_row<T>(args, sequence, t.draft);
      if (args.target_to_draft == nullptr) {
        load_group(y, q, begin, lane, t.law.slope == 0.0f ? 0.0f : minus_infinity());
#pragma unroll
        for (float& x : y) {
          bad |= t.law.slope == 0.0f && is_bad_value(x, false);
          x = probability(x, t.law);
        }
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int i = begin + index_in_group<T>(lane, e);
          y[e] = i < p.length ? mapped_q(q, t.law, i) : 0.0f;
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) r[e] = residual(r[e], multiply(y[e], t.mass));
    }
  }

  // By a warp; groups below the cutoff weigh nothing and are not read.
  __device__ __noinline__ uint64_t sum(int begin, int end, int lane, bool& bad) const {
    uint64_t total = 0;
    const uint32_t least = key_of(law.cutoff);
    for (; begin < end; begin += 32 * kGroup) {
      const int own = begin + lane * kGroup;
      uint32_t wanted =
          __ballot_sync(~0u, own < end && (group_keys == nullptr || group_keys[own / kGroup] >= least));
      for (; wanted; wanted &= wanted - 1) {
        float r[8];
        group(r, begin + (__ffs(wanted) - 1) * kGroup, lane, bad);
        total += fixed_sum(r);
      }
    }
    return warp_sum(total);
  }
};

template <class T>
struct Verifier {
  const VerifyArgs& args;
  Shared& shared;
  Joint& joint;
  Team& team;
  const Rows& rows;
  const Parameters& s;
  LayeredWeights<T> weights{args,    team.task, RowView<T>(nullptr, 0), stored_law(), 1.0f, joint.taken, 0,
                            nullptr, nullptr};
  Pieces<kMaxTeam * kWarps> pieces{};  // of the weights
  int64_t count = 0;                   // tokens so far

  __device__ void note(uint32_t bits) const {
    if (threadIdx.x == 0 && bits) atomicOr(&shared.status, bits);
  }

  __device__ int64_t draft_token(int64_t k) const { return args.drafts[team.task * args.max_drafts + k]; }
  __device__ bool is_valid(int64_t token) const {
    const bool inside = token >= 0 && token < args.vocab;
    if (!inside && token != -1) note(kBadToken);
    return inside;
  }

  __device__ void emit(int64_t token, float logprob, int node) {
    emit(token, logprob, node, team.rank == 0 && threadIdx.x == 0);
  }
  __device__ void emit(int64_t token, float logprob, int node, bool writes) {
    if (writes) {
      const int64_t at = team.task * (args.max_drafts + 1) + count;
      args.tokens[at] = token;
      if (args.logprobs) args.logprobs[at] = logprob;
      if (args.nodes && node >= 0) args.nodes[team.task * args.max_drafts + count] = node;
    }
    ++count;
  }

  __device__ int next_child(int node, int after) const {
    const int drafts = static_cast<int>(rows.drafts);
    for (int first = (after + 1) & ~31; first < drafts; first += 32) {
      const int i = first + team.lane;
      const uint32_t found = __ballot_sync(~0u, i > after && i < drafts && joint.parents[i] == node);
      if (found) return first + __ffs(found) - 1;
    }
    return -1;
  }

  // The row behind a position as weights, nothing taken yet; `bad` as law_at says.
  __device__ void open_row(int64_t position, float share, bool& bad) {
    weights.p = target_row<T>(args, rows.first + position);
    weights.law = target_law(args, team.task, position, bad);
    weights.share = share;
    weights.num_taken = 0;
    weights.group_keys = nullptr;
    if (!args.target_is_logits) return;
    const RowScratch scratch = scratch_of(args);
    const int64_t slot = team.task * (args.max_drafts + 1) + position;
    weights.strips = scratch.strips + slot * kMaxStrips;
    if (weights.law.cutoff != minus_infinity())
      weights.group_keys = scratch.group_keys + slot * scratch.num_groups;
  }

  // q of a drafted token, and what else must be known of its draft.
  __device__ float open_draft(int64_t k, int64_t token, float mass, Taken& out, uint32_t& bits) const {
    out = {static_cast<int>(k), static_cast<int>(token), mass, stored_law(), false};
    if (args.draft == nullptr) return 1.0f;
    bool there = false;
    const float y = draft_value<T>(args, team.task, k, token, there);
    out.law = draft_law(args, team.task, k, s, out.bad);
    if (there && is_bad_value(y, args.draft_is_logits)) bits |= kBadValue;
    return there ? probability(y, out.law) : 0.0f;
  }

  __device__ void weigh_row() {
    uint32_t bits = 0;
    pieces = weigh(shared, team, weights, bits);
    note(bits);
  }

  // The last token, from the weights just weighed.
  __device__ void finish() {
    uint32_t bits = 0;
    if (pieces.total == 0) {
      const int token = argmax(shared, team, weights.p, args.target_is_logits, bits);
      note(bits | kNoMass);
      return emit(token, 0.0f, -1);
    }
    const uint64_t fraction = token_noise(args, team.task, count, bits);
    note(bits);
    int token = kNowhere;
    if (weights.num_taken == 0 && weights.share == 1.0f)  // as a chain does
      token = find_by_strips<T>(shared, team, weights, weights.law, weights.strips, fraction);
    if (token == kNowhere) token = find_draw<T>(shared, team, weights, pieces, draw(fraction, pieces.total));
    const float logprob = token >= 0 ? logf(probability(weights.p.at(token), weights.law)) : 0.0f;
    emit(token, logprob, -1, token >= 0 && team.lane == 0);
  }

  __device__ void walk_greedily() {
    for (int node = -1;;) {
      const RowView<T> row = target_row<T>(args, rows.first + node + 1);
      uint32_t bits = 0;
      const int best = argmax(shared, team, row, args.target_is_logits, bits);
      note(bits);
      int child = next_child(node, -1);
      for (; child >= 0; child = next_child(node, child))
        if (is_valid(draft_token(child)) && draft_token(child) == best) break;
      if (child < 0) {
        const float top = args.target_is_logits ? clean_logit(row.at(best)) : clean_probability(row.at(best));
        if (top == (args.target_is_logits ? minus_infinity() : 0.0f)) note(kNoMass);
      }
      emit(best, 0.0f, child);
      if (child < 0) return;
      node = child;
    }
  }

  // The child that is accepted; or -1, and what the refused ones left is weighed.
  __device__ int find_accepted(int node, float& logprob) {
    bool bad = false, weighed = false;
    open_row(node + 1, 1.0f, bad);
    float mass = 1.0f;
    uint32_t turn = 0;
    for (int child = next_child(node, -1); child >= 0; child = next_child(node, child), ++turn) {
      const int64_t token = draft_token(child);
      if (!is_valid(token)) continue;
      Taken taken;
      const float x = weights.p.at(token);
      uint32_t bits = is_bad_value(x, args.target_is_logits) ? kBadValue : 0;
      const float q_token = open_draft(child, token, mass, taken, bits);
      const uint64_t fraction = node_noise(args, team.task, child, count, turn, bits);
      note(bits);
      if (accepts(fraction, weights.at(static_cast<int>(token)), multiply(q_token, mass))) {
        logprob = logf(probability(x, weights.law));
        return child;
      }
      if (bad || taken.bad) note(kBadValue);
      __syncthreads();  // every warp is done with the entry that may have stood here
      if (threadIdx.x == 0) joint.taken[weights.num_taken] = taken;
      __syncthreads();
      ++weights.num_taken;
      weigh_row();
      weighed = pieces.total > 0;
      if (weighed) {
        mass = mass_of(pieces.total);
      } else {
        note(kEmptyResidual);
        --weights.num_taken;
      }
    }
    if (bad) note(kBadValue);
    if (!weighed) weigh_row();
    return -1;
  }

  __device__ void walk_tree() {
    for (int node = -1;;) {
      float logprob = 0.0f;
      const int child = find_accepted(node, logprob);
      if (child < 0) return finish();
      emit(draft_token(child), logprob, child);
      node = child;
    }
  }

  // joint.length drafts are valid; their values are gathered by a warp each.
  __device__ void gather_block() {
    for (int k = team.warp; k < joint.length; k += kWarps) {
      const int64_t token = draft_token(k);
      Taken taken;
      bool bad = false;
      const float x = target_row<T>(args, rows.first + k).at(token);
      uint32_t bits = is_bad_value(x, args.target_is_logits) ? kBadValue : 0;
      const float q_token = open_draft(k, token, 1.0f, taken, bits);
      const RowLaw law = target_law(args, team.task, k, bad);
      if (team.lane != 0) continue;
      joint.taken[k] = taken;
      joint.p_token[k] = probability(x, law), joint.q_token[k] = q_token;
      atomicOr(&shared.status, bits);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      float share = joint.shares[0] = 1.0f;
      for (int k = 0; k < joint.length; ++k)
        joint.shares[k + 1] = share = next_share(share, joint.p_token[k], joint.q_token[k]);
    }
    __syncthreads();
  }

  __device__ void verify_block() {
    for (int k = threadIdx.x; k < rows.drafts; k += kThreads) {
      const int64_t token = draft_token(k);
      if (token < 0 || token >= args.vocab) atomicMin(&joint.length, k);
    }
    __syncthreads();
    const int length = joint.length;
    if (length < rows.drafts) is_valid(draft_token(length));
    gather_block();
    int k = length;
    for (;; --k) {
      const float share = joint.shares[k];
      uint32_t bits = 0;
      const uint64_t fraction = k > 0 ? block_noise(args, team.task, k - 1, bits) : 0;
      note(bits);
      if (k == length && k > 0 && !accepts(fraction, share, 1.0f)) continue;
      bool bad = false;
      open_row(k, k == length ? 1.0f : share, bad);
      weights.taken = joint.taken + k;
      weights.num_taken = k < length;
      if (bad || (k < length && joint.taken[k].bad)) note(kBadValue);
      weigh_row();
      if (k == length || k == 0 || accepts_block(fraction, share, pieces.total)) break;
    }
    if (k < length && pieces.total == 0) {  // k = 0
      note(kEmptyResidual);
      weights.num_taken = 0;
      weigh_row();
    }
    while (count < k) emit(draft_token(count), logf(joint.p_token[count]), -1);
    finish();
  }
};

// grid (sequences, blocks of a team)
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    verify_modes_kernel(const __grid_constant__ VerifyArgs args, TeamShape shape) {
  __shared__ Shared shared;
  __shared__ Joint joint;
  Team team(shape);
  prepare(shared, team);
  team.arrive();
  if (!needs_laws(args)) wait_for_previous_kernel();
  const int64_t b = team.task;
  uint32_t status = 0;
  const Parameters s = parameters_of(args.parameters, b, args.vocab, status);
  const Rows rows = rows_of(args, b, status);
  const bool is_tree = args.mode == VerifyMode::kTree;
  if (threadIdx.x == 0) shared.status = status, joint.length = static_cast<int>(rows.drafts);
  wait_for_previous_kernel();
  team.wait();
  for (int64_t i = threadIdx.x; i < rows.drafts; i += kThreads) {
    const int64_t parent = is_tree ? args.parents[b * args.max_drafts + i] : i - 1;
    const bool good = parent >= -1 && parent < rows.drafts;
    joint.parents[i] = good ? static_cast<int>(parent) : -2;
    if (!good) atomicOr(&shared.status, static_cast<uint32_t>(kBadParent));
  }
  __syncthreads();
  int64_t count = 0;
  if (rows.drafts >= 0) {
    Verifier<T> verifier{args, shared, joint, team, rows, s};
    if (s.greedy) {
      verifier.walk_greedily();
    } else if (is_tree) {
      verifier.walk_tree();
    } else {
      verifier.verify_block();
    }
    count = verifier.count;
  }
  __syncthreads();
  if (team.rank != 0) return;
  for (int64_t k = count + threadIdx.x; k <= args.max_drafts; k += kThreads) {
    args.tokens[b * (args.max_drafts + 1) + k] = -1;
    if (args.logprobs) args.logprobs[b * (args.max_drafts + 1) + k] = 0.0f;
  }
  const int64_t accepted = count > 0 ? count - 1 : 0;
  for (int64_t k = accepted + threadIdx.x; args.nodes != nullptr && k < args.max_drafts; k += kThreads)
    args.nodes[b * args.max_drafts + k] = -1;
  if (threadIdx.x != 0) return;
  if (args.counts) args.counts[b] = count;
  args.status[b] = static_cast<int32_t>(shared.status);
}

}  // namespace

cudaError_t launch_verify_modes(const VerifyArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  const TeamShape shape = team_for(args, device);
  visit_real(args.value_type,
             [&]<class T>(T) { error = launch_teams(verify_modes_kernel<T>, args, shape, device, stream); });
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
