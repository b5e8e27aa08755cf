// SPDX-License-Identifier: MIT
// Rows of weights on their way into a product: int8 codes in logical order with a scale (and offset)
// per granule, or float32 values for unquantised types. The only part of the CPU products that is
// compiled once per format; everything behind it sees panels.
#pragma once
#include "../args.h"
#include "../formats/portable.h"

namespace quantgemm {

struct PanelDecoder {
  int elems, bytes;  // of a block
  int granule;       // weights per scale in the panel: 32, 16 or 4; 0 = the type is unquantised
  bool offset;
  // num_blocks blocks -> codes[elems · num_blocks], scales and offsets[elems / granule · num_blocks]
  void (*decode)(bytes_ptr blocks, int64_t num_blocks, int8_t* codes, float* scales, float* offsets);
  // Where codes are still nibbles after decode(): the 16 levels they stand for. Null otherwise.
  const int8_t* levels;
  // Unquantised types: num_elems numbers -> weights
  void (*convert)(bytes_ptr elems, int64_t num_elems, float* weights);
};

PanelDecoder panel_decoder(int64_t qtype);

}  // namespace quantgemm
