// SPDX-License-Identifier: MIT
#include "sparse_kv_product.cuh"

namespace quantgemm {
template cudaError_t launch_product_of<16>(const KvProductArgs&, int, bool, cudaStream_t);
}
