// SPDX-License-Identifier: MIT
#include "sparse_kv_attention.cuh"
#include "sparse_kv_codes.cuh"

namespace quantgemm {
template cudaError_t launch_attention_of<64, DenseCodes>(const KvAttentionArgs&, int, bool, cudaStream_t);
}
