// SPDX-License-Identifier: MIT
// rms_norm(x [..., cols], weight [cols], eps) -> like x
// rotary(q, k [batch, heads, tokens, channels], cos, sin [batch or 1, tokens, channels]) -> like q, k
#include <limits>

#include "../cpu/cpu.h"
#include "launch_scope.h"
#include "rotation.h"

namespace quantgemm {
namespace {

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

void check_like(const char* name, const Tensor& t, const char* other, const Tensor& like) {
  check_type(t.scalar_type() == like.scalar_type(), name, ": expected ", dtype_name(like.scalar_type()),
             " as ", other, ", got ", dtype_name(t.scalar_type()));
  check_value(t.is_cuda() == like.is_cuda() && t.get_device() == like.get_device(), name, ": expected on ",
              device_of(like), " as ", other, ", got ", device_of(t));
}

// A view of [batch, heads, tokens, channels] whose channels lie side by side, copied where they do not.
Tensor with_channels_together(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  // check
  check_device("x", x);
  const Real type = check_real("x", x.scalar_type());
  check_like("weight", weight, "x", x);
  check_value(x.dim() >= 1, "x: expected at least one dimension [..., cols], got a scalar");
  const int64_t cols = x.size(x.dim() - 1);
  check_value(weight.dim() == 1 && weight.size(0) == cols, "weight: expected shape [", cols, "], got ",
              shape_of(weight));

  // arguments and output
  const Tensor values = packed(x), scales = packed(weight);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  Tensor out = new_output("rms_norm", values, sizes, x.scalar_type());
  const RmsNormArgs args{values.const_data_ptr(),
                         scales.const_data_ptr(),
                         out.mutable_data_ptr(),
                         cols == 0 ? 0 : x.numel() / cols,
                         cols,
                         static_cast<float>(eps),
                         type};

  // run
  if (out.numel() == 0) return out;
  check_value(args.rows <= kMaxBlocks, "x: expected at most 2^31 - 1 rows, got ", args.rows);
  if (values.is_cuda()) {
    QG_RUN_ON_GPU(rms_norm, values, args);
  } else {
    torch::stable::parallel_for(0, args.rows, 16384 / cols + 1,
                                [&](int64_t begin, int64_t end) { rms_norm_cpu(args, begin, end); });
  }
  return out;
}

Rotation check_rotation(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_device("q", q);
  const Real type = check_real("q", q.scalar_type());
  check_like("k", k, "q", q);
  check_like("cos", cos, "q", q);
  check_like("sin", sin, "q", q);
  check_value(q.dim() == 4, "q: expected [batch, heads, tokens, channels], got ", shape_of(q));
  const int64_t batch = q.size(0), tokens = q.size(2), channels = q.size(3);
  check_value(channels % 2 == 0, "q: expected an even number of channels, got ", channels);
  check_value(k.dim() == 4 && k.size(0) == batch && k.size(2) == tokens && k.size(3) == channels,
              "k: expected [", batch, ", heads, ", tokens, ", ", channels, "], got ", shape_of(k));
  for (const auto& [name, angles] : {std::pair("cos", &cos), std::pair("sin", &sin)})
    check_value(angles->dim() == 3 && (angles->size(0) == batch || angles->size(0) == 1) &&
                    angles->size(0) == cos.size(0) && angles->size(1) == tokens &&
                    angles->size(2) == channels,
                name, ": expected [", batch, " or 1, ", tokens, ", ", channels, "], got ", shape_of(*angles));

  Rotation made{with_channels_together(q),
                with_channels_together(k),
                torch::stable::contiguous(cos),
                torch::stable::contiguous(sin),
                {}};
  made.args = {{heads_of(made.queries), heads_of(made.keys)},
               made.cosines.const_data_ptr(),
               made.sines.const_data_ptr(),
               batch,
               tokens,
               channels,
               cos.size(0) == 1 ? 0 : tokens * channels,
               type};
  return made;
}

std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) {
  // check
  const Rotation rotation = check_rotation(q, k, cos, sin);

  // arguments and output
  RotaryArgs args = rotation.args;
  const auto [batch, tokens, channels] = std::tuple(args.batch, args.tokens, args.channels);
  Tensor q_out = new_output("rotary", q, {batch, q.size(1), tokens, channels}, q.scalar_type());
  Tensor k_out = new_output("rotary", k, {batch, k.size(1), tokens, channels}, k.scalar_type());
  args.sides[0].out = q_out.mutable_data_ptr(), args.sides[1].out = k_out.mutable_data_ptr();

  // run
  if (q_out.numel() + k_out.numel() == 0) return {q_out, k_out};
  check_value((q_out.numel() + k_out.numel()) / 512 < kMaxBlocks, "q: expected fewer values, got shape ",
              shape_of(q));
  if (q.is_cuda()) {
    QG_RUN_ON_GPU(rotary, rotation.queries, args);
  } else {
    const int64_t grain = 16384 / ((q.size(1) + k.size(1)) * channels) + 1;
    torch::stable::parallel_for(0, args.batch * args.tokens, grain,
                                [&](int64_t begin, int64_t end) { rotary_cpu(args, begin, end); });
  }
  return {q_out, k_out};
}

}  // namespace quantgemm
