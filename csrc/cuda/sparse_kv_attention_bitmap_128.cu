// SPDX-License-Identifier: MIT
#include "sparse_kv_attention.cuh"
#include "sparse_kv_bitmap.cuh"

namespace quantgemm {
template cudaError_t launch_attention_of<128, BitmapCodes>(const KvAttentionArgs&, int, bool, cudaStream_t);
}
