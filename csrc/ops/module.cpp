// SPDX-License-Identifier: MIT
// Table of contents. Ops: schema once, one implementation for the CPU and CUDA backends (each op
// branches at its end). The Python module itself carries only what is not an op: the format table,
// by which the tests compare C++ and Python, and what was built.
#include "../gemm_select.h"
#include "ops.h"

STABLE_TORCH_LIBRARY(quantgemm, m) {
  m.def("dequantize(Tensor blocks, int qtype, ScalarType dtype=float) -> Tensor");
  m.def("quantize(Tensor x, int qtype, Tensor? importance=None) -> Tensor");
  m.def("quantize_activations(Tensor x) -> Tensor");
  m.def("gemm(Tensor x, Tensor w, int qtype, str algo='auto') -> Tensor");
  m.def("gemm_fp32(Tensor x, Tensor w, str algo) -> Tensor");
  m.def("pack(Tensor w, int qtype) -> Tensor");
  m.def("unpack(Tensor packed, int qtype, int n, int k) -> Tensor");
  m.def(
      "gemm_packed(Tensor x, Tensor packed, int qtype, int n, int k, Tensor? bias=None, str algo='auto', "
      "Tensor? residual=None, Tensor? norm_weight=None, float norm_eps=0, Tensor? ahead=None) -> Tensor");
  m.def(
      "gemm_packed_gated(Tensor x, Tensor gate, Tensor up, int qtype, int n, int k, str algo='auto', "
      "Tensor? norm_weight=None, float norm_eps=0, Tensor? ahead=None) -> Tensor");
  m.def(
      "gemm_packed_pair(Tensor x, Tensor packed, int qtype, int n, Tensor other, int other_qtype, "
      "int other_n, int k, str algo='auto', Tensor? norm_weight=None, float norm_eps=0, Tensor? ahead=None) "
      "-> (Tensor y, Tensor other_y)");
  m.def(
      "moe_gemm(Tensor x, Tensor packed, int qtype, int n, int k, Tensor expert_ids, Tensor? weights=None, "
      "Tensor? bias=None, str algo='auto', Tensor? up=None) -> Tensor");
  m.def("embedding(Tensor ids, Tensor w, int qtype, ScalarType dtype=float) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q, Tensor k)");
  m.def(
      "spec_verify(Tensor target, Tensor draft_tokens, Tensor cu_rows, Tensor? draft=None, "
      "bool target_probs=False, bool draft_probs=False, Tensor? draft_lse=None, Tensor? draft_cutoff=None, "
      "Tensor? target_to_draft=None, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, "
      "Tensor? min_p=None, Tensor? seed=None, Tensor? position=None, Tensor? uniforms=None, "
      "Tensor? parents=None, bool block=False) "
      "-> (Tensor tokens, Tensor count, Tensor logprobs, Tensor status, Tensor nodes)");
  m.def(
      "sample(Tensor logits, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, "
      "Tensor? min_p=None, Tensor? seed=None, Tensor? position=None, Tensor? uniforms=None) "
      "-> (Tensor tokens, Tensor logprobs, Tensor status)");
  m.def(
      "draft_sample(Tensor logits, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, "
      "Tensor? min_p=None, Tensor? seed=None, Tensor? position=None, Tensor? uniforms=None, "
      "bool return_probs=False, int turn=0) -> (Tensor tokens, Tensor lse, Tensor cutoff, Tensor probs, "
      "Tensor status)");
  m.def(
      "sparse_kv_compress(Tensor x, int bits, int keep, bool value) -> (Tensor bitmaps, Tensor tile_offsets, "
      "Tensor packed, Tensor scales, Tensor zeros, Tensor num_words)");
  m.def(
      "sparse_key_spmm(Tensor query, Tensor bitmaps, Tensor tile_offsets, Tensor packed, Tensor? scales, "
      "Tensor? zeros, int num_tokens, int groups, int bits) -> Tensor");
  m.def(
      "sparse_value_spmm(Tensor scores, Tensor bitmaps, Tensor tile_offsets, Tensor packed, Tensor? scales, "
      "Tensor? zeros, int head_dim, int groups, int bits) -> Tensor");
  m.def(
      "sparse_kv_append(Tensor keys, Tensor values, Tensor(a!) key_pages, Tensor(b!) value_pages, "
      "Tensor page_table, Tensor(c!) recent_keys, Tensor(d!) recent_values, Tensor lens, Tensor? means, "
      "Tensor? counts, int sinks, int window, str key_format, str value_format, int keep) -> ()");
  m.def(
      "sparse_kv_append_rotated(Tensor query, Tensor keys, Tensor values, Tensor cos, Tensor sin, "
      "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor page_table, Tensor(c!) recent_keys, "
      "Tensor(d!) recent_values, Tensor lens, Tensor? means, int sinks, int window, str key_format, "
      "str value_format, int keep) -> Tensor");
  m.def(
      "sparse_kv_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, "
      "Tensor recent_keys, Tensor recent_values, Tensor lens, Tensor? means, int sinks, int window, "
      "str key_format, str value_format, int keep, float scale) -> (Tensor out, Tensor lse)");
}

