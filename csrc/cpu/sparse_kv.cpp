// SPDX-License-Identifier: MIT
// The sparse key-value container on the CPU: prune, fit and pack 64-token blocks; products with tiles
// decoded one at a time. Layout and arithmetic are kv.h.
#include "../kv.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu.h"

namespace quantgemm {

void kv_prune_cpu(uint16_t* row, int64_t channels, int64_t keep, std::vector<int>& order) {
  if (keep >= channels) return;
  order.resize(static_cast<size_t>(channels));
  std::iota(order.begin(), order.end(), 0);
  const auto larger = [&](int a, int b) {
    const uint32_t key_a = magnitude_key(row[a]), key_b = magnitude_key(row[b]);
    return key_a > key_b || (key_a == key_b && a < b);
  };
  std::nth_element(order.begin(), order.begin() + keep, order.end(), larger);
  for (auto i = order.begin() + keep; i != order.end(); ++i) row[*i] = 0;
}

namespace {

template <class Fn>
void visit_real16(Real type, Fn&& f) {
  if (type == Real::kFloat16) return f(Half{});
  f(BFloat16{});
}

// ---- compression: the block as a dense [64, channels] with what was pruned set to zero ----
struct Block {
  int64_t first_tile;
  std::vector<uint16_t> values;  // [64, channels]

