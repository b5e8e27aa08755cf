// SPDX-License-Identifier: MIT
// y[i, j] = sum over e of x[i, e] · w[j, e] on the CPU. naive is one loop. tiled and dp4a share the
// way through memory: a panel of weight rows is decoded for a run of columns, once for up to 512
// tokens, and meets them tile by tile while it is in the cache.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../formats/gguf_formats.h"
#include "cpu.h"
#include "gemm_kernels.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

constexpr int64_t kRun = 64;

void gemm_naive(const GemmArgs& args, const GemmRange& range) {
  visit_real(args.type, [&]<class T>(T) {
    const auto run = [&]<class F>(F) {
      std::vector<float> row(static_cast<size_t>(args.k));
      for (int64_t j = range.first_n; j < range.last_n; ++j) {
        bytes_ptr w = args.w + j * (args.k / F::kElems * F::kBytes);
        for (int64_t e = 0; e < args.k; ++e) {
          if constexpr (PlainFormat<F>) {
            row[e] = F::value(w + e * F::kBytes);
          } else {
            bytes_ptr block = w + e / F::kElems * F::kBytes;
            const int within = static_cast<int>(e % F::kElems);
            row[e] = weight<F>(F::affine(block, within / F::kGroup),
                               byte_to_float(F::quad(block, within / 4), within % 4));
          }
        }
        for (int64_t i = range.first_m; i < range.last_m; ++i) {
          const T* x = static_cast<const T*>(args.x) + i * args.k;
          float sum = 0;  // of runs: short sums round less than one of length k
          for (int64_t begin = 0; begin < args.k; begin += kRun) {
            float run = 0;
            for (int64_t e = begin; e < std::min(begin + kRun, args.k); ++e) run += load_real(x + e) * row[e];
            sum += run;
          }
          store_real(static_cast<T*>(args.y) + i * args.n + j, sum);
        }
      }
    };
    if (!BlockFormats::visit(args.qtype, run)) PlainFormats::visit(args.qtype, run);
  });
}

template <class T>
struct ToFloat32 {
  QG_HD static void run(const T* x, float* out, int64_t count) {
    for (int64_t e = 0; e < count; ++e) out[e] = load_real(x + e);
  }
};

