// SPDX-License-Identifier: MIT
// out[b, e] = scale(b, group of e) · q(b, e) + offset(b, group of e), one block after another.
// The codes of a block are gathered first, four to a word; the loop over a group then is a plain
// int8 -> float multiplication, which the compiler turns into vector instructions.
#include "../formats/gguf_formats.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

template <BlockFormat F>
QG_HD void gather_codes(bytes_ptr block, int8_t* codes) {
  constexpr int kQuads = F::kElems / 4;
  constexpr int kRun = kQuads >= 32 ? 8 : kQuads;  // long blocks keep their shifts over 32 weights
#pragma GCC unroll 8                               // so that shifts are constants
  for (int i = 0; i < kQuads; i += kRun) {
    uint32_t quads[kRun];
#pragma GCC unroll 8
    for (int j = 0; j < kRun; ++j) quads[j] = F::quad(block, i + j);
    std::memcpy(codes + 4 * i, quads, sizeof quads);
  }
}

template <BlockFormat F>
QG_HD void scale_codes(bytes_ptr block, const int8_t* codes, float* weights) {
  for (int e = 0; e < F::kElems; ++e) weights[e] = static_cast<float>(codes[e]);
  for (int g = 0; g < F::kElems / F::kGroup; ++g, weights += F::kGroup) {
    const Affine affine = F::affine(block, g);
#pragma GCC unroll 1  // else the loop over groups is what gets vectorised, with strided accesses
    for (int e = 0; e < F::kGroup; ++e) weights[e] = weight<F>(affine, weights[e]);
  }
}

template <BlockFormat F, class Out>
struct DecodeBlocks {
  QG_HD static void run(bytes_ptr blocks, Out* out, int64_t num_blocks) {
    for (int64_t b = 0; b < num_blocks; ++b, blocks += F::kBytes, out += F::kElems) {
      int8_t codes[F::kElems];
      float weights[F::kElems];
      gather_codes<F>(blocks, codes);
      scale_codes<F>(blocks, codes, weights);
      for (int e = 0; e < F::kElems; ++e) store_real(out + e, weights[e]);
    }
  }
};

template <PlainFormat F, class Out>
struct ConvertPlain {
  QG_HD static void run(bytes_ptr elements, Out* out, int64_t num_elements) {
    for (int64_t i = 0; i < num_elements; ++i) store_real(out + i, F::value(elements + i * F::kBytes));
  }
};

}  // namespace

void dequantize_cpu(const DequantizeArgs& args, int64_t first_block, int64_t last_block) {
  visit_real(args.out_type, [&]<class Out>(Out) {
    const auto decode = [&]<class F>(F) {
      bytes_ptr blocks = args.blocks + first_block * F::kBytes;
      Out* out = static_cast<Out*>(args.out) + first_block * F::kElems;
      if constexpr (PlainFormat<F>) {
        run_vectorized<ConvertPlain<F, Out>>(blocks, out, last_block - first_block);
      } else {
        run_vectorized<DecodeBlocks<F, Out>>(blocks, out, last_block - first_block);
      }
    };
    if (!BlockFormats::visit(args.qtype, decode)) PlainFormats::visit(args.qtype, decode);
  });
}

}  // namespace quantgemm
