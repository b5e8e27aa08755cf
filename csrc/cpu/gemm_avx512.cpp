// SPDX-License-Identifier: MIT
// The CPU products for AVX-512 with VNNI: 16 lanes, 32 registers. vpdpbusd multiplies unsigned with
// signed bytes, so 128 is added to the weights' codes and 128 Σ q_a subtracted from the start.
#include "gemm_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#ifndef __clang__  // g++ 12 takes the undefined registers in its own header for a mistake (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define QG_SIMD \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512")))
#define QG_INLINE QG_SIMD static inline __attribute__((always_inline))

namespace quantgemm {
namespace {

struct Avx512 {
  using Floats = __m512;
  using Ints = __m512i;
  static constexpr int kLanes = 16, kBias = 128;
  static constexpr int kFewTokens = 4, kManyTokens = 6, kTiledCols = 1024, kDp4aCols = 2048;

  QG_INLINE Floats zero() { return _mm512_setzero_ps(); }
  QG_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
  QG_INLINE void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  QG_INLINE Floats broadcast(float v) { return _mm512_set1_ps(v); }
  QG_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  QG_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  QG_INLINE Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  QG_INLINE Floats codes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  QG_INLINE __m256 halves(Floats v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  }
  // sums[0 … 3] += the sums over the lanes of a, b, c, d
  QG_INLINE void add_lane_sums(Floats a, Floats b, Floats c, Floats d, float* sums) {
    const __m256 ab = _mm256_hadd_ps(halves(a), halves(b)), cd = _mm256_hadd_ps(halves(c), halves(d));
    const __m256 abcd = _mm256_hadd_ps(ab, cd);
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), all));
  }

  QG_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
  QG_INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
  QG_INLINE void store_ints(void* p, Ints v) { _mm512_storeu_si512(p, v); }
  QG_INLINE Ints biased(Ints q) { return _mm512_xor_si512(q, _mm512_set1_epi8(-128)); }
  QG_INLINE Ints dot4(Ints sum, Ints unsigned_q, Ints x) { return _mm512_dpbusd_epi32(sum, unsigned_q, x); }

  // 4 × 4 words in each 128-bit lane, transposed
  QG_INLINE void transpose(Ints (&v)[4]) {
    const Ints a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const Ints c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c), v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d), v[3] = _mm512_unpackhi_epi64(b, d);
  }

  // A scale per granule to every lane: lane 4a + b is half 4b + a.
  template <int Granule>
  QG_INLINE Floats spread(const float* p) {
    if constexpr (Granule == 32) {
      const Ints order = _mm512_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7);
      return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
    }
    const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, _mm512_loadu_ps(p));
  }

  QG_SIMD static void translate(int8_t* codes, int64_t cols, const int8_t* levels) {
    const Ints table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
    int64_t e = 0;
    for (; e + 64 <= cols; e += 64) store_ints(codes + e, _mm512_shuffle_epi8(table, load_ints(codes + e)));
    for (; e < cols; ++e) codes[e] = levels[codes[e]];
  }
};

}  // namespace
}  // namespace quantgemm

#include "gemm_dp4a.h"
#include "gemm_tiled.h"

namespace quantgemm {

const GemmKernels* gemm_kernels_avx512() {
  static const GemmKernels kernels{TiledKernel<Avx512>::kernel(), Dp4aKernel<Avx512>::kernel()};
  return __builtin_cpu_supports("avx512vnni") ? &kernels : nullptr;
}

}  // namespace quantgemm
#else
namespace quantgemm {
const GemmKernels* gemm_kernels_avx512() { return nullptr; }
}  // namespace quantgemm
#endif
