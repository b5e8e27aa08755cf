// SPDX-License-Identifier: MIT
// Attention of one new token over the native key-value cache (kv_page.h): logits, softmax and output in
// one pass. A warp takes pages for 8 query heads of a group, the next one on its way to shared memory:
//
//   logits  rows = tokens, columns = heads: a = codes, b = query · scale of the page's channels;
//           the shifts are one row more, added to all
//   softmax online; the weights, transposed as they lie, are b of the second product
//   output  rows = channels, columns = heads: a = codes, b = weight · scale of the token
#pragma once
#include "memory.cuh"
#include "ptx.cuh"
#include "sparse_kv_codes.cuh"

namespace quantgemm {

inline constexpr float kLog2E = 1.4426950408889634f;
// The largest weight is 2^-this when the maximum is raised, so that it need not be for a little more.
inline constexpr float kHeadroom = 2.0f;

template <class Codes>
__device__ __forceinline__ constexpr PageFormat format_of(int keep) {
  return {Codes::kKind, Codes::kBits, keep};  // all but keep is known at compile time
}
// A page of a sequence, and the one that shares the keys' fits or -1.
struct PagePlace {
  int page, other;
  bool is_odd;  // the second of the two
};

template <class Real16, int Channels, class Keys, class Values>
struct AttentionWarp {
  static constexpr int kSteps = Channels / 16;  // of keys; a page has four of values
  static constexpr bool kSparseKeys = Keys::kKind != PageKind::kDense;
  static constexpr bool kSparseValues = Values::kKind != PageKind::kDense;
  const KvAttentionArgs& args;
  uint8_t* stage;         // a page of keys, then one of values
  uint4* queries;         // of the block, as halves: of two steps of every lane
  const uint32_t* table;  // of the formats
  int lane;
  int64_t row;                       // sequence · heads + key-value head
  bytes_ptr key_pages, value_pages;  // of this head, with this lane's place in a page
  const Real16* query;               // of this lane's column, or null
  float out[kSteps][4] = {};         // of codes in their units, so long as pages are added
  float shifts[2][4] = {};           // Σ weight · scale · shift, see add_shifts: belongs to every row of out
  float maximum[2] = {}, mass[2] = {};  // of two columns, at least that of logits; mass of this lane's rows
  bool is_empty = true;                 // nothing added

  __device__ AttentionWarp(const KvAttentionArgs& a, uint8_t* s, uint4* q, const uint32_t* t, int64_t r,
                           int64_t first_head)
      : args(a), stage(s), queries(q), table(t), lane(threadIdx.x % 32), row(r) {
    const int64_t head = first_head + lane / 4;
    query = head < args.groups
                ? static_cast<const Real16*>(args.query) + (row * args.groups + head) * Channels
                : nullptr;
    const int64_t own = row % a.cache.heads;
    key_pages = a.cache.key_pages + own * key_bytes(a.cache) + 16 * lane;
    value_pages = a.cache.value_pages + own * value_bytes(a.cache) + 16 * lane;
  }

  static __device__ __forceinline__ constexpr int key_codes(int keep) {
    return static_cast<int>(codes_bytes(Channels, format_of<Keys>(keep)));
  }
  static __device__ __forceinline__ constexpr int value_codes(int keep) {
    return static_cast<int>(codes_bytes(Channels, format_of<Values>(keep)));
  }
  static __device__ __forceinline__ int key_bytes(const KvCacheArgs& c) {
    return static_cast<int>(key_page_bytes(Channels, format_of<Keys>(c.key_format.keep)));
  }
  static __device__ __forceinline__ int staged_key_bytes(const KvCacheArgs& c) {
    return static_cast<int>(whole_keys_bytes(Channels, format_of<Keys>(c.key_format.keep)));
  }
  static __device__ __forceinline__ int value_bytes(const KvCacheArgs& c) {
    return static_cast<int>(value_page_bytes(Channels, format_of<Values>(c.value_format.keep)));
  }
  __device__ __forceinline__ uint8_t* staged_values() const { return stage + staged_key_bytes(args.cache); }

