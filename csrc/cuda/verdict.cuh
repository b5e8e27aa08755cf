// SPDX-License-Identifier: MIT
// The verdict on a chain's drafts from the laws of their rows and the values at their tokens, before
// a whole row is read. A lane judges a position, so that a warp looks at 32 in one go; what does not
// depend on each other is loaded together, because this is a chain of round trips to memory.
#pragma once
#include "device.h"
#include "row_laws.cuh"
#include "team.cuh"

namespace quantgemm {

// No drafts, only a row of logits of each sequence (sample_rows.cu).
__host__ __device__ inline bool has_only_rows(const VerifyArgs& args) {
  return args.max_drafts == 0 && args.target_is_logits && args.mode == VerifyMode::kChain;
}
cudaError_t launch_sample_rows(const VerifyArgs& args, cudaStream_t stream);

// Chains of few sequences from logits, without truncation, read and verified in one launch
// (read_and_verify.cu).
bool is_read_and_verified(const VerifyArgs& args, const Device& device);
cudaError_t launch_read_and_verify(const VerifyArgs& args, const Device& device, cudaStream_t stream);

// Does somebody have to find the laws of rows of logits? Of the draft's?
__host__ __device__ inline bool reads_drafts(const VerifyArgs& args) {
  return args.draft && args.draft_is_logits && !args.draft_lse;
}
__host__ __device__ inline bool needs_laws(const VerifyArgs& args) {
  return args.target_is_logits || reads_drafts(args);
}

// The laws of some positions of a sequence in shared memory: the target's rows, the draft's rows. As
// they are stored: scale is negative if there is NaN or +inf in the row.
struct LawTable {
  RowLaw laws[2][32];
  uint32_t num_kept[32];
};

// Fills the table for `count` positions from `first` on, a row per warp; each knows where it lies before it
// waits for the kernel that writes it.
__device__ __forceinline__ void fill_laws(const VerifyArgs& args, const RowScratch& scratch, LawTable& table,
                                          int64_t sequence, int64_t first, int count, float slope) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int num_warps = static_cast<int>(blockDim.x) / 32;
  const int64_t slot = sequence * (args.max_drafts + 1) + first;
  const bool stored = laws_are_stored(args), drafts = reads_drafts(args);
  // The first warp has drafts to look at: it comes last.
#pragma unroll 1
  for (int i = num_warps - 1 - warp; i < 2 * count; i += num_warps) {
    const int is_draft = i >= count, k = is_draft ? i - count : i;
    if (!(is_draft ? drafts : args.target_is_logits)) continue;
    const int64_t own = (is_draft ? scratch.slots : 0) + slot + k;
    const float2* strips = scratch.strips + own * kMaxStrips;
    keep_here(strips);
    wait_for_previous_kernel();
    RowLaw law;
    if (stored) {
      law = scratch.laws[own];
    } else {
      const int length = static_cast<int>(is_draft ? args.draft_vocab : args.vocab);
      law = join_strips(strips_of_lane(strips, length, lane), slope).law;
    }
    if (lane != 0) continue;
    table.laws[is_draft][k] = law;
    if (scratch.has_kept && !is_draft) table.num_kept[k] = scratch.num_kept[own];
  }
}

// The law of a row of logits; `bad` if there is NaN or +inf in the row.
__device__ __forceinline__ RowLaw law_at(const RowScratch& scratch, int64_t slot, bool& bad) {
  RowLaw law = scratch.laws[slot];
  bad = signbit(law.scale);
  law.scale = fabsf(law.scale);
  return law;
}

__device__ __forceinline__ RowLaw target_law(const VerifyArgs& args, int64_t sequence, int64_t position,
                                             bool& bad) {
  bad = false;
  if (!args.target_is_logits) return stored_law();
  return law_at(scratch_of(args), sequence * (args.max_drafts + 1) + position, bad);
}

__device__ __forceinline__ RowLaw draft_law(const VerifyArgs& args, int64_t sequence, int64_t k,
                                            const Parameters& s, bool& bad) {
  bad = false;
  if (!args.draft_is_logits) return stored_law();
  const int64_t flat = sequence * args.max_drafts + k;
  if (args.draft_lse)
    return law_from_lse(args.draft_lse[flat], args.draft_cutoff ? args.draft_cutoff[flat] : minus_infinity(),
                        s);
  const RowScratch scratch = scratch_of(args);
  bool q_bad = false;
  const RowLaw law = law_at(scratch, scratch.slots + sequence * (args.max_drafts + 1) + k, q_bad);
  bad = q_bad && !args.target_to_draft;
  return law;
}

