// SPDX-License-Identifier: MIT
// Blocks of real numbers to GGUF blocks with the encoders of formats/encode.h.
#include "../formats/encode.h"
#include "../formats/gguf_formats.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

void load_block(const QuantizeArgs& args, int64_t first, int count, float* values) {
  visit_real(args.x_type, [&]<class In>(In) {
    const In* x = static_cast<const In*>(args.x) + first;
    for (int i = 0; i < count; ++i) values[i] = load_real(x + i);
  });
}

template <class F>
struct EncodeBlocks {
  QG_HD static void run(const QuantizeArgs* args, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      float values[F::kElems];
      load_block(*args, b * F::kElems, F::kElems, values);
      const int64_t column = b % args->blocks_per_row * F::kElems;
      Encoder<F>::encode(values, args->importance ? args->importance + column : nullptr,
                         args->blocks + b * F::kBytes);
    }
  }
};

}  // namespace

void quantize_cpu(const QuantizeArgs& args, int64_t first_block, int64_t last_block) {
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (Encodable<F>) run_vectorized<EncodeBlocks<F>>(&args, first_block, last_block);
  });
}

}  // namespace quantgemm
