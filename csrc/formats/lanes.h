// SPDX-License-Identifier: MIT
// Eight numbers at once, for the encoders: a vector register where g++ compiles, eight registers of
// one thread in CUDA code. Lanes mix only in sum, largest and smallest, whose order is fixed, and
// where encoders read single ones, so every machine computes the same bits. That assumes no
// contraction to fused multiply-add: encoders are compiled with -ffp-contract=off and --fmad=false.
#pragma once
#include "portable.h"

namespace quantgemm {

#ifdef __CUDACC__
#define QG_UNROLL _Pragma("unroll")
#else
#define QG_UNROLL _Pragma("GCC unroll 16")
#endif

// QG_LANES(T, whole, single) is the body of a lane-by-lane function: `whole` is its value as an
// expression of vector registers, `single` its value in lane i.
#ifdef __CUDACC__
template <class T>
struct Vec8 {
  T v[8];
};
template <class T, class Fn>
QG_HD Vec8<T> each_lane(Fn fn) {
  Vec8<T> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.v[i] = fn(i);
  return out;
}
#define QG_LANES(T, whole, single) return each_lane<T>([&](int i) -> T { return single; })
#else
template <class T>
struct Vec8 {
  typedef T Register __attribute__((vector_size(32)));
  Register v;
};
#define QG_LANES(T, whole, single) \
  return { whole }
#endif
using Floats = Vec8<float>;
using Ints = Vec8<int32_t>;

template <class T>
QG_HD Vec8<T> operator+(const Vec8<T>& a, const Vec8<T>& b) {
  QG_LANES(T, a.v + b.v, a.v[i] + b.v[i]);
}
template <class T>
QG_HD Vec8<T> operator-(const Vec8<T>& a, const Vec8<T>& b) {
  QG_LANES(T, a.v - b.v, a.v[i] - b.v[i]);
}
template <class T>
QG_HD Vec8<T> operator*(const Vec8<T>& a, const Vec8<T>& b) {
  QG_LANES(T, a.v * b.v, a.v[i] * b.v[i]);
}
template <class T>
QG_HD Vec8<T> operator+(const Vec8<T>& a, T b) {
  QG_LANES(T, a.v + b, a.v[i] + b);
}
template <class T>
QG_HD Vec8<T> operator-(const Vec8<T>& a, T b) {
  QG_LANES(T, a.v - b, a.v[i] - b);
}
template <class T>
QG_HD Vec8<T> operator*(const Vec8<T>& a, T b) {
  QG_LANES(T, a.v * b, a.v[i] * b);
}
QG_HD Ints operator|(const Ints& a, const Ints& b) { QG_LANES(int32_t, a.v | b.v, a.v[i] | b.v[i]); }
QG_HD Ints operator&(const Ints& a, int b) { QG_LANES(int32_t, (a.v & b), a.v[i] & b); }
QG_HD Ints operator<<(const Ints& a, int n) { QG_LANES(int32_t, a.v << n, a.v[i] << n); }
QG_HD Ints operator>>(const Ints& a, int n) { QG_LANES(int32_t, a.v >> n, a.v[i] >> n); }

QG_HD Floats broadcast(float x) { QG_LANES(float, Floats::Register{} + x, x); }

QG_HD Floats load8(const float* x) {
#ifdef __CUDACC__
  return each_lane<float>([&](int i) { return x[i]; });
#else
  Floats lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
#endif
}

// x limited to a bound. A NaN becomes the bound, on both machines.
QG_HD Floats at_most(const Floats& x, float bound) {
  QG_LANES(float, x.v < bound ? x.v : bound, fminf(x.v[i], bound));
}
QG_HD Floats at_least(const Floats& x, float bound) {
  QG_LANES(float, x.v > bound ? x.v : bound, fmaxf(x.v[i], bound));
}
// The larger or smaller of `so_far`, which is no NaN, and x, which is skipped where it is one.
// Of +0 and −0 either may come out: do not look at the sign of a zero.
QG_HD Floats larger(const Floats& so_far, const Floats& x) {
  QG_LANES(float, x.v > so_far.v ? x.v : so_far.v, fmaxf(so_far.v[i], x.v[i]));
}
QG_HD Floats smaller(const Floats& so_far, const Floats& x) {
  QG_LANES(float, x.v < so_far.v ? x.v : so_far.v, fminf(so_far.v[i], x.v[i]));
}

QG_HD Ints bits_of(const Floats& x) { QG_LANES(int32_t, (Ints::Register)x.v, bit_cast<int32_t>(x.v[i])); }
QG_HD Floats from_bits(const Ints& x) { QG_LANES(float, (Floats::Register)x.v, bit_cast<float>(x.v[i])); }
QG_HD Floats magnitude(const Floats& x) { return from_bits(bits_of(x) & 0x7fffffff); }
// 1 where the condition holds, else 0.
QG_HD Ints above(const Floats& x, float threshold) {
  QG_LANES(int32_t, (x.v > threshold) & 1, x.v[i] > threshold ? 1 : 0);
}
QG_HD Ints not_below_zero(const Floats& x) { QG_LANES(int32_t, (x.v >= 0.0f) & 1, x.v[i] >= 0.0f ? 1 : 0); }
QG_HD Floats not_nan(const Floats& x) {
  QG_LANES(float, x.v == x.v ? x.v : Floats::Register{}, x.v[i] == x.v[i] ? x.v[i] : 0.0f);
}
// x + gap where t is above the threshold.
QG_HD Floats add_above(const Floats& x, const Floats& t, float threshold, float gap) {
  QG_LANES(float, x.v + (t.v > threshold ? Floats::Register{} + gap : Floats::Register{}),
           t.v[i] > threshold ? x.v[i] + gap : x.v[i]);
}

// ---- to integers: |x| must be below 2^22 ----
QG_HD Floats round_even(const Floats& x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 · 2^23
QG_HD float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }
QG_HD Ints truncate(const Floats& x) {
  QG_LANES(int32_t, __builtin_convertvector(x.v, Ints::Register), static_cast<int32_t>(x.v[i]));
}
// Halves go away from zero. The float below 0.5 is added, so that the float below 0.5 stays 0.
QG_HD Ints round_away(const Floats& x) {
  const Ints half_below = (bits_of(x) & INT32_MIN) | bits_of(broadcast(0x1.fffffep-2f));
  return truncate(x + from_bits(half_below));
}

// ---- across lanes ----
template <class T, class Fn>
QG_HD T fold(const Vec8<T>& x, Fn join) {
  T half[4];
  QG_UNROLL
  for (int i = 0; i < 4; ++i) half[i] = join(x.v[i], x.v[i + 4]);
  return join(join(half[0], half[2]), join(half[1], half[3]));
}
template <class T>
QG_HD T sum(const Vec8<T>& x) {
  return fold(x, [](T a, T b) { return a + b; });
}
QG_HD float largest(const Floats& x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}
QG_HD float smallest(const Floats& x) {
  return fold(x, [](float a, float b) { return a < b ? a : b; });
}

// 1/scale, and 0 for the scale of zeros.
QG_HD float inverse_or_zero(float scale) { return scale != 0 ? 1.0f / scale : 0.0f; }

// ---- of N numbers in memory ----
template <int N>
QG_HD float largest_magnitude(const float* x) {
  Floats so_far = broadcast(0);
  QG_UNROLL
  for (int i = 0; i < N; i += 8) so_far = larger(so_far, magnitude(load8(x + i)));
  return largest(so_far);
}
// The number of largest magnitude, with its sign; the first of several. +0 if all are zero or NaN.
template <int N>
QG_HD float extreme(const float* x) {
  Floats high = broadcast(0), low = broadcast(0);
  QG_UNROLL
  for (int i = 0; i < N; i += 8) {
    high = larger(high, load8(x + i));
    low = smaller(low, load8(x + i));
  }
  const float top = largest(high), bottom = smallest(low);
  float result = top > -bottom ? top : bottom + 0.0f;  // −0 + 0 is +0
  if (top == -bottom && top > 0) {
    for (int i = N - 1; i >= 0; --i)
      if (x[i] == top || x[i] == bottom) result = x[i];
  }
  return result;
}

// ---- to bytes ----
// The low byte of each lane, lane i in byte i.
QG_HD uint64_t low_bytes(const Ints& x) {
#ifdef __CUDACC__
  uint32_t word[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) word[i / 4] |= static_cast<uint32_t>(x.v[i] & 255) << (8 * (i % 4));
  return word[0] | static_cast<uint64_t>(word[1]) << 32;
#else
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  return bit_cast<uint64_t>(__builtin_convertvector(x.v, Bytes));
#endif
}
// Lanes of 0 or 1 as bits, lane i in bit i: the products put byte i's bit at 56 + i.
QG_HD uint32_t low_bits(const Ints& x) {
  return static_cast<uint32_t>(((low_bytes(x) & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
}

// Writes an unsigned value at an address that is a multiple of Align.
template <int Align, class T>
QG_HD void store(uint8_t* p, T value) {
#ifdef __CUDACC__
  constexpr int kPiece = Align < static_cast<int>(sizeof(T)) ? Align : static_cast<int>(sizeof(T));
  using Piece = std::conditional_t<
      kPiece == 1, uint8_t,
      std::conditional_t<kPiece == 2, uint16_t, std::conditional_t<kPiece == 4, uint32_t, uint64_t>>>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / kPiece; ++i)
    reinterpret_cast<Piece*>(p)[i] = static_cast<Piece>(value >> (8 * kPiece * i));
#else
  std::memcpy(p, &value, sizeof value);
#endif
}

}  // namespace quantgemm
