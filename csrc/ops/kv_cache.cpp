// SPDX-License-Identifier: MIT
// sparse_kv_append: new tokens [batch, heads, count, channels] into a cache of kv_page.h, in place
// sparse_kv_append_rotated: the same of keys that have not had their rotary embedding -> query with its own
// sparse_kv_attention(query [batch, heads · groups(, tokens), channels], cache) -> out like query, lse
#include "../cpu/cpu.h"
#include "../kv_page.h"
#include "launch_scope.h"
#include "rotation.h"

namespace quantgemm {
namespace {

// The cache's tensors are used in place, so nothing may be copied on the way.
void check_cache_tensor(const char* name, const Tensor& t, const Tensor& like, ScalarType type,
                        const std::vector<int64_t>& sizes) {
  check_type(t.scalar_type() == type, name, ": expected ", dtype_name(type), ", got ",
             dtype_name(t.scalar_type()));
  bool fits = t.dim() == static_cast<int64_t>(sizes.size());
  std::string wanted;
  for (size_t i = 0; i < sizes.size(); ++i) {
    fits = fits && t.size(static_cast<int64_t>(i)) == sizes[i];
    wanted += concat(i ? ", " : "", sizes[i]);
  }
  check_value(fits, name, ": expected shape [", wanted, "], got ", shape_of(t));
  check_value(device_of(t) == device_of(like), name, ": expected a tensor on ", device_of(like), ", got ",
              device_of(t));
  check_value(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
              ": expected a contiguous tensor that starts on a 16-byte boundary");
}

PageFormat check_format(const char* name, const std::string& format, int64_t channels, int64_t keep) {
  const int half = static_cast<int>(channels / 2), all = static_cast<int>(channels);
  const std::pair<const char*, PageFormat> formats[] = {
      {"dense2", {PageKind::kDense, 2, all}},
      {"dense4", {PageKind::kDense, 4, all}},
      {"bitmap2", {PageKind::kBitmap, 2, static_cast<int>(keep)}},
      {"bitmap4", {PageKind::kBitmap, 4, static_cast<int>(keep)}},
      {"4of8_2", {PageKind::kFourOfEight, 2, half}},
      {"4of8_4", {PageKind::kFourOfEight, 4, half}},
  };
  std::string known;
  for (const auto& [own, page] : formats) {
    known += concat(known.empty() ? "" : ", ", own);
    if (format != own) continue;
    check_value(page.kind != PageKind::kBitmap || (keep >= 1 && keep <= channels), "keep: expected 1 to ",
                channels, " of a token's channels, got ", keep);
    return page;
  }
  check_value(false, name, ": expected one of ", known, ", got ", format);
  return {};
}

struct Cache {
  const Tensor &key_pages, &value_pages, &page_table, &recent_keys, &recent_values, &lens;
  const OptTensor& means;
  int64_t sinks, window;
  const std::string &key_format, &value_format;
  int64_t keep;

