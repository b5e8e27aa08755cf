// SPDX-License-Identifier: MIT
// The int8 product as int8_product.h defines it, for comparison: nothing here is in a hurry.
#include <cmath>

#include "../formats/activation.h"
#include "../int8_product.h"
#include "cpu.h"

namespace quantgemm {

void round_to_int8_cpu(const float* x, int64_t k, int8_t* codes, float* scales) {
  for (int64_t first = 0; first < k; first += kInt8Group) {
    const int64_t last = first + kInt8Group < k ? first + kInt8Group : k;
    float largest = 0;
    for (int64_t i = first; i < last; ++i) largest = max_magnitude(largest, x[i]);
    const float scale = activation_scale(largest), inverse = inverse_activation_scale(scale);
    const bool plain = largest > kInt8Least && largest < kInt8Most;
    for (int64_t i = first; i < last; ++i)  // a product of two floats is exact in double
      codes[i] = static_cast<int8_t>(plain ? std::nearbyint(double{x[i]} * double{inverse})
                                           : activation_code(x[i], inverse));
    scales[first / kInt8Group] = scale;
  }
}

float int8_product_cpu(const int8_t* x, const float* x_scales, const int8_t* w, const float* w_scales,
                       int64_t k) {
  float y = 0;
  for (int64_t first = 0; first < k; first += kInt8Group) {
    const int64_t last = first + kInt8Group < k ? first + kInt8Group : k;
    int sum = 0;
    for (int64_t i = first; i < last; ++i) sum += x[i] * w[i];
    y += static_cast<float>(sum) * x_scales[first / kInt8Group] * w_scales[first / kInt8Group];
  }
  return y;
}

}  // namespace quantgemm
