// SPDX-License-Identifier: MIT
#include "gemm_3_dp4a_few.cuh"

template cudaError_t quantgemm::dp4a::launch_few_tokens<2>(const quantgemm::GemmArgs&, cudaStream_t);
