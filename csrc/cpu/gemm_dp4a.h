// SPDX-License-Identifier: MIT
// Integer products with a set of vectors S of L lanes: y = Σ s_w s_a Σ q_w q_a + o_w s_a Σ q_a over
// halves of an activation group, 16 weights. A unit is L halves. Its codes, four vectors, are
// transposed so that a lane holds four codes of one half: four dot products into the same lanes
// finish all L sums, and scales meet them as vectors.
//   lane 4a + b, a < A = L / 4, b < 4, is half A·b + a; vector j has its codes 4j … 4j + 3
// Token, per unit: | 4 vectors of codes | start of the integer sums | s_a | s_a Σ q_a |
// Packed row:      | 4 vectors of codes | s_w | o_w |
// Included like gemm_tiled.h.
#include "../formats/activation.h"

namespace quantgemm {
namespace {

template <class S>
struct Dp4aKernel {
  using Floats = typename S::Floats;
  using Ints = typename S::Ints;
  static constexpr int kLanes = S::kLanes, kUnit = 16 * kLanes, kVector = 4 * kLanes;  // bytes

  static int half_of(int lane) { return kLanes / 4 * (lane % 4) + lane / 4; }

  QG_SIMD static void prepare(const GemmArgs& args, int64_t token, uint8_t* x) {
    const uint8_t* row = args.activations + token * ActivationRow::bytes(args.k);
    const uint8_t* scales = row + ActivationRow::scales_offset(args.k);
    for (int64_t e = 0; e < args.k; e += kUnit, x += 7 * kVector) {
      const int64_t elems = args.k - e < kUnit ? args.k - e : kUnit;
      alignas(64) int8_t codes[kUnit] = {};
      std::memcpy(codes, row + e, static_cast<size_t>(elems));
      Ints q[4];
      for (int j = 0; j < 4; ++j) q[j] = S::load_ints(codes + j * kVector);
      S::transpose(q);
      for (int j = 0; j < 4; ++j) S::store_ints(x + j * kVector, q[j]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int half = half_of(lane);
        int32_t sum = 0;
        for (int i = 0; i < 16; ++i) sum += codes[16 * half + i];
        float scale = 0;
        if (16 * half < elems) std::memcpy(&scale, scales + (e / 32 + half / 2) * 8, 4);
        const int32_t start = -S::kBias * sum;
        const float scaled = scale * static_cast<float>(sum);
        std::memcpy(x + 4 * kVector + 4 * lane, &start, 4);
        std::memcpy(x + 5 * kVector + 4 * lane, &scale, 4);
        std::memcpy(x + 6 * kVector + 4 * lane, &scaled, 4);
      }
    }
  }

  QG_SIMD static inline void load_codes(const int8_t* codes, Ints (&q)[4]) {
    for (int j = 0; j < 4; ++j) q[j] = S::load_ints(codes + j * kVector);
    S::transpose(q);
    for (int j = 0; j < 4; ++j) q[j] = S::biased(q[j]);
  }

  template <int Granule>
  QG_SIMD static void pack_row(const PanelRow& row, int64_t cols, uint8_t* packed) {
    for (int64_t e = 0; e < cols; e += kUnit, packed += 6 * kVector) {
      Ints q[4];
      load_codes(row.codes + e, q);
      for (int j = 0; j < 4; ++j) S::store_ints(packed + j * kVector, q[j]);
      S::store(reinterpret_cast<float*>(packed + 4 * kVector),
               S::template spread<Granule>(row.scales + e / Granule));
      if (row.offset)
        S::store(reinterpret_cast<float*>(packed + 5 * kVector),
                 S::template spread<Granule>(row.offsets + e / Granule));
    }
  }
  static void pack(const PanelRow& row, int64_t cols, uint8_t* packed) {
    row.granule == 32 ? pack_row<32>(row, cols, packed) : pack_row<16>(row, cols, packed);
  }

  // Granule 0: from packed rows.
  template <int Tokens, int Granule, bool Offset>
  QG_SIMD static void multiply(const GemmTile& tile) {
    Floats sum[Tokens][kTileRows];
    for (auto& row : sum)
      for (auto& lanes : row) lanes = S::zero();
    for (int64_t u = 0; u < tile.cols / kUnit; ++u) {
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        Ints q[4];
        Floats scale, offset = S::zero();
        if constexpr (Granule == 0) {
          const uint8_t* packed = tile.packed + r * tile.packed_stride + u * (6 * kVector);
          for (int j = 0; j < 4; ++j) q[j] = S::load_ints(packed + j * kVector);
          scale = S::load(reinterpret_cast<const float*>(packed + 4 * kVector));
          if constexpr (Offset) offset = S::load(reinterpret_cast<const float*>(packed + 5 * kVector));
        } else {
          load_codes(tile.row.codes + r * tile.row_stride + u * kUnit, q);
          const int64_t group = r * (tile.row_stride / Granule) + u * (kUnit / Granule);
          scale = S::template spread<Granule>(tile.row.scales + group);
          if constexpr (Offset) offset = S::template spread<Granule>(tile.row.offsets + group);
        }
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          const uint8_t* x = tile.x + t * tile.x_stride + u * (7 * kVector);
          const float* x_scales = reinterpret_cast<const float*>(x + 5 * kVector);
          Ints dots = S::kBias != 0 ? S::load_ints(x + 4 * kVector) : S::zero_ints();
          for (int j = 0; j < 4; ++j) dots = S::dot4(dots, q[j], S::load_ints(x + j * kVector));
          sum[t][r] = S::fma(S::mul(S::to_floats(dots), S::load(x_scales)), scale, sum[t][r]);
          if constexpr (Offset) sum[t][r] = S::fma(offset, S::load(x_scales + kLanes), sum[t][r]);
        }
      }
    }
    for (int t = 0; t < Tokens; ++t)
      S::add_lane_sums(sum[t][0], sum[t][1], sum[t][2], sum[t][3], tile.sums + t * tile.sums_stride);
  }

  static void few(const GemmTile& tile) {
    const bool offset = tile.row.offset;
    if (tile.row.granule == 32) return offset ? multiply<1, 32, true>(tile) : multiply<1, 32, false>(tile);
    return offset ? multiply<1, 16, true>(tile) : multiply<1, 16, false>(tile);
  }
  template <int Tokens>
  static void many(const GemmTile& tile) {
    tile.row.offset ? multiply<Tokens, 0, true>(tile) : multiply<Tokens, 0, false>(tile);
  }

  static GemmKernel kernel() {
    static const TileFunction few_table[] = {&few};
    static const TileFunction many_table[] = {&many<1>, &many<2>};
    return {kUnit,    7 * kVector,   6 * kVector, S::kDp4aCols, 1,         2,
            &prepare, &S::translate, &pack,       few_table,    many_table};
  }
};

}  // namespace
}  // namespace quantgemm
