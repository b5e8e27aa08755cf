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

// One page of keys or of values. Fits belong to k: a channel of keys, a token of values.
struct Page {
  uint8_t* codes;
  int rows, num_k, bits;

  uint16_t* fits() const { return reinterpret_cast<uint16_t*>(codes + int64_t{rows} * num_k * bits / 8); }
  PageFit fit(int k) const {
    const int at = fit_place(k);
    return {fits()[at], fits()[num_k + at]};
  }

  float value(int row, int k) const {
    const CodePlace at = code_place(row, k, num_k, bits);
    uint32_t word;
    std::memcpy(&word, codes + 4 * at.word, 4);
    return PageCoder(fit(k), bits).value(static_cast<float>(word >> at.shift & ((1u << bits) - 1)));
  }

  // x(row, k)
  template <class Fn>
  void pack(Fn&& x) const {
    std::fill_n(codes, int64_t{rows} * num_k * bits / 8, uint8_t{0});
    for (int k = 0; k < num_k; ++k) {
      const PageFit fit = fit_page_group([&](int row) { return x(row, k); }, rows, bits);
      const int place = fit_place(k);
      fits()[place] = fit.scale, fits()[num_k + place] = fit.shift;
      const PageCoder coder(fit, bits);
      for (int row = 0; row < rows; ++row) {
        const CodePlace at = code_place(row, k, num_k, bits);
        or_into<4>(codes + 4 * at.word, static_cast<uint32_t>(coder.code(x(row, k))) << at.shift);
      }
    }
  }
};

Page key_page(const KvCacheArgs& c, int64_t page, int64_t head) {
  const int64_t bytes = key_page_bytes(c.channels, c.key_bits);
  return {c.key_pages + (page * c.heads + head) * bytes, kPageTokens, static_cast<int>(c.channels),
          c.key_bits};
}
Page value_page(const KvCacheArgs& c, int64_t page, int64_t head) {
  const int64_t bytes = value_page_bytes(c.channels, c.value_bits);
  return {c.value_pages + (page * c.heads + head) * bytes, static_cast<int>(c.channels), kPageTokens,
          c.value_bits};
}
// -1 for an entry that is no page.
int64_t page_of(const KvCacheArgs& c, int64_t sequence, int64_t index) {
  const int64_t page = c.page_table[sequence * c.max_pages + index];
  return page >= 0 && page < c.num_pages ? page : -1;
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
  const auto add_token = [&] {
    for (int64_t g = 0; g < args.groups; ++g) {
      float logit = 0;
      for (int64_t d = 0; d < c.channels; ++d)
        logit +=
            load_any(args.query, (first_query + g) * c.channels + d, c.type) * key[static_cast<size_t>(d)];
      sums[static_cast<size_t>(g)].add(logit * args.scale, value.data(), c.channels);
    }
  };
  const SequenceParts parts = parts_of(c, c.lens[sequence]);
  for (int64_t i = 0; i < parts.pages; ++i) {
    const int64_t page = page_of(c, sequence, i);
    if (page < 0) continue;
    const Page keys = key_page(c, page, head), values = value_page(c, page, head);
    for (int t = 0; t < kPageTokens; ++t) {
      for (int d = 0; d < c.channels; ++d) {
        key[static_cast<size_t>(d)] = keys.value(t, d);
        value[static_cast<size_t>(d)] = values.value(d, t);
      }
      add_token();
    }
  }
  const auto add_recent = [&](int64_t slot) {
    const int64_t at = (row * c.recent + slot) * c.channels;
    for (int64_t d = 0; d < c.channels; ++d) {
      key[static_cast<size_t>(d)] = load_any(c.recent_keys, at + d, c.type);
      value[static_cast<size_t>(d)] = load_any(c.recent_values, at + d, c.type);
    }
    add_token();
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
  const int64_t before = c.lens[sequence];
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
  // The 64 tokens from a position on, where they are before anything has moved, as bits.
  std::vector<uint16_t> x(static_cast<size_t>(kPageTokens * c.channels));
  const auto stage = [&](bool value, int64_t first) {
    for (int64_t i = 0; i < kPageTokens * c.channels; ++i) {
      const int64_t position = first + i / c.channels, d = i % c.channels;
      x[static_cast<size_t>(i)] =
          position < before ? recent_of(value, position)[d] : centred(value, position - before, d);
    }
    return x.data();
  };
  for (int64_t i = old.pages; i < now.pages; ++i) {
    const int64_t page = page_of(c, sequence, i), first = c.sinks + i * kPageTokens;
    if (page < 0) continue;
    pack_page(key_page(c, page, head), stage(false, first), c);
    pack_page(value_page(c, page, head), stage(true, first), c);
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
