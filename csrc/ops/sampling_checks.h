// SPDX-License-Identifier: MIT
// What spec_verify, sample and draft_sample check alike: rows of values, tensors of one number per
// sequence, noise. Contents are device data: the kernels judge them and set status bits.
#pragma once
#include <list>

#include "../sampling.h"
#include "ops.h"

namespace quantgemm {

class SamplingChecks {
 public:
  explicit SamplingChecks(const Tensor& rows) : on_(rows) {}

  // `shape` as the message prints it, -1 in sizes for any number.
  Tensor tensor(const char* name, const Tensor& t, ScalarType type, const std::vector<int64_t>& sizes,
                const char* shape) {
    check_type(t.scalar_type() == type, name, ": expected ", dtype_name(type), ", got ",
               dtype_name(t.scalar_type()));
    bool fits = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i)
      fits = sizes[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes[i];
    std::string numbers;
    for (const int64_t n : sizes) numbers += (numbers.empty() ? "" : ", ") + (n < 0 ? "any" : text_of(n));
    check_value(fits, name, ": expected shape ", shape, " = [", numbers, "], got ", shape_of(t));
    device(name, t);
    return torch::stable::contiguous(t);
  }

  // The same for an optional one; the copy, if one was needed, lives as long as these checks.
  template <class T>
  const T* pointer(const char* name, const OptTensor& t, ScalarType type, const std::vector<int64_t>& sizes,
                   const char* shape) {
    if (!t.has_value()) return nullptr;
    kept_.push_back(tensor(name, *t, type, sizes, shape));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }

  void device(const char* name, const Tensor& t) const {
    check_value(t.is_cuda() == on_.is_cuda() && t.get_device() == on_.get_device(), name,
                ": expected on the device of the target's rows");
  }

  void parameters(VerifyArgs& args, const OptTensor& temperature, const OptTensor& top_k,
                  const OptTensor& top_p, const OptTensor& min_p) {
    const std::vector<int64_t> sizes{args.num_sequences};
    const char* shape = "[num_sequences]";
    args.parameters = {pointer<float>("temperature", temperature, ScalarType::Float, sizes, shape),
                       pointer<int64_t>("top_k", top_k, ScalarType::Long, sizes, shape),
                       pointer<float>("top_p", top_p, ScalarType::Float, sizes, shape),
                       pointer<float>("min_p", min_p, ScalarType::Float, sizes, shape)};
  }

  void noise(VerifyArgs& args, const OptTensor& seed, const OptTensor& position, const OptTensor& uniforms) {
    check_value(seed.has_value() == position.has_value(), "position: expected together with seed");
    check_value(seed.has_value() != uniforms.has_value(),
                "seed: expected either seed and position or uniforms, got ",
                seed.has_value() ? "both" : "neither");
    const std::vector<int64_t> sizes{args.num_sequences};
    args.seeds = pointer<int64_t>("seed", seed, ScalarType::Long, sizes, "[num_sequences]");
    args.positions = pointer<int64_t>("position", position, ScalarType::Long, sizes, "[num_sequences]");
    args.uniforms =
        pointer<double>("uniforms", uniforms, ScalarType::Double, {args.num_sequences, args.max_drafts + 1},
                        "[num_sequences, max_drafts + 1]");
  }

 private:
  const Tensor& on_;
  std::list<Tensor> kept_;
};

// Rows of a vocabulary: values that follow each other, rows at any distance.
inline Real check_rows(const char* name, const Tensor& t, int64_t dims, const char* shape) {
  check_device(name, t);
  const Real type = check_real(name, t.scalar_type());
  check_value(t.dim() == dims, name, ": expected shape ", shape, ", got ", shape_of(t));
  const int64_t vocab = t.size(dims - 1);
  check_value(vocab >= 1 && vocab <= kMaxVocab, name, ": expected a vocabulary of 1 to ", kMaxVocab, ", got ",
              vocab);
  check_value(vocab == 1 || t.stride(dims - 1) == 1, name,
              ": expected values of a row next to each other (last stride 1), got stride ",
              t.stride(dims - 1));
  return type;
}

// Runs on the device of `rows`, with room for row statistics where a GPU needs it.
void run_verify(const char* op, VerifyArgs& args, const Tensor& rows);

}  // namespace quantgemm
