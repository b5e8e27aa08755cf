// SPDX-License-Identifier: MIT
// The tensor-core rung's entry: the narrowest tile of tokens that holds m, if the multiprocessor's
// shared memory holds its pipeline. Kernel and idea: gemm_4_mma.cuh.
#include "gemm_4_mma.cuh"
#include "gemm_4_mma_few.cuh"

namespace quantgemm {

extern template cudaError_t launch_gemm_mma_few<Half>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_few<BFloat16>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens32>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens64>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens128>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens256>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens32>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens64>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens128>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens256>(const GemmArgs&, cudaStream_t);

namespace {

int shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  return bytes;
}

template <class Tile>
bool suits(const GemmArgs& args) {
  bool fits = false;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0) fits = MmaLayout<F, Tile>::kBytes <= shared_memory_limit();
  });
  return fits;
}

// Calls f with the tile for these sizes.
template <class Fn>
auto with_tile(const GemmArgs& args, Fn&& f) {
  const bool even = (args.m + 127) / 128 % 2 == 0;  // no half of a tile of 256 is empty
  if (args.m > 128 && even && suits<Tokens256>(args)) return f(Tokens256{});
  if (args.m > 64 && suits<Tokens128>(args)) return f(Tokens128{});
  if (args.m > 32 && suits<Tokens64>(args)) return f(Tokens64{});
  return f(Tokens32{});
}

}  // namespace

int64_t gemm_mma_scratch_bytes(const GemmArgs& args) {
  if (args.m <= kFewTokens) return 0;
  return with_tile(args, [&]<class Tile>(Tile) { return mma_scratch_bytes<Tile>(args); });
}

cudaError_t launch_gemm_mma(const GemmArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  if (args.m <= kFewTokens)
    return args.type == Real::kFloat16 ? launch_gemm_mma_few<Half>(args, stream)
                                       : launch_gemm_mma_few<BFloat16>(args, stream);
  return with_tile(args, [&]<class Tile>(Tile) {
    return args.type == Real::kFloat16 ? launch_gemm_mma_tile<Half, Tile>(args, stream)
                                       : launch_gemm_mma_tile<BFloat16, Tile>(args, stream);
  });
}

}  // namespace quantgemm
