// SPDX-License-Identifier: MIT
// sparse_kv_compress(x [heads, tokens, channels], bits, keep, value) -> the container of kv.h
// sparse_key_spmm(query [heads·groups, n, channels], container) -> [heads·groups, n, tokens]
// sparse_value_spmm(scores [heads·groups, n, tokens], container) -> [heads·groups, n, channels]
#include "../cpu/cpu.h"
#include "../kv.h"
#include "launch_scope.h"
#include "ops.h"

namespace quantgemm {
namespace {

void check_kv_bits(int64_t bits) {
  check_value(bits == 2 || bits == 4 || bits == kRawBits,
              "bits: expected 2, 4 or 16 (values as they are), got ", bits);
}

void check_head_dim(const char* name, int64_t channels) {
  check_value(channels == 64 || channels == 128 || channels == 256, name,
              ": expected a head dimension of 64, 128 or 256, got ", channels);
}

Real check_real16(const char* name, const Tensor& t) {
  const auto type = real_of(t.scalar_type());
  check_type(type.has_value() && *type != Real::kFloat32, name,
             ": expected torch.float16 or torch.bfloat16, got ", dtype_name(t.scalar_type()));
  return *type;
}

int64_t blocks_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }

// One tensor of the container: an entry for every tile.
Tensor check_tiles(const char* name, const Tensor& t, const Tensor& x, ScalarType type, int64_t heads,
                   int64_t tiles) {
  check_type(t.scalar_type() == type, name, ": expected ", dtype_name(type), ", got ",
             dtype_name(t.scalar_type()));
  check_value(t.dim() == 2 && t.size(0) == heads && t.size(1) == tiles, name, ": expected shape [", heads,
              ", ", tiles, "] (heads, blocks of 64 tokens x head dimension), got ", shape_of(t));
  check_value(device_of(t) == device_of(x), name, ": expected a tensor on ", device_of(x), ", got ",
              device_of(t));
  return packed(t);
}

struct Product {
  const char* op;
  const char* name;  // of x
  Tensor x, bitmaps, tile_offsets, packed_codes;
  OptTensor scales, zeros;
  int64_t tokens, channels, groups, bits;
  bool is_value;

  Tensor run() {
    // check
    check_device(name, x);
    const Real type = check_real16(name, x);
    check_kv_bits(bits);
    check_value(groups >= 1, "groups: expected query heads per key-value head, at least 1, got ", groups);
    const int64_t n = x.size(1), heads = x.size(0) / groups;
    check_value(x.size(0) % groups == 0, name, ": first dimension ", x.size(0),
                " (batch x query heads) is not a multiple of groups = ", groups);
    check_value(n <= 8, name, ": expected at most 8 rows per query head, got ", n, " in shape ", shape_of(x));
    check_value(tokens < int64_t{1} << 31, "tokens: expected fewer than 2^31, got ", tokens);
    const int64_t tiles = blocks_of(tokens) * channels;
    const Tensor bitmap_rows = check_tiles("bitmaps", bitmaps, x, ScalarType::Long, heads, tiles);
    const Tensor offset_rows = check_tiles("tile_offsets", tile_offsets, x, ScalarType::Int, heads, tiles);
    check_type(packed_codes.scalar_type() == ScalarType::Int, "packed: expected torch.int32, got ",
               dtype_name(packed_codes.scalar_type()));
    check_value(packed_codes.dim() == 1, "packed: expected one dimension [words], got shape ",
                shape_of(packed_codes));
    check_value(device_of(packed_codes) == device_of(x), "packed: expected a tensor on ", device_of(x),
                ", got ", device_of(packed_codes));
    const Tensor words = packed(packed_codes);
    OptTensor scale_rows, zero_rows;
    for (auto [what, t, rows] : {std::tuple{"scales", &scales, &scale_rows}, {"zeros", &zeros, &zero_rows}}) {
      check_value(t->has_value() == (bits != kRawBits), what, ": expected ",
                  bits == kRawBits ? "None for values that are not quantised" : "a tensor", " (bits = ", bits,
                  "), got ", t->has_value() ? "a tensor" : "None");
      if (t->has_value()) *rows = check_tiles(what, **t, x, x.scalar_type(), heads, tiles);
    }

    // arguments and output
    const Tensor rows = packed(x);
    Tensor y = new_output(op, rows, {x.size(0), n, is_value ? channels : tokens}, x.scalar_type());
    if (y.numel() == 0) return y;
    KvProductArgs args{};
    args.x = rows.const_data_ptr();
    args.bitmaps = reinterpret_cast<const uint64_t*>(bitmap_rows.const_data_ptr<int64_t>());
    args.offsets = offset_rows.const_data_ptr<int32_t>();
    args.packed = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
    args.scales = scale_rows ? scale_rows->const_data_ptr() : nullptr;
    args.zeros = zero_rows ? zero_rows->const_data_ptr() : nullptr;
    args.y = y.mutable_data_ptr();
    args.heads = heads, args.columns = groups * n;
    args.m = is_value ? channels : tokens, args.k = is_value ? tokens : channels;
    args.num_words = words.numel(), args.channels = channels, args.blocks = blocks_of(tokens);
    args.split = 1, args.bits = static_cast<int>(bits), args.is_value = is_value, args.type = type;

    // run
    if (rows.is_cuda()) {
      run_on_gpu_split(rows, args);
    } else {
      torch::stable::parallel_for(0, heads * blocks_of(args.m), 1,
                                  [&](int64_t begin, int64_t end) { kv_product_cpu(args, begin, end); });
    }
    return y;
  }

