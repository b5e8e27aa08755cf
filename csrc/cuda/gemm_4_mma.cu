// SPDX-License-Identifier: MIT
// The tensor-core rung's entry: the narrowest tile of tokens that holds m, if the multiprocessor's
// shared memory holds its pipeline. Kernel and idea: gemm_4_mma.cuh.
#include "gemm_4_mma.cuh"
#include "gemm_4_mma_few.cuh"
#include "gemm_4_mma_many.cuh"

namespace quantgemm {

extern template cudaError_t launch_gemm_mma_few<Half>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_few<BFloat16>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_many<Half>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_many<BFloat16>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens32>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens64>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<Half, Tokens128>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens32>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens64>(const GemmArgs&, cudaStream_t);
extern template cudaError_t launch_gemm_mma_tile<BFloat16, Tokens128>(const GemmArgs&, cudaStream_t);

namespace {

// What the four tiles have in common, to choose among them.
template <class Tile>
struct TileKernel {
  template <class F>
  using Layout = MmaLayout<F, Tile>;
  template <class F>
  static TileSchedule schedule(const GemmArgs& args) {
    return mma_schedule<F, Tile>(args);
  }
  template <class T>
  static cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
    return launch_gemm_mma_tile<T, Tile>(args, stream);
  }
};
struct ManyKernel {
  template <class F>
  using Layout = ManyLayout<F>;
  template <class F>
  static TileSchedule schedule(const GemmArgs& args) {
    return mma_many_schedule<F>(args);
  }
  template <class T>
  static cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
    return launch_gemm_mma_many<T>(args, stream);
  }
};

template <class Kernel>
bool suits(const GemmArgs& args) {
  bool fits = false;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % 32 == 0)
      fits = Kernel::template Layout<F>::kBytes <= current_device().shared_per_block;
  });
  return fits;
}

// Calls f with the kernel for these sizes.
template <class Fn>
auto with_kernel(const GemmArgs& args, Fn&& f) {
  // No half of a tile of 256 is empty, or few are: then the many-token kernel gains more than it loses.
  const bool filled = (args.m + 127) / 128 % 2 == 0 || args.m > 1024;
  if (args.m > 128 && filled && suits<ManyKernel>(args)) return f(ManyKernel{});
  if (args.m > 64 && suits<TileKernel<Tokens128>>(args)) return f(TileKernel<Tokens128>{});
  if (args.m > 32 && suits<TileKernel<Tokens64>>(args)) return f(TileKernel<Tokens64>{});
  return f(TileKernel<Tokens32>{});
}

}  // namespace

int64_t gemm_mma_scratch_bytes(const GemmArgs& args) {
  if (args.m <= kFewTokens) return 0;
  return with_kernel(args, [&]<class Kernel>(Kernel) {
    int64_t bytes = 0;
    BlockFormats::visit(args.qtype, [&]<class F>(F) {
      if constexpr (F::kElems % 32 == 0)
        bytes = PartialTiles::bytes(Kernel::template schedule<F>(args), Kernel::template Layout<F>::kElems);
    });
    return bytes;
  });
}

cudaError_t launch_gemm_mma(const GemmArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  if (args.m <= kFewTokens)
    return args.type == Real::kFloat16 ? launch_gemm_mma_few<Half>(args, stream)
                                       : launch_gemm_mma_few<BFloat16>(args, stream);
  return with_kernel(args, [&]<class Kernel>(Kernel) {
    return args.type == Real::kFloat16 ? Kernel::template launch<Half>(args, stream)
                                       : Kernel::template launch<BFloat16>(args, stream);
  });
}

}  // namespace quantgemm
