// SPDX-License-Identifier: MIT
// The native key-value cache on the CPU: new tokens into the ring and, when they leave it, into pages;
// attention of one new token of each head over pages, sinks and ring. Layout is kv_page.h.
#include "../kv_page.h"

#include <algorithm>
#include <vector>

#include "cpu.h"

namespace quantgemm {
namespace {

float load_any(const void* x, int64_t i, Real type) {
  const uint16_t bits = static_cast<const uint16_t*>(x)[i];
  return type == Real::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}
uint16_t store_any(float x, Real type) {
  return type == Real::kFloat16 ? float_to_half(x) : float_to_bfloat16(x);
}

// What is stored is less by this; is_value: 0 or 1.
float mean_of(const KvCacheArgs& c, int64_t is_value, int64_t row, int64_t d) {
  if (c.means == nullptr) return 0;
  return load_any(c.means, ((is_value * c.batch * c.heads) + row) * c.channels + d, c.type);
}

// One page of keys or of values, [token, channel] to the outside.
struct Page {
  uint8_t* bytes;
  PageFormat format;
  int channels;
  bool is_value;
  uint8_t *with_scales, *with_shifts;  // dense: the pages that have them

  int rows() const { return is_value ? channels : kPageTokens; }
  int num_k() const { return is_value ? kPageTokens : channels; }
  uint16_t* fits(uint8_t* page) const {
    return reinterpret_cast<uint16_t*>(page + codes_bytes(channels, format));
  }
  uint16_t* scales() const { return fits(with_scales); }
  uint16_t* shifts() const { return fits(with_shifts) + (is_value ? num_k() : 0); }
  uint32_t word(int at) const { return load<uint32_t, 4>(bytes + 4 * at); }

  // x(token, channel), of keys also those of the page that shares the fits.
  template <class Fn>
  void fit_dense(Fn&& x) const {
    const int count = is_value ? channels : 2 * kPageTokens;
    for (int k = 0; k < num_k(); ++k) {
      const auto at_row = [&](int row) { return is_value ? x(k, row) : x(row, k); };
      const PageFit fit = fit_page_group(at_row, count, format.bits);
      scales()[fit_place(k)] = fit.scale, shifts()[fit_place(k)] = fit.shift;
    }
  }
  // The fits are there.
  template <class Fn>
  void pack_dense(Fn&& x) const {
    const auto at_row = [&](int row, int k) { return is_value ? x(k, row) : x(row, k); };
    for (int k = 0; k < num_k(); ++k) {
      const PageCoder coder({scales()[fit_place(k)], shifts()[fit_place(k)]}, format.bits);
      for (int row = 0; row < rows(); ++row) {
        const CodePlace at = code_place(row, k, num_k(), format.bits);
        or_into<4>(bytes + 4 * at.word, static_cast<uint32_t>(coder.code(at_row(row, k))) << at.shift);
      }
    }
  }
  // x(token, channel) is zero where nothing is kept.
  template <class Fn>
  void pack_sparse(Fn&& x) const {
    std::vector<uint16_t> scales(static_cast<size_t>(num_k()));
    for (int k = 0; k < num_k(); ++k) {
      SparseGroup group{INFINITY, 0, {0, 0}, 0};
      for (int row = 0; row < rows(); ++row) {
        const float v = std::fabs(is_value ? x(k, row) : x(row, k));
        if (v == 0) continue;
        group.lo = std::min(v, group.lo), group.hi = v > group.hi || v != v ? v : group.hi;
        group.sum[is_value ? row / 8 % 2 : row / 32] += v, ++group.count;
      }
      scales[static_cast<size_t>(k)] = fits(bytes)[scale_place(k)] = fit_sparse_group(group, format.bits);
    }
    const auto code_of = [&](int token, int channel) {
      const uint16_t scale = scales[static_cast<size_t>(is_value ? token : channel)];
      return SparseCoder(scale, format.bits).code(x(token, channel), format.bits);
    };
    const auto set_bit = [&](PlanePlace at) { or_into<4>(bytes + 4 * at.word, 1u << at.bit); };
    if (format.kind == PageKind::kBitmap) {
      for (int place = 0, at = 0; place < kPageTokens * channels; ++place) {
        const SparseOrigin o = origin(bitmap_element(place));
        if (x(o.token, o.channel) == 0) continue;
        set_bit({place / 32, place % 32});
        bytes[bitmap_bytes(channels) + at / 8] |= static_cast<uint8_t>(code_of(o.token, o.channel) << at % 8);
        at += format.bits;
      }
    } else {
      for (int token = 0; token < kPageTokens; ++token)
        for (int first = 0; first < channels; first += 8) {
          uint32_t set = 0;
          for (int i = 0; i < 8; ++i) set |= uint32_t{x(token, first + i) != 0} << i;
          for (int i = 0; i < 8; ++i) {
            if (!(set >> i & 1)) continue;
            const int rank = four_of_eight_rank(set, i);
            const SparseElement e = element(token, first + i);
            const uint32_t code = code_of(token, first + i);
            const auto set_plane = [&](int plane) {
              set_bit(four_of_eight_place(e, plane, channels, format.bits, is_value));
            };
            set_plane(i);
            for (int b = 0; b < format.bits; ++b)
              if (code >> b & 1) set_plane(8 + rank * format.bits + b);
          }
        }
    }
  }

