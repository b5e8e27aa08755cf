// SPDX-License-Identifier: MIT
// Queries and keys before their rotary embedding, checked (layer_steps.cpp).
#pragma once
#include "ops.h"

namespace quantgemm {

struct Rotation {
  Tensor queries, keys, cosines, sines;  // what args point to
  RotaryArgs args;                       // without outputs
};

Rotation check_rotation(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin);

}  // namespace quantgemm