const GemmKernel& kernel_of(GemmAlgo algo, const PanelDecoder& decoder) {
  const GemmKernels* kernels = nullptr;
  const bool wide = decoder.granule != 4;  // 0 also: unquantised
  if (wide && simd_level() == SimdLevel::kAvx512) kernels = gemm_kernels_avx512();
  if (wide && kernels == nullptr && simd_level() != SimdLevel::kPlain) kernels = gemm_kernels_avx2();
  if (kernels == nullptr) kernels = gemm_kernels_plain();
  return algo == GemmAlgo::kDp4a ? kernels->dp4a : kernels->tiled;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Bytes from token to token: an odd number of cache lines, as powers of two would share cache sets.
int64_t x_stride_of(const GemmKernel& kernel, int64_t k) {
  return round_up(round_up(k, kernel.unit) / kernel.unit * kernel.x_unit_bytes, 128) + 64;
}

struct alignas(64) CacheLine {
  uint8_t bytes[64];
};

// The product of one range by tiles; the panel's memory is its own, so threads share nothing.
class PanelProduct {
 public:
  PanelProduct(const GemmArgs& args, GemmAlgo algo, const GemmRange& range)
      : args_(args), range_(range), decoder_(panel_decoder(args.qtype)), kernel_(kernel_of(algo, decoder_)) {
    const int64_t tokens = std::min(range.last_m - range.first_m, kTokens);
    packing_ = decoder_.granule == 0 || (kernel_.pack != nullptr && tokens > kernel_.few_tokens);
    // Few tokens: as few rows as a tile has, so that their codes never leave the L1.
    const int64_t n = round_up(range.last_n - range.first_n, kTileRows);
    rows_ = tokens <= kernel_.few_tokens ? kTileRows : std::min<int64_t>(n, kRows);
    const int64_t step = std::lcm<int64_t>(decoder_.elems, kernel_.unit);
    sum_cols_ = std::max<int64_t>(kernel_.panel_cols / step, 1) * step;
    cols_ = packing_ ? sum_cols_ : std::min(4 * sum_cols_, round_up(args.k, sum_cols_));
    stride_ = round_up(cols_, 64) + 64;
    packed_stride_ = cols_ / kernel_.unit * kernel_.packed_unit_bytes + 64;
    sums_.resize(static_cast<size_t>(tokens * rows_));
    const int64_t code_rows = packing_ ? 1 : rows_;
    const int64_t code_bytes =
        code_rows * stride_;  // and no more for scales: four weights share one at least
    const int64_t packed_bytes = packing_ ? rows_ * packed_stride_ : 0;
    memory_.resize(static_cast<size_t>((packed_bytes + 3 * code_bytes) / 64));
    packed_ = memory_.data()->bytes;
    codes_ = reinterpret_cast<int8_t*>(packed_ + packed_bytes);
    scales_ = reinterpret_cast<float*>(packed_ + packed_bytes + code_bytes);
    offsets_ = reinterpret_cast<float*>(packed_ + packed_bytes + 2 * code_bytes);
  }

  void run() {
    for (int64_t i = range_.first_m; i < range_.last_m; i += kTokens)
      for (int64_t j = range_.first_n; j < range_.last_n; j += rows_)
        multiply_panel(i, std::min(i + kTokens, range_.last_m), j, std::min(j + rows_, range_.last_n));
  }

 private:
  static constexpr int64_t kTokens = 512, kRows = 64;

  // Columns first … first + cols − 1 of row j of w, with zeros up to padded columns, to row r of the panel.
  void decode_row(int64_t j, int64_t r, int64_t first, int64_t cols, int64_t padded) {
    bytes_ptr w = args_.w + (j * (args_.k / decoder_.elems) + first / decoder_.elems) * decoder_.bytes;
    if (j + rows_ < range_.last_n) {
      // The same columns of the row that will take this one's place: too far on for the processor to guess.
      bytes_ptr next = w + rows_ * (args_.k / decoder_.elems) * decoder_.bytes;
      for (int64_t b = 0; b < cols / decoder_.elems * decoder_.bytes; b += 64)
        __builtin_prefetch(next + b, 0, 2);
    }
    uint8_t* packed = packed_ + r * packed_stride_;
    if (decoder_.granule == 0) {
      float* weights = reinterpret_cast<float*>(packed);
      decoder_.convert(w, cols, weights);
      std::fill(weights + cols, weights + padded, 0.0f);
      return;
    }
    const int64_t code_row = packing_ ? 0 : r, granule = decoder_.granule;
    int8_t* codes = codes_ + code_row * stride_;
    float *scales = scales_ + code_row * stride_ / granule,
          *offsets = offsets_ + code_row * stride_ / granule;
    decoder_.decode(w, cols / decoder_.elems, codes, scales, offsets);
    if (decoder_.levels != nullptr) kernel_.translate(codes, cols, decoder_.levels);
    std::fill(codes + cols, codes + padded, 0);
    std::fill(scales + cols / granule, scales + padded / granule, 0.0f);
    std::fill(offsets + cols / granule, offsets + padded / granule, 0.0f);
    if (packing_) kernel_.pack({codes, scales, offsets, decoder_.granule, decoder_.offset}, padded, packed);
  }

  void multiply_tile(int64_t i, int tokens, int64_t r, int64_t first, int64_t cols, float* sums) {
    const int64_t x_stride = x_stride_of(kernel_, args_.k);
    for (int64_t e = 0; e < cols; e += sum_cols_) {
      const uint8_t* x = static_cast<const uint8_t*>(args_.scratch) + i * x_stride +
                         (first + e) / kernel_.unit * kernel_.x_unit_bytes;
      PanelRow row{};
      if (!packing_) {
        const int64_t begin = r * stride_ + e, group = begin / decoder_.granule;
        row = {codes_ + begin, scales_ + group, offsets_ + group};
      }
      row.granule = decoder_.granule;
      row.offset = decoder_.offset;
      const GemmTile tile{x,
                          x_stride,
                          row,
                          stride_,
                          packed_ + r * packed_stride_,
                          packed_stride_,
                          std::min(sum_cols_, cols - e),
                          sums,
                          rows_};
      (packing_ ? kernel_.many : kernel_.few)[tokens - 1](tile);
    }
  }

  void multiply_panel(int64_t first_m, int64_t last_m, int64_t first_n, int64_t last_n) {
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int64_t e = 0; e < args_.k; e += cols_) {
      const int64_t cols = std::min(cols_, args_.k - e), padded = round_up(cols, kernel_.unit);
      for (int64_t j = first_n; j < last_n; ++j) decode_row(j, j - first_n, e, cols, padded);
      const int most = packing_ ? kernel_.many_tokens : kernel_.few_tokens;
      for (int64_t i = first_m; i < last_m;) {
        // Tiles of nearly equal size, instead of full ones and a thin last.
        const int64_t left = last_m - i, tiles = (left + most - 1) / most,
                      tokens = (left + tiles - 1) / tiles;
        for (int64_t r = 0; r < last_n - first_n; r += kTileRows)
          multiply_tile(i, static_cast<int>(tokens), r, e, padded, sums_.data() + (i - first_m) * rows_ + r);
        i += tokens;
      }
    }
    visit_real(args_.type, [&]<class T>(T) {
      for (int64_t i = first_m; i < last_m; ++i)
        for (int64_t j = first_n; j < last_n; ++j)
          store_real(static_cast<T*>(args_.y) + i * args_.n + j, sums_[(i - first_m) * rows_ + j - first_n]);
    });
  }

  const GemmArgs& args_;
  const GemmRange& range_;
  const PanelDecoder decoder_;
  const GemmKernel& kernel_;
  bool packing_;
  int64_t rows_, cols_;             // of the panel
  int64_t sum_cols_;                // columns that a tile sums at a time, the same for any m
  int64_t stride_, packed_stride_;  // from row to row: in codes, in bytes
  std::vector<float> sums_;         // [tokens, rows_]
  std::vector<CacheLine> memory_;   // zeros at first: a tile may reach past the last row
  uint8_t* packed_;
  int8_t* codes_;
  float *scales_, *offsets_;
};

}  // namespace

