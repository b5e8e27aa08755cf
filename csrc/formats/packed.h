// SPDX-License-Identifier: MIT
// THE PACKED LAYOUT: the bits of a matrix of blocks in the order in which tensor cores take weights.
// Nothing is added and nothing lost: codes and heads (scales) are moved apart, each into planes.
//
// A strip is 16 rows, a tile 64 columns of it. Rows are padded to 64 (four strips, what a warpgroup
// takes), columns to 64, with zero bits. Strips lie back to back, [strips, strip_bytes]. In one:
//
//     | codes: their low 8, 4, 2 or 1 bits, tile after tile | codes: their other bits, if any | heads |
//
// Inside a tile, lane 4r + c of a warp holds 32 weights, those of its fragments of mma.m16n8k16 and
// wgmma.m64k16: of step s = 0…3 (16 columns) four pairs j, of columns 2c + {0, 1} + 16s and
//
//        j = 0  row r, columns + 0   j = 2  row r, columns + 8       a pair lies in one word, 16 bits
//        j = 1  row r + 8            j = 3  row r + 8                apart: (word >> at) & mask
//
//   4 bits  word s   | h1: j3 j2 j1 j0 | h0: j3 j2 j1 j0 |           four words a lane, a 16-byte load
//   2 bits  word s/2, 1 bit the word: the pairs of the second step above those of the first, and so on
//   8 bits  words 2s (row r) and 2s + 1 (row r + 8)  | j2 h1 | j0 h1 | j2 h0 | j0 h0 |; the words of
//           steps 0 and 1 of all lanes come first, then those of 2 and 3: two 16-byte loads
//
// So word & 0x0f0f0f0f is four codes of row r, and of row r + 8 after a shift by 4: int8 products read
// the same words, with activations in the order of columns 0 8 1 9.
//
// The head of a block is its bytes beside the codes, in their order. Heads of 64 columns (several short
// blocks) or of one long block make a record. Records are cut into pieces of 16 bytes, then 8, 4, 2 and
// 1 as their size has it, and each piece is a plane: [records along k][row r, row r + 8; r = 0…7].
#pragma once
#include "block_format.h"

namespace quantgemm {

constexpr int kStripRows = 16, kTileCols = 64, kPanelStrips = 4;  // of the packed layout

// Strips of n rows: a multiple of kPanelStrips.
QG_HD constexpr int64_t num_strips(int64_t n) {
  constexpr int kRows = kStripRows * kPanelStrips;
  return (n + kRows - 1) / kRows * kPanelStrips;
}
QG_HD constexpr int64_t padded_cols(int64_t k) { return (k + kTileCols - 1) / kTileCols * kTileCols; }

// Where pair j of step s lies in a lane's words of a plane with so many bits to a weight.
template <int Bits>
struct PackedField {
  static constexpr uint32_t kMask = ((1u << Bits) - 1) * 0x00010001u;
  QG_HD static constexpr int word(int s, int j) { return Bits == 8 ? 2 * s + (j & 1) : s * Bits / 4; }
  QG_HD static constexpr int bit(int s, int j) {
    return Bits == 8 ? 8 * (j >> 1) : Bits * (j + 4 * (s % (Bits == 8 ? 1 : 4 / Bits)));
  }
  // Bytes from the tile's begin to the lane's word w.
  QG_HD static constexpr int at(int lane, int w) {
    return Bits == 8 ? w / 4 * 512 + lane * 16 + w % 4 * 4 : lane * 4 * Bits + 4 * w;
  }
};

template <PackableFormat F>
struct PackedLayout {
  static constexpr int kBits = F::kCodeBits;
  static constexpr int kLowBits = kBits >= 8 ? 8 : kBits >= 4 ? 4 : kBits >= 2 ? 2 : 1;
  static constexpr int kHighBits = kBits - kLowBits;
  static constexpr int kHeadBytes = F::kBytes - F::kElems * kBits / 8;
  static constexpr int kSpan = F::kElems > kTileCols ? F::kElems : kTileCols;  // columns of a record
  static constexpr int kSpanBlocks = kSpan / F::kElems, kRecordBytes = kSpanBlocks * kHeadBytes;
  static constexpr int kLowTile = 128 * kLowBits, kHighTile = 128 * kHighBits;  // bytes

  QG_HD static constexpr int64_t tiles(int64_t k) { return padded_cols(k) / kTileCols; }
  QG_HD static constexpr int64_t spans(int64_t k) { return padded_cols(k) / kSpan; }
  // Planes of a strip, in bytes from its begin.
  QG_HD static constexpr int64_t high_at(int64_t k) { return tiles(k) * kLowTile; }
  QG_HD static constexpr int64_t heads_at(int64_t k) { return tiles(k) * (kLowTile + kHighTile); }
  QG_HD static constexpr int64_t strip_bytes(int64_t k) {
    return heads_at(k) + spans(k) * kStripRows * kRecordBytes;
  }

