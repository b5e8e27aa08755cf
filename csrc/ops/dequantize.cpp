// SPDX-License-Identifier: MIT
// dequantize(blocks uint8 [..., row_bytes], qtype, dtype) -> [..., cols] of dtype
#include "../cpu/cpu.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {

Tensor dequantize(Tensor blocks, int64_t qtype, ScalarType dtype) {
  // check
  const RowFormat row = check_qtype(qtype);
  check_device("blocks", blocks);
  check_type(blocks.scalar_type() == ScalarType::Byte, "blocks: expected torch.uint8, got ",
             dtype_name(blocks.scalar_type()));
  check_value(blocks.dim() >= 1, "blocks: expected at least one dimension [..., row_bytes], got a scalar");
  const int64_t row_bytes = blocks.size(blocks.dim() - 1);
  check_value(row_bytes % row.bytes == 0, "blocks: row of ", row_bytes, " bytes is not a multiple of the ",
              row.bytes, "-byte ", row.name, " block");
  const Real out_type = check_real("dtype", dtype);

  // arguments and output
  const Tensor rows = packed(blocks);
  Tensor out =
      new_output("dequantize", rows, with_last_dim(blocks, row_bytes / row.bytes * row.elems), dtype);
  const DequantizeArgs args{rows.const_data_ptr<uint8_t>(), out.mutable_data_ptr(), rows.numel() / row.bytes,
                            qtype, out_type};

  // run
  if (rows.is_cuda()) {
    QG_RUN_ON_GPU(dequantize, rows, args);
  } else {
    const int64_t grain = 16384 / row.elems;  // blocks: about 10 µs of work
    torch::stable::parallel_for(0, args.num_blocks, grain,
                                [&](int64_t begin, int64_t end) { dequantize_cpu(args, begin, end); });
  }
  return out;
}

}  // namespace quantgemm
