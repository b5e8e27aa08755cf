// SPDX-License-Identifier: MIT
#include "sparse_kv_attention.cuh"

namespace quantgemm {
template cudaError_t launch_attention_of<64>(const KvAttentionArgs&, cudaStream_t);
}
