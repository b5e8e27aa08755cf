// SPDX-License-Identifier: MIT
// codes[e] = q(e), scales[g], offsets[g] for a run of blocks. Two loops: over groups, with the number
// of the group a constant so that the compiler merges what groups share, and over runs of 16 codes,
// which it turns into vector instructions.
#include "gemm_panel.h"

#include "../formats/gguf_formats.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

template <BlockFormat F>
inline constexpr int kGranule = F::kGroup % 32 == 0   ? 32
                                : F::kGroup % 16 == 0 ? 16
                                                      : 4;

template <BlockFormat F>
QG_HD uint32_t raw_quad(bytes_ptr block, int i) {
  if constexpr (LevelFormat<F>)
    return F::nibbles(block, i);
  else
    return F::quad(block, i);
}

// Eight signed bytes times a factor.
QG_HD void scale_bytes(uint64_t bytes, float factor, float* out) {
  int8_t codes[8];
  std::memcpy(codes, &bytes, 8);
#pragma GCC unroll 1  // else the bytes are taken apart one by one
  for (int i = 0; i < 8; ++i) out[i] = factor * static_cast<float>(codes[i]);
}

template <BlockFormat F>
struct DecodePanel {
  QG_HD static void run(const uint8_t* __restrict blocks, int64_t num_blocks, int8_t* __restrict codes,
                        float* __restrict scales, float* __restrict offsets) {
    constexpr int kGroups = F::kElems / F::kGroup, kParts = F::kGroup / kGranule<F>;
    // What g++ vectorises best: short blocks and nibbles come in halves of 16 weights.
    constexpr int kRun = F::kElems % 16 != 0 ? 4 : F::kElems % 64 != 0 || LevelFormat<F> ? 16 : 32;
    static_assert(F::kElems % F::kGroup == 0 && F::kGroup % 4 == 0);
    if constexpr (kGroups * kParts == 1) {  // loops of their own: conversions of many blocks at a time
      for (int64_t b = 0; b < num_blocks; ++b) scales[b] = F::affine(blocks + b * F::kBytes, 0).scale;
      if constexpr (F::kOffset)
        for (int64_t b = 0; b < num_blocks; ++b) offsets[b] = F::affine(blocks + b * F::kBytes, 0).offset;
    } else {
      for (int64_t b = 0; b < num_blocks; ++b, scales += kGroups * kParts, offsets += kGroups * kParts) {
        if constexpr (TwoLevelFormat<F> && kParts == 1) {
          bytes_ptr block = blocks + b * F::kBytes;
          const Affine factors = F::factors(block);
          for (int g = 0; g < kGroups; g += 8) {
            scale_bytes(F::scale_codes(block, g / 8), factors.scale, scales + g);
            if constexpr (F::kOffset) scale_bytes(F::offset_codes(block, g / 8), factors.offset, offsets + g);
          }
        } else {
#pragma GCC unroll 16
          for (int g = 0; g < kGroups; ++g) {
            const Affine affine = F::affine(blocks + b * F::kBytes, g);
            for (int p = 0; p < kParts; ++p) {
              scales[g * kParts + p] = affine.scale;
              if constexpr (F::kOffset) offsets[g * kParts + p] = affine.offset;
            }
          }
        }
      }
    }
    for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 16
      for (int r = 0; r < F::kElems; r += kRun) {
        uint32_t quads[kRun / 4];
        for (int j = 0; j < kRun / 4; ++j) quads[j] = raw_quad<F>(blocks + b * F::kBytes, r / 4 + j);
        std::memcpy(codes + b * F::kElems + r, quads, sizeof quads);
      }
    }
  }
};

template <PlainFormat F>
struct ConvertRow {
  QG_HD static void run(bytes_ptr elems, int64_t num_elems, float* weights) {
    for (int64_t i = 0; i < num_elems; ++i) weights[i] = F::value(elems + i * F::kBytes);
  }
};

template <LevelFormat F>
const int8_t* level_table() {
  static const struct Table {
    int8_t levels[16];
    Table() {
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t four = F::levels(0x03020100u + 0x04040404u * i);
        std::memcpy(levels + 4 * i, &four, 4);
      }
    }
  } table;
  return table.levels;
}

}  // namespace

PanelDecoder panel_decoder(int64_t qtype) {
  PanelDecoder decoder{};
  const auto describe = [&]<class F>(F) {
    decoder.elems = F::kElems;
    decoder.bytes = F::kBytes;
    decoder.offset = F::kOffset;
    if constexpr (PlainFormat<F>) {
      decoder.convert = [](bytes_ptr elems, int64_t num_elems, float* weights) {
        run_vectorized<ConvertRow<F>>(elems, num_elems, weights);
      };
    } else {
      decoder.granule = kGranule<F>;
      decoder.decode = [](bytes_ptr blocks, int64_t num_blocks, int8_t* codes, float* scales,
                          float* offsets) {
        run_vectorized<DecodePanel<F>>(blocks, num_blocks, codes, scales, offsets);
      };
      if constexpr (LevelFormat<F>) decoder.levels = level_table<F>();
    }
  };
  if (!BlockFormats::visit(qtype, describe)) PlainFormats::visit(qtype, describe);
  return decoder;
}

}  // namespace quantgemm
