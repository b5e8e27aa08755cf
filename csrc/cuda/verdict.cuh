// SPDX-License-Identifier: MIT
// What a verifying kernel knows of a drafted token before it reads a whole row: the laws of its rows
// and their values at the token; and how such kernels are launched.
#pragma once
#include "row_laws.cuh"

namespace quantgemm {

constexpr int kThreads = 512, kWarps = kThreads / 32, kMaxRanks = 8;

// The law of a row of logits, by a warp; `bad` if there is NaN or +inf in the row.
__device__ __forceinline__ RowLaw law_at(const RowScratch& scratch, int64_t slot, float slope, bool& bad) {
  RowLaw law;
  if (scratch.has_laws) {
    law = scratch.laws[slot];
  } else {
    law =
        law_of(combine_strips(scratch.strips + slot * scratch.num_strips, scratch.num_strips, slope), slope);
  }
  bad = signbit(law.scale);
  law.scale = fabsf(law.scale);
  return law;
}

__device__ __forceinline__ RowLaw target_law(const VerifyArgs& args, int64_t sequence, int64_t position,
                                             const Parameters& s, bool& bad) {
  bad = false;
  if (!args.target_is_logits) return stored_law();
  return law_at(scratch_of(args), sequence * (args.max_drafts + 1) + position, s.slope, bad);
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
  const RowLaw law = law_at(scratch, scratch.slots + sequence * (args.max_drafts + 1) + k, s.slope, q_bad);
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

inline bool needs_laws(const VerifyArgs& args) {
  return args.target_is_logits || (args.draft && args.draft_is_logits && !args.draft_lse);
}

// A cluster of blocks per sequence: at most one block per multiprocessor, each with 4096 values at least.
inline cudaError_t launch_teams(void (*kernel)(VerifyArgs, int), const VerifyArgs& args,
                                cudaStream_t stream) {
  int device = 0, processors = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  int ranks = 1;
  if (major >= 9)
    while (ranks < kMaxRanks && args.num_sequences * ranks * 2 <= processors &&
           args.vocab >= ranks * 2 * 4096)
      ranks *= 2;
  Launch launch(static_cast<unsigned>(args.num_sequences * ranks), kThreads, stream);
  launch.in_clusters_of(ranks);
  if (needs_laws(args)) launch.follow_previous_kernel(major);
  return cudaLaunchKernelEx(&launch.config, kernel, args, ranks);
}

}  // namespace quantgemm
