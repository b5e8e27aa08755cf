// SPDX-License-Identifier: MIT
// gemm(x [..., k], w uint8 [n, row_bytes], qtype, algo) -> y [..., n] of x's dtype
// gemm_fp32(x float32 [..., k], w float32 [n, k], algo) -> y float32 [..., n]
#include "../gemm_select.h"

#include "../cpu/cpu.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {
namespace {

GemmAlgo check_algo(const std::string& name, const GemmProblem& problem) {
  if (name == "auto") return select_gemm(problem, false).algo;
  if (name == "auto_q8") return select_gemm(problem, true).algo;
  for (const GemmAlgo algo : kGemmAlgos) {
    if (name != name_of(algo)) continue;
    const char* obstacle = gemm_obstacle(algo, problem);
    check_implemented(obstacle == nullptr, "algo: ", name,
                      " cannot serve this product: ", obstacle ? obstacle : "",
                      "; these can: ", able_gemms(problem));
    return algo;
  }
  std::string known = "auto, auto_q8";
  for (const GemmAlgo algo : kGemmAlgos) known += concat(", ", name_of(algo));
  check_value(false, "algo: expected one of ", known, ", got '", name, "'");
  return GemmAlgo::kNaive;
}

#ifdef QG_WITH_CUDA
cudaError_t launch_gemm(const std::pair<GemmAlgo, GemmArgs>& job, cudaStream_t stream) {
  switch (job.first) {
    case GemmAlgo::kNaive: return launch_gemm_naive(job.second, stream);
    case GemmAlgo::kTiled: return launch_gemm_tiled(job.second, stream);
    case GemmAlgo::kDp4a: return launch_gemm_dp4a(job.second, stream);
    case GemmAlgo::kMma: return launch_gemm_mma(job.second, stream);
    case GemmAlgo::kMmaQ8: return launch_gemm_mma_q8(job.second, stream);
  }
  return cudaErrorInvalidValue;
}

int64_t scratch_bytes(GemmAlgo algo, const GemmArgs& args) {
  switch (algo) {
    case GemmAlgo::kDp4a: return gemm_dp4a_scratch_bytes(args);
    case GemmAlgo::kMma: return gemm_mma_scratch_bytes(args);
    case GemmAlgo::kMmaQ8: return gemm_mma_q8_scratch_bytes(args);
    default: return 0;
  }
}
#endif

// y = x · wᵀ for checked arguments; w's rows back to back from a 16-byte boundary.
Tensor multiply(const Tensor& x, const Tensor& w, int64_t n, int64_t qtype, GemmAlgo algo) {
  const int64_t k = x.size(x.dim() - 1);
  const Tensor rows = packed(x), weights = packed(w);
  Tensor y = new_output("gemm", rows, with_last_dim(x, n), x.scalar_type());
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  if (m == 0 || n == 0) return y;
  if (k == 0) return torch::stable::zero_(y);

  std::optional<Tensor> activations, scratch;
  if (wants_rounded_rows(algo, m, rows.is_cuda())) activations = quantize_activations(rows);
  GemmArgs args{rows.const_data_ptr(),
                activations ? activations->const_data_ptr<uint8_t>() : nullptr,
                static_cast<const uint8_t*>(weights.const_data_ptr()),
                y.mutable_data_ptr(),
                nullptr,
                m,
                n,
                k,
                qtype,
                *real_of(x.scalar_type())};
  if (rows.is_cuda()) {
#ifdef QG_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(rows.get_device());
    if (const int64_t bytes = scratch_bytes(algo, args); bytes > 0) {
      scratch = new_output("gemm", rows, {bytes}, ScalarType::Byte);
      args.scratch = scratch->mutable_data_ptr();
    }
#endif
    const std::pair job{algo, args};
    QG_RUN_ON_GPU(gemm, rows, job);
  } else {
    if (const int64_t bytes = gemm_cpu_scratch_bytes(args, algo); bytes > 0) {
      scratch = new_output("gemm", rows, {bytes}, ScalarType::Byte);
      args.scratch = scratch->mutable_data_ptr();
    }
    torch::stable::parallel_for(
        0, m, 32768 / k + 1, [&](int64_t begin, int64_t end) { gemm_cpu_prepare(args, algo, begin, end); });
    // Threads divide the longer side of y: weights are decoded once per division of m.
    const bool by_tokens = m > n;
    const int64_t length = by_tokens ? m : n, grain = 32768 / (m * n / length * k) + 1;
    torch::stable::parallel_for(0, length, grain, [&](int64_t begin, int64_t end) {
      gemm_cpu(args, algo, by_tokens ? GemmRange{begin, end, 0, n} : GemmRange{0, m, begin, end});
    });
  }
  return y;
}

void check_product(const Tensor& x, const Tensor& w) {
  check_device("x", x);
  check_device("w", w);
  check_real("x", x.scalar_type());
  check_value(x.dim() >= 1, "x: expected at least one dimension [..., k], got a scalar");
  check_value(w.dim() == 2, "w: expected two dimensions [n, row], got shape ", shape_of(w));
  check_value(x.is_cuda() == w.is_cuda() && x.get_device() == w.get_device(), "w: expected on ", device_of(x),
              " as x is, got ", device_of(w));
}

}  // namespace

Tensor gemm(Tensor x, Tensor w, int64_t qtype, std::string algo) {
  const RowFormat row = check_qtype(qtype);
  check_product(x, w);
  check_type(w.scalar_type() == ScalarType::Byte, "w: expected torch.uint8, got ",
             dtype_name(w.scalar_type()));
  const int64_t k = x.size(x.dim() - 1), row_bytes = w.size(1);
  check_value(row_bytes % row.bytes == 0, "w: row of ", row_bytes, " bytes is not a multiple of the ",
              row.bytes, "-byte ", row.name, " block");
  check_value(row_bytes / row.bytes * row.elems == k, "x: expected rows of ",
              row_bytes / row.bytes * row.elems, " values as w's rows of ", row_bytes, " bytes of ", row.name,
              ", got shape ", shape_of(x));
  const int64_t n = w.size(0), m = k == 0 ? 0 : x.numel() / k;
  const GemmProblem problem{m, n, k, row.plain, row.elems, *real_of(x.scalar_type()), architecture_of(x)};
  return multiply(x, w, n, qtype, check_algo(algo, problem));
}

Tensor gemm_fp32(Tensor x, Tensor w, std::string algo) {
  check_product(x, w);
  check_type(x.scalar_type() == ScalarType::Float, "x: expected torch.float32, got ",
             dtype_name(x.scalar_type()));
  check_type(w.scalar_type() == ScalarType::Float, "w: expected torch.float32, got ",
             dtype_name(w.scalar_type()));
  check_value(algo == "naive" || algo == "tiled", "algo: expected naive or tiled, got '", algo, "'");
  check_value(w.size(1) == x.size(x.dim() - 1), "x: expected rows of ", w.size(1),
              " values as w's, got shape ", shape_of(x));
  return multiply(x, w, w.size(0), kFloat32Type, algo == "naive" ? GemmAlgo::kNaive : GemmAlgo::kTiled);
}

}  // namespace quantgemm
