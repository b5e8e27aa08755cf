// SPDX-License-Identifier: MIT
// The C++ side of torch.ops.quantgemm: one function per op, registered in module.cpp.
#pragma once
#include <tuple>

#include "checks.h"

namespace quantgemm {

Tensor dequantize(Tensor blocks, int64_t qtype, ScalarType dtype);
Tensor quantize(Tensor x, int64_t qtype, std::optional<Tensor> importance);
Tensor quantize_activations(Tensor x);
Tensor gemm(Tensor x, Tensor w, int64_t qtype, std::string algo);
Tensor gemm_fp32(Tensor x, Tensor w, std::string algo);
Tensor pack(Tensor w, int64_t qtype);
Tensor unpack(Tensor packed_weights, int64_t qtype, int64_t n, int64_t k);
Tensor embedding(Tensor ids, Tensor w, int64_t qtype, ScalarType dtype);
Tensor rms_norm(Tensor x, Tensor weight, double eps);
std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin);

using OptTensor = std::optional<Tensor>;
Tensor gemm_packed(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n, int64_t k, OptTensor bias,
                   std::string algo, OptTensor residual, OptTensor norm_weight, double norm_eps,
                   OptTensor ahead);
Tensor gemm_packed_gated(Tensor x, Tensor gate, Tensor up, int64_t qtype, int64_t n, int64_t k,
                         std::string algo, OptTensor norm_weight, double norm_eps, OptTensor ahead);
std::tuple<Tensor, Tensor> gemm_packed_pair(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n,
                                            Tensor other, int64_t other_qtype, int64_t other_n, int64_t k,
                                            std::string algo, OptTensor norm_weight, double norm_eps,
                                            OptTensor ahead);
Tensor moe_gemm(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n, int64_t k, Tensor expert_ids,
                OptTensor weights, OptTensor bias, std::string algo, OptTensor up);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spec_verify(
    Tensor target, Tensor draft_tokens, Tensor cu_rows, OptTensor draft, bool target_probs, bool draft_probs,
    OptTensor draft_lse, OptTensor draft_cutoff, OptTensor target_to_draft, OptTensor temperature,
    OptTensor top_k, OptTensor top_p, OptTensor min_p, OptTensor seed, OptTensor position, OptTensor uniforms,
    OptTensor parents, bool block);
std::tuple<Tensor, Tensor, Tensor> sample(Tensor logits, OptTensor temperature, OptTensor top_k,
                                          OptTensor top_p, OptTensor min_p, OptTensor seed,
                                          OptTensor position, OptTensor uniforms);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> draft_sample(Tensor logits, OptTensor temperature,
                                                                OptTensor top_k, OptTensor top_p,
                                                                OptTensor min_p, OptTensor seed,
                                                                OptTensor position, OptTensor uniforms,
                                                                bool return_probs, int64_t turn);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_kv_compress(Tensor x, int64_t bits,
                                                                              int64_t keep, bool value);
Tensor sparse_key_spmm(Tensor query, Tensor bitmaps, Tensor tile_offsets, Tensor packed_codes,
                       OptTensor scales, OptTensor zeros, int64_t num_tokens, int64_t groups, int64_t bits);
Tensor sparse_value_spmm(Tensor scores, Tensor bitmaps, Tensor tile_offsets, Tensor packed_codes,
                         OptTensor scales, OptTensor zeros, int64_t head_dim, int64_t groups, int64_t bits);
void sparse_kv_append(Tensor keys, Tensor values, Tensor key_pages, Tensor value_pages, Tensor page_table,
                      Tensor recent_keys, Tensor recent_values, Tensor lens, OptTensor means,
                      OptTensor counts, int64_t sinks, int64_t window, std::string key_format,
                      std::string value_format, int64_t keep);
Tensor sparse_kv_append_rotated(Tensor query, Tensor keys, Tensor values, Tensor cos, Tensor sin,
                                Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor recent_keys,
                                Tensor recent_values, Tensor lens, OptTensor means, int64_t sinks,
                                int64_t window, std::string key_format, std::string value_format,
                                int64_t keep);
std::tuple<Tensor, Tensor> sparse_kv_attention(Tensor query, Tensor key_pages, Tensor value_pages,
                                               Tensor page_table, Tensor recent_keys, Tensor recent_values,
                                               Tensor lens, OptTensor means, int64_t sinks, int64_t window,
                                               std::string key_format, std::string value_format, int64_t keep,
                                               double scale);

bool can_quantize(int64_t qtype);

}  // namespace quantgemm
