// SPDX-License-Identifier: MIT
// The CPU products for AVX2 with FMA: 8 lanes, 16 registers. vpmaddubsw multiplies unsigned with
// signed bytes and adds pairs in 16 bits: |q_w| ≤ 128 and |q_a| ≤ 127 stay below 2^15, so the
// magnitude of the one and the other with its sign never saturate.
#include "gemm_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#define QG_SIMD __attribute__((target("avx2,fma")))
#define QG_INLINE QG_SIMD static inline __attribute__((always_inline))

namespace quantgemm {
namespace {

struct Avx2 {
  using Floats = __m256;
  using Ints = __m256i;
  static constexpr int kLanes = 8, kBias = 0;
  static constexpr int kFewTokens = 2, kManyTokens = 3, kTiledCols = 512, kDp4aCols = 2048;

  QG_INLINE Floats zero() { return _mm256_setzero_ps(); }
  QG_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
  QG_INLINE void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  QG_INLINE Floats broadcast(float v) { return _mm256_set1_ps(v); }
  QG_INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  QG_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  QG_INLINE Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  QG_INLINE Floats codes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  // sums[0 … 3] += the sums over the lanes of a, b, c, d
  QG_INLINE void add_lane_sums(Floats a, Floats b, Floats c, Floats d, float* sums) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), all));
  }

  QG_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
  QG_INLINE Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  QG_INLINE void store_ints(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  QG_INLINE Ints biased(Ints q) { return q; }
  QG_INLINE Ints dot4(Ints sum, Ints q, Ints x) {
    const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }

  // 4 × 4 words in each 128-bit lane, transposed
  QG_INLINE void transpose(Ints (&v)[4]) {
    const Ints a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpackhi_epi32(v[0], v[1]);
    const Ints c = _mm256_unpacklo_epi32(v[2], v[3]), d = _mm256_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm256_unpacklo_epi64(a, c), v[1] = _mm256_unpackhi_epi64(a, c);
    v[2] = _mm256_unpacklo_epi64(b, d), v[3] = _mm256_unpackhi_epi64(b, d);
  }

  // A scale per granule to every lane: lane 4a + b is half 2b + a.
  template <int Granule>
  QG_INLINE Floats spread(const float* p) {
    if constexpr (Granule == 32) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  }

  QG_SIMD static void translate(int8_t* codes, int64_t cols, const int8_t* levels) {
    const Ints table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
    int64_t e = 0;
    for (; e + 32 <= cols; e += 32) store_ints(codes + e, _mm256_shuffle_epi8(table, load_ints(codes + e)));
    for (; e < cols; ++e) codes[e] = levels[codes[e]];
  }
};

}  // namespace
}  // namespace quantgemm

#include "gemm_dp4a.h"
#include "gemm_tiled.h"

namespace quantgemm {

const GemmKernels* gemm_kernels_avx2() {
  static const GemmKernels kernels{TiledKernel<Avx2>::kernel(), Dp4aKernel<Avx2>::kernel()};
  return &kernels;
}

}  // namespace quantgemm
#else
namespace quantgemm {
const GemmKernels* gemm_kernels_avx2() { return nullptr; }
}  // namespace quantgemm
#endif
