// SPDX-License-Identifier: MIT
// gemm_packed(x [..., k], packed uint8 [strips, strip_bytes], qtype, n, k, bias [n] or None, algo,
//             residual [..., n] or None, norm_weight [k] or None, norm_eps)
//     -> y [..., n] of x's dtype; y = x · wᵀ + bias + residual, sums and bias in float32, y rounded once
// gemm_packed_gated(x, gate, up, qtype, n, k, algo, norm_weight, norm_eps)
//     -> silu(x · gateᵀ) · (x · upᵀ), gate and up like packed
// gemm_packed_pair(x, packed, qtype, n, other, other_qtype, other_n, k, algo, norm_weight, norm_eps)
//     -> x · wᵀ and x · otherᵀ, in one launch for up to eight tokens and some pairs of types
// `ahead`, packed weights that a later launch reads, or None, is the last argument of all three: a hint.
// With norm_weight of rms_norm(x, norm_weight, norm_eps) in place of x: that itself, or inside of the product
// where folds_norm(), which rounds in other places (gemv_packed_stage.cuh).
#include "gemm_packed.h"

#include <vector>

#include "../cpu/cpu.h"
#include "../int8_product.h"
#include "ops.h"
#ifdef QG_WITH_CUDA
#include "../cuda/gemm_packed_few.h"
#include "../cuda/gemm_packed_int8.h"
#include "../cuda/gemm_packed_wgmma.h"
#include "../cuda/gemv_packed_pair.h"
#endif

namespace quantgemm {

PackedAlgo check_packed_algo(const std::string& name, const PackedProblem& problem) {
  if (name == "auto") return select_packed_gemm(problem);
  const bool may_round = name == "auto_int8" && !problem.experts;
  if (may_round && problem.k == 0) return select_packed_gemm(problem);
  std::string known = problem.experts ? "auto" : "auto, auto_int8";
  for (const PackedAlgo algo : kPackedAlgos) {
    const bool has_experts = algo != PackedAlgo::kInt8 && algo != PackedAlgo::kFew;
    if (has_experts || !problem.experts) known += concat(", ", name_of(algo));
    if (name != name_of(algo) && !(may_round && algo == PackedAlgo::kInt8)) continue;
    const char* obstacle = packed_obstacle(algo, problem);
    check_implemented(obstacle == nullptr, "algo: ", name,
                      " cannot serve this product: ", obstacle == nullptr ? "" : obstacle,
                      "; these can: ", able_packed_gemms(problem));
    return may_round ? select_packed_gemm(problem, true) : algo;
  }
  check_value(false, "algo: expected one of ", known, ", got '", name, "'");
  return PackedAlgo::kGemv;
}

#ifdef QG_WITH_CUDA
cudaError_t launch_gemm_packed(const PackedJob& job, cudaStream_t stream) {
  switch (job.algo) {
    case PackedAlgo::kGemv: {
      const cudaError_t status = launch_gemv_packed(job.args, stream);
      if (status != cudaErrorNotSupported || job.launched == nullptr) return status;
      *job.launched = false;
      return cudaSuccess;
    }
    case PackedAlgo::kFew: return launch_few_packed(job.args, stream);
    case PackedAlgo::kMma: return launch_mma_packed(job.args, stream);
    case PackedAlgo::kWgmma: return launch_wgmma_and_finish(job.args, job.scratch, stream);
    case PackedAlgo::kInt8: break;  // wants memory
  }
  return cudaErrorInvalidValue;
}

static cudaError_t launch_gemm_packed_pair(const std::pair<PackedJob, PackedJob>& jobs, cudaStream_t stream) {
  const auto& [one, other] = jobs;
  const cudaError_t status = launch_gemv_pair(one.args, other.args, stream);
  if (status != cudaErrorNotSupported) return status;
  const cudaError_t first = launch_gemm_packed(one, stream);
  return first != cudaSuccess ? first : launch_gemm_packed(other, stream);
}

static cudaError_t launch_gemm_packed_int8(const std::pair<GemmPackedArgs, uint8_t*>& job,
                                           cudaStream_t stream) {
  return launch_int8_packed(job.first, job.second, stream);
}
#endif

// The CPU's product: strips are unpacked a few at a time into a thread's own memory, where the CPU backend
// multiplies blocks. x and y are float32 here, so the bias is added before y is rounded.
static void multiply_once(const GemmPackedArgs& args, const PackedShape& shape) {
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

// The same in int8.
static void multiply_in_int8(const GemmPackedArgs& args, const PackedShape& shape) {
  const int64_t groups = Int8Layout(args.m, args.n, args.k).groups;
  std::vector<int8_t> x(static_cast<size_t>(args.m * args.k));
  std::vector<float> x_scales(static_cast<size_t>(args.m * groups));
  torch::stable::parallel_for(0, args.m, 32768 / args.k + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      round_to_int8_cpu(static_cast<const float*>(args.x) + i * args.k, args.k, x.data() + i * args.k,
                        x_scales.data() + i * groups);
  });
  const int64_t strips = (args.n + kStripRows - 1) / kStripRows, blocks = args.k / shape.elems;
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> rows(static_cast<size_t>(kStripRows * shape.row_bytes) + 64);
    std::vector<float> weights(static_cast<size_t>(args.k)), scales(static_cast<size_t>(groups));
    std::vector<int8_t> codes(static_cast<size_t>(args.k));
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * kStripRows, count = std::min<int64_t>(args.n - first, kStripRows);
      unpack_cpu({args.packed + s * shape.strip_bytes, rows.data(), count, args.k, args.qtype}, 0, 1);
      for (int64_t j = 0; j < count; ++j) {
        const uint8_t* row = rows.data() + j * shape.row_bytes;
        dequantize_cpu({row, weights.data(), blocks, args.qtype, Real::kFloat32}, 0, blocks);
        round_to_int8_cpu(weights.data(), args.k, codes.data(), scales.data());
        for (int64_t i = 0; i < args.m; ++i)
          static_cast<float*>(args.y)[i * args.n + first + j] = int8_product_cpu(
              x.data() + i * args.k, x_scales.data() + i * groups, codes.data(), scales.data(), args.k);
      }
    }
  });
}

