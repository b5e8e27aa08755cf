// SPDX-License-Identifier: MIT
// What the format headers need from a compiler, the same for g++ and nvcc: number conversions on
// bit patterns, loads of known alignment, and arithmetic on four bytes packed in one word.
// The only file of formats/ with a branch for device code (lanes.h has one for nvcc).
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define QG_HD __host__ __device__ __forceinline__
#else
#define QG_HD inline __attribute__((always_inline))
#endif
#ifdef __CUDA_ARCH__
#define QG_TABLE __device__ constexpr  // a table indexed at run time lives in the GPU's global memory
#else
#define QG_TABLE constexpr
#endif

namespace quantgemm {

using bytes_ptr = const uint8_t*;

template <class To, class From>
QG_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
#ifdef __CUDA_ARCH__
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
#else
  return std::bit_cast<To>(x);
#endif
}

// ---- loads: the pointer is a multiple of Align bytes, the value may be wider than that ----
template <class T, int Align>
QG_HD T load(bytes_ptr p) {
#ifdef __CUDA_ARCH__  // a GPU faults on a misaligned load: assemble the value from aligned pieces
  if constexpr (Align >= static_cast<int>(sizeof(T))) {
    return *reinterpret_cast<const T*>(p);
  } else {
    using Piece = std::conditional_t<Align == 1, uint8_t, std::conditional_t<Align == 2, uint16_t, uint32_t>>;
    T value = 0;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(T) / sizeof(Piece)); ++i)
      value |= static_cast<T>(reinterpret_cast<const Piece*>(p)[i]) << (8 * sizeof(Piece) * i);
    return value;
  }
#else
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
#endif
}

// The word at p, a multiple of Align, gets these bits as well.
template <int Align>
QG_HD void or_into(uint8_t* p, uint32_t bits) {
#ifdef __CUDA_ARCH__
  using Piece = std::conditional_t<Align == 1, uint8_t, std::conditional_t<Align == 2, uint16_t, uint32_t>>;
#pragma unroll
  for (int i = 0; i < static_cast<int>(4 / sizeof(Piece)); ++i)
    reinterpret_cast<Piece*>(p)[i] |= static_cast<Piece>(bits >> (8 * sizeof(Piece) * i));
#else
  const uint32_t word = load<uint32_t, Align>(p) | bits;
  std::memcpy(p, &word, sizeof word);
#endif
}

// ---- half, bfloat16 <-> float on bit patterns; every rounding is to nearest even ----
QG_HD float half_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // Exponent and mantissa moved into float position are the value times 2^-112; one exact
  // multiplication mends the exponent, of subnormals too. Infinity and NaN keep all exponent bits.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(scaled)));
#endif
}

QG_HD uint16_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Selections instead of branches: loops over this become vector code.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 adding 0.5 lets the float adder round to the subnormal half's last bit.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;        // rounds to infinity
  half = magnitude > 0x7f800000u ? 0x7fffu : half | sign;  // NaN, as cvt gives
  return static_cast<uint16_t>(half);
#endif
}

QG_HD float bfloat16_to_float(uint16_t b) { return bit_cast<float>(static_cast<uint32_t>(b) << 16); }

QG_HD uint16_t float_to_bfloat16(float x) {
#ifdef __CUDA_ARCH__
  uint16_t b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(x));
  return b;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);  // NaN as cvt
#endif
}

// a · b rounded to float32, also where the compiler may fuse a product with the addition after it.
QG_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// ---- four signed bytes in a word: byte j is element j ----
QG_HD uint32_t broadcast_byte(uint32_t b) { return (b & 0xffu) * 0x01010101u; }

// Bytewise a - b for bytes a in 0…127 and b in 0…128, without a carry between bytes.
QG_HD uint32_t sub_bytes(uint32_t a, uint32_t b) { return (a + (0x80808080u - b)) ^ 0x80808080u; }

