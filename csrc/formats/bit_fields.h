// SPDX-License-Identifier: MIT
// Small integers out of packed words, four at a time. Block formats store codes as nibbles, 2-bit
// planes, single bits and base-3 digits; each helper returns four of them, one per byte.
#pragma once
#include "portable.h"

namespace quantgemm {

// bits 0…3 -> bit 0 of bytes 0…3
QG_HD constexpr uint32_t spread_bits(uint32_t bits) { return ((bits & 0xfu) * 0x00204081u) & 0x01010101u; }

// fields of 2 bits at 0, 2, 4, 6 -> bytes 0…3
QG_HD uint32_t spread_pairs(uint32_t fields) {
  fields &= 0xffu;
  fields = (fields | (fields << 12)) & 0x000f000fu;
  return (fields | (fields << 6)) & 0x03030303u;
}

// fields of 2 bits at 0, 2, … 14 -> nibbles 0…7
QG_HD constexpr uint32_t pairs_to_nibbles(uint32_t fields) {
  fields &= 0xffffu;
  fields = (fields | (fields << 8)) & 0x00ff00ffu;
  fields = (fields | (fields << 4)) & 0x0f0f0f0fu;
  return (fields | (fields << 2)) & 0x33333333u;
}

// fields of 4 bits at 0, 4, 8, 12 -> bytes 0…3
QG_HD uint32_t spread_nibbles(uint32_t fields) {
  fields = (fields | (fields << 8)) & 0x00ff00ffu;
  return (fields | (fields << 4)) & 0x0f0f0f0fu;
}

// The ways back of the first two: bit 0 of bytes 0…3 -> bits 0…3, two bits of each -> fields at 0, 2, 4, 6.
// One multiplication puts what each byte gives into the highest byte, where nothing else arrives.
QG_HD uint32_t gather_bits(uint32_t four) { return (((four & 0x01010101u) * 0x01020408u) >> 24) & 0xfu; }
QG_HD uint32_t gather_pairs(uint32_t four) { return ((four & 0x03030303u) * 0x01041040u) >> 24; }

// Legacy nibble order of 32 weights in 16 bytes: weights 0…15 low, 16…31 high nibbles.
template <int Align>
QG_HD uint32_t nibbles_of_32(bytes_ptr codes, int i) {
  return (load<uint32_t, Align>(codes + 4 * (i & 3)) >> (i & 4)) & 0x0f0f0f0fu;
}

template <int Align>
QG_HD void put_nibbles_of_32(uint8_t* codes, int i, uint32_t four) {
  or_into<Align>(codes + 4 * (i & 3), (four & 0x0f0f0f0fu) << (i & 4));
}

// K-quant nibble order: 64 weights in 32 bytes, weights 0…31 low, 32…63 high nibbles.
template <int Align>
QG_HD uint32_t nibbles_of_64(bytes_ptr codes, int i) {
  return (load<uint32_t, Align>(codes + 32 * (i >> 4) + 4 * (i & 7)) >> ((i & 8) >> 1)) & 0x0f0f0f0fu;
}

template <int Align>
QG_HD void put_nibbles_of_64(uint8_t* codes, int i, uint32_t four) {
  or_into<Align>(codes + 32 * (i >> 4) + 4 * (i & 7), (four & 0x0f0f0f0fu) << ((i & 8) >> 1));
}

// K-quant 2-bit planes: 128 weights in 32 bytes, weights 32p…32p+31 in bits 2p and 2p+1.
template <int Align>
QG_HD uint32_t planes_of_128(bytes_ptr codes, int i) {
  return (load<uint32_t, Align>(codes + 32 * (i >> 5) + 4 * (i & 7)) >> (2 * ((i >> 3) & 3))) & 0x03030303u;
}

template <int Align>
QG_HD void put_planes_of_128(uint8_t* codes, int i, uint32_t four) {
  or_into<Align>(codes + 32 * (i >> 5) + 4 * (i & 7), (four & 0x03030303u) << (2 * ((i >> 3) & 3)));
}

// One base-3 digit (0, 1, 2) of each of four bytes. The first n digits are byte · 3^n / 256, at most
// 242: digit n is that of n + 1, less three times that of n. Products lie in 16-bit lanes.
QG_HD uint32_t base3_digits(uint32_t bytes, int digit) {
  const uint32_t power = (digit & 1 ? 3u : 1u) * (digit & 2 ? 9u : 1u) * (digit & 4 ? 81u : 1u);
  uint32_t even = bytes & 0x00ff00ffu, odd = (bytes >> 8) & 0x00ff00ffu;
  if constexpr (kPicksBytes) {
    const uint32_t before = digit == 0 ? 0 : pick_bytes(even * power, odd * power, 0x7351);
    return pick_bytes(even * (3 * power), odd * (3 * power), 0x7351) - 3 * before;
  }
  even = (even * power) & 0x00ff00ffu;
  odd = (odd * power) & 0x00ff00ffu;
  return (((even * 3) >> 8) & 0x00030003u) | ((odd * 3) & 0x03000300u);
}

}  // namespace quantgemm
