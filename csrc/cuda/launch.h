// SPDX-License-Identifier: MIT
// Every launcher of the CUDA backend. Each enqueues on the given stream and returns the status;
// none synchronises, allocates or looks at device data, so all can be captured in a CUDA graph.
#pragma once
#include <cuda_runtime_api.h>

#include "../args.h"

namespace quantgemm {

cudaError_t launch_dequantize(const DequantizeArgs& args, cudaStream_t stream);
cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream);
cudaError_t launch_quantize_activations(const ActivationArgs& args, cudaStream_t stream);

// The ladder: each rung with the scratch memory it wants for these sizes on the current device.
cudaError_t launch_gemm_naive(const GemmArgs& args, cudaStream_t stream);
cudaError_t launch_gemm_tiled(const GemmArgs& args, cudaStream_t stream);
cudaError_t launch_gemm_dp4a(const GemmArgs& args, cudaStream_t stream);
cudaError_t launch_gemm_mma(const GemmArgs& args, cudaStream_t stream);
cudaError_t launch_gemm_mma_q8(const GemmArgs& args, cudaStream_t stream);
int64_t gemm_dp4a_scratch_bytes(const GemmArgs& args);
int64_t gemm_mma_scratch_bytes(const GemmArgs& args);
int64_t gemm_mma_q8_scratch_bytes(const GemmArgs& args);

// The packed layout (formats/packed.h) and products with it.
cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream);
cudaError_t launch_unpack(const PackArgs& args, cudaStream_t stream);
cudaError_t launch_gemv_packed(const GemmPackedArgs& args, cudaStream_t stream);
cudaError_t launch_mma_packed(const GemmPackedArgs& args, cudaStream_t stream);
// Fills args.routes' groups, and rows of y that have no expert; a product with routes comes behind it, unless
// they are few enough for its blocks to do that.
cudaError_t launch_expert_routes(const GemmPackedArgs& args, cudaStream_t stream);

cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream);

cudaError_t launch_rms_norm(const RmsNormArgs& args, cudaStream_t stream);
cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream);

// Rows of logits: their laws into args.row_laws, of this many bytes (row_laws.cuh).
int64_t verify_scratch_bytes(const VerifyArgs& args);
cudaError_t launch_row_laws(const VerifyArgs& args, cudaStream_t stream);
cudaError_t launch_spec_verify(const VerifyArgs& args, cudaStream_t stream);
cudaError_t launch_verify_modes(const VerifyArgs& args,
                                cudaStream_t stream);  // its part for trees and blocks

// The sparse key-value container (kv.h). The product says how many parts of k it wants.
int64_t sparse_kv_compress_scratch_bytes(const KvCompressArgs& args);
cudaError_t launch_sparse_kv_compress(const KvCompressArgs& args, cudaStream_t stream);
int64_t sparse_kv_product_split(const KvProductArgs& args);
cudaError_t launch_sparse_kv_product(const KvProductArgs& args, cudaStream_t stream);

// The native cache (kv_page.h). Attention says how many parts of the context it wants.
cudaError_t launch_sparse_kv_append(const KvAppendArgs& args, cudaStream_t stream);
// Few tokens, no more than the window, without means, keys and values in pages of one kind. Without cosines
// it is the same as the other one.
cudaError_t launch_sparse_kv_append_rotated(const KvAppendRotatedArgs& args, cudaStream_t stream);
int64_t sparse_kv_attention_split(const KvAttentionArgs& args);
cudaError_t launch_sparse_kv_attention(const KvAttentionArgs& args, cudaStream_t stream);
// The same for keys and values in pages of different kinds.
int64_t sparse_kv_attention_mixed_split(const KvAttentionArgs& args);
cudaError_t launch_sparse_kv_attention_mixed(const KvAttentionArgs& args, cudaStream_t stream);

}  // namespace quantgemm
