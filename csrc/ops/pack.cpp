// SPDX-License-Identifier: MIT
// pack(w uint8 [n, row_bytes], qtype) -> uint8 [strips, strip_bytes], the layout of formats/packed.h
// unpack(packed, qtype, n, k) -> w, the same bytes
#include "../cpu/cpu.h"
#include "launch_scope.h"
#include "ops.h"
#include "packed_checks.h"

namespace quantgemm {

Tensor pack(Tensor w, int64_t qtype) {
  // check
  const RowFormat row = check_qtype(qtype);
  check_device("w", w);
  check_type(w.scalar_type() == ScalarType::Byte, "w: expected torch.uint8, got ",
             dtype_name(w.scalar_type()));
  check_value(w.dim() == 2, "w: expected two dimensions [n, row_bytes], got shape ", shape_of(w));
  check_value(w.size(1) % row.bytes == 0, "w: row of ", w.size(1), " bytes is not a multiple of the ",
              row.bytes, "-byte ", row.name, " block");
  const int64_t n = w.size(0), k = w.size(1) / row.bytes * row.elems;
  const PackedShape shape = check_packable(qtype, n, k);

  // arguments and output
  const Tensor blocks = packed(w);
  Tensor strips = new_output("pack", blocks, {shape.strips, shape.strip_bytes}, ScalarType::Byte);
  const PackArgs args{blocks.const_data_ptr<uint8_t>(), strips.mutable_data_ptr<uint8_t>(), n, k, qtype};

  // run
  if (strips.numel() == 0) return strips;
  if (blocks.is_cuda()) {
    QG_RUN_ON_GPU(pack, blocks, args);
  } else {
    torch::stable::parallel_for(0, shape.strips, 65536 / shape.strip_bytes + 1,
                                [&](int64_t begin, int64_t end) { pack_cpu(args, begin, end); });
  }
  return strips;
}

Tensor unpack(Tensor packed_weights, int64_t qtype, int64_t n, int64_t k) {
  const PackedShape shape = check_strips(packed_weights, qtype, n, k);
  const Tensor strips = packed(packed_weights);
  Tensor w = new_output("unpack", strips, {n, shape.row_bytes}, ScalarType::Byte);
  const PackArgs args{strips.const_data_ptr<uint8_t>(), w.mutable_data_ptr<uint8_t>(), n, k, qtype};
  if (w.numel() == 0) return w;
  if (strips.is_cuda()) {
    QG_RUN_ON_GPU(unpack, strips, args);
  } else {
    torch::stable::parallel_for(0, shape.strips, 65536 / shape.strip_bytes + 1,
                                [&](int64_t begin, int64_t end) { unpack_cpu(args, begin, end); });
  }
  return w;
}

}  // namespace quantgemm
