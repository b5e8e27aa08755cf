// SPDX-License-Identifier: MIT
#include "gemm_4_mma_many.cuh"

template cudaError_t quantgemm::launch_gemm_mma_many<quantgemm::Half>(const GemmArgs&, cudaStream_t);