  // The channel of row r of block y of out.
  static __device__ __forceinline__ int channel(int y, int r) {
    return kSparseValues ? sparse_value_origin({4 * r, y % 8, 0, y / 8, 0}).channel : 8 * y + r;
  }

  // By one warp for all.
  __device__ __forceinline__ void load_query() {
    uint32_t q[kSteps][2];
    const auto pack = [](uint32_t pair) {
      return pack_pair(to_float(Real16{static_cast<uint16_t>(pair)}),
                       to_float(Real16{static_cast<uint16_t>(pair >> 16)}), Half{});
    };
    if constexpr (kSparseKeys) {
      constexpr int kGroups = Channels / 32;
      uint32_t words[kGroups][4];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint4 v = query ? __ldg(reinterpret_cast<const uint4*>(query) + 4 * g + lane % 4) : uint4{};
        words[g][0] = v.x, words[g][1] = v.y, words[g][2] = v.z, words[g][3] = v.w;
      }
#pragma unroll
      for (int y = 0; y < 2 * kSteps; ++y) {
        const int j = y / 8, i = y % 8;
        q[y / 2][y % 2] =
            pack(__byte_perm(words[j][i / 2], words[j + kGroups / 2][i / 2], i % 2 ? 0x7632 : 0x5410));
      }
    } else {
      const auto* own = reinterpret_cast<const uint32_t*>(query) + lane % 4;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i)
        q[i / 2][i % 2] = pack(query ? __ldg(own + 4 * (first_group(i / 2) + i % 2 * 2)) : 0u);
    }
#pragma unroll
    for (int s = 0; s < kSteps; s += 2)
      queries[16 * s + lane] = make_uint4(q[s][0], q[s][1], q[s + 1][0], q[s + 1][1]);
  }

  // This lane's place in a page of so many bytes; a copy of no more than Most.
  __device__ __forceinline__ bytes_ptr in_page(bytes_ptr pages, int bytes, int page) const {
    return pages + static_cast<uint64_t>(static_cast<uint32_t>(page)) *
                       (static_cast<uint32_t>(args.cache.heads) * static_cast<uint32_t>(bytes));
  }
  template <int Most>
  __device__ __forceinline__ void copy(uint8_t* to, bytes_ptr from, int bytes) const {
#pragma unroll
    for (int i = 0; i < Most; i += 512)
      if (i + 16 * lane < bytes) cp_async16(shared_address(to + 16 * lane) + i, from + i);
  }
  // One group of copies each, empty for no page. Without another page dense keys' fits are there.
  __device__ __forceinline__ void fetch_keys(PagePlace place) const {
    __syncwarp();  // all have read what was here
    if (place.page >= 0) {
      const int bytes = key_bytes(args.cache);
      if constexpr (kSparseKeys) {
        constexpr int kMost = static_cast<int>(key_page_bytes(Channels, format_of<Keys>(Channels)));
        copy<kMost>(stage, in_page(key_pages, bytes, place.page), bytes);
      } else {
        constexpr int kCodes = key_codes(0), kScales = 2 * Channels;
        copy<kCodes>(stage, in_page(key_pages, bytes, place.page), kCodes);
        if (place.other >= 0) {
#pragma unroll
          for (int i = 0; i < 2 * kScales; i += 512) {
            const int at = i + 16 * lane;
            const bool is_shift = at >= kScales;
            const int page = is_shift == place.is_odd ? place.page : place.other;
            if (at < 2 * kScales)
              cp_async16(shared_address(stage + kCodes + at),
                         in_page(key_pages, bytes, page) + kCodes + i - (is_shift ? kScales : 0));
          }
        }
      }
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void fetch_values(int page) const {
    __syncwarp();  // all have read what was here
    constexpr int kMost = static_cast<int>(value_page_bytes(Channels, format_of<Values>(Channels)));
    const int bytes = value_bytes(args.cache);
    if (page >= 0) copy<kMost>(staged_values(), in_page(value_pages, bytes, page), bytes);
    cp_async_commit();
  }

  // Logits, in powers of two and less `maximum`, of 16 · Tiles tokens to weights, as b of the second
  // product: of one tile or of the steps of a page (first_group).
  template <class Weight, int Tiles>
  __device__ __forceinline__ void softmax(float (&logits)[Tiles][4], uint32_t (&weights)[Tiles][2]) {
    // Is one above the maximum? Only then all are compared. The sign bit of `below`: none is.
    uint32_t below = ~0u;
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) below &= __float_as_uint(logits[m][j]);
    if (is_empty || __any_sync(~0u, static_cast<int>(below) >= 0)) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float top = logits[0][c];
#pragma unroll
        for (int m = 0; m < Tiles; ++m) top = fmaxf(top, fmaxf(logits[m][c], logits[m][c + 2]));
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
        if (is_empty || top > 0.0f) raise_maximum(logits, top + kHeadroom, c);
      }
    }
    is_empty = false;