// The draft's value for a token of the target; `there` if its vocabulary has the token.
template <class T>
__device__ __forceinline__ float draft_value(const VerifyArgs& args, int64_t sequence, int64_t k,
                                             int64_t token, bool& there) {
  const int64_t j = args.target_to_draft ? args.target_to_draft[token] : token;
  there = j >= 0 && j < args.draft_vocab;
  return there ? draft_row<T>(args, sequence, k).at(j) : 0.0f;
}

// What the inputs say about position k of a chain.
struct Draft {
  int64_t token;
  float x, y;  // the target's and the draft's value of it
  bool valid, has_q;
  uint32_t status;
  uint64_t fraction;
};

__device__ __forceinline__ int64_t draft_token(const VerifyArgs& args, int64_t sequence, int64_t k) {
  return k < args.max_drafts ? args.drafts[sequence * args.max_drafts + k] : -1;
}

// All but the noise, for the drafted token.
template <class T>
__device__ __forceinline__ Draft gather_values(const VerifyArgs& args, int64_t sequence, const Rows& rows,
                                               int64_t k, int64_t token) {
  Draft d{k < rows.drafts ? token : -1, 0.0f, 1.0f, false, false, 0, 0};
  d.valid = d.token >= 0 && d.token < args.vocab;
  if (!d.valid) {
    if (d.token != -1) d.status = kBadToken;
    return d;
  }
  d.x = target_row<T>(args, rows.first + k).at(d.token);
  if (args.draft != nullptr) d.y = draft_value<T>(args, sequence, k, d.token, d.has_q);
  return d;
}
template <class T>
__device__ __forceinline__ Draft gather_draft(const VerifyArgs& args, int64_t sequence, const Rows& rows,
                                              int64_t k) {
  Draft d = gather_values<T>(args, sequence, rows, k, draft_token(args, sequence, k));
  if (d.valid) d.fraction = node_noise(args, sequence, k, k, 0, d.status);
  return d;
}

// Position `drafts` has no draft: it stops with the bonus.
struct Verdict {
  RowLaw p_law, q_law;
  float p_token;
  uint32_t status;
  bool stops, has_draft, bad;  // bad: NaN or +inf in the rows, which matters if one is drawn from
};

// By the lane of position k. Logits: of either model. p_law and q_law: of its rows, as they are stored, if
// they have been read.
template <bool Logits>
__device__ __forceinline__ Verdict judge(const VerifyArgs& args, const RowLaw& p_law, const RowLaw& q_law,
                                         int64_t sequence, int64_t k, const Draft& d, const Parameters& s) {
  Verdict v{stored_law(), stored_law(), 0.0f, d.status, true, d.valid, false};
  if (Logits && args.target_is_logits) {
    v.p_law = p_law;
    v.bad = signbit(v.p_law.scale);
    v.p_law.scale = fabsf(v.p_law.scale);
  }
  if (d.valid) {
    if (Logits && args.draft_is_logits && args.draft_lse) {
      bool bad = false;
      v.q_law = draft_law(args, sequence, k, s, bad);
    } else if (Logits && args.draft_is_logits) {
      v.q_law = q_law;
      v.bad |= signbit(v.q_law.scale) && !args.target_to_draft;
      v.q_law.scale = fabsf(v.q_law.scale);
    }
    if (is_bad_value(d.x, Logits && args.target_is_logits) ||
        (d.has_q && is_bad_value(d.y, Logits && args.draft_is_logits)))
      v.status |= kBadValue;
    const auto law = [](float x, const RowLaw& how) {
      return Logits ? probability(x, how) : clean_probability(x);
    };
    v.p_token = law(d.x, v.p_law);
    v.stops = !accepts(d.fraction, v.p_token, d.has_q ? law(d.y, v.q_law) : d.y);
  }
  if (v.stops && v.bad) v.status |= kBadValue;
  return v;
}

}  // namespace quantgemm
