// SPDX-License-Identifier: MIT
// moe_gemm(x [tokens, k] or [tokens, top, k], packed uint8 [experts, strips, strip_bytes], qtype, n, k,
//          expert_ids int64 or int32 [tokens, top], weights float32 [tokens, top] or None,
//          bias [experts, n] or None, algo, up like packed or None)
//     -> y [tokens, top, n] of x's dtype: weights · (x · w[expert]ᵀ + bias[expert]),
//        or weights · silu(x · w[expert]ᵀ) · (x · up[expert]ᵀ)
#include <cstring>

#include "../cpu/cpu.h"
#include "../gemm_select.h"
#include "gemm_packed.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {
namespace {

#ifdef QG_WITH_CUDA
cudaError_t launch_moe_gemm(const std::pair<PackedAlgo, GemmPackedArgs>& job, cudaStream_t stream) {
  const auto& [algo, args] = job;
  if (args.routes.groups != nullptr) {
    const cudaError_t status = launch_expert_routes(args, stream);
    if (status != cudaSuccess) return status;
  }
  PackedJob product{algo, args};
  if (args.routes.sorted != nullptr) product.args.x = args.routes.sorted;
  return launch_gemm_packed(product, stream);
}
#endif

int64_t expert_of(const ExpertRoutes& routes, int64_t slot) {
  const int64_t id = routes.wide ? static_cast<const int64_t*>(routes.ids)[slot]
                                 : static_cast<const int32_t*>(routes.ids)[slot];
  return id >= 0 && id < routes.experts ? id : -1;
}

// Expert after expert: its tokens side by side, multiplied, and back. All numbers are float32 here.
void moe_on_cpu(const GemmPackedArgs& args, const PackedShape& shape) {
  const ExpertRoutes& routes = args.routes;
  std::vector<std::vector<int64_t>> slots(static_cast<size_t>(routes.experts));
  float* const y = static_cast<float*>(args.y);
  for (int64_t slot = 0; slot < routes.num_slots; ++slot) {
    const int64_t expert = expert_of(routes, slot);
    if (expert >= 0)
      slots[static_cast<size_t>(expert)].push_back(slot);
    else
      std::memset(y + slot * args.n, 0, static_cast<size_t>(args.n) * sizeof(float));
  }
  std::vector<float> x, product, gate;
  for (int64_t expert = 0; expert < routes.experts; ++expert) {
    const std::vector<int64_t>& own = slots[static_cast<size_t>(expert)];
    if (own.empty()) continue;
    x.resize(own.size() * static_cast<size_t>(args.k));
    product.resize(own.size() * static_cast<size_t>(args.n));
    const auto bytes = static_cast<size_t>(args.k) * sizeof(float);
    for (size_t i = 0; i < own.size(); ++i)
      std::memcpy(x.data() + i * args.k,
                  static_cast<const float*>(args.x) + own[i] / routes.slots_per_row * args.k, bytes);
    GemmPackedArgs part = args;
    part.x = x.data(), part.y = product.data(), part.m = static_cast<int64_t>(own.size());
    part.packed = args.packed + expert * routes.expert_bytes;
    if (args.up_at != 0) gate.resize(product.size()), part.gate = gate.data();
    multiply_packed_on_cpu(part, shape);
    for (size_t i = 0; i < gate.size(); ++i) product[i] *= silu_on_cpu(gate[i]);
    const float* const bias =
        args.bias == nullptr ? nullptr : static_cast<const float*>(args.bias) + expert * args.n;
    for (size_t i = 0; i < own.size(); ++i) {
      const float by = routes.weights == nullptr ? 1.0f : routes.weights[own[i]];
      for (int64_t j = 0; j < args.n; ++j)
        y[own[i] * args.n + j] = (product[i * args.n + j] + (bias == nullptr ? 0.0f : bias[j])) * by;
    }
  }
}

}  // namespace

