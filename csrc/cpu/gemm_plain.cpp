// SPDX-License-Identifier: MIT
// The CPU products without intrinsics: float32 in vectors of four, which g++ and clang have on every
// architecture, and integer products as a loop. Serves any group size.
#include <cstring>

#include "../formats/activation.h"
#include "gemm_kernels.h"

#define QG_SIMD
#define QG_INLINE QG_HD static

namespace quantgemm {
namespace {

struct PlainVectors {
  typedef float Floats __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kFewTokens = 1, kManyTokens = 2, kTiledCols = 512;

  QG_INLINE Floats zero() { return Floats{}; }
  QG_INLINE Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  QG_INLINE void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
  QG_INLINE Floats broadcast(float v) { return Floats{v, v, v, v}; }
  QG_INLINE Floats mul(Floats a, Floats b) { return a * b; }
  QG_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  QG_INLINE Floats codes(const int8_t* p) {
    return Floats{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                  static_cast<float>(p[3])};
  }
  // sums[0 … 3] += the sums over the lanes of a, b, c, d
  QG_INLINE void add_lane_sums(Floats a, Floats b, Floats c, Floats d, float* sums) {
    const Floats all = {(a[0] + a[1]) + (a[2] + a[3]), (b[0] + b[1]) + (b[2] + b[3]),
                        (c[0] + c[1]) + (c[2] + c[3]), (d[0] + d[1]) + (d[2] + d[3])};
    store(sums, load(sums) + all);
  }
  static void translate(int8_t* codes, int64_t cols, const int8_t* levels) {
    for (int64_t e = 0; e < cols; ++e) codes[e] = levels[codes[e]];
  }
};

// Token, per 32 columns: | 32 codes | scale |
constexpr int kUnit = ActivationRow::kGroup, kUnitBytes = kUnit + 4;

void prepare_dp4a(const GemmArgs& args, int64_t token, uint8_t* x) {
  const uint8_t* row = args.activations + token * ActivationRow::bytes(args.k);
  const uint8_t* scales = row + ActivationRow::scales_offset(args.k);
  for (int64_t g = 0; g < args.k / kUnit; ++g, x += kUnitBytes) {
    std::memcpy(x, row + g * kUnit, kUnit);
    std::memcpy(x + kUnit, scales + 8 * g, 4);
  }
}

template <int Granule>
void dot_rows(const GemmTile& tile) {
  for (int r = 0; r < kTileRows; ++r) {
    const int8_t* codes = tile.row.codes + r * tile.row_stride;
    const float* scales = tile.row.scales + r * (tile.row_stride / Granule);
    const float* offsets = tile.row.offsets + r * (tile.row_stride / Granule);
    const uint8_t* x = tile.x;
    float sum = 0;
    for (int64_t e = 0; e < tile.cols; e += kUnit, x += kUnitBytes) {
      float x_scale;
      std::memcpy(&x_scale, x + kUnit, 4);
      for (int i = 0; i < kUnit; i += Granule) {
        const int64_t g = (e + i) / Granule;
        int dot = 0, x_sum = 0;
        for (int j = i; j < i + Granule; ++j) {
          const auto q = static_cast<int8_t>(x[j]);
          dot += codes[e + j] * q;
          x_sum += q;
        }
        sum += scales[g] * (x_scale * static_cast<float>(dot));
        if (tile.row.offset) sum += offsets[g] * (x_scale * static_cast<float>(x_sum));
      }
    }
    tile.sums[r] += sum;
  }
}

void dp4a_tile(const GemmTile& tile) {
  switch (tile.row.granule) {
    case 32: return dot_rows<32>(tile);
    case 16: return dot_rows<16>(tile);
    default: return dot_rows<4>(tile);
  }
}

}  // namespace
}  // namespace quantgemm

#include "gemm_tiled.h"

namespace quantgemm {

const GemmKernels* gemm_kernels_plain() {
  static const TileFunction dp4a_tiles[] = {&dp4a_tile};
  static const GemmKernels kernels{TiledKernel<PlainVectors>::kernel(),
                                   {kUnit, kUnitBytes, 0, 2048, 1, 0, &prepare_dp4a, &PlainVectors::translate,
                                    nullptr, dp4a_tiles, nullptr}};
  return &kernels;
}

}  // namespace quantgemm