  // The piece of a record that its byte b is in: where it begins, and its size.
  struct Piece {
    int first, size;
  };
  QG_HD static constexpr Piece piece_of(int b) {
    constexpr int kAll = kRecordBytes;
    if (b < kAll / 16 * 16) return {b / 16 * 16, 16};
    if (b < kAll / 8 * 8) return {kAll / 16 * 16, 8};
    if (b < kAll / 4 * 4) return {kAll / 8 * 8, 4};
    if (b < kAll / 2 * 2) return {kAll / 4 * 4, 2};
    return {kAll / 2 * 2, 1};
  }
  QG_HD static constexpr int piece_bytes(int first) { return piece_of(first).size; }
  // The piece's plane, from the strip's begin, and a row's place in it.
  QG_HD static constexpr int64_t piece_at(int64_t k, int first) {
    return heads_at(k) + spans(k) * kStripRows * first;
  }
  QG_HD static constexpr int64_t row_in_piece(int64_t span, int row, int first) {
    return (span * kStripRows + 2 * (row % 8) + row / 8) * piece_bytes(first);
  }
};

// Two neighbouring bytes of a quad as the halves of a word: what a pair is before its bits are packed.
QG_HD uint32_t pair_of(uint32_t quad, int which) {
  const uint32_t two = quad >> (16 * which);
  return (two & 0xffu) | (two & 0xff00u) << 8;
}

// A lane's words of one plane from its pairs of a tile, pairs[4s + j], whose bits from Shift on belong
// there; and the way back, into pairs without these bits.
template <int Bits, int Shift>
QG_HD void pack_words(const uint32_t (&pairs)[16], uint32_t (&words)[Bits]) {
  using Field = PackedField<Bits>;
  for (int w = 0; w < Bits; ++w) words[w] = 0;
  for (int i = 0; i < 16; ++i)
    words[Field::word(i / 4, i % 4)] |= ((pairs[i] >> Shift) & Field::kMask) << Field::bit(i / 4, i % 4);
}
template <int Bits, int Shift>
QG_HD void unpack_words(const uint32_t (&words)[Bits], uint32_t (&pairs)[16]) {
  using Field = PackedField<Bits>;
  for (int i = 0; i < 16; ++i)
    pairs[i] |= ((words[Field::word(i / 4, i % 4)] >> Field::bit(i / 4, i % 4)) & Field::kMask) << Shift;
}

// The head bytes of one block of a strip to their places in `block`; its other bytes are not touched.
template <PackableFormat F>
QG_HD void load_head(bytes_ptr strip, int64_t k, int row, int64_t block_idx, uint8_t* block) {
  using L = PackedLayout<F>;
  const int64_t span = block_idx / L::kSpanBlocks;
  const int begin = static_cast<int>(block_idx % L::kSpanBlocks) * L::kHeadBytes;
  for (int first = 0, size; first < L::kRecordBytes; first += size) {
    size = L::piece_bytes(first);
    bytes_ptr piece = strip + L::piece_at(k, first) + L::row_in_piece(span, row, first);
    for (int i = 0; i < size; ++i) {
      const int byte = first + i - begin;
      if (byte >= 0 && byte < L::kHeadBytes) block[F::head_at(byte)] = piece[i];
    }
  }
}

// The stored code of one weight, which is bits of one byte of each plane.
template <int Bits>
QG_HD uint32_t packed_bits(bytes_ptr plane, int64_t tile, int row, int col) {
  const int lane = row % 8 * 4 + col % 8 / 2, s = col / 16, j = row / 8 + col % 16 / 8 * 2;
  const int bit = PackedField<Bits>::bit(s, j) + col % 2 * 16;
  const uint32_t byte =
      plane[tile * 128 * Bits + PackedField<Bits>::at(lane, PackedField<Bits>::word(s, j)) + bit / 8];
  return (byte >> (bit % 8)) & ((1u << Bits) - 1);
}

// One weight, without haste.
template <PackableFormat F>
QG_HD float packed_weight(bytes_ptr strip, int64_t k, int row, int64_t col) {
  using L = PackedLayout<F>;
  const int64_t tile = col / kTileCols;
  const int within = static_cast<int>(col % kTileCols), in_block = static_cast<int>(col % F::kElems);
  uint32_t code = packed_bits<L::kLowBits>(strip, tile, row, within);
  if constexpr (L::kHighBits > 0)
    code |= packed_bits<L::kHighBits>(strip + L::high_at(k), tile, row, within) << L::kLowBits;
  alignas(16) uint8_t block[F::kBytes] = {};
  load_head<F>(strip, k, row, col / F::kElems, block);
  return weight<F>(F::affine(block, in_block / F::kGroup), byte_to_float(quad_of_stored<F>(code), 0));
}

}  // namespace quantgemm
