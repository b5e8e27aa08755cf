// SPDX-License-Identifier: MIT
// The encoding half of a format: Encoder<F> is specialised for the formats that can be written.
//   encode(x, importance, block)   kElems weights -> kBytes bytes; one call, one block, one thread.
//                                  importance: null, or kElems weights of the squared errors
//   kUsesImportance                false where the bytes do not depend on importance
// Whatever x holds, codes stay in range and the bytes are the same on CPU and GPU.
#pragma once
#include <concepts>

#include "block_format.h"

namespace quantgemm {

template <class F>
struct Encoder;

template <class F>
concept Encodable = BlockFormat<F> && requires(const float* x, uint8_t* block) {
  { Encoder<F>::kUsesImportance } -> std::convertible_to<bool>;
  { Encoder<F>::encode(x, x, block) };
};

}  // namespace quantgemm