  // value(token, channel, of the element)
  template <class Fn>
  void unpack(Fn&& value) const {
    if (format.kind == PageKind::kDense) {
      for (int k = 0; k < num_k(); ++k) {
        const PageCoder coder({scales()[fit_place(k)], shifts()[fit_place(k)]}, format.bits);
        for (int row = 0; row < rows(); ++row) {
          const CodePlace at = code_place(row, k, num_k(), format.bits);
          const uint32_t code = word(at.word) >> at.shift & ((1u << format.bits) - 1);
          const float v = coder.value(static_cast<float>(code));
          is_value ? value(k, row, v) : value(row, k, v);
        }
      }
    } else if (format.kind == PageKind::kBitmap) {
      for (int place = 0, at = 0; place < kPageTokens * channels; ++place) {
        const SparseOrigin o = origin(bitmap_element(place));
        int level = 0;
        if (word(place / 32) >> place % 32 & 1) {
          const int code = bytes[bitmap_bytes(channels) + at / 8] >> at % 8 & ((1 << format.bits) - 1);
          level = sparse_level(code, format.bits), at += format.bits;
        }
        value(o.token, o.channel, decode(o, level));
      }
    } else {
      for (int token = 0; token < kPageTokens; ++token)
        for (int first = 0; first < channels; first += 8) {
          const SparseElement e = element(token, first);
          const auto plane = [&](int p) {
            const PlanePlace at = four_of_eight_place(e, p, channels, format.bits, is_value);
            return static_cast<int>(word(at.word) >> at.bit & 1);
          };
          uint32_t set = 0;
          for (int i = 0; i < 8; ++i) set |= static_cast<uint32_t>(plane(i)) << i;
          for (int i = 0; i < 8; ++i) {
            int code = 0;
            const int rank = four_of_eight_rank(set, i);
            for (int b = 0; b < format.bits; ++b) code |= plane(8 + (rank & 3) * format.bits + b) << b;
            value(token, first + i,
                  decode({token, first + i}, set >> i & 1 ? sparse_level(code, format.bits) : 0));
          }
        }
    }
  }

