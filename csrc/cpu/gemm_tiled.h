// SPDX-License-Identifier: MIT
// float32 products with a set of vectors S: lanes run along k, a tile keeps tokens × 4 sums in
// registers and loads a vector of each token and each row per step. Included by gemm_avx512.cpp,
// gemm_avx2.cpp and gemm_plain.cpp, which define S and QG_SIMD, the attribute that allows its
// instructions; everything is local to the including file.
#include <array>
#include <utility>

namespace quantgemm {
namespace {

template <class S>
struct TiledKernel {
  using Floats = typename S::Floats;

  // Tokens × 4 sums to memory, each summed over its lanes.
  template <int Tokens>
  QG_SIMD static inline void add_sums(const Floats (&sum)[Tokens][kTileRows], const GemmTile& tile) {
    for (int t = 0; t < Tokens; ++t)
      S::add_lane_sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3], tile.sums + t * tile.sums_stride);
  }

  // Weights made in registers from codes, exactly as weight<F>() rounds them.
  template <int Tokens, int Granule, bool Offset>
  QG_SIMD static void from_codes(const GemmTile& tile) {
    Floats sum[Tokens][kTileRows];
    for (auto& row : sum)
      for (auto& lanes : row) lanes = S::zero();
    const int64_t scales_stride = tile.row_stride / Granule;
    for (int64_t e = 0; e < tile.cols; e += Granule) {
      const float *scales = tile.row.scales + e / Granule, *offsets = tile.row.offsets + e / Granule;
#pragma GCC unroll 8
      for (int i = 0; i < Granule; i += S::kLanes) {
        Floats x[Tokens];
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
          x[t] = S::load(reinterpret_cast<const float*>(tile.x + t * tile.x_stride) + e + i);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) {
          const Floats scale = S::broadcast(scales[r * scales_stride]);
          const Floats q = S::codes(tile.row.codes + r * tile.row_stride + e + i);
          Floats w;
          if constexpr (Offset)
            w = S::fma(scale, q, S::broadcast(offsets[r * scales_stride]));
          else
            w = S::mul(scale, q);
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t) sum[t][r] = S::fma(x[t], w, sum[t][r]);
        }
      }
    }
    add_sums<Tokens>(sum, tile);
  }

  template <int Tokens>
  static void few(const GemmTile& tile) {
    const bool offset = tile.row.offset;
    switch (tile.row.granule) {
      case 32: return offset ? from_codes<Tokens, 32, true>(tile) : from_codes<Tokens, 32, false>(tile);
      case 16: return offset ? from_codes<Tokens, 16, true>(tile) : from_codes<Tokens, 16, false>(tile);
      default:  // 4: plain vectors alone
        if constexpr (S::kLanes == 4)
          return offset ? from_codes<Tokens, 4, true>(tile) : from_codes<Tokens, 4, false>(tile);
    }
  }

  // codes -> float32 weights
  template <int Granule, bool Offset>
  QG_SIMD static void expand(const PanelRow& row, int64_t cols, float* weights) {
    for (int64_t g = 0; g < cols / Granule; ++g) {
      const Floats scale = S::broadcast(row.scales[g]);
      for (int64_t e = g * Granule; e < (g + 1) * Granule; e += S::kLanes) {
        const Floats q = S::codes(row.codes + e);
        if constexpr (Offset)
          S::store(weights + e, S::fma(scale, q, S::broadcast(row.offsets[g])));
        else
          S::store(weights + e, S::mul(scale, q));
      }
    }
  }

  static void pack(const PanelRow& row, int64_t cols, uint8_t* packed) {
    float* weights = reinterpret_cast<float*>(packed);
    switch (row.granule) {
      case 32:
        return row.offset ? expand<32, true>(row, cols, weights) : expand<32, false>(row, cols, weights);
      case 16:
        return row.offset ? expand<16, true>(row, cols, weights) : expand<16, false>(row, cols, weights);
      default:
        if constexpr (S::kLanes == 4)
          return row.offset ? expand<4, true>(row, cols, weights) : expand<4, false>(row, cols, weights);
    }
  }

  template <int Tokens>
  QG_SIMD static void many(const GemmTile& tile) {
    Floats sum[Tokens][kTileRows];
    for (auto& row : sum)
      for (auto& lanes : row) lanes = S::zero();
    for (int64_t e = 0; e < tile.cols; e += S::kLanes) {
      Floats w[kTileRows];
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r)
        w[r] = S::load(reinterpret_cast<const float*>(tile.packed + r * tile.packed_stride) + e);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        const Floats x = S::load(reinterpret_cast<const float*>(tile.x + t * tile.x_stride) + e);
#pragma GCC unroll 4
        for (int r = 0; r < kTileRows; ++r) sum[t][r] = S::fma(x, w[r], sum[t][r]);
      }
    }
    add_sums<Tokens>(sum, tile);
  }

  template <int... I>
  static const TileFunction* few_table(std::integer_sequence<int, I...>) {
    static const TileFunction table[] = {&few<I + 1>...};
    return table;
  }
  template <int... I>
  static const TileFunction* many_table(std::integer_sequence<int, I...>) {
    static const TileFunction table[] = {&many<I + 1>...};
    return table;
  }

  static GemmKernel kernel() {
    return {kTiledUnit,
            4 * kTiledUnit,
            4 * kTiledUnit,
            S::kTiledCols,
            S::kFewTokens,
            S::kManyTokens,
            &prepare_float32,
            &S::translate,
            &pack,
            few_table(std::make_integer_sequence<int, S::kFewTokens>{}),
            many_table(std::make_integer_sequence<int, S::kManyTokens>{})};
  }
};

}  // namespace
}  // namespace quantgemm
