// SPDX-License-Identifier: MIT
// Rows of x and w in units of eight neighbouring values, as float32. No block and no group of a
// format is shorter, so a unit has one scale; and eight activations are one or two 16-byte loads.
// Unit u of a row is its values 8u … 8u+7, zeros from k on.
#pragma once
#include "../formats/gguf_formats.h"
#include "memory.cuh"

namespace quantgemm {

constexpr int kUnit = 8;

// A unit of x as it is stored; rows start on 16-byte boundaries if k is a multiple of eight, which
// any block makes it.
template <class X>
struct ActivationUnit {
  uint4 words[kUnit * sizeof(X) / 16];

  template <class F>
  __device__ __forceinline__ void load(const X* row, int u, int64_t k) {
    const int64_t e = int64_t{kUnit} * u;
    if (e < k && (BlockFormat<F> || k % kUnit == 0)) {
      for (int i = 0; i < static_cast<int>(sizeof words / 16); ++i)
        words[i] = reinterpret_cast<const uint4*>(row + e)[i];
    } else {
      X values[kUnit] = {};
      for (int j = 0; j < kUnit; ++j)
        if (PlainFormat<F> && e + j < k) values[j] = row[e + j];
      memcpy(words, values, sizeof words);
    }
  }
  __device__ __forceinline__ void decode(float (&v)[kUnit]) const {
    load8(v, reinterpret_cast<const X*>(words));
  }
};

// A unit of w: two quads and their scale, which take half the registers of the weights.
template <class F>
struct WeightUnit;

template <BlockFormat F>
struct WeightUnit<F> {
  static_assert(F::kGroup % kUnit == 0);
  Affine affine;
  uint32_t quads[2];

  __device__ __forceinline__ void load(bytes_ptr row, int u, int64_t k) {
    constexpr unsigned kUnitsOfBlock = F::kElems / kUnit;
    const unsigned block_idx = static_cast<unsigned>(u) / kUnitsOfBlock,
                   within = static_cast<unsigned>(u) % kUnitsOfBlock;
    affine = {0, 0}, quads[0] = quads[1] = 0;
    if (int64_t{kUnit} * u >= k) return;
    bytes_ptr block = row + int64_t{F::kBytes} * block_idx;
    affine = F::affine(block, static_cast<int>(within * kUnit / F::kGroup));
    for (int i = 0; i < 2; ++i) quads[i] = F::quad(block, static_cast<int>(within * 2 + i));
  }
  __device__ __forceinline__ void decode(float (&v)[kUnit]) const {
    for (int j = 0; j < kUnit; ++j) v[j] = weight<F>(affine, byte_to_float(quads[j / 4], j % 4));
  }
};

template <PlainFormat F>
struct WeightUnit<F> {
  float values[kUnit];

  __device__ __forceinline__ void load(bytes_ptr row, int u, int64_t k) {
    const int64_t e = int64_t{kUnit} * u;
    row += e * F::kBytes;
    if (e < k && k % kUnit == 0) {
      using Piece = std::conditional_t<F::kBytes == 1, uint2, uint4>;
      Piece pieces[kUnit * F::kBytes / sizeof(Piece)];
      for (int i = 0; i < static_cast<int>(sizeof pieces / sizeof(Piece)); ++i)
        pieces[i] = reinterpret_cast<const Piece*>(row)[i];
      for (int j = 0; j < kUnit; ++j)
        values[j] = F::value(reinterpret_cast<bytes_ptr>(pieces) + j * F::kBytes);
    } else {
      for (int j = 0; j < kUnit; ++j) values[j] = e + j < k ? F::value(row + j * F::kBytes) : 0;
    }
  }
  __device__ __forceinline__ void decode(float (&v)[kUnit]) const {
    for (int j = 0; j < kUnit; ++j) v[j] = values[j];
  }
};

}  // namespace quantgemm
