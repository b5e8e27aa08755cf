// SPDX-License-Identifier: MIT
// out[i] = decoded row ids[i] of w.
#include <limits>

#include "../formats/gguf_formats.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {

void embedding_cpu(const EmbeddingArgs& args, int64_t first_id, int64_t last_id) {
  int64_t block_bytes = 0, block_elems = 0;
  const auto sizes = [&]<class F>(F) { block_bytes = F::kBytes, block_elems = F::kElems; };
  if (!BlockFormats::visit(args.qtype, sizes)) PlainFormats::visit(args.qtype, sizes);
  const int64_t cols = args.row_blocks * block_elems;
  visit_real(args.out_type, [&]<class Out>(Out) {
    for (int64_t i = first_id; i < last_id; ++i) {
      Out* out = static_cast<Out*>(args.out) + i * cols;
      const int64_t id = args.ids[i];
      if (id < 0 || id >= args.num_rows) {
        for (int64_t e = 0; e < cols; ++e) store_real(out + e, std::numeric_limits<float>::quiet_NaN());
      } else {
        const DequantizeArgs row{args.w + id * args.row_blocks * block_bytes, out, args.row_blocks,
                                 args.qtype, args.out_type};
        dequantize_cpu(row, 0, args.row_blocks);
      }
    }
  });
}

}  // namespace quantgemm
