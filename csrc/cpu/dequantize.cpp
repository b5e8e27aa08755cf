// SPDX-License-Identifier: MIT
// out[b, e] = scale(b, group of e) · q(b, e) + offset(b, group of e), one block after another.
// The codes of a block are gathered first, four to a word; the loop over a group then is a plain
// int8 -> float multiplication, which the compiler turns into vector instructions.
#include "../formats/gguf_formats.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

// A run of eight quads keeps its shifts, and is one or two groups: vector registers from bits to floats.
template <BlockFormat F>
QG_HD void decode_block(bytes_ptr block, float* weights) {
  constexpr int kRun = F::kElems < 32 ? F::kElems : 32, kSpan = F::kGroup < kRun ? F::kGroup : kRun;
  static_assert(F::kElems % kRun == 0 && kRun % kSpan == 0);
#pragma GCC unroll 8  // so that shifts are constants
  for (int r = 0; r < F::kElems; r += kRun) {
    uint32_t quads[kRun / 4];
    for (int j = 0; j < kRun / 4; ++j) quads[j] = F::quad(block, r / 4 + j);
    int8_t codes[kRun];
    std::memcpy(codes, quads, sizeof codes);
    for (int e = 0; e < kRun; e += kSpan) {
      const Affine affine = F::affine(block, (r + e) / F::kGroup);
#pragma GCC unroll 1  // else the loop over spans is what gets vectorised, with strided accesses
      for (int j = e; j < e + kSpan; ++j) weights[r + j] = weight<F>(affine, static_cast<float>(codes[j]));
    }
  }
}

template <BlockFormat F, class Out>
struct DecodeBlocks {
  QG_HD static void run(bytes_ptr blocks, Out* out, int64_t num_blocks) {
    for (int64_t b = 0; b < num_blocks; ++b, blocks += F::kBytes, out += F::kElems) {
      if constexpr (std::is_same_v<Out, float>) {
        decode_block<F>(blocks, out);
      } else {
        float weights[F::kElems];
        decode_block<F>(blocks, weights);
        for (int e = 0; e < F::kElems; ++e) store_real(out + e, weights[e]);
      }
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
