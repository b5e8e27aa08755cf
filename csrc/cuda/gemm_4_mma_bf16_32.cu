// SPDX-License-Identifier: MIT
#include "gemm_4_mma.cuh"

template cudaError_t quantgemm::launch_gemm_mma_tile<quantgemm::BFloat16, quantgemm::Tokens32>(
    const GemmArgs&, cudaStream_t);