  void run_on_gpu_split([[maybe_unused]] const Tensor& rows, [[maybe_unused]] KvProductArgs& args) const {
    OptTensor partial;
#ifdef QG_WITH_CUDA
    {
      const torch::stable::accelerator::DeviceGuard guard(rows.get_device());
      args.split = sparse_kv_product_split(args);
    }
    if (args.split > 1) {
      partial = new_output(op, rows, {args.split, args.heads, args.columns, args.m}, ScalarType::Float);
      args.partial = partial->mutable_data_ptr<float>();
    }
#endif
    QG_RUN_ON_GPU(sparse_kv_product, rows, args);
  }
};

void check_rows(const char* name, const Tensor& x, const char* last) {
  check_value(x.dim() == 3, name, ": expected three dimensions [batch x query heads, rows, ", last,
              "], got shape ", shape_of(x));
}

}  // namespace

Tensor sparse_key_spmm(Tensor query, Tensor bitmaps, Tensor tile_offsets, Tensor packed_codes,
                       OptTensor scales, OptTensor zeros, int64_t num_tokens, int64_t groups, int64_t bits) {
  check_rows("query", query, "head_dim");
  check_head_dim("query", query.size(2));
  check_value(num_tokens >= 0, "num_tokens: expected at least 0, got ", num_tokens);
  return Product{"sparse_key_spmm", "query",       query,  bitmaps, tile_offsets, packed_codes, scales, zeros,
                 num_tokens,        query.size(2), groups, bits,    false}
      .run();
}

Tensor sparse_value_spmm(Tensor scores, Tensor bitmaps, Tensor tile_offsets, Tensor packed_codes,
                         OptTensor scales, OptTensor zeros, int64_t head_dim, int64_t groups, int64_t bits) {
  check_rows("scores", scores, "tokens");
  check_head_dim("head_dim", head_dim);
  return Product{"sparse_value_spmm", "scores", scores, bitmaps, tile_offsets, packed_codes, scales, zeros,
                 scores.size(2),      head_dim, groups, bits,    true}
      .run();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sparse_kv_compress(Tensor x, int64_t bits,
                                                                              int64_t keep, bool value) {
  // check
  check_device("x", x);
  const Real type = check_real16("x", x);
  check_kv_bits(bits);
  check_value(x.dim() == 3, "x: expected three dimensions [batch x heads, tokens, head_dim], got shape ",
              shape_of(x));
  const int64_t heads = x.size(0), tokens = x.size(1), channels = x.size(2);
  check_head_dim("x", channels);
  check_value(keep >= 0 && keep <= channels, "keep: expected 0 to ", channels, " values of each token, got ",
              keep);
  // Every tile may end with a word that holds one code only.
  const int64_t tiles = blocks_of(tokens) * channels, capacity = 32 / bits;
  const int64_t room = heads * (tokens * keep / capacity + (keep == 0 ? 0 : tiles));
  check_value(room < int64_t{1} << 31, "x: offsets are 32 bits wide, and shape ", shape_of(x), " may need ",
              room, " words; compress parts of the heads");

  // arguments and output
  const Tensor rows = packed(x);
  const auto output = [&](const std::vector<int64_t>& sizes, ScalarType dtype) {
    return new_output("sparse_kv_compress", rows, sizes, dtype);
  };
  const int64_t fits = bits == kRawBits ? 0 : tiles;
  Tensor bitmaps = output({heads, tiles}, ScalarType::Long),
         offsets = output({heads, tiles}, ScalarType::Int);
  Tensor codes = output({room}, ScalarType::Int), num_words = output({1}, ScalarType::Long);
  Tensor scales = output({heads, fits}, x.scalar_type()), zeros = output({heads, fits}, x.scalar_type());
  KvCompressArgs args{};
  args.x = rows.const_data_ptr();
  args.bitmaps = reinterpret_cast<uint64_t*>(bitmaps.mutable_data_ptr<int64_t>());
  args.offsets = offsets.mutable_data_ptr<int32_t>();
  args.packed = reinterpret_cast<uint32_t*>(codes.mutable_data_ptr<int32_t>());
  args.scales = bits == kRawBits ? nullptr : scales.mutable_data_ptr();
  args.zeros = bits == kRawBits ? nullptr : zeros.mutable_data_ptr();
  args.num_words = num_words.mutable_data_ptr<int64_t>();
  args.heads = heads, args.tokens = tokens, args.channels = channels, args.room = room;
  args.keep = keep;
  args.bits = static_cast<int>(bits), args.is_value = value, args.type = type;

  // run
  if (rows.is_cuda()) {
#ifdef QG_WITH_CUDA
    Tensor scratch = output({sparse_kv_compress_scratch_bytes(args)}, ScalarType::Byte);
    args.scratch = scratch.mutable_data_ptr<uint8_t>();
#endif
    QG_RUN_ON_GPU(sparse_kv_compress, rows, args);
  } else {
    const int64_t blocks = heads * blocks_of(tokens);
    const auto in_parallel = [&](auto step) {
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) { step(args, begin, end); });
    };
    in_parallel(kv_fit_cpu);
    kv_offsets_cpu(args);
    in_parallel(kv_pack_cpu);
  }
  return {bitmaps, offsets, codes, scales, zeros, num_words};
}

}  // namespace quantgemm
