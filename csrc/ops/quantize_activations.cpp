// SPDX-License-Identifier: MIT
// quantize_activations(x [..., cols]) -> uint8 [..., ActivationRow::bytes(cols)]
#include "../cpu/cpu.h"
#include "../formats/activation.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {

Tensor quantize_activations(Tensor x) {
  // check
  check_device("x", x);
  const Real x_type = check_real("x", x.scalar_type());
  check_value(x.dim() >= 1, "x: expected at least one dimension [..., cols], got a scalar");
  const int64_t cols = x.size(x.dim() - 1);
  check_value(cols % ActivationRow::kGroup == 0, "x: row of ", cols, " values is not a multiple of the ",
              ActivationRow::kGroup, "-value activation group");

  // arguments and output
  const Tensor values = packed(x);
  Tensor rows = new_output("quantize_activations", values, with_last_dim(x, ActivationRow::bytes(cols)),
                           ScalarType::Byte);
  const int64_t num_rows = cols == 0 ? 0 : values.numel() / cols;
  const ActivationArgs args{values.const_data_ptr(), rows.mutable_data_ptr<uint8_t>(), num_rows, cols,
                            x_type};

  // run
  if (values.is_cuda()) {
    QG_RUN_ON_GPU(quantize_activations, values, args);
  } else {
    const int64_t grain = cols == 0 ? 1 : 16384 / cols + 1;
    torch::stable::parallel_for(
        0, num_rows, grain, [&](int64_t begin, int64_t end) { quantize_activations_cpu(args, begin, end); });
  }
  return rows;
}

}  // namespace quantgemm
