// SPDX-License-Identifier: MIT
// gemm_packed(x [..., k], packed uint8 [strips, strip_bytes], qtype, n, k, bias [n] or None, algo)
//     -> y [..., n] of x's dtype; y = x · wᵀ + bias, sums and bias in float32, y rounded once
#include "gemm_packed.h"

#include <vector>

#include "../cpu/cpu.h"
#include "ops.h"

namespace quantgemm {

PackedAlgo check_packed_algo(const std::string& name, const PackedProblem& problem) {
  if (name == "auto") return select_packed_gemm(problem);
  std::string known = "auto";
  for (const PackedAlgo algo : kPackedAlgos) {
    known += concat(", ", name_of(algo));
    if (name != name_of(algo)) continue;
    const char* obstacle = packed_obstacle(algo, problem);
    check_implemented(obstacle == nullptr, "algo: ", name,
                      " cannot serve this product: ", obstacle == nullptr ? "" : obstacle,
                      "; these can: ", able_packed_gemms(problem));
    return algo;
  }
  check_value(false, "algo: expected one of ", known, ", got '", name, "'");
  return PackedAlgo::kGemv;
}

#ifdef QG_WITH_CUDA
cudaError_t launch_gemm_packed(const std::pair<PackedAlgo, GemmPackedArgs>& job, cudaStream_t stream) {
  switch (job.first) {
    case PackedAlgo::kGemv: return launch_gemv_packed(job.second, stream);
    case PackedAlgo::kMma: return launch_mma_packed(job.second, stream);
    case PackedAlgo::kWgmma: return launch_wgmma_packed(job.second, stream);
  }
  return cudaErrorInvalidValue;
}
#endif

// The CPU's product: strips are unpacked a few at a time into a thread's own memory, where the CPU backend
// multiplies blocks. x and y are float32 here, so the bias is added before y is rounded.
void multiply_packed_on_cpu(const GemmPackedArgs& args, const PackedShape& shape) {
  constexpr GemmAlgo kAlgo = GemmAlgo::kTiled;
  GemmArgs whole{args.x, nullptr, nullptr, args.y, nullptr, args.m, args.n, args.k, args.qtype, args.type};
  std::vector<uint8_t> scratch(static_cast<size_t>(gemm_cpu_scratch_bytes(whole, kAlgo)) + 64);
  whole.scratch = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
  torch::stable::parallel_for(0, args.m, 32768 / args.k + 1, [&](int64_t begin, int64_t end) {
    gemm_cpu_prepare(whole, kAlgo, begin, end);
  });
  const int64_t strips = (args.n + kStripRows - 1) / kStripRows;
  torch::stable::parallel_for(0, strips, kPanelStrips, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> blocks(static_cast<size_t>(kPanelStrips * kStripRows * shape.row_bytes) + 64);
    for (int64_t s = begin; s < end; s += kPanelStrips) {
      const int64_t last = std::min(end, s + kPanelStrips), row = s * kStripRows,
                    rows = std::min(args.n, last * kStripRows) - row;
      const PackArgs part{args.packed + s * shape.strip_bytes, blocks.data(), rows, args.k, args.qtype};
      unpack_cpu(part, 0, last - s);
      GemmArgs product = whole;
      product.w = blocks.data() - row * shape.row_bytes;  // its rows `row` … are the unpacked ones
      gemm_cpu(product, kAlgo, {0, args.m, row, row + rows});
    }
  });
}

namespace {

void add_bias_on_cpu(const GemmPackedArgs& args) {
  const float* bias = static_cast<const float*>(args.bias);
  torch::stable::parallel_for(0, args.m, 32768 / args.n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* y = static_cast<float*>(args.y) + i * args.n;
      for (int64_t j = 0; j < args.n; ++j) y[j] += bias[j];
    }
  });
}

}  // namespace

Tensor gemm_packed(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n, int64_t k, OptTensor bias,
                   std::string algo) {
  // check
  const PackedShape shape = check_strips(packed_weights, qtype, n, k);
  check_device("x", x);
  const Real type = check_real("x", x.scalar_type());
  check_value(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: expected rows of ", k, " values, got shape ",
              shape_of(x));
  const auto same_device = [&](const char* name, const Tensor& t) {
    check_value(x.is_cuda() == t.is_cuda() && x.get_device() == t.get_device(), name, ": expected on ",
                device_of(x), " as x is, got ", device_of(t));
  };
  same_device("packed", packed_weights);
  if (bias.has_value()) {
    same_device("bias", *bias);
    check_type(bias->scalar_type() == x.scalar_type(), "bias: expected ", dtype_name(x.scalar_type()),
               " as x, got ", dtype_name(bias->scalar_type()));
    check_value(bias->dim() == 1 && bias->size(0) == n, "bias: expected shape [", n, "], got ",
                shape_of(*bias));
  }
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  const PackedAlgo chosen = check_packed_algo(algo, {m, n, k, type, architecture_of(x)});

  // arguments and output
  const bool widen = !x.is_cuda() && type != Real::kFloat32;
  const Tensor rows = packed(widen ? torch::stable::to(x, ScalarType::Float) : x),
               strips = packed(packed_weights);
  OptTensor added;
  if (bias.has_value()) added = packed(widen ? torch::stable::to(*bias, ScalarType::Float) : *bias);
  Tensor y = new_output("gemm_packed", rows, with_last_dim(x, n), rows.scalar_type());
  const GemmPackedArgs args{rows.const_data_ptr(),
                            strips.const_data_ptr<uint8_t>(),
                            added ? added->const_data_ptr() : nullptr,
                            y.mutable_data_ptr(),
                            m,
                            n,
                            k,
                            qtype,
                            widen ? Real::kFloat32 : type};

  // run
  if (m == 0 || n == 0) return widen ? torch::stable::to(y, x.scalar_type()) : y;
  if (x.is_cuda()) {
    [[maybe_unused]] const std::pair job{chosen, args};
    QG_RUN_ON_GPU(gemm_packed, rows, job);
    return y;
  }
  if (k == 0) torch::stable::zero_(y);
  if (k > 0) multiply_packed_on_cpu(args, shape);
  if (added) add_bias_on_cpu(args);
  return widen ? torch::stable::to(y, x.scalar_type()) : y;
}

}  // namespace quantgemm
