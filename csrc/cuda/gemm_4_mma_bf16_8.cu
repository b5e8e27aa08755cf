// SPDX-License-Identifier: MIT
#include "gemm_4_mma_few.cuh"

template cudaError_t quantgemm::launch_gemm_mma_few<quantgemm::BFloat16>(const GemmArgs&, cudaStream_t);
