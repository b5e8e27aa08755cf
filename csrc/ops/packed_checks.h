// SPDX-License-Identifier: MIT
// What ops on packed weights ask of them: a type with a packed form, and the sizes that follow.
#pragma once
#include "../formats/packed.h"
#include "checks.h"

namespace quantgemm {

struct PackedShape {
  std::string name;
  int64_t elems, row_bytes, strips, strip_bytes;  // row_bytes of the blocks
};

inline bool can_pack(int64_t qtype) {
  bool can = false;
  BlockFormats::visit(qtype, [&]<class F>(F) { can = PackableFormat<F>; });
  return can;
}

// Of weights [n, k]; k is checked by the caller, who knows what it came from.
inline PackedShape check_packable(int64_t qtype, int64_t n, int64_t k) {
  const RowFormat row = check_qtype(qtype);
  std::string able;
  BlockFormats::for_each([&](auto f) {
    if (can_pack(f.kType)) able += concat(able.empty() ? "" : ", ", f.kName);
  });
  check_implemented(can_pack(qtype), "qtype: ", row.name, " has no packed form; types that have one: ", able);
  PackedShape shape{row.name, row.elems, k / row.elems * row.bytes, num_strips(n), 0};
  BlockFormats::visit(qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) shape.strip_bytes = PackedLayout<F>::strip_bytes(k);
  });
  return shape;
}

// Type, n and k of packed weights; their shape is the caller's to check.
inline PackedShape check_packed_type(const Tensor& packed, int64_t qtype, int64_t n, int64_t k,
                                     const char* name) {
  check_device(name, packed);
  check_type(packed.scalar_type() == ScalarType::Byte, name, ": expected torch.uint8, got ",
             dtype_name(packed.scalar_type()));
  check_value(n >= 0, "n: expected at least 0, got ", n);
  check_value(k >= 0, "k: expected at least 0, got ", k);
  const PackedShape shape = check_packable(qtype, n, k);
  check_value(k % shape.elems == 0, "k: ", k, " is not a multiple of the ", shape.elems, " weights of a ",
              shape.name, " block");
  return shape;
}

inline PackedShape check_strips(const Tensor& packed, int64_t qtype, int64_t n, int64_t k,
                                const char* name = "packed") {
  const PackedShape shape = check_packed_type(packed, qtype, n, k, name);
  check_value(packed.dim() == 2 && packed.size(0) == shape.strips && packed.size(1) == shape.strip_bytes,
              name, ": expected shape [", shape.strips, ", ", shape.strip_bytes, "] for ", shape.name,
              " weights [", n, ", ", k, "], got ", shape_of(packed));
  return shape;
}

// Weights of several experts, one after the other.
inline PackedShape check_expert_strips(const Tensor& packed, int64_t qtype, int64_t n, int64_t k,
                                       const char* name = "packed") {
  const PackedShape shape = check_packed_type(packed, qtype, n, k, name);
  check_value(packed.dim() == 3 && packed.size(1) == shape.strips && packed.size(2) == shape.strip_bytes,
              name, ": expected shape [experts, ", shape.strips, ", ", shape.strip_bytes, "] for ",
              shape.name, " weights [experts, ", n, ", ", k, "], got ", shape_of(packed));
  check_implemented(packed.size(0) <= kMaxExperts, "packed: expected at most ", kMaxExperts, " experts, got ",
                    packed.size(0));
  return shape;
}

}  // namespace quantgemm