#pragma unroll
    for (int m = 0; m < Tiles; ++m) {
      float p[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) p[j] = fast_exp2(logits[m][j]), mass[j % 2] += p[j];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t& w = Tiles == 1 ? weights[m][h] : weights[m / 2 * 2 + h][m % 2];
        w = transpose_8x8(pack_pair(p[2 * h], p[2 * h + 1], Weight{}));
      }
    }
  }
  template <int Tiles>
  __device__ __forceinline__ void raise_maximum(float (&logits)[Tiles][4], float by, int c) {
    const float factor = is_empty ? 0.0f : fast_exp2(-by);
    if (by == -INFINITY) by = 0.0f;  // nothing yet: any finite number will do
    maximum[c] += by, mass[c] *= factor;
#pragma unroll
    for (int m = 0; m < Tiles; ++m) logits[m][c] -= by, logits[m][c + 2] -= by;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) out[i][c] *= factor, out[i][c + 2] *= factor;
    shifts[0][c] *= factor, shifts[1][c + 2] *= factor;
  }

  // Σ b · shift over all columns. Shifts that came as one load are one operand: sums[0] is right in rows
  // 0 … 7, sums[1] in the others. A sparse page's shift is always the same.
  template <class Codes, int Steps>
  static __device__ __forceinline__ void add_shifts(float (&sums)[2][4], const uint8_t* fits,
                                                    const uint32_t (&b)[Steps][2]) {
    if constexpr (Codes::kKind == PageKind::kDense) {
#pragma unroll
      for (int s = 0; s < Steps; s += 2) {
        const uint4 v = *reinterpret_cast<const uint4*>(fits + 32 * s);
        const uint32_t shift[4] = {v.x, v.y, v.z, v.w};
        mma_16x8x16(sums[0], shift, b[s][0], b[s][1], Half{});
        mma_16x8x16(sums[1], shift, b[s + 1][0], b[s + 1][1], Half{});
      }
    } else if constexpr (Codes::kOffset != 0.0f) {
      const uint32_t pair = pack_pair(-Codes::kOffset, -Codes::kOffset, Half{});
      const uint32_t shift[4] = {pair, pair, pair, pair};
#pragma unroll
      for (int s = 0; s < Steps; ++s) mma_16x8x16(sums[s % 2], shift, b[s][0], b[s][1], Half{});
    }
  }
  // Of four groups of columns, in the order of fit_place.
  static __device__ __forceinline__ void multiply_scales(uint32_t (&first)[2], uint32_t (&second)[2],
                                                         const uint4& x, const uint8_t* fits) {
    const uint4 v = *reinterpret_cast<const uint4*>(fits);
    first[0] = multiply_halves(x.x, v.x), first[1] = multiply_halves(x.y, v.z);
    second[0] = multiply_halves(x.z, v.y), second[1] = multiply_halves(x.w, v.w);
  }

  static __device__ __forceinline__ int kept_plane_bit(SparseElement e) {
    const PlanePlace place = four_of_eight_place(e, e.i, Channels, Values::kBits, true);
    return 32 * place.word + place.bit;
  }
  // Tokens whose scale is NaN: what they keep is, and nothing else. Their weights become zero.
  __device__ __forceinline__ void set_apart_nans(const uint8_t* values, uint32_t (&weights)[4][2]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint32_t& w = weights[i / 2][i % 2];
      w &= __heq2_mask(bit_cast<__half2>(w), bit_cast<__half2>(w));
    }
    const auto* scales =
        reinterpret_cast<const uint16_t*>(values + value_codes(args.cache.value_format.keep));
