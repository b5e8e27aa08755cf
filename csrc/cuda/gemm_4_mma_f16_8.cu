// SPDX-License-Identifier: MIT
#include "gemm_4_mma_few.cuh"

template cudaError_t quantgemm::launch_gemm_mma_few<quantgemm::Half>(const GemmArgs&, cudaStream_t);
