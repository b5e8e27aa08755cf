// SPDX-License-Identifier: MIT
// Rows of x and w in units of eight neighbouring values, as float32. No block and no group of a
// format is shorter, so a unit has one scale; and eight activations are one or two 16-byte loads.
// Unit u of a row is its values 8u … 8u+7, zeros from k on. Where the caller knows that rows consist
// of whole units and this is one of them (kInside), there is no branch, so that loads overlap.
#pragma once
#include "../formats/gguf_formats.h"
#include "memory.cuh"

namespace quantgemm {

constexpr int kUnit = 8;

// Rows start on 16-byte boundaries if k is a multiple of eight, which any block makes it.
template <class F, bool kInside = false, class X>
__device__ __forceinline__ void load_activations(float (&v)[kUnit], const X* row, int u, int k) {
  const int e = kUnit * u;
  if constexpr (kInside) {
    load8(v, row + e);
  } else if (e < k && (BlockFormat<F> || k % kUnit == 0)) {
    load8(v, row + e);
  } else {
    for (int j = 0; j < kUnit; ++j) v[j] = PlainFormat<F> && e + j < k ? to_float(row[e + j]) : 0;
  }
}

// Of row `row` of x [.., k] of any type: a branch that all threads take alike, where compiling a kernel for
// each type is not worth its time.
template <class F>
__device__ __forceinline__ void load_activations(float (&v)[kUnit], const void* x, Real type, int64_t row,
                                                 int u, int k) {
  switch (type) {
    case Real::kFloat32: return load_activations<F>(v, static_cast<const float*>(x) + row * k, u, k);
    case Real::kFloat16: return load_activations<F>(v, static_cast<const Half*>(x) + row * k, u, k);
    case Real::kBFloat16: return load_activations<F>(v, static_cast<const BFloat16*>(x) + row * k, u, k);
  }
}

template <BlockFormat F, bool kInside = false>
__device__ __forceinline__ void load_weights(float (&v)[kUnit], bytes_ptr row, int u, int k) {
  static_assert(F::kGroup % kUnit == 0);
  constexpr unsigned kUnitsOfBlock = F::kElems / kUnit;
  const unsigned block_idx = static_cast<unsigned>(u) / kUnitsOfBlock,
                 within = static_cast<unsigned>(u) % kUnitsOfBlock;
  if (kInside || kUnit * u < k) {
    bytes_ptr block = row + int64_t{F::kBytes} * block_idx;
    const Affine affine = F::affine(block, static_cast<int>(within * kUnit / F::kGroup));
    for (int i = 0; i < 2; ++i) decode_quad<F>(block, static_cast<int>(2 * within) + i, affine, v + 4 * i);
  } else {
    for (float& value : v) value = 0;
  }
}

template <PlainFormat F, bool kInside = false>
__device__ __forceinline__ void load_weights(float (&v)[kUnit], bytes_ptr row, int u, int k) {
  const int e = kUnit * u;
  row += int64_t{F::kBytes} * e;
  if (kInside || (e < k && k % kUnit == 0)) {
    using Piece = std::conditional_t<F::kBytes == 1, uint2, uint4>;
    Piece pieces[kUnit * F::kBytes / sizeof(Piece)];
    for (int i = 0; i < static_cast<int>(sizeof pieces / sizeof(Piece)); ++i)
      pieces[i] = reinterpret_cast<const Piece*>(row)[i];
    for (int j = 0; j < kUnit; ++j) v[j] = F::value(reinterpret_cast<bytes_ptr>(pieces) + j * F::kBytes);
  } else {
    for (int j = 0; j < kUnit; ++j) v[j] = e + j < k ? F::value(row + j * F::kBytes) : 0;
  }
}

}  // namespace quantgemm