#pragma unroll 1
    for (int token = 0; token < kPageTokens; ++token) {
      if ((scales[sparse_value_scale_place(token)] & 0x7fff) <= 0x7c00) continue;
#pragma unroll
      for (int y = 0; y < 2 * kSteps; ++y) {
        const SparseElement e = sparse_value_element(token, channel(y, lane / 4));
        const int bit = Values::kKind == PageKind::kBitmap ? bitmap_value_place(e) : kept_plane_bit(e);
        if (values[bit / 8] >> bit % 8 & 1) out[y / 2][y % 2 * 2] = out[y / 2][y % 2 * 2 + 1] = NAN;
      }
    }
  }

  // The page that is on its way here; then the next one is, or none (-1). Its keys come as soon as these
  // have been multiplied, its values after these.
  __device__ __forceinline__ void add_page(PagePlace next) {
    float logits[4][4] = {}, base[2][4] = {};
    uint32_t b[kSteps][2];
    cp_async_wait<1>();
    __syncwarp();  // the other lanes' copies too
    const uint8_t* key_fits = stage + key_codes(args.cache.key_format.keep) + lane % 4 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; s += 2)
      multiply_scales(b[s], b[s + 1], queries[16 * s + lane], key_fits + 32 * s);
    add_shifts<Keys>(base, key_fits + 2 * Channels, b);
    Keys::multiply_keys(logits, stage, lane, table, b);
    fetch_keys(next);
    const float scale = args.scale * kLog2E;
    const float shift[2] = {fmaf(base[0][0] + base[1][2], scale, -maximum[0]),
                            fmaf(base[0][1] + base[1][3], scale, -maximum[1])};
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        logits[m][j] = fmaf(logits[m][j], scale * Keys::key_unit(2 * m + j / 2), shift[j % 2]);
    uint32_t weights[4][2];
    softmax<Half>(logits, weights);
    cp_async_wait<1>();
    __syncwarp();  // the other lanes' copies too
    const uint8_t* values = staged_values();
    const uint8_t* fits = values + value_codes(args.cache.value_format.keep) + lane % 4 * 16;
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      const uint4 w = make_uint4(weights[s][0], weights[s][1], weights[s + 1][0], weights[s + 1][1]);
      multiply_scales(weights[s], weights[s + 1], w, fits + 32 * s);
    }
    if constexpr (kSparseValues) {
      auto sum = bit_cast<__half2>(weights[0][0]);  // NaN if one of them is
#pragma unroll
      for (int i = 1; i < 8; ++i) sum = __hadd2(sum, bit_cast<__half2>(weights[i / 2][i % 2]));
      if (__any_sync(~0u, !__hbeq2(sum, sum))) set_apart_nans(values, weights);
    }
    add_shifts<Values>(shifts, fits + 2 * kPageTokens, weights);
    constexpr bool kSameTable = std::is_same_v<Keys, Values>;
    Values::multiply_values(out, values, lane, table + (kSameTable ? 0 : Keys::kTableBytes / 4), weights);
    fetch_values(next.page);
  }

  // Those of 16 tokens from the index-th on that are among the `count` recent ones of parts, whose ring
  // begins at first_slot; one at least. Before all pages, and before a page each query must have seen one of
  // them.
  __device__ __forceinline__ void add_recent(const SequenceParts& parts, int first_slot, int index,
                                             int count) {
    const KvCacheArgs& c = args.cache;
    const int sinks = static_cast<int>(parts.sinks), ring = static_cast<int>(ring_slots(c));
    const auto is_among = [&](int i, int those) {
      return static_cast<unsigned>(index + i) < static_cast<unsigned>(those);
    };
    // The i-th token's elements, or those of the next that is there.
    const auto place = [&](int i) {
      const int t = index + i < 0 ? 0 : min(index + i, count - 1), at = first_slot + t - sinks;
      const int64_t slot = t < sinks ? t : c.sinks + (at < ring ? at : at - ring);
      return (row * c.recent + slot) * Channels;
    };
    const auto load8 = [](const void* x) { return __ldg(static_cast<const uint4*>(x)); };
    const int own = lane / 4;  // this lane's tokens of the logits, and own + 8
    const int64_t at[2] = {place(own), place(own + 8)};
    uint32_t v[kSteps][4];
    load_recent_values(v, at, place, [&](int i) { return is_among(i, count); });
    // Lane c has channels 8c … 8c+7 of every 32, in keys as in the query: sums take them in any order.
    const auto* keys = static_cast<const uint16_t*>(c.recent_keys) + lane % 4 * 8;
    float logits[1][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps / 2; ++s) {
      const uint4 low = load8(keys + at[0] + 32 * s), high = load8(keys + at[1] + 32 * s);
      const uint4 b = query ? load8(query + lane % 4 * 8 + 32 * s) : uint4{};
      const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
      mma_16x8x16(logits[0], first, b.x, b.y, Real16{});
      mma_16x8x16(logits[0], second, b.z, b.w, Real16{});
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = own + j / 2 * 8, column = static_cast<int>(8 * blockIdx.z) + lane % 4 * 2 + j % 2;
      const bool is_seen = is_among(i, max(count - hidden_tokens(args, column), 0));
      logits[0][j] = is_seen ? fmaf(logits[0][j], args.scale * kLog2E, -maximum[j % 2]) : -INFINITY;
    }
    uint32_t weights[1][2];
    softmax<Real16>(logits, weights);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      if constexpr (!kSparseValues) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // A token that is not there has weight 0, but its slot may hold anything, NaN too.
          v[m][j] = transpose_8x8(is_among(own + j / 2 * 8, count) ? v[m][j] : 0u);
        }
      }
      mma_16x8x16(out[m], v[m], weights[0][0], weights[0][1], Real16{});
    }
  }
  // Operands of the second product: with dense pages yet to be transposed, with sparse ones channels are
  // elsewhere in out, 8 neighbours of one lane in as many blocks.
  template <class Place, class IsThere>
  __device__ __forceinline__ void load_recent_values(uint32_t (&v)[kSteps][4], const int64_t (&at)[2],
                                                     Place&& place, IsThere&& is_there) const {
    const auto* values = static_cast<const uint16_t*>(args.cache.recent_values);
    if constexpr (!kSparseValues) {
#pragma unroll
      for (int m = 0; m < kSteps; ++m)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          v[m][j] = __ldg(
              reinterpret_cast<const uint32_t*>(values + at[j / 2] + lane % 4 * 2 + 16 * m + 8 * (j % 2)));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = 8 * half + lane % 4 * 2;
        const uint16_t* from[2] = {values + place(token), values + place(token + 1)};
#pragma unroll
        for (int j = 0; j < Channels / 64; ++j) {
          uint32_t words[2][4] = {};
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            if (!is_there(token + odd)) continue;
            const uint4 x = __ldg(reinterpret_cast<const uint4*>(from[odd] + 8 * (lane / 4 + 8 * j)));
            words[odd][0] = x.x, words[odd][1] = x.y, words[odd][2] = x.z, words[odd][3] = x.w;
          }
#pragma unroll
          for (int i = 0; i < 8; ++i)
            v[4 * j + i / 2][2 * half + i % 2] =
                __byte_perm(words[0][i / 2], words[1][i / 2], i % 2 ? 0x7632 : 0x5410);
        }
      }
    }
  }

  // To units of codes.
  __device__ __forceinline__ void begin_pages() {
#pragma unroll
    for (int m = 0; m < kSteps; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[m][j] *= 1.0f / Values::value_unit(2 * m + j / 2);
  }
};

}  // namespace quantgemm