void multiply_packed_on_cpu(const GemmPackedArgs& args, const PackedShape& shape, bool in_int8) {
  const auto multiply = in_int8 ? multiply_in_int8 : multiply_once;
  GemmPackedArgs part = args;
  if (args.up_at != 0) {
    part.y = args.gate;
    multiply(part, shape);
    part.y = args.y, part.packed += args.up_at;
  }
  multiply(part, shape);
}

static void finish_on_cpu(const GemmPackedArgs& args, const float* gate) {
  const float *bias = static_cast<const float*>(args.bias),
              *residual = static_cast<const float*>(args.residual);
  torch::stable::parallel_for(0, args.m, 32768 / args.n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* y = static_cast<float*>(args.y) + i * args.n;
      for (int64_t j = 0; j < args.n; ++j) {
        if (gate != nullptr) y[j] *= silu_on_cpu(gate[i * args.n + j]);
        if (bias != nullptr) y[j] += bias[j];
        if (residual != nullptr) y[j] += residual[i * args.n + j];
      }
    }
  });
}

namespace {

// What x is multiplied by, and what is done before and after. With `up` silu(x · wᵀ) · (x · upᵀ).
struct Product {
  const char* op;
  const Tensor& packed_weights;
  int64_t qtype, n, k;
  const std::string& algo;
  OptTensor up = {}, bias = {}, residual = {}, norm_weight = {};
  double norm_eps = 0;
  OptTensor ahead = {};
  std::optional<GemmPackedArgs>* waiting = nullptr;  // where `gemv` is not launched but left, if it can be
  const char* weights_name = "packed";
};

Tensor product(const Tensor& x, const Product& of) {
  const auto& [op, packed_weights, qtype, n, k, algo, up, bias, residual, norm_weight, norm_eps, ahead,
               waiting, weights_name] = of;
  // check
  const PackedShape shape = check_strips(packed_weights, qtype, n, k, weights_name);
  if (up) check_strips(*up, qtype, n, k, "up");
  check_device("x", x);
  const Real type = check_real("x", x.scalar_type());
  check_value(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: expected rows of ", k, " values, got shape ",
              shape_of(x));
  const auto same_device = [&](const char* name, const Tensor& t) {
    check_value(x.is_cuda() == t.is_cuda() && x.get_device() == t.get_device(), name, ": expected on ",
                device_of(x), " as x is, got ", device_of(t));
  };
  const auto as_x = [&](const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
    same_device(name, t);
    check_type(t.scalar_type() == x.scalar_type(), name, ": expected ", dtype_name(x.scalar_type()),
               " as x, got ", dtype_name(t.scalar_type()));
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == sizes[static_cast<size_t>(i)];
    check_value(same, name, ": expected shape ", shape_of(sizes), ", got ", shape_of(t));
  };
  const std::vector<int64_t> sizes = with_last_dim(x, n);
  same_device(weights_name, packed_weights);
  if (up) same_device("up", *up);
  if (bias) as_x("bias", *bias, {n});
  if (residual) as_x("residual", *residual, sizes);
  if (norm_weight) as_x("norm_weight", *norm_weight, {k});
  if (ahead) {
    same_device("ahead", *ahead);
    check_type(ahead->scalar_type() == ScalarType::Byte, "ahead: expected uint8, got ",
               dtype_name(ahead->scalar_type()));
    check_value(ahead->is_contiguous() && reinterpret_cast<uintptr_t>(ahead->const_data_ptr()) % 16 == 0,
                "ahead: expected packed weights, contiguous and at a multiple of 16 bytes");
  }
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  const PackedProblem problem{m, n, k, type, architecture_of(x)};
  const PackedAlgo chosen = check_packed_algo(algo, problem);
  const auto norm_first = [&] {
    Product rest = of;
    rest.norm_weight = std::nullopt, rest.waiting = nullptr;  // these rows do not live long
    return product(rms_norm(x, *norm_weight, norm_eps), rest);
  };
  if (norm_weight && (m == 0 || n == 0 || !folds_norm(chosen, problem))) return norm_first();

  // arguments and output
  const bool widen = !x.is_cuda() && type != Real::kFloat32;
  const auto as_numbers = [&](const Tensor& t) {
    return packed(widen ? torch::stable::to(t, ScalarType::Float) : t);
  };
  const Tensor rows = as_numbers(x), strips = packed(packed_weights);
  OptTensor second, added, carried, gate, norm;
  if (up) second = packed(*up);
  if (bias) added = as_numbers(*bias);
  if (residual) carried = as_numbers(*residual);
  if (norm_weight) norm = as_numbers(*norm_weight);
  Tensor y = new_output(op, rows, sizes, rows.scalar_type());
  const bool in_int8 = chosen == PackedAlgo::kInt8;
  if (up && (!x.is_cuda() || chosen == PackedAlgo::kWgmma || in_int8))
    gate = new_output(op, rows, sizes, rows.scalar_type());
  GemmPackedArgs args{rows.const_data_ptr(),
                      strips.const_data_ptr<uint8_t>(),
                      added ? added->const_data_ptr() : nullptr,
                      y.mutable_data_ptr(),
                      m,
                      n,
                      k,
                      qtype,
                      widen ? Real::kFloat32 : type};
  args.residual = carried ? carried->const_data_ptr() : nullptr;
  args.up_at = second ? second->const_data_ptr<uint8_t>() - args.packed : 0;
  if (second && args.up_at == 0) {  // one tensor as both: two products all the same
    second = torch::stable::clone(*second);
    args.up_at = second->const_data_ptr<uint8_t>() - args.packed;
  }
  args.gate = gate ? gate->mutable_data_ptr() : nullptr;
  args.norm_weight = norm ? norm->const_data_ptr() : nullptr;
  args.norm_eps = static_cast<float>(norm_eps);
  if (ahead && x.is_cuda()) args.ahead = ahead->const_data_ptr<uint8_t>(), args.ahead_bytes = ahead->numel();
  // The kernel reads weights before the launch in front of it has ended, which must not be their copy.
  const bool is_copy = strips.const_data_ptr() != packed_weights.const_data_ptr() ||
                       (up && second->const_data_ptr() != up->const_data_ptr());
  if (is_copy && x.is_cuda()) {
    Tensor between = new_output(op, rows, {1}, ScalarType::Byte);
    torch::stable::zero_(between);
  }

  // run
  if (m == 0 || n == 0) return widen ? torch::stable::to(y, x.scalar_type()) : y;
  if (x.is_cuda() && in_int8) {
    Tensor scratch = new_output(op, rows, {Int8Layout(m, n, k).bytes()}, ScalarType::Byte);
    [[maybe_unused]] const std::pair job{args, scratch.mutable_data_ptr<uint8_t>()};
    QG_RUN_ON_GPU(gemm_packed_int8, rows, job);
    return y;
  }
  if (x.is_cuda() && waiting != nullptr && chosen == PackedAlgo::kGemv && !is_copy &&
      rows.const_data_ptr() == x.const_data_ptr()) {
    *waiting = args;
    return y;
  }
  if (x.is_cuda()) {
    bool launched = true;
    PackedJob job{chosen, args, norm ? &launched : nullptr};
    OptTensor sums;
#ifdef QG_WITH_CUDA
    const torch::stable::accelerator::DeviceGuard guard(rows.get_device());
    const int64_t bytes = chosen == PackedAlgo::kWgmma ? wgmma_scratch_bytes(args) : 0;
    if (bytes > 0) {
      sums = new_output(op, rows, {bytes}, ScalarType::Byte);
      job.scratch = sums->mutable_data_ptr<uint8_t>();
    }
#endif
    QG_RUN_ON_GPU(gemm_packed, rows, job);
    return launched ? y : norm_first();
  }
  if (k == 0) torch::stable::zero_(y);
  if (k == 0 && gate) torch::stable::zero_(*gate);
  if (k > 0) multiply_packed_on_cpu(args, shape, in_int8);
  finish_on_cpu(args, static_cast<const float*>(args.gate));
  return widen ? torch::stable::to(y, x.scalar_type()) : y;
}

}  // namespace

