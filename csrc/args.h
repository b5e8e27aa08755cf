// SPDX-License-Identifier: MIT
// What crosses from ops/ to the kernels: plain structs of pointers and sizes that own nothing.
// Everything in them has been checked by the op layer.
#pragma once
#include <cstdint>

namespace quantgemm {

enum class Real { kFloat32, kFloat16, kBFloat16 };

// Calls f with a value of the storage type: float, or the bit pattern wrapped in a tag.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class Fn>
void visit_real(Real type, Fn&& f) {
  switch (type) {
    case Real::kFloat32: return f(float{});
    case Real::kFloat16: return f(Half{});
    case Real::kBFloat16: return f(BFloat16{});
  }
}

struct DequantizeArgs {
  const uint8_t* blocks;  // [num_blocks, block bytes of qtype]
  void* out;              // [num_blocks, block elems of qtype] of out_type
  int64_t num_blocks;
  int64_t qtype;
  Real out_type;
};

struct QuantizeArgs {
  const void* x;            // [num_blocks, block elems of qtype] of x_type
  const float* importance;  // [blocks_per_row, block elems] or null
  uint8_t* blocks;          // [num_blocks, block bytes of qtype]
  int64_t num_blocks;
  int64_t blocks_per_row;
  int64_t qtype;
  Real x_type;
};

struct ActivationArgs {
  const void* x;  // [num_rows, num_cols] of x_type, num_cols a multiple of 32
  uint8_t* rows;  // [num_rows, ActivationRow::bytes(num_cols)]
  int64_t num_rows;
  int64_t num_cols;
  Real x_type;
};

}  // namespace quantgemm
