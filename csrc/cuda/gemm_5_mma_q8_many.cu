// SPDX-License-Identifier: MIT
// Int8 tensor cores for more than 128 tokens: which problems, and their launch.
#include "gemm_5_mma_q8_many.cuh"

#include "gemm_5_mma_q8_many.h"

namespace quantgemm::mma_q8 {
namespace {

// Calls f for a format whose groups are whole products; the others have twice the scales.
template <class Fn>
void visit_many(const GemmArgs& args, Fn&& f) {
  BlockFormats::visit(args.qtype, [&]<class F>(F format) {
    if constexpr (F::kElems % 32 == 0 && F::kGroup % 32 == 0) f(format);
  });
}

template <class F>
TileSchedule many_schedule(const GemmArgs& args) {
  using L = ManyTokens<F>;
  return schedule_tiles((args.n + L::kRows - 1) / L::kRows, (args.m + L::kTokens - 1) / L::kTokens,
                        (args.k + L::kChunk - 1) / L::kChunk, multiprocessors(), true);
}

}  // namespace

// Compute capability 9.0 only: with the registers of others the multipliers spill.
bool serves_many(const GemmArgs& args) {
  const bool filled = (args.m + 127) / 128 % 2 == 0 || args.m > 1024;  // no half of a tile is empty, or few
  if (args.m <= 128 || !filled || args.k >= int64_t{1} << 23) return false;
  int device = 0, major = 0, shared_bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  bool serves = false;
  visit_many(args, [&]<class F>(F) { serves = major == 9 && ManyTokens<F>::kBytes <= shared_bytes; });
  return serves;
}

int64_t many_scratch_bytes(const GemmArgs& args) {
  int64_t bytes = 0;
  visit_many(args,
             [&]<class F>(F) { bytes = PartialTiles::bytes(many_schedule<F>(args), ManyTokens<F>::kElems); });
  return bytes;
}

cudaError_t launch_many(const GemmArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  visit_many(args, [&]<class F>(F) {
    using L = ManyTokens<F>;
    GemmArgs rounded = args;
    rounded.x = args.activations;
    status = quantgemm::launch_tiles(gemm_mma_q8_many_kernel<F>, L::kThreads, L::kBytes, rounded,
                                     args.k / F::kElems * F::kBytes, many_schedule<F>(args), stream);
  });
  return status;
}

}  // namespace quantgemm::mma_q8
