// SPDX-License-Identifier: MIT
// Two products of one x whose weights are of different types: blocks of one launch, each what a block of
// gemv_packed.cuh is. Which strips a block has does not change a bit of y, so y is that of two launches; how
// many panels its columns make would, and where more strips of a block want more of them there are two.
#include "gemv_packed_pair.h"

#include <algorithm>
#include <cstdint>

#include "../formats/mixed_pairs.h"
#include "gemv_packed.cuh"

namespace quantgemm {
namespace packed_gemv {
namespace {

template <PackableFormat F, PackableFormat G, class X, int Tokens>
__global__ void __launch_bounds__(Plan<F, X, Tokens>::kAllThreads, 1)
    gemv_pair_kernel(const __grid_constant__ GemmPackedArgs args, const __grid_constant__ Split split,
                     int blocks, const __grid_constant__ GemmPackedArgs other_args,
                     const __grid_constant__ Split other_split) {
  static_assert(Plan<F, X, Tokens>::kWarps == Plan<G, X, Tokens>::kWarps);
  const int block = static_cast<int>(blockIdx.x);
  if (block < blocks)
    multiply_strips<F, X, Tokens, false>(args, split, block);
  else
    multiply_strips<G, X, Tokens, false>(other_args, other_split, block - blocks);
}

// Multiprocessors for the first, so that the block with most to read has the least.
template <class F, class G>
int share_of(const GemmPackedArgs& one, const GemmPackedArgs& other, int multiprocessors) {
  const auto most = [](int64_t n, int64_t strip_bytes, int blocks) {
    const int64_t strips = (n + kStripRows - 1) / kStripRows;
    return (strips + blocks - 1) / blocks * strip_bytes;
  };
  int best = 1;
  int64_t least = INT64_MAX;
  for (int some = 1; some < multiprocessors; ++some) {
    const int64_t bytes =
        std::max(most(one.n, PackedLayout<F>::strip_bytes(one.k), some),
                 most(other.n, PackedLayout<G>::strip_bytes(other.k), multiprocessors - some));
    if (bytes < least) least = bytes, best = some;
  }
  return best;
}

template <class F, class G, class X, int Tokens>
cudaError_t launch_both(const GemmPackedArgs& one, const GemmPackedArgs& other, const Device& device,
                        cudaStream_t stream) {
  const int all = device.multiprocessors;
  if (all < 2) return cudaErrorNotSupported;
  const int share = share_of<F, G>(one, other, all);
  const auto first = divide<F, X, Tokens>(one, device, share);
  const auto second = divide<G, X, Tokens>(other, device, all - share);
  if (first.blocks == 0 || second.blocks == 0) return cudaErrorNotSupported;
  // Panels, and with them the order of sums, have to be those of a launch of its own.
  if (first.split.panels != divide<F, X, Tokens>(one, device, all).split.panels ||
      second.split.panels != divide<G, X, Tokens>(other, device, all).split.panels)
    return cudaErrorNotSupported;
  const int bytes = std::max(first.bytes, second.bytes);
  const auto kernel = gemv_pair_kernel<F, G, X, Tokens>;
  const cudaError_t status = give_shared_memory(kernel, bytes);
  if (status != cudaSuccess) return status;
  const DependentLaunch launch(static_cast<unsigned>(first.blocks + second.blocks),
                               Plan<F, X, Tokens>::kAllThreads, device, stream, bytes);
  return cudaLaunchKernelEx(&launch.config, kernel, one, first.split, first.blocks, other, second.split);
}

}  // namespace
}  // namespace packed_gemv

cudaError_t launch_gemv_pair(const GemmPackedArgs& one, const GemmPackedArgs& other, cudaStream_t stream) {
  if (one.type == Real::kFloat32 || one.m > 8) return cudaErrorNotSupported;
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  status = cudaErrorNotSupported;
  const auto launch = [&]<class F, class G>(const GemmPackedArgs& first, const GemmPackedArgs& second) {
    const auto with = [&]<class X>(X) {
      return first.m == 1 ? packed_gemv::launch_both<F, G, X, 1>(first, second, device, stream)
                          : packed_gemv::launch_both<F, G, X, 8>(first, second, device, stream);
    };
    status = first.type == Real::kFloat16 ? with(Half{}) : with(BFloat16{});
  };
  MixedPairs::for_each([&]<class Pair>(Pair) {
    using F = typename Pair::First;
    using G = typename Pair::Second;
    if (one.qtype == F::kType && other.qtype == G::kType) launch.template operator()<F, G>(one, other);
    if (one.qtype == G::kType && other.qtype == F::kType) launch.template operator()<F, G>(other, one);
  });
  return status;
}

}  // namespace quantgemm
