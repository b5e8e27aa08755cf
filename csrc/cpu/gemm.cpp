// SPDX-License-Identifier: MIT
// y[i, j] = sum over e of x[i, e] · w[j, e] on the CPU.
#include <vector>

#include "../formats/gguf_formats.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {

void gemm_cpu(const GemmArgs& args, GemmAlgo, int64_t first_n, int64_t last_n) {
  visit_real(args.type, [&]<class T>(T) {
    const auto run = [&]<class F>(F) {
      std::vector<float> row(args.k);
      for (int64_t j = first_n; j < last_n; ++j) {
        bytes_ptr w = args.w + j * (args.k / F::kElems * F::kBytes);
        for (int64_t e = 0; e < args.k; ++e) {
          if constexpr (PlainFormat<F>) {
            row[e] = F::value(w + e * F::kBytes);
          } else {
            bytes_ptr block = w + e / F::kElems * F::kBytes;
            const int within = static_cast<int>(e % F::kElems);
            row[e] = weight<F>(F::affine(block, within / F::kGroup),
                               byte_to_float(F::quad(block, within / 4), within % 4));
          }
        }
        for (int64_t i = 0; i < args.m; ++i) {
          const T* x = static_cast<const T*>(args.x) + i * args.k;
          float sum = 0;
          for (int64_t e = 0; e < args.k; ++e) sum += load_real(x + e) * row[e];
          store_real(static_cast<T*>(args.y) + i * args.n + j, sum);
        }
      }
    };
    if (!BlockFormats::visit(args.qtype, run)) PlainFormats::visit(args.qtype, run);
  });
}

}  // namespace quantgemm
