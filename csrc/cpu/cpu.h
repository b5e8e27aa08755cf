// SPDX-License-Identifier: MIT
// The CPU backend: each function does one range of its work; the op layer splits the whole among
// torch's threads.
#pragma once
#include "../args.h"

namespace quantgemm {

void dequantize_cpu(const DequantizeArgs& args, int64_t first_block, int64_t last_block);
void quantize_cpu(const QuantizeArgs& args, int64_t first_block, int64_t last_block);
void quantize_activations_cpu(const ActivationArgs& args, int64_t first_row, int64_t last_row);
// Columns first_n … last_n − 1 of y, by kNaive, kTiled or kDp4a.
void gemm_cpu(const GemmArgs& args, GemmAlgo algo, int64_t first_n, int64_t last_n);
void embedding_cpu(const EmbeddingArgs& args, int64_t first_id, int64_t last_id);
void spec_verify_cpu(const VerifyArgs& args, int64_t first_sequence, int64_t last_sequence);

}  // namespace quantgemm