Tensor moe_gemm(Tensor x, Tensor packed_weights, int64_t qtype, int64_t n, int64_t k, Tensor expert_ids,
                OptTensor weights, OptTensor bias, std::string algo, OptTensor up) {
  // check
  const PackedShape shape = check_expert_strips(packed_weights, qtype, n, k);
  check_value(k > 0, "k: expected at least 1, got ", k);
  const int64_t experts = packed_weights.size(0);
  check_device("x", x);
  const Real type = check_real("x", x.scalar_type());
  const auto same_device = [&](const char* name, const Tensor& t) {
    check_value(x.is_cuda() == t.is_cuda() && x.get_device() == t.get_device(), name, ": expected on ",
                device_of(x), " as x is, got ", device_of(t));
  };
  same_device("packed", packed_weights);
  same_device("expert_ids", expert_ids);
  const bool wide = expert_ids.scalar_type() == ScalarType::Long;
  check_type(wide || expert_ids.scalar_type() == ScalarType::Int,
             "expert_ids: expected torch.int64 or torch.int32, got ", dtype_name(expert_ids.scalar_type()));
  check_value(expert_ids.dim() == 2, "expert_ids: expected two dimensions [tokens, top], got shape ",
              shape_of(expert_ids));
  const int64_t tokens = expert_ids.size(0), top = expert_ids.size(1), slots = tokens * top;
  const bool apart = x.dim() == 3;  // a row of x for each slot
  check_value(
      (x.dim() == 2 || (apart && x.size(1) == top)) && x.size(0) == tokens && x.size(x.dim() - 1) == k,
      "x: expected shape [", tokens, ", ", k, "] or [", tokens, ", ", top, ", ", k, "], got ", shape_of(x));
  check_value(slots < int64_t{1} << 30, "expert_ids: expected fewer than 2**30 ids, got ", slots);
  if (weights.has_value()) {
    same_device("weights", *weights);
    check_type(weights->scalar_type() == ScalarType::Float, "weights: expected torch.float32, got ",
               dtype_name(weights->scalar_type()));
    check_value(weights->dim() == 2 && weights->size(0) == tokens && weights->size(1) == top,
                "weights: expected shape [", tokens, ", ", top, "] as expert_ids, got ", shape_of(*weights));
  }
  if (bias.has_value()) {
    same_device("bias", *bias);
    check_type(bias->scalar_type() == x.scalar_type(), "bias: expected ", dtype_name(x.scalar_type()),
               " as x, got ", dtype_name(bias->scalar_type()));
    check_value(bias->dim() == 2 && bias->size(0) == experts && bias->size(1) == n, "bias: expected shape [",
                experts, ", ", n, "], got ", shape_of(*bias));
  }
  if (up.has_value()) {
    same_device("up", *up);
    check_expert_strips(*up, qtype, n, k, "up");
    check_value(up->size(0) == experts, "up: expected ", experts, " experts as packed, got ", up->size(0));
    check_value(!bias.has_value(), "bias: expected none beside up");
  }
  const PackedProblem problem{slots, n, k, type, architecture_of(x), true};
  const MoeChoice choice = algo == "auto" ? select_moe(problem, experts)
                                          : moe_choice_of(check_packed_algo(algo, problem), problem, experts);

  // arguments and output
  const bool widen = !x.is_cuda() && type != Real::kFloat32;
  const auto as_numbers = [&](const Tensor& t) {
    return packed(widen ? torch::stable::to(t, ScalarType::Float) : t);
  };
  const Tensor rows = as_numbers(x), strips = packed(packed_weights), ids = packed(expert_ids);
  OptTensor factors, added, second, gate;
  if (up.has_value()) second = packed(*up);
  if (weights.has_value()) factors = packed(*weights);
  if (bias.has_value()) added = as_numbers(*bias);
  Tensor y = new_output("moe_gemm", rows, {tokens, top, n}, rows.scalar_type());
  if (slots == 0 || n == 0 || experts == 0) {
    torch::stable::zero_(y);
    return widen ? torch::stable::to(y, x.scalar_type()) : y;
  }
  GemmPackedArgs args{rows.const_data_ptr(),
                      strips.const_data_ptr<uint8_t>(),
                      added ? added->const_data_ptr() : nullptr,
                      y.mutable_data_ptr(),
                      slots,
                      n,
                      k,
                      qtype,
                      widen ? Real::kFloat32 : type};
  args.up_at = second ? second->const_data_ptr<uint8_t>() - args.packed : 0;
  if (second && args.up_at == 0) {  // one tensor as both: two products all the same
    second = torch::stable::clone(*second);
    args.up_at = second->const_data_ptr<uint8_t>() - args.packed;
  }
  ExpertRoutes& routes = args.routes;
  routes.ids = ids.const_data_ptr(), routes.wide = wide;
  routes.weights = factors ? factors->const_data_ptr<float>() : nullptr;
  routes.num_slots = slots, routes.experts = experts, routes.expert_bytes = shape.strips * shape.strip_bytes;
  routes.slots_per_row = apart ? 1 : static_cast<int32_t>(top);
  routes.tile = choice.tile;

  // run
  if (!x.is_cuda()) {
    moe_on_cpu(args, shape);
    return widen ? torch::stable::to(y, x.scalar_type()) : y;
  }
#ifdef QG_WITH_CUDA
  routes.tile =
      static_cast<int32_t>(std::min<int64_t>(routes.tile, choice.algo == PackedAlgo::kWgmma ? 256 : tokens));
  routes.most_groups = std::min(slots, slots / routes.tile + std::min(slots, experts));
  if (second && choice.algo == PackedAlgo::kWgmma) {
    gate = new_output("moe_gemm", rows, {tokens, top, n}, rows.scalar_type());
    args.gate = gate->mutable_data_ptr();
  }
  check_implemented(routes.most_groups * shape.strips < int64_t{1} << 31, "expert_ids: ", slots,
                    " ids are too many for ", n, " outputs");
  OptTensor table, sorted;
  if (choice.algo == PackedAlgo::kWgmma) {
    sorted = new_output("moe_gemm", rows, {slots, k}, rows.scalar_type());
    routes.sorted = sorted->mutable_data_ptr();
  }
  if (slots > kOwnSlots || choice.algo == PackedAlgo::kWgmma) {
    table = new_output("moe_gemm", rows, {4 + 4 * routes.most_groups + 2 * slots}, ScalarType::Int);
    routes.num_groups = table->mutable_data_ptr<int32_t>();
    routes.groups = reinterpret_cast<ExpertGroup*>(routes.num_groups + 4);
    routes.slots = routes.num_groups + 4 + 4 * routes.most_groups;
    routes.ranks = routes.slots + slots;
  }
#endif
  [[maybe_unused]] const std::pair job{choice.algo, args};
  QG_RUN_ON_GPU(moe_gemm, rows, job);
  return y;
}

}  // namespace quantgemm
