// SPDX-License-Identifier: MIT
// Rung 3: y = x · wᵀ with x as int8 (formats/activation.h), four products and three additions an
// instruction. A group of 32 adds  s_w (s_a Σ q_w q_a) + o_w Σ a.  Two kernels: few tokens read the
// weights once at the speed of memory, many tokens reuse them from shared memory.
#include "gemm_3_dp4a.cuh"

namespace quantgemm {

int64_t gemm_dp4a_scratch_bytes(const GemmArgs&) { return 0; }

cudaError_t launch_gemm_dp4a(const GemmArgs& args, cudaStream_t stream) {
  using namespace dp4a;
  if (args.m <= kMostTokens) return launch_few_tokens(args, stream);
  return launch_tiles(args, stream);
}

}  // namespace quantgemm
