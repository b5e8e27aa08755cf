// SPDX-License-Identifier: MIT
// embedding(ids int64 or int32 [...], w uint8 [rows, row_bytes], qtype, dtype) -> [..., cols] of dtype
#include "../cpu/cpu.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {

Tensor embedding(Tensor ids, Tensor w, int64_t qtype, ScalarType dtype) {
  // check
  const RowFormat row = check_qtype(qtype);
  check_device("ids", ids);
  check_device("w", w);
  check_type(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
             "ids: expected torch.int64 or torch.int32, got ", dtype_name(ids.scalar_type()));
  check_type(w.scalar_type() == ScalarType::Byte, "w: expected torch.uint8, got ",
             dtype_name(w.scalar_type()));
  check_value(w.dim() == 2, "w: expected two dimensions [rows, row_bytes], got shape ", shape_of(w));
  check_value(ids.is_cuda() == w.is_cuda() && ids.get_device() == w.get_device(), "w: expected on ",
              device_of(ids), " as ids are, got ", device_of(w));
  const int64_t row_bytes = w.size(1);
  check_value(row_bytes % row.bytes == 0, "w: row of ", row_bytes, " bytes is not a multiple of the ",
              row.bytes, "-byte ", row.name, " block");
  const Real out_type = check_real("dtype", dtype);

  // arguments and output
  const Tensor rows = packed(w),
               numbers = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < ids.dim(); ++i) sizes.push_back(ids.size(i));
  sizes.push_back(row_bytes / row.bytes * row.elems);
  Tensor out = new_output("embedding", rows, sizes, dtype);
  const EmbeddingArgs args{numbers.const_data_ptr<int64_t>(),
                           rows.const_data_ptr<uint8_t>(),
                           out.mutable_data_ptr(),
                           ids.numel(),
                           w.size(0),
                           row_bytes / row.bytes,
                           qtype,
                           out_type};

  // run
  if (out.numel() == 0) return out;
  if (rows.is_cuda()) {
    QG_RUN_ON_GPU(embedding, rows, args);
  } else {
    for (int64_t i = 0; i < args.num_ids; ++i) {
      check_index(args.ids[i] >= 0 && args.ids[i] < args.num_rows, "ids: expected 0 to ", args.num_rows - 1,
                  " for a table of ", args.num_rows, " rows, got ", args.ids[i]);
    }
    const int64_t grain = 16384 / sizes.back() + 1;
    torch::stable::parallel_for(0, args.num_ids, grain,
                                [&](int64_t begin, int64_t end) { embedding_cpu(args, begin, end); });
  }
  return out;
}

}  // namespace quantgemm
