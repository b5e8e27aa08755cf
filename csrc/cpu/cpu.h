// SPDX-License-Identifier: MIT
// The CPU backend: each function does one range of its work; the op layer splits the whole among
// torch's threads.
#pragma once
#include <vector>

#include "../args.h"

namespace quantgemm {

void dequantize_cpu(const DequantizeArgs& args, int64_t first_block, int64_t last_block);
void quantize_cpu(const QuantizeArgs& args, int64_t first_block, int64_t last_block);
void quantize_activations_cpu(const ActivationArgs& args, int64_t first_row, int64_t last_row);

// Products by kNaive, kTiled or kDp4a: args.scratch has so many bytes, all tokens are prepared into
// it, then any division of y into ranges gives the same y.
struct GemmRange {
  int64_t first_m, last_m, first_n, last_n;
};
int64_t gemm_cpu_scratch_bytes(const GemmArgs& args, GemmAlgo algo);
void gemm_cpu_prepare(const GemmArgs& args, GemmAlgo algo, int64_t first_m, int64_t last_m);
void gemm_cpu(const GemmArgs& args, GemmAlgo algo, const GemmRange& range);

void pack_cpu(const PackArgs& args, int64_t first_strip, int64_t last_strip);
void unpack_cpu(const PackArgs& args, int64_t first_strip, int64_t last_strip);

// A row to int8_product.h's codes and scales; one number of y of two such rows.
void round_to_int8_cpu(const float* x, int64_t k, int8_t* codes, float* scales);
float int8_product_cpu(const int8_t* x, const float* x_scales, const int8_t* w, const float* w_scales,
                       int64_t k);

void embedding_cpu(const EmbeddingArgs& args, int64_t first_id, int64_t last_id);
void rms_norm_cpu(const RmsNormArgs& args, int64_t first_row, int64_t last_row);
void rotary_cpu(const RotaryArgs& args, int64_t first_token, int64_t last_token);  // of all sequences
void spec_verify_cpu(const VerifyArgs& args, int64_t first_sequence, int64_t last_sequence);

// Compression of 64-token blocks of all heads, counted head by head: bitmaps and fits of a range, then
// all offsets, then the codes of a range.
void kv_fit_cpu(const KvCompressArgs& args, int64_t first_block, int64_t last_block);
void kv_offsets_cpu(const KvCompressArgs& args);
void kv_pack_cpu(const KvCompressArgs& args, int64_t first_block, int64_t last_block);
// Groups of 64 rows of y, counted head by head.
void kv_product_cpu(const KvProductArgs& args, int64_t first_group, int64_t last_group);

// The native cache: pairs of sequence and key-value head.
// All but the keep largest magnitudes become zero; of equal ones the first stay. order: room.
void kv_prune_cpu(uint16_t* row, int64_t channels, int64_t keep, std::vector<int>& order);
void kv_append_cpu(const KvAppendArgs& args, int64_t first_row, int64_t last_row);
void kv_attention_cpu(const KvAttentionArgs& args, int64_t first_row, int64_t last_row);

}  // namespace quantgemm
