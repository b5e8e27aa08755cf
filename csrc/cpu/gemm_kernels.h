// SPDX-License-Identifier: MIT
// What the CPU products ask of an instruction set. An algorithm there is a GemmKernel: how a token's
// row is laid out, and the product of four rows of weights with a few tokens. With few tokens a tile
// reads codes as decoded; with more, each row is first packed into what the inner loop loads.
// Every y[i, j] is summed in the same order whatever the tiles and threads: along k only.
#pragma once
#include "../args.h"
#include "gemm_panel.h"

namespace quantgemm {

inline constexpr int kTileRows = 4;

// A row of codes as PanelDecoder leaves it, zeros up to a multiple of the kernel's unit.
struct PanelRow {
  const int8_t* codes;
  const float *scales, *offsets;
  int granule = 0;
  bool offset = false;
};

struct GemmTile {
  const uint8_t* x;  // tokens, prepared, at the tile's first column
  int64_t x_stride;  // bytes from token to token
  PanelRow row;      // the first of four, codes row_stride apart, scales row_stride / granule
  int64_t row_stride;
  const uint8_t* packed;  // or the first of four packed rows
  int64_t packed_stride;  // bytes from row to row
  int64_t cols;           // a multiple of unit
  float* sums;            // [tokens, 4], added to
  int64_t sums_stride;    // floats from token to token
};

using TileFunction = void (*)(const GemmTile&);

struct GemmKernel {
  int unit;               // columns per step
  int x_unit_bytes;       // of a prepared token, per unit
  int packed_unit_bytes;  // of a packed row, per unit
  int panel_cols;         // about as many columns at a time, so that a tile's tokens stay in the L1
  int few_tokens;         // so many straight from codes …
  int many_tokens;        // … and so many from packed rows at a time
  void (*prepare)(const GemmArgs& args, int64_t token, uint8_t* x);
  void (*translate)(int8_t* codes, int64_t cols, const int8_t* levels);  // nibbles -> levels
  void (*pack)(const PanelRow& row, int64_t cols, uint8_t* packed);      // null: always from codes
  const TileFunction* few;                                               // [few_tokens], for 1, 2, … tokens
  const TileFunction* many;                                              // [many_tokens]
};

struct GemmKernels {
  GemmKernel tiled, dp4a;
};

// Null where the compiler or the processor cannot.
const GemmKernels* gemm_kernels_avx512();
const GemmKernels* gemm_kernels_avx2();
const GemmKernels* gemm_kernels_plain();

// x as float32, for tiled: [k] and zeros up to a multiple of unit
inline constexpr int kTiledUnit = 32;
void prepare_float32(const GemmArgs& args, int64_t token, uint8_t* x);

}  // namespace quantgemm
