// SPDX-License-Identifier: MIT
// quantize(x [..., cols], qtype, importance [cols] or None) -> uint8 [..., row_bytes]
#include "../cpu/cpu.h"
#include "../formats/encode.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {
namespace {

struct EncoderInfo {
  bool exists = false, uses_importance = false;
};

EncoderInfo encoder_of(int64_t qtype) {
  EncoderInfo info;
  BlockFormats::visit(qtype, [&]<class F>(F) {
    if constexpr (Encodable<F>) info = {true, Encoder<F>::kUsesImportance};
  });
  return info;
}

template <class Keep>
std::string format_names(Keep keep) {
  std::string names;
  BlockFormats::for_each([&](auto f) {
    if (keep(encoder_of(f.kType))) names += concat(names.empty() ? "" : ", ", f.kName);
  });
  return names;
}

const float* check_importance(const std::optional<Tensor>& importance, const Tensor& x, const RowFormat& row,
                              bool used) {
  if (!importance.has_value()) return nullptr;
  check_implemented(used, "importance: ", row.name,
                    " has a closed form that importance cannot change; types that use it: ",
                    format_names([](EncoderInfo e) { return e.uses_importance; }));
  const int64_t cols = x.size(x.dim() - 1);
  check_type(importance->scalar_type() == ScalarType::Float, "importance: expected torch.float32, got ",
             dtype_name(importance->scalar_type()));
  check_value(importance->dim() == 1 && importance->size(0) == cols, "importance: expected shape [", cols,
              "], one weight per column of x, got ", shape_of(*importance));
  check_value(importance->is_cuda() == x.is_cuda() && importance->get_device() == x.get_device(),
              "importance: expected on the device of x");
  check_value(importance->is_contiguous(), "importance: expected a contiguous tensor");
  return importance->const_data_ptr<float>();
}

}  // namespace

bool can_quantize(int64_t qtype) { return encoder_of(qtype).exists; }

Tensor quantize(Tensor x, int64_t qtype, std::optional<Tensor> importance) {
  // check
  const RowFormat row = check_qtype(qtype);
  const EncoderInfo encoder = encoder_of(qtype);
  check_implemented(encoder.exists, "qtype: cannot quantize to ", row.name,
                    "; types that can be written: ", format_names([](EncoderInfo e) { return e.exists; }));
  check_device("x", x);
  const Real x_type = check_real("x", x.scalar_type());
  check_value(x.dim() >= 1, "x: expected at least one dimension [..., cols], got a scalar");
  const int64_t cols = x.size(x.dim() - 1);
  check_value(cols % row.elems == 0, "x: row of ", cols, " values is not a multiple of the ", row.elems,
              "-value ", row.name, " block");
  const float* weights = check_importance(importance, x, row, encoder.uses_importance);

  // arguments and output
  const Tensor values = packed(x);
  const int64_t blocks_per_row = cols / row.elems;
  Tensor blocks =
      new_output("quantize", values, with_last_dim(x, blocks_per_row * row.bytes), ScalarType::Byte);
  const QuantizeArgs args{values.const_data_ptr(),
                          weights,
                          blocks.mutable_data_ptr<uint8_t>(),
                          values.numel() / row.elems,
                          blocks_per_row,
                          qtype,
                          x_type};

  // run
  if (values.is_cuda()) {
    QG_RUN_ON_GPU(quantize, values, args);
  } else {
    const int64_t grain = 1024 / row.elems + 1;
    torch::stable::parallel_for(0, args.num_blocks, grain,
                                [&](int64_t begin, int64_t end) { quantize_cpu(args, begin, end); });
  }
  return blocks;
}

}  // namespace quantgemm
