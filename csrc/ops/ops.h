// SPDX-License-Identifier: MIT
// The C++ side of torch.ops.quantgemm: one function per op, registered in module.cpp.
#pragma once
#include "checks.h"

namespace quantgemm {

Tensor dequantize(Tensor blocks, int64_t qtype, ScalarType dtype);
Tensor quantize(Tensor x, int64_t qtype, std::optional<Tensor> importance);
Tensor quantize_activations(Tensor x);

bool can_quantize(int64_t qtype);

}  // namespace quantgemm