// Bytewise x negated where the matching bit of mask (bits 0…3) is set; bytes of x in 1…127.
QG_HD uint32_t negate_bytes(uint32_t x, uint32_t mask) {
  // Spread bit j to byte j; two's complement carries out of no byte, since none is 0.
  const uint32_t ones = ((mask & 0xfu) * 0x00204081u) & 0x01010101u;
  return (x ^ (ones * 0xffu)) + ones;
}

// Four of the eight bytes of high:low, by the nibbles (0…7) in the low half of selectors. Where one
// instruction does that, formats take their levels from such a table rather than by arithmetic.
#ifdef __CUDA_ARCH__
inline constexpr bool kPicksBytes = true;
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  uint32_t picked;  // __byte_perm would mask the selectors first
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(picked) : "r"(low), "r"(high), "r"(selectors));
  return picked;
}
#else
inline constexpr bool kPicksBytes = false;
QG_HD uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t picked = 0;
  for (int j = 0; j < 4; ++j)
    picked |= static_cast<uint32_t>((bytes >> (8 * ((selectors >> (4 * j)) & 7))) & 0xff) << (8 * j);
  return picked;
}
#endif

// The same with each byte's sign in all of its bits: 0 or −1.
QG_HD uint32_t signs_of_bytes(uint32_t low, uint32_t high, uint32_t selectors) {
#ifdef __CUDA_ARCH__
  return pick_bytes(low, high, selectors | 0x8888u);
#else
  return ((pick_bytes(low, high, selectors) >> 7) & 0x01010101u) * 0xffu;
#endif
}

// Byte j of a word.
QG_HD uint32_t byte_of(uint32_t word, int j) {
#ifdef __CUDA_ARCH__
  return pick_bytes(word, 0, 0x4440u + j);
#else
  return (word >> (8 * j)) & 0xffu;
#endif
}

// (a | b) & mask in one instruction, also where a | b is wanted twice.
QG_HD uint32_t either_and(uint32_t a, uint32_t b, uint32_t mask) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xa8;" : "=r"(bits) : "r"(a), "r"(b), "r"(mask));
  return bits;
#else
  return (a | b) & mask;
#endif
}

// (a & mask) | bits in one instruction, with two constants.
QG_HD uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#ifdef __CUDA_ARCH__
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
#else
  return (a & mask) | bits;
#endif
}

QG_HD int byte_at(uint32_t quad, int j) { return static_cast<int8_t>(quad >> (8 * j)); }

QG_HD float byte_to_float(uint32_t quad, int j) {
#ifdef __CUDA_ARCH__
  // 2^23 + n is a float whose low byte is n: one PRMT and one FADD where I2F runs at a quarter rate.
  const uint32_t biased = __byte_perm(quad ^ 0x80808080u, 0x4b000000u, 0x7440 + j);
  return __uint_as_float(biased) - 8388736.0f;
#else
  return static_cast<float>(byte_at(quad, j));
#endif
}

// Four values of a 16-entry int8 table (its bytes in T0…T3), selected by the nibble in each byte.
template <uint32_t T0, uint32_t T1, uint32_t T2, uint32_t T3>
QG_HD uint32_t lookup_nibbles(uint32_t nibbles) {
#ifdef __CUDA_ARCH__
  const uint32_t packed = __byte_perm(nibbles | (nibbles >> 4), 0, 0x0020);  // 4 nibbles in 16 bits
  const uint32_t low_half = __byte_perm(T0, T1, packed & 0x7777u);
  const uint32_t high_half = __byte_perm(T2, T3, packed & 0x7777u);
  return __byte_perm(low_half, high_half, 0x3210u | ((packed & 0x8888u) >> 1));
#else
  constexpr uint32_t words[4] = {T0, T1, T2, T3};
  uint32_t values = 0;
  for (int j = 0; j < 4; ++j) {
    const uint32_t n = (nibbles >> (8 * j)) & 15;
    values |= ((words[n >> 2] >> (8 * (n & 3))) & 0xffu) << (8 * j);
  }
  return values;
#endif
}

QG_HD int popcount(uint32_t x) {
#ifdef __CUDA_ARCH__
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

}  // namespace quantgemm
