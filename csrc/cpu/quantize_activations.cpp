// SPDX-License-Identifier: MIT
// Rows of activations to int8 with a scale and a sum per 32 values (formats/activation.h).
#include "../formats/activation.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

template <class In>
struct QuantizeRow {
  QG_HD static void run(const In* x, uint8_t* row, int64_t cols) {
    constexpr int kGroup = ActivationRow::kGroup;
    uint8_t* scales = row + ActivationRow::scales_offset(cols);
    for (int64_t g = 0; g < cols / kGroup; ++g, x += kGroup) {
      float largest = 0;
      for (int j = 0; j < kGroup; ++j) largest = max_magnitude(largest, load_real(x + j));
      const float scale = activation_scale(largest), inverse = inverse_activation_scale(scale);
      int sum = 0;
      for (int j = 0; j < kGroup; ++j) {
        const int q = activation_code(load_real(x + j), inverse);
        row[g * kGroup + j] = static_cast<uint8_t>(q);
        sum += q;
      }
      const float scale_sum[2] = {scale, activation_sum(scale, sum)};
      std::memcpy(scales + 8 * g, scale_sum, 8);
    }
    const int64_t used = cols + cols / kGroup * 8;
    std::memset(row + used, 0, static_cast<size_t>(ActivationRow::bytes(cols) - used));
  }
};

}  // namespace

void quantize_activations_cpu(const ActivationArgs& args, int64_t first_row, int64_t last_row) {
  visit_real(args.x_type, [&]<class In>(In) {
    const In* x = static_cast<const In*>(args.x);
    for (int64_t r = first_row; r < last_row; ++r)
      run_vectorized<QuantizeRow<In>>(x + r * args.num_cols,
                                      args.rows + r * ActivationRow::bytes(args.num_cols), args.num_cols);
  });
}

}  // namespace quantgemm
