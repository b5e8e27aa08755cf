// SPDX-License-Identifier: MIT
// Int8 tensor cores, tiles of 64 and 128 tokens.
#include "gemm_5_mma_q8.cuh"

namespace quantgemm::mma_q8 {

template cudaError_t launch_tiles<4>(const GemmArgs&, const Work&, int64_t, cudaStream_t);
template cudaError_t launch_tiles<8>(const GemmArgs&, const Work&, int64_t, cudaStream_t);

}  // namespace quantgemm::mma_q8