namespace {

void register_backend(torch::stable::detail::StableLibrary& m) {
  m.impl("dequantize", TORCH_BOX(&quantgemm::dequantize));
  m.impl("quantize", TORCH_BOX(&quantgemm::quantize));
  m.impl("quantize_activations", TORCH_BOX(&quantgemm::quantize_activations));
  m.impl("gemm", TORCH_BOX(&quantgemm::gemm));
  m.impl("gemm_fp32", TORCH_BOX(&quantgemm::gemm_fp32));
  m.impl("pack", TORCH_BOX(&quantgemm::pack));
  m.impl("unpack", TORCH_BOX(&quantgemm::unpack));
  m.impl("gemm_packed", TORCH_BOX(&quantgemm::gemm_packed));
  m.impl("gemm_packed_gated", TORCH_BOX(&quantgemm::gemm_packed_gated));
  m.impl("gemm_packed_pair", TORCH_BOX(&quantgemm::gemm_packed_pair));
  m.impl("moe_gemm", TORCH_BOX(&quantgemm::moe_gemm));
  m.impl("embedding", TORCH_BOX(&quantgemm::embedding));
  m.impl("rms_norm", TORCH_BOX(&quantgemm::rms_norm));
  m.impl("rotary", TORCH_BOX(&quantgemm::rotary));
  m.impl("spec_verify", TORCH_BOX(&quantgemm::spec_verify));
  m.impl("sample", TORCH_BOX(&quantgemm::sample));
  m.impl("draft_sample", TORCH_BOX(&quantgemm::draft_sample));
  m.impl("sparse_kv_compress", TORCH_BOX(&quantgemm::sparse_kv_compress));
  m.impl("sparse_key_spmm", TORCH_BOX(&quantgemm::sparse_key_spmm));
  m.impl("sparse_value_spmm", TORCH_BOX(&quantgemm::sparse_value_spmm));
  m.impl("sparse_kv_append", TORCH_BOX(&quantgemm::sparse_kv_append));
  m.impl("sparse_kv_append_rotated", TORCH_BOX(&quantgemm::sparse_kv_append_rotated));
  m.impl("sparse_kv_attention", TORCH_BOX(&quantgemm::sparse_kv_attention));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(quantgemm, CPU, m) { register_backend(m); }
STABLE_TORCH_LIBRARY_IMPL(quantgemm, CUDA, m) { register_backend(m); }

namespace {

namespace py = pybind11;
using namespace quantgemm;

py::dict table_row(auto f) {
  using F = decltype(f);
  py::dict row;
  row["name"] = F::kName;
  row["type_id"] = F::kType;
  row["block_elems"] = static_cast<int>(F::kElems);
  row["block_bytes"] = static_cast<int>(F::kBytes);
  row["group"] = static_cast<int>(F::kGroup);
  row["has_offset"] = static_cast<bool>(F::kOffset);
  row["is_plain"] = PlainFormat<F>;
  row["can_quantize"] = can_quantize(F::kType);
  row["can_pack"] = PackableFormat<F>;
  return row;
}

py::list format_table() {
  py::list rows;
  PlainFormats::for_each([&](auto f) { rows.append(table_row(f)); });
  BlockFormats::for_each([&](auto f) { rows.append(table_row(f)); });
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = QG_COMPILER;
  info["cuda"] = QG_CUDA_VERSION;              // "" in a CPU-only build
  info["cuda_architectures"] = QG_CUDA_ARCHS;  // as TORCH_CUDA_ARCH_LIST spells them
  info["torch_abi"] = QG_TORCH_ABI;
  return info;
}

Real real_named(const std::string& dtype) {
  if (dtype == "float32") return Real::kFloat32;
  return dtype == "float16" ? Real::kFloat16 : Real::kBFloat16;
}

py::object text_or_none(const char* text) {
  return text == nullptr ? py::object(py::none()) : py::object(py::str(text));
}

// What `auto` chooses for a product, why, and which algorithms could serve it.
py::dict choose_gemm(int64_t m, int64_t n, int64_t k, int64_t qtype, const std::string& dtype, int arch,
                     bool may_round) {
  const RowFormat row = check_qtype(qtype);
  const GemmProblem problem{m, n, k, row.plain, row.elems, real_named(dtype), arch};
  const GemmChoice choice = select_gemm(problem, may_round);
  py::dict result, obstacles;
  py::list rounding;
  for (const GemmAlgo algo : kGemmAlgos) {
    obstacles[name_of(algo)] = text_or_none(gemm_obstacle(algo, problem));
    if (rounds_activations(algo)) rounding.append(name_of(algo));
  }
  result["algo"] = name_of(choice.algo);
  result["reason"] = choice.reason;
  result["obstacles"] = obstacles;
  result["rounding"] = rounding;  // the algorithms that make x int8 first
  return result;
}

// The same for packed weights. The CPU has one way, without a name.
py::dict choose_packed_gemm(int64_t m, int64_t n, int64_t k, const std::string& dtype, int arch,
                            bool may_round) {
  const PackedProblem problem{m, n, k, real_named(dtype), arch};
  py::dict result, obstacles;
  for (const PackedAlgo algo : kPackedAlgos)
    obstacles[name_of(algo)] = text_or_none(packed_obstacle(algo, problem));
  const PackedAlgo chosen = select_packed_gemm(problem, may_round);
  const bool nameless = arch == 0 && chosen != PackedAlgo::kInt8;
  py::list rounding;
  rounding.append(name_of(PackedAlgo::kInt8));
  result["algo"] = nameless ? "auto" : name_of(chosen);
  result["reason"] = nameless ? "strips are decoded to float32, row by row" : reason_for(chosen);
  result["obstacles"] = obstacles;
  result["rounding"] = rounding;
  result["folds_norm"] = folds_norm(chosen, problem);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "quantgemm's compiled module: importing it registers torch.ops.quantgemm";
  m.def("format_table", &format_table, "Every GGUF type as the C++ kernels know it");
  m.def("select_gemm", &choose_gemm,
        "Choice of gemm_select.h for sizes, type id, dtype name and 10 x capability");
  m.def("select_packed_gemm", &choose_packed_gemm, "Likewise for packed weights");
  m.def("build_info", &build_info, "Compiler, CUDA version and architectures of this build");
}