Tensor gemm_packed(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n, int64_t k, OptTensor bias,
                   std::string algo, OptTensor residual, OptTensor norm_weight, double norm_eps,
                   OptTensor ahead) {
  return product(x, {"gemm_packed", packed_weights, qtype, n, k, algo, std::nullopt, bias, residual,
                     norm_weight, norm_eps, ahead});
}

Tensor gemm_packed_gated(Tensor x, Tensor gate, Tensor up, int64_t qtype, int64_t n, int64_t k,
                         std::string algo, OptTensor norm_weight, double norm_eps, OptTensor ahead) {
  Product of{"gemm_packed_gated", gate,         qtype,       n,        k,    algo, up,
             std::nullopt,        std::nullopt, norm_weight, norm_eps, ahead};
  of.weights_name = "gate";
  return product(x, of);
}

std::tuple<Tensor, Tensor> gemm_packed_pair(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n,
                                            Tensor other, int64_t other_qtype, int64_t other_n, int64_t k,
                                            std::string algo, OptTensor norm_weight, double norm_eps,
                                            OptTensor ahead) {
  const auto norm_first = [&] {  // once for both
    return gemm_packed_pair(rms_norm(x, *norm_weight, norm_eps), packed_weights, qtype, n, other, other_qtype,
                            other_n, k, algo, std::nullopt, 0, ahead);
  };
  const auto folds = [&](int64_t outputs) {
    const PackedProblem problem{k > 0 ? x.numel() / k : 0, outputs, k, check_real("x", x.scalar_type()),
                                architecture_of(x)};
    return folds_norm(check_packed_algo(algo, problem), problem);
  };
  if (norm_weight && !(folds(n) && folds(other_n))) return norm_first();
  const Tensor rows = x.is_cuda() ? packed(x) : x;  // these live until both are launched
  OptTensor norm;
  if (norm_weight) norm = packed(*norm_weight);
  std::optional<GemmPackedArgs> one, two;
  Product first{"gemm_packed_pair", packed_weights, qtype, n, k, algo},
      second{"gemm_packed_pair", other, other_qtype, other_n, k, algo};
  first.waiting = &one, second.waiting = &two, first.ahead = second.ahead = ahead;
  second.weights_name = "other";
  first.norm_weight = second.norm_weight = norm, first.norm_eps = second.norm_eps = norm_eps;
  Tensor y = product(rows, first), z = product(rows, second);
  bool launched = true;
  const auto job_of = [&](const GemmPackedArgs& args) {
    return PackedJob{PackedAlgo::kGemv, args, norm ? &launched : nullptr};
  };
  if (one && two) {
    [[maybe_unused]] const std::pair job{job_of(*one), job_of(*two)};
    QG_RUN_ON_GPU(gemm_packed_pair, rows, job);
  } else if (one || two) {
    [[maybe_unused]] const PackedJob job = job_of(one ? *one : *two);
    QG_RUN_ON_GPU(gemm_packed, rows, job);
  }
  return launched ? std::tuple{y, z} : norm_first();
}

}  // namespace quantgemm
