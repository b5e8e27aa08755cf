// SPDX-License-Identifier: MIT
// Rung 3: y = x · wᵀ with x as int8 (formats/activation.h), four products and three additions an
// instruction. A group of 32 adds  s_w (s_a Σ q_w q_a) + o_w Σ a.  Two kernels: few tokens read the
// weights once at the speed of memory, many tokens reuse them from shared memory.
#include "gemm_3_dp4a.cuh"

namespace quantgemm {

namespace {

// Beyond eight tokens reading the weights again, for eight at a time, pays up to here (measured).
constexpr int64_t kFew = 8, kPasses = 3;

size_t value_bytes(Real type) { return type == Real::kFloat32 ? 4 : 2; }

cudaError_t launch_up_to_eight(const GemmArgs& args, cudaStream_t stream) {
  using namespace dp4a;
  if (args.m == 1) return launch_few_tokens<1>(args, stream);
  if (args.m == 2) return launch_few_tokens<2>(args, stream);
  if (args.m <= 4) return launch_few_tokens<4>(args, stream);
  return launch_few_tokens<8>(args, stream);
}

}  // namespace

int64_t gemm_dp4a_scratch_bytes(const GemmArgs&) { return 0; }

cudaError_t launch_gemm_dp4a(const GemmArgs& args, cudaStream_t stream) {
  if (args.m > kFew * kPasses) return dp4a::launch_tiles(args, stream);
  cudaError_t status = cudaSuccess;
  for (int64_t token = 0; token < args.m && status == cudaSuccess; token += kFew) {
    GemmArgs pass = args;
    pass.m = args.m - token < kFew ? args.m - token : kFew;
    if (pass.activations != nullptr) pass.activations += token * ActivationRow::bytes(args.k);
    pass.x = static_cast<const uint8_t*>(args.x) + token * args.k * value_bytes(args.type);
    pass.y = static_cast<uint8_t*>(args.y) + token * args.n * value_bytes(args.type);
    status = launch_up_to_eight(pass, stream);
  }
  return status;
}

}  // namespace quantgemm
