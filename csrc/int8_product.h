// SPDX-License-Identifier: MIT
// A product of packed weights in int8: x, and w once decoded to float32, are rounded per row and 256 columns,
//     scale = max|x| / 127,   q = x · (1 / scale), a product that is rounded once, to an integer,
//     y = Σ over groups of 256 columns of  s_x · s_w · Σ q_x q_w,
// and where a GPU keeps the rounded matrices during a call. Columns of a group may lie in any order there
// that is the same for both. NaN or infinity in a group makes its scale, and so y, not finite.
#pragma once
#include "formats/packed.h"

namespace quantgemm {

constexpr int kInt8Group = 256;                    // columns that share a scale
constexpr int kInt8Tokens = 128, kInt8Rows = 256;  // of a tile
constexpr int kInt8Padding = 256;                  // scales of so many tokens or rows lie side by side

// Between these max|x| the scale and its inverse have all their bits; elsewhere codes are
// activation_code()'s.
constexpr float kInt8Least = 1e-28f, kInt8Most = 1e38f;

QG_HD constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// | codes of x [m, cols] | of w [rows, cols] | scales of x [groups, tokens] | of w [groups, all_rows] |
struct Int8Layout {
  int64_t m, rows, cols, groups, tokens, all_rows;

  QG_HD constexpr Int8Layout(int64_t m, int64_t n, int64_t k)
      : m(m),
        rows(num_strips(n) * kStripRows),
        cols(round_up(k, kInt8Group)),
        groups(cols / kInt8Group),
        tokens(round_up(m, kInt8Padding)),
        all_rows(round_up(n, kInt8Padding)) {}
  QG_HD constexpr int64_t weights_at() const { return m * cols; }
  QG_HD constexpr int64_t token_scales_at() const { return weights_at() + rows * cols; }
  QG_HD constexpr int64_t row_scales_at() const { return token_scales_at() + 4 * groups * tokens; }
  QG_HD constexpr int64_t bytes() const { return row_scales_at() + 4 * groups * all_rows; }
};

}  // namespace quantgemm
