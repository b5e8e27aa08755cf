// SPDX-License-Identifier: MIT
#include "sparse_kv_attention.cuh"
#include "sparse_kv_four_of_eight.cuh"

namespace quantgemm {
template cudaError_t launch_attention_of<128, FourOfEightCodes>(const KvAttentionArgs&, int, bool,
                                                                cudaStream_t);
}