 private:
  int scale_place(int k) const {
    return is_value ? sparse_value_scale_place(k) : sparse_key_scale_place(k, channels);
  }
  float decode(SparseOrigin o, int level) const {
    return level == 0 ? 0.0f : sparse_value(level, fits(bytes)[scale_place(is_value ? o.token : o.channel)]);
  }
  SparseElement element(int token, int channel) const {
    return is_value ? sparse_value_element(token, channel) : sparse_key_element(token, channel, channels);
  }
  SparseElement bitmap_element(int place) const {
    return is_value ? bitmap_value_element(place) : bitmap_key_element(place);
  }
  SparseOrigin origin(SparseElement e) const {
    return is_value ? sparse_value_origin(e) : sparse_key_origin(e, channels);
  }
};

// x: the page's tokens [64, channels] as bits, pruned here; of dense keys' first page also the second's, and
// when that is packed, the fits are there.
void pack_page(const Page& page, uint16_t* x, Real type) {
  const int channels = page.channels;
  const auto at = [&](int token, int channel) { return load_any(x, token * channels + channel, type); };
  std::fill_n(page.bytes, codes_bytes(channels, page.format), uint8_t{0});
  if (page.format.kind == PageKind::kDense) {
    if (page.bytes == page.with_scales) page.fit_dense(at);
    return page.pack_dense(at);
  }
  const int of = page.format.kind == PageKind::kBitmap ? channels : 8;
  const int keep = page.format.kind == PageKind::kBitmap ? page.format.keep : 4;
  std::vector<int> order;
  for (int i = 0; i < kPageTokens * channels; i += of) kv_prune_cpu(x + i, of, keep, order);
  page.pack_sparse(at);
}

// -1 for an entry that is no page.
int64_t page_of(const KvCacheArgs& c, int64_t sequence, int64_t index) {
  const int64_t page = c.page_table[sequence * c.max_pages + index];
  return page >= 0 && page < c.num_pages ? page : -1;
}
// Of a sequence's pages, bytes null: not there, or not that with its fits.
Page key_page(const KvCacheArgs& c, int64_t sequence, int64_t index, int64_t head) {
  const auto place = [&](int64_t i) {
    const int64_t page = page_of(c, sequence, i);
    return page < 0 ? nullptr
                    : c.key_pages + (page * c.heads + head) * key_page_bytes(c.channels, c.key_format);
  };
  const int64_t together = pages_together(c.key_format), first = whole_pages(index, c.key_format);
  uint8_t *scales = place(first), *shifts = place(first + together - 1);
  return {scales && shifts ? place(index) : nullptr,
          c.key_format,
          static_cast<int>(c.channels),
          false,
          scales,
          shifts};
}
Page value_page(const KvCacheArgs& c, int64_t sequence, int64_t index, int64_t head) {
  const int64_t page = page_of(c, sequence, index);
  uint8_t* bytes =
      page < 0 ? nullptr
               : c.value_pages + (page * c.heads + head) * value_page_bytes(c.channels, c.value_format);
  return {bytes, c.value_format, static_cast<int>(c.channels), true, bytes, bytes};
}

// ---- one new token of a group of query heads, online over tokens ----
struct Sums {
  float maximum = -INFINITY, mass = 0;
  std::vector<float> out;