  KvCacheArgs check() const {
    check_device("recent_keys", recent_keys);
    const Tensor& like = recent_keys;
    const auto type = real_of(like.scalar_type());
    check_type(type.has_value() && *type != Real::kFloat32,
               "recent_keys: expected torch.float16 or torch.bfloat16, got ", dtype_name(like.scalar_type()));
    check_value(like.dim() == 4, "recent_keys: expected [batch, heads, slots, head_dim], got shape ",
                shape_of(like));
    KvCacheArgs c{};
    c.batch = like.size(0), c.heads = like.size(1), c.recent = like.size(2), c.channels = like.size(3);
    check_value(c.channels == 64 || c.channels == 128 || c.channels == 256,
                "recent_keys: expected a head dimension of 64, 128 or 256, got ", c.channels);
    c.key_format = check_format("key_format", key_format, c.channels, keep);
    c.value_format = check_format("value_format", value_format, c.channels, keep);
    check_value(sinks >= 0 && window >= 0, "window: expected sinks and window of at least 0, got ", sinks,
                " and ", window);
    const int64_t ring = c.recent - sinks;
    const int64_t leave = pages_together(c.key_format) * kPageTokens;
    check_value(ring % kPageTokens == 0 && ring >= window + leave, "recent_keys: expected ", sinks,
                " slots for sinks and a multiple of 64 for at least window + ", leave, " = ", window + leave,
                " tokens, got ", c.recent, " slots");
    c.sinks = sinks, c.window = window, c.type = *type;
    check_value(page_table.dim() == 2, "page_table: expected [batch, pages], got shape ",
                shape_of(page_table));
    c.max_pages = page_table.size(1), c.num_pages = key_pages.dim() > 0 ? key_pages.size(0) : 0;
    check_cache_tensor("recent_keys", recent_keys, like, like.scalar_type(),
                       {c.batch, c.heads, c.recent, c.channels});
    check_cache_tensor("recent_values", recent_values, like, like.scalar_type(),
                       {c.batch, c.heads, c.recent, c.channels});
    check_cache_tensor("key_pages", key_pages, like, ScalarType::Byte,
                       {c.num_pages, c.heads, key_page_bytes(c.channels, c.key_format)});
    check_cache_tensor("value_pages", value_pages, like, ScalarType::Byte,
                       {c.num_pages, c.heads, value_page_bytes(c.channels, c.value_format)});
    check_cache_tensor("page_table", page_table, like, ScalarType::Int, {c.batch, c.max_pages});
    check_cache_tensor("lens", lens, like, ScalarType::Long, {c.batch});
    if (means)
      check_cache_tensor("means", *means, like, like.scalar_type(), {2, c.batch, c.heads, c.channels});
    c.means = means ? means->const_data_ptr() : nullptr;
    c.key_pages = const_cast<uint8_t*>(key_pages.const_data_ptr<uint8_t>());
    c.value_pages = const_cast<uint8_t*>(value_pages.const_data_ptr<uint8_t>());
    c.page_table = page_table.const_data_ptr<int32_t>();
    c.recent_keys = const_cast<void*>(recent_keys.const_data_ptr());
    c.recent_values = const_cast<void*>(recent_values.const_data_ptr());
    c.lens = lens.const_data_ptr<int64_t>();
    return c;
  }
};

}  // namespace

void sparse_kv_append(Tensor keys, Tensor values, Tensor key_pages, Tensor value_pages, Tensor page_table,
                      Tensor recent_keys, Tensor recent_values, Tensor lens, OptTensor means,
                      OptTensor counts, int64_t sinks, int64_t window, std::string key_format,
                      std::string value_format, int64_t keep) {
  // check
  const Cache cache{key_pages, value_pages, page_table, recent_keys, recent_values, lens,
                    means,     sinks,       window,     key_format,  value_format,  keep};
  KvAppendArgs args{};
  args.cache = cache.check();
  const KvCacheArgs& c = args.cache;
  check_value(keys.dim() == 4, "keys: expected [batch, heads, count, head_dim], got shape ", shape_of(keys));
  args.count = keys.size(2);
  const Tensor key_rows = packed(keys), value_rows = packed(values);
  const std::vector<int64_t> sizes{c.batch, c.heads, args.count, c.channels};
  check_cache_tensor("keys", key_rows, recent_keys, recent_keys.scalar_type(), sizes);
  check_cache_tensor("values", value_rows, recent_keys, recent_keys.scalar_type(), sizes);
  if (counts) check_cache_tensor("counts", *counts, recent_keys, ScalarType::Long, {c.batch});
  args.keys = key_rows.const_data_ptr(), args.values = value_rows.const_data_ptr();
  args.counts = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  if (key_rows.numel() == 0) return;

  // run
  if (recent_keys.is_cuda()) {
    QG_RUN_ON_GPU(sparse_kv_append, key_rows, args);
  } else {
    torch::stable::parallel_for(0, c.batch * c.heads, 1,
                                [&](int64_t begin, int64_t end) { kv_append_cpu(args, begin, end); });
  }
}

// In one launch where that is possible, else as two ops.
Tensor sparse_kv_append_rotated(Tensor query, Tensor keys, Tensor values, Tensor cos, Tensor sin,
                                Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor recent_keys,
                                Tensor recent_values, Tensor lens, OptTensor means, int64_t sinks,
                                int64_t window, std::string key_format, std::string value_format,
                                int64_t keep) {
  // check
  constexpr int64_t kMostTokens = 16;
  const Rotation rotation = check_rotation(query, keys, cos, sin);
  const Cache cache{key_pages, value_pages, page_table, recent_keys, recent_values, lens,
                    means,     sinks,       window,     key_format,  value_format,  keep};
  KvAppendRotatedArgs args{};
  args.append.cache = cache.check(), args.rotary = rotation.args;
  const KvCacheArgs& c = args.append.cache;
  const RotaryArgs& r = args.rotary;
  const auto in_vectors = [](const RotatedHeads& heads) {
    const int64_t odd = heads.strides[0] | heads.strides[1] | heads.strides[2];
    return odd % 8 == 0 && reinterpret_cast<uintptr_t>(heads.x) % 16 == 0;
  };
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  // No page takes a token that comes now: keys are rotated on their way to the ring alone.
  const bool in_one = query.is_cuda() && device_of(query) == device_of(recent_keys) && r.type == c.type &&
                      r.batch == c.batch && r.sides[1].heads == c.heads && r.sides[0].heads % c.heads == 0 &&
                      r.channels == c.channels && r.tokens <= window && r.tokens <= kMostTokens &&
                      keys.numel() > 0 && query.numel() > 0 && !means &&
                      c.key_format.kind == c.value_format.kind && in_vectors(r.sides[0]) &&
                      in_vectors(r.sides[1]) && aligned(r.cos) && aligned(r.sin);
  const bool values_fit = values.dim() == 4 && values.scalar_type() == keys.scalar_type() &&
                          device_of(values) == device_of(keys) && values.size(0) == c.batch &&
                          values.size(1) == c.heads && values.size(2) == r.tokens &&
                          values.size(3) == c.channels && values.stride(3) == 1;
  if (values_fit) args.values = heads_of(values);
  if (!in_one || !values_fit || !in_vectors(args.values)) {
    auto [rotated, rotated_keys] = rotary(query, keys, cos, sin);
    sparse_kv_append(rotated_keys, values, key_pages, value_pages, page_table, recent_keys, recent_values,
                     lens, means, {}, sinks, window, key_format, value_format, keep);
    return rotated;
  }

  // arguments and output
  Tensor rotated = new_output("sparse_kv_append_rotated", query,
                              {r.batch, r.sides[0].heads, r.tokens, r.channels}, query.scalar_type());
  args.append.count = r.tokens;
  args.rotary.sides[0].out = rotated.mutable_data_ptr();

  // run
  QG_RUN_ON_GPU(sparse_kv_append_rotated, query, args);
  return rotated;
}

std::tuple<Tensor, Tensor> sparse_kv_attention(Tensor query, Tensor key_pages, Tensor value_pages,
                                               Tensor page_table, Tensor recent_keys, Tensor recent_values,
                                               Tensor lens, OptTensor means, int64_t sinks, int64_t window,
                                               std::string key_format, std::string value_format, int64_t keep,
                                               double scale) {
  // check
  const Cache cache{key_pages, value_pages, page_table, recent_keys, recent_values, lens,
                    means,     sinks,       window,     key_format,  value_format,  keep};
  KvAttentionArgs args{};
  args.cache = cache.check();
  const KvCacheArgs& c = args.cache;
  check_value(
      query.dim() == 3 || query.dim() == 4,
      "query: expected [batch, query heads, head_dim] or [batch, query heads, tokens, head_dim], got ",
      "shape ", shape_of(query));
  const int64_t heads = query.size(1), groups = c.heads == 0 ? 0 : heads / c.heads;
  check_value(c.heads > 0 && heads % c.heads == 0 && groups >= 1 && groups <= 16,
              "query: expected 1 to 16 query heads for each of ", c.heads, " key-value heads, got ", heads);
  // So that nothing is packed that one of them must not see, and each sees one of the latest 16.
  const int64_t seen = window + (sinks > 0), most = seen < 1 ? 1 : (seen < 16 ? seen : 16);
  args.tokens = query.dim() == 4 ? query.size(2) : 1;
  check_value(args.tokens >= 1 && args.tokens <= most, "query: expected 1 to ", most,
              " tokens, no more than 16 and the window (one more with sinks), got ", args.tokens);
  args.groups = groups * args.tokens;
  const Tensor rows = packed(query);
  std::vector<int64_t> sizes{c.batch, heads}, lse_sizes{c.batch, heads};
  if (query.dim() == 4) sizes.push_back(args.tokens), lse_sizes.push_back(args.tokens);
  sizes.push_back(c.channels);
  check_cache_tensor("query", rows, recent_keys, recent_keys.scalar_type(), sizes);

  // arguments and output
  Tensor out = new_output("sparse_kv_attention", rows, sizes, rows.scalar_type());
  Tensor lse = new_output("sparse_kv_attention", rows, lse_sizes, ScalarType::Float);
  args.query = rows.const_data_ptr(), args.out = out.mutable_data_ptr();
  args.lse = lse.mutable_data_ptr<float>();
  args.scale = static_cast<float>(scale), args.split = 1;
  if (out.numel() == 0) return {out, lse};

  // run
  if (rows.is_cuda()) {
    OptTensor partial;
#ifdef QG_WITH_CUDA
    {
      const torch::stable::accelerator::DeviceGuard guard(rows.get_device());
      args.split = sparse_kv_attention_split(args);
    }
    partial = new_output("sparse_kv_attention", rows,
                         {args.split, c.batch, heads * args.tokens, c.channels + 2}, ScalarType::Float);
    args.partial = partial->mutable_data_ptr<float>();
#endif
    QG_RUN_ON_GPU(sparse_kv_attention, rows, args);
  } else {
    torch::stable::parallel_for(0, c.batch * c.heads, 1,
                                [&](int64_t begin, int64_t end) { kv_attention_cpu(args, begin, end); });
  }
  return {out, lse};
}

}  // namespace quantgemm