  uint16_t at(int64_t token, int64_t channel, int64_t channels) const {
    return values[static_cast<size_t>(token * channels + channel)];
  }
};

Block load_block(const KvCompressArgs& args, int64_t index) {
  const int64_t blocks = (args.tokens + kTile - 1) / kTile;
  const int64_t head = index / blocks, first = index % blocks * kTile;
  const int64_t count = std::min<int64_t>(kTile, args.tokens - first);
  Block block{index * args.channels, std::vector<uint16_t>(static_cast<size_t>(kTile * args.channels))};
  const auto* x = static_cast<const uint16_t*>(args.x) + (head * args.tokens + first) * args.channels;
  std::copy_n(x, count * args.channels, block.values.begin());
  std::vector<int> order;
  for (int64_t t = 0; t < count; ++t)
    kv_prune_cpu(block.values.data() + t * args.channels, args.channels, args.keep, order);
  return block;
}

// Element i of the block's tile.
uint16_t element(const KvCompressArgs& args, const Block& block, int64_t tile, int i) {
  if (!args.is_value) return block.at(i, tile, args.channels);
  return block.at(tile % kTile, tile / kTile * kTile + i, args.channels);
}

template <class Real16>
void fit_block(const KvCompressArgs& args, const Block& block) {
  auto* scales = static_cast<Real16*>(args.scales);
  auto* zeros = static_cast<Real16*>(args.zeros);
  for (int64_t tile = 0; tile < args.channels; ++tile) {
    uint64_t bitmap = 0;
    float lo = 0, hi = 0;
    bool has_nan = false;
    for (int i = 0; i < kTile; ++i) {
      const Real16 stored{element(args, block, tile, i)};
      if (magnitude_key(stored.bits) == 0) continue;
      const float x = value_of(stored);
      lo = bitmap == 0 ? x : std::min(lo, x);
      hi = bitmap == 0 ? x : std::max(hi, x);
      has_nan |= x != x;
      bitmap |= uint64_t{1} << (63 - i);
    }
    if (has_nan) lo = hi = bit_cast<float>(0x7fc00000u);
    args.bitmaps[block.first_tile + tile] = bitmap;
    if (args.bits == kRawBits) continue;
    const TileFit<Real16> fit = fit_tile<Real16>(lo, hi, args.bits);
    scales[block.first_tile + tile] = fit.scale;
    zeros[block.first_tile + tile] = fit.zero;
  }
}

template <class Real16>
void pack_block(const KvCompressArgs& args, const Block& block) {
  for (int64_t tile = 0; tile < args.channels; ++tile) {
    const int64_t at = block.first_tile + tile;
    const uint64_t bitmap = args.bitmaps[at];
    uint32_t* words = args.packed + args.offsets[at];
    std::fill_n(words, tile_words(__builtin_popcountll(bitmap), args.bits), 0u);
    float scale = 0, zero = 0;
    if (args.bits != kRawBits) {
      scale = value_of(static_cast<const Real16*>(args.scales)[at]);
      zero = value_of(static_cast<const Real16*>(args.zeros)[at]);
    }
    int bit = 0;
    for (int i = 0; i < kTile; ++i) {
      if (!(bitmap >> (63 - i) & 1)) continue;
      const Real16 stored{element(args, block, tile, i)};
      const uint32_t code =
          args.bits == kRawBits ? stored.bits : code_of(value_of(stored), scale, zero, args.bits);
      words[bit / 32] |= code << (bit % 32);
      bit += args.bits;
    }
  }
}

// ---- products ----
template <class Real16>
void decode_tile(const KvProductArgs& args, int64_t tile, float (&values)[kTile]) {
  const uint64_t bitmap = args.bitmaps[tile];
  float scale = 0, zero = 0;
  if (args.bits != kRawBits) {
    scale = value_of(static_cast<const Real16*>(args.scales)[tile]);
    zero = value_of(static_cast<const Real16*>(args.zeros)[tile]);
  }
  const uint32_t mask = args.bits == kRawBits ? 0xffffu : (1u << args.bits) - 1;
  int64_t word = args.offsets[tile];
  int bit = 0;
  for (int i = 0; i < kTile; ++i) {
    values[i] = 0;
    if (!(bitmap >> (63 - i) & 1)) continue;
    const bool inside = word >= 0 && word < args.num_words;  // whatever the offsets say
    const uint32_t code = inside ? args.packed[word] >> bit & mask : 0;
    values[i] = args.bits == kRawBits ? value_of(Real16{static_cast<uint16_t>(code)})
                                      : value_of(decode<Real16>(code, scale, zero));
    bit += args.bits;
    if (bit == 32) bit = 0, ++word;
  }
}

template <class Real16>
void multiply_group(const KvProductArgs& args, int64_t head, int64_t group) {
  const TileGrid grid = args.is_value ? value_grid(args.channels) : key_grid(args.channels);
  const auto* x = static_cast<const Real16*>(args.x) + head * args.columns * args.k;
  auto* y = static_cast<Real16*>(args.y) + head * args.columns * args.m;
  const int64_t first_tile = head * args.blocks * args.channels;
  std::vector<float> sums(static_cast<size_t>(args.columns * kTile)), part(sums.size());
  // Sums of 64 columns first: their rounding errors do not grow with the context.
  for (int64_t k0 = 0; k0 < args.k; k0 += kTile) {
    std::fill(part.begin(), part.end(), 0.0f);
    for (int64_t k = k0; k < std::min(k0 + kTile, args.k); ++k) {
      float values[kTile];
      decode_tile<Real16>(args, first_tile + grid.tile(group, k), values);
      for (int64_t c = 0; c < args.columns; ++c) {
        const float factor = value_of(x[c * args.k + k]);
        float* to = part.data() + c * kTile;
        for (int i = 0; i < kTile; ++i) to[i] += factor * values[i];
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += part[i];
  }
  const int64_t rows = std::min<int64_t>(kTile, args.m - group * kTile);
  for (int64_t c = 0; c < args.columns; ++c)
    for (int64_t i = 0; i < rows; ++i)
      y[c * args.m + group * kTile + i] = rounded(sums[static_cast<size_t>(c * kTile + i)], Real16{});
}

}  // namespace

void kv_fit_cpu(const KvCompressArgs& args, int64_t first_block, int64_t last_block) {
  visit_real16(args.type, [&]<class Real16>(Real16) {
    for (int64_t b = first_block; b < last_block; ++b) fit_block<Real16>(args, load_block(args, b));
  });
}

void kv_offsets_cpu(const KvCompressArgs& args) {
  const int64_t tiles = args.heads * ((args.tokens + kTile - 1) / kTile) * args.channels;
  int64_t sum = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    args.offsets[tile] = static_cast<int32_t>(sum);
    sum += tile_words(__builtin_popcountll(args.bitmaps[tile]), args.bits);
  }
  std::fill(args.packed + sum, args.packed + args.room, 0u);
  *args.num_words = sum;
}

void kv_pack_cpu(const KvCompressArgs& args, int64_t first_block, int64_t last_block) {
  visit_real16(args.type, [&]<class Real16>(Real16) {
    for (int64_t b = first_block; b < last_block; ++b) pack_block<Real16>(args, load_block(args, b));
  });
}

void kv_product_cpu(const KvProductArgs& args, int64_t first_group, int64_t last_group) {
  const int64_t groups = (args.m + kTile - 1) / kTile;
  visit_real16(args.type, [&]<class Real16>(Real16) {
    for (int64_t i = first_group; i < last_group; ++i) multiply_group<Real16>(args, i / groups, i % groups);
  });
}

}  // namespace quantgemm
