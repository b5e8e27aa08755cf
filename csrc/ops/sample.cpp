// SPDX-License-Identifier: MIT
// sample(logits [B, vocab], …) -> tokens [B], logprobs [B], status [B]: verification without drafts.
// draft_sample(logits [B, vocab], …) -> tokens, lse, cutoff [B], probs [B, vocab] or [B, 0], status:
// the same with the drafts' own noise, and with what spec_verify needs to know about q.
#include "launch_scope.h"
#include "sampling_checks.h"

namespace quantgemm {
namespace {

struct Sampler {
  const char* op;
  const Tensor& logits;
  SamplingChecks checks{logits};
  VerifyArgs args{};
  Tensor tokens{}, status{};

  Sampler(const char* name, const Tensor& rows) : op(name), logits(rows) {
    args.value_type = check_rows("logits", logits, 2, "[num_sequences, vocab]");
    args.num_sequences = args.num_rows = logits.size(0);
    args.vocab = args.draft_vocab = logits.size(1);
    args.target = logits.const_data_ptr();
    args.target_stride = logits.stride(0);
    args.target_is_logits = true;
    tokens = output({args.num_sequences}, ScalarType::Long);
    status = output({args.num_sequences}, ScalarType::Int);
    args.tokens = tokens.mutable_data_ptr<int64_t>();
    args.status = status.mutable_data_ptr<int32_t>();
  }

  Tensor output(const std::vector<int64_t>& sizes, ScalarType type) {
    return new_output(op, logits, sizes, type);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample(Tensor logits, OptTensor temperature, OptTensor top_k,
                                          OptTensor top_p, OptTensor min_p, OptTensor seed,
                                          OptTensor position, OptTensor uniforms) {
  Sampler s("sample", logits);
  s.checks.parameters(s.args, temperature, top_k, top_p, min_p);
  s.checks.noise(s.args, seed, position, uniforms);
  Tensor logprobs = s.output({s.args.num_sequences}, ScalarType::Float);
  s.args.logprobs = logprobs.mutable_data_ptr<float>();
  s.args.token_domain = kTokenDomain;
  run_verify("sample", s.args, logits);
  return {s.tokens, logprobs, s.status};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> draft_sample(Tensor logits, OptTensor temperature,
                                                                OptTensor top_k, OptTensor top_p,
                                                                OptTensor min_p, OptTensor seed,
                                                                OptTensor position, OptTensor uniforms,
                                                                bool return_probs, int64_t turn) {
  check_value(turn >= 0 && turn < kMaxJointDrafts, "turn: expected 0 to ", kMaxJointDrafts - 1, ", got ",
              turn);
  Sampler s("draft_sample", logits);
  s.checks.parameters(s.args, temperature, top_k, top_p, min_p);
  s.checks.noise(s.args, seed, position, uniforms);
  const int64_t rows = s.args.num_sequences;
  Tensor lse = s.output({rows}, ScalarType::Float), cutoff = s.output({rows}, ScalarType::Float);
  Tensor probs = s.output({rows, return_probs ? s.args.vocab : 0}, ScalarType::Float);
  s.args.lse = lse.mutable_data_ptr<float>();
  s.args.cutoff = cutoff.mutable_data_ptr<float>();
  s.args.probs = return_probs ? probs.mutable_data_ptr<float>() : nullptr;
  s.args.token_domain = kDraftDomain;
  s.args.turn = static_cast<uint32_t>(turn);
  run_verify("draft_sample", s.args, logits);
  return {s.tokens, lse, cutoff, probs, s.status};
}

}  // namespace quantgemm
