// SPDX-License-Identifier: MIT
// One loop body, compiled for several instruction sets and chosen when the program runs. The body is
// an always-inlined functor; each wrapper has its own name, so the linker can never put a wide
// version where a narrow one was meant.
#pragma once
#include <cstdlib>
#include <string_view>

#include "../args.h"
#include "../formats/portable.h"

namespace quantgemm {

enum class SimdLevel { kPlain, kAvx2, kAvx512 };

// What this processor has, or less if QUANTGEMM_CPU (plain, avx2 or avx512) says so; read once.
inline SimdLevel simd_level() {
  static const SimdLevel level = [] {
    SimdLevel best = SimdLevel::kPlain;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = SimdLevel::kAvx2;
    if (best == SimdLevel::kAvx2 && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = SimdLevel::kAvx512;
#endif
    const char* wish = std::getenv("QUANTGEMM_CPU");
    const std::string_view name = wish != nullptr ? wish : "";
    if (name == "plain") return SimdLevel::kPlain;
    if (name == "avx2" && best == SimdLevel::kAvx512) return SimdLevel::kAvx2;
    return best;
  }();
  return level;
}

#if defined(__x86_64__) && defined(__GNUC__)
#define QG_TARGET(isa) __attribute__((target(isa)))

// 256 bits wide, so that what a body stores in a small array is loaded again in the same width.
template <class Body, class... Args>
QG_TARGET("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=256")
void run_avx512(Args... args) {
  Body::run(args...);
}
template <class Body, class... Args>
QG_TARGET("avx2")
void run_avx2(Args... args) {
  Body::run(args...);
}
#endif

// Calls Body::run(args…) with the widest instructions this processor has.
template <class Body, class... Args>
void run_vectorized(Args... args) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (simd_level() == SimdLevel::kAvx512) return run_avx512<Body>(args...);
  if (simd_level() == SimdLevel::kAvx2) return run_avx2<Body>(args...);
#endif
  Body::run(args...);
}

QG_HD void store_real(float* p, float x) { *p = x; }
QG_HD void store_real(Half* p, float x) { p->bits = float_to_half(x); }
QG_HD void store_real(BFloat16* p, float x) { p->bits = float_to_bfloat16(x); }
QG_HD float load_real(const float* p) { return *p; }
QG_HD float load_real(const Half* p) { return half_to_float(p->bits); }
QG_HD float load_real(const BFloat16* p) { return bfloat16_to_float(p->bits); }

}  // namespace quantgemm
