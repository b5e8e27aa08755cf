// SPDX-License-Identifier: MIT
// The registry: every GGUF type, once. A new block type is a struct in one of the family headers and
// its name in BlockFormats; kernels, ops, tests and benchmarks take it from there.
#pragma once
#include "block_format.h"
#include "formats_iq.h"
#include "formats_k.h"
#include "formats_legacy.h"
#include "formats_tiny.h"

namespace quantgemm {

// Unquantised rows. Integers and doubles are rounded once, to the nearest float32.
template <int Type, class T>
struct PlainNumber {
  static constexpr int kType = Type, kElems = 1, kBytes = sizeof(T), kGroup = 1;
  static constexpr bool kOffset = false;
  QG_HD static float value(bytes_ptr e) { return static_cast<float>(load<T, sizeof(T)>(e)); }
};
struct F32 : PlainNumber<0, float> {
  static constexpr const char* kName = "F32";
};
struct I8 : PlainNumber<24, int8_t> {
  static constexpr const char* kName = "I8";
};
struct I16 : PlainNumber<25, int16_t> {
  static constexpr const char* kName = "I16";
};
struct I32 : PlainNumber<26, int32_t> {
  static constexpr const char* kName = "I32";
};
struct I64 : PlainNumber<27, int64_t> {
  static constexpr const char* kName = "I64";
};
struct F64 : PlainNumber<28, double> {
  static constexpr const char* kName = "F64";
};
struct F16 : PlainNumber<1, uint16_t> {
  static constexpr const char* kName = "F16";
  QG_HD static float value(bytes_ptr e) { return half_to_float(load<uint16_t, 2>(e)); }
};
struct BF16 : PlainNumber<30, uint16_t> {
  static constexpr const char* kName = "BF16";
  QG_HD static float value(bytes_ptr e) { return bfloat16_to_float(load<uint16_t, 2>(e)); }
};

inline constexpr int kFloat32Type = F32::kType;  // what float32 matrices are when read as rows of bytes

using PlainFormats = FormatList<F32, F16, BF16, F64, I8, I16, I32, I64>;

using BlockFormats = FormatList<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K,  //
                                IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_NL, IQ4_XS,    //
                                TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0>;

}  // namespace quantgemm
