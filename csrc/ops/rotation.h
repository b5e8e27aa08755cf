// SPDX-License-Identifier: MIT
// Queries and keys before their rotary embedding, checked (layer_steps.cpp).
#pragma once
#include "ops.h"

namespace quantgemm {

struct Rotation {
  Tensor queries, keys, cosines, sines;  // what args point to
  RotaryArgs args;                       // without outputs
};

// A view of [batch, heads, tokens, channels], channels side by side.
inline RotatedHeads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), nullptr, x.size(1), {x.stride(0), x.stride(1), x.stride(2)}};
}

Rotation check_rotation(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin);

}  // namespace quantgemm
