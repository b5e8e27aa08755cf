// SPDX-License-Identifier: MIT
// Blocks to strips of the packed layout and back, tile by tile and lane by lane, as packed.h says.
#include <algorithm>
#include <vector>

#include "../formats/gguf_formats.h"
#include "../formats/packed.h"
#include "cpu.h"

namespace quantgemm {
namespace {

template <int Bits>
void store_words(const uint32_t (&words)[Bits], uint8_t* tile, int lane) {
  for (int w = 0; w < Bits; ++w) std::memcpy(tile + PackedField<Bits>::at(lane, w), words + w, 4);
}
template <int Bits>
void load_words(bytes_ptr tile, int lane, uint32_t (&words)[Bits]) {
  for (int w = 0; w < Bits; ++w) std::memcpy(words + w, tile + PackedField<Bits>::at(lane, w), 4);
}

template <PackableFormat F>
void pack_strip(bytes_ptr blocks, int rows, int64_t k, uint8_t* strip) {
  using L = PackedLayout<F>;
  const int64_t row_blocks = k / F::kElems, row_bytes = row_blocks * F::kBytes;
  const auto codes = [&](int row, int64_t col) {  // of columns col … col + 3
    if (row >= rows || col >= k) return 0u;
    return stored_codes<F>(blocks + row * row_bytes + col / F::kElems * F::kBytes,
                           static_cast<int>(col % F::kElems / 4));
  };
  for (int64_t tile = 0; tile < L::tiles(k); ++tile) {
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = lane % 4;
      uint32_t pairs[16];
      for (int i = 0; i < 16; ++i) {
        const int s = i / 4, j = i % 4;
        const int64_t col = tile * kTileCols + 16 * s + 8 * (j / 2) + c / 2 * 4;
        pairs[i] = pair_of(codes(r + 8 * (j % 2), col), c % 2);
      }
      uint32_t low[L::kLowBits];
      pack_words<L::kLowBits, 0>(pairs, low);
      store_words(low, strip + tile * L::kLowTile, lane);
      if constexpr (L::kHighBits > 0) {
        uint32_t high[L::kHighBits];
        pack_words<L::kHighBits, L::kLowBits>(pairs, high);
        store_words(high, strip + L::high_at(k) + tile * L::kHighTile, lane);
      }
    }
  }
  for (int first = 0; first < L::kRecordBytes; first += L::piece_bytes(first)) {
    for (int64_t span = 0; span < L::spans(k); ++span) {
      for (int row = 0; row < kStripRows; ++row) {
        uint8_t* piece = strip + L::piece_at(k, first) + L::row_in_piece(span, row, first);
        for (int i = 0; i < L::piece_bytes(first); ++i) {
          const int byte = first + i;
          const int64_t block = span * L::kSpanBlocks + byte / L::kHeadBytes;
          const bool inside = row < rows && block < row_blocks;
          piece[i] =
              inside ? blocks[row * row_bytes + block * F::kBytes + F::head_at(byte % L::kHeadBytes)] : 0;
        }
      }
    }
  }
}

template <PackableFormat F>
void unpack_strip(bytes_ptr strip, int rows, int64_t k, uint8_t* blocks) {
  using L = PackedLayout<F>;
  const int64_t row_blocks = k / F::kElems, row_bytes = row_blocks * F::kBytes;
  std::memset(blocks, 0, static_cast<size_t>(rows * row_bytes));
  for (int64_t tile = 0; tile < L::tiles(k); ++tile) {
    uint8_t codes[kStripRows][kTileCols];
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t pairs[16] = {}, low[L::kLowBits];
      load_words(strip + tile * L::kLowTile, lane, low);
      unpack_words<L::kLowBits, 0>(low, pairs);
      if constexpr (L::kHighBits > 0) {
        uint32_t high[L::kHighBits];
        load_words(strip + L::high_at(k) + tile * L::kHighTile, lane, high);
        unpack_words<L::kHighBits, L::kLowBits>(high, pairs);
      }
      for (int i = 0; i < 16; ++i) {
        uint8_t* to = codes[lane / 4 + 8 * (i % 2)] + 16 * (i / 4) + 8 * (i % 4 / 2) + 2 * (lane % 4);
        to[0] = static_cast<uint8_t>(pairs[i]), to[1] = static_cast<uint8_t>(pairs[i] >> 16);
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int64_t col = tile * kTileCols; col < std::min(k, (tile + 1) * kTileCols); col += 4) {
        uint32_t four;
        std::memcpy(&four, codes[row] + col % kTileCols, 4);
        F::place(blocks + row * row_bytes + col / F::kElems * F::kBytes,
                 static_cast<int>(col % F::kElems / 4), four);
      }
    }
  }
  for (int row = 0; row < rows; ++row)
    for (int64_t block = 0; block < row_blocks; ++block)
      load_head<F>(strip, k, row, block, blocks + row * row_bytes + block * F::kBytes);
}

int rows_of(const PackArgs& args, int64_t strip) {
  return static_cast<int>(std::clamp<int64_t>(args.n - strip * kStripRows, 0, kStripRows));
}

}  // namespace

void pack_cpu(const PackArgs& args, int64_t first_strip, int64_t last_strip) {
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) {
      const int64_t strip_bytes = PackedLayout<F>::strip_bytes(args.k),
                    row_bytes = args.k / F::kElems * F::kBytes;
      for (int64_t s = first_strip; s < last_strip; ++s)
        pack_strip<F>(args.from + s * kStripRows * row_bytes, rows_of(args, s), args.k,
                      args.to + s * strip_bytes);
    }
  });
}

void unpack_cpu(const PackArgs& args, int64_t first_strip, int64_t last_strip) {
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>) {
      const int64_t strip_bytes = PackedLayout<F>::strip_bytes(args.k),
                    row_bytes = args.k / F::kElems * F::kBytes;
      for (int64_t s = first_strip; s < last_strip; ++s)
        unpack_strip<F>(args.from + s * strip_bytes, rows_of(args, s), args.k,
                        args.to + s * kStripRows * row_bytes);
    }
  });
}

}  // namespace quantgemm