  void add(float logit, const float* value, int64_t channels) {
    if (logit > maximum || logit != logit) {
      const float factor = maximum == -INFINITY ? 0.0f : std::exp(maximum - logit);
      maximum = logit, mass *= factor;
      for (float& o : out) o *= factor;
    }
    const float weight = std::exp(logit - maximum);
    mass += weight;
    for (int64_t d = 0; d < channels; ++d) out[static_cast<size_t>(d)] += weight * value[d];
  }
};

void attend(const KvAttentionArgs& args, int64_t sequence, int64_t head) {
  const KvCacheArgs& c = args.cache;
  const int64_t row = sequence * c.heads + head, first_query = row * args.groups;
  std::vector<Sums> sums(static_cast<size_t>(args.groups));
  for (Sums& s : sums) s.out.assign(static_cast<size_t>(c.channels), 0.0f);
  std::vector<float> key(static_cast<size_t>(c.channels)), value(key.size());
  std::vector<float> page_keys(key.size() * kPageTokens), page_values(page_keys.size());
  const auto add_token = [&](int64_t tokens_behind) {
    for (int64_t g = 0; g < args.groups; ++g) {
      if (tokens_behind < hidden_tokens(args, static_cast<int>(g))) continue;
      float logit = 0;
      for (int64_t d = 0; d < c.channels; ++d)
        logit +=
            load_any(args.query, (first_query + g) * c.channels + d, c.type) * key[static_cast<size_t>(d)];
      sums[static_cast<size_t>(g)].add(logit * args.scale, value.data(), c.channels);
    }
  };
  const SequenceParts parts = parts_of(c, c.lens[sequence]);
  for (int64_t i = 0; i < parts.pages; ++i) {
    const Page own_keys = key_page(c, sequence, i, head), own_values = value_page(c, sequence, i, head);
    if (!own_keys.bytes || !own_values.bytes) continue;
    const auto at = [&](std::vector<float>& to) {
      return [&](int t, int d, float x) { to[static_cast<size_t>(t * c.channels + d)] = x; };
    };
    own_keys.unpack(at(page_keys));
    own_values.unpack(at(page_values));
    for (int64_t t = 0; t < kPageTokens; ++t) {
      std::copy_n(page_keys.data() + t * c.channels, c.channels, key.data());
      std::copy_n(page_values.data() + t * c.channels, c.channels, value.data());
      add_token(args.tokens);  // the window hides nothing that is packed
    }
  }
  int64_t left = parts.sinks + parts.ring_end - parts.ring_first;
  const auto add_recent = [&](int64_t slot) {
    const int64_t at = (row * c.recent + slot) * c.channels;
    for (int64_t d = 0; d < c.channels; ++d) {
      key[static_cast<size_t>(d)] = load_any(c.recent_keys, at + d, c.type);
      value[static_cast<size_t>(d)] = load_any(c.recent_values, at + d, c.type);
    }
    add_token(--left);
  };
  for (int64_t t = 0; t < parts.sinks; ++t) add_recent(t);
  for (int64_t t = parts.ring_first; t < parts.ring_end; ++t) add_recent(recent_slot(c, c.sinks + t));
  for (int64_t g = 0; g < args.groups; ++g) {
    const Sums& s = sums[static_cast<size_t>(g)];
    float logit = 0;  // of the keys' mean
    for (int64_t d = 0; c.means != nullptr && d < c.channels; ++d)
      logit += load_any(args.query, (first_query + g) * c.channels + d, c.type) * mean_of(c, 0, row, d);
    args.lse[first_query + g] = s.maximum + std::log(s.mass) + logit * args.scale;
    for (int64_t d = 0; d < c.channels; ++d) {
      const float out = s.mass == 0 ? 0.0f : s.out[static_cast<size_t>(d)] / s.mass + mean_of(c, 1, row, d);
      static_cast<uint16_t*>(args.out)[(first_query + g) * c.channels + d] = store_any(out, c.type);
    }
  }
}

void append(const KvAppendArgs& args, int64_t sequence, int64_t head) {
  const KvCacheArgs& c = args.cache;
  const int64_t before = std::max<int64_t>(c.lens[sequence], 0);
  const int64_t count = args.counts ? std::clamp<int64_t>(args.counts[sequence], 0, args.count) : args.count;
  const SequenceParts old = parts_of(c, before), now = parts_of(c, before + count);
  const int64_t row = sequence * c.heads + head;
  const auto centred = [&](bool value, int64_t index, int64_t d) {
    const void* added = value ? args.values : args.keys;
    const int64_t from = (row * args.count + index) * c.channels + d;
    if (c.means == nullptr) return static_cast<const uint16_t*>(added)[from];
    return store_any(load_any(added, from, c.type) - mean_of(c, value, row, d), c.type);
  };
  const auto recent_of = [&](bool value, int64_t position) {
    return static_cast<uint16_t*>(value ? c.recent_values : c.recent_keys) +
           (row * c.recent + recent_slot(c, position)) * c.channels;
  };
  // The tokens that a page is packed from, where they are before anything has moved, as bits: its own, and
  // the next one's, as far as they leave the ring, where they share a fit that is made with this page.
  std::vector<uint16_t> x(static_cast<size_t>(2 * kPageTokens * c.channels));
  const auto stage = [&](const Page& page, int64_t index) {
    const bool value = page.is_value, is_fit = !value && page.format.kind == PageKind::kDense &&
                                               page.bytes == page.with_scales && index + 1 < now.pages;
    const int64_t first = c.sinks + index * kPageTokens, tokens = (is_fit ? 2 : 1) * kPageTokens;
    for (int64_t i = 0; i < tokens * c.channels; ++i) {
      const int64_t position = first + i / c.channels, d = i % c.channels;
      x[static_cast<size_t>(i)] =
          position < before ? recent_of(value, position)[d] : centred(value, position - before, d);
    }
    return x.data();
  };
  for (int64_t i = old.pages; i < now.pages; ++i) {
    const Page keys = key_page(c, sequence, i, head), values = value_page(c, sequence, i, head);
    if (keys.bytes) pack_page(keys, stage(keys, i), c.type);
    if (values.bytes) pack_page(values, stage(values, i), c.type);
  }
  for (int64_t index = 0; index < count; ++index) {
    const int64_t position = before + index;
    if (position >= c.sinks && position - c.sinks < now.ring_first) continue;
    for (const bool value : {false, true})
      for (int64_t d = 0; d < c.channels; ++d) recent_of(value, position)[d] = centred(value, index, d);
  }
}

}  // namespace

void kv_append_cpu(const KvAppendArgs& args, int64_t first_row, int64_t last_row) {
  for (int64_t i = first_row; i < last_row; ++i) append(args, i / args.cache.heads, i % args.cache.heads);
}

void kv_attention_cpu(const KvAttentionArgs& args, int64_t first_row, int64_t last_row) {
  for (int64_t i = first_row; i < last_row; ++i) attend(args, i / args.cache.heads, i % args.cache.heads);
}

}  // namespace quantgemm