void prepare_float32(const GemmArgs& args, int64_t token, uint8_t* x) {
  visit_real(args.type, [&]<class T>(T) {
    run_vectorized<ToFloat32<T>>(static_cast<const T*>(args.x) + token * args.k, reinterpret_cast<float*>(x),
                                 args.k);
  });
  std::memset(x + 4 * args.k, 0, static_cast<size_t>(4 * (round_up(args.k, kTiledUnit) - args.k)));
}

int64_t gemm_cpu_scratch_bytes(const GemmArgs& args, GemmAlgo algo) {
  if (algo == GemmAlgo::kNaive) return 0;
  return args.m * x_stride_of(kernel_of(algo, panel_decoder(args.qtype)), args.k);
}

void gemm_cpu_prepare(const GemmArgs& args, GemmAlgo algo, int64_t first_m, int64_t last_m) {
  if (algo == GemmAlgo::kNaive) return;
  const GemmKernel& kernel = kernel_of(algo, panel_decoder(args.qtype));
  const int64_t stride = x_stride_of(kernel, args.k);
  for (int64_t i = first_m; i < last_m; ++i)
    kernel.prepare(args, i, static_cast<uint8_t*>(args.scratch) + i * stride);
}

void gemm_cpu(const GemmArgs& args, GemmAlgo algo, const GemmRange& range) {
  if (range.first_m >= range.last_m || range.first_n >= range.last_n) return;
  if (algo == GemmAlgo::kNaive) return gemm_naive(args, range);
  PanelProduct(args, algo, range).run();
}

}  // namespace quantgemm
