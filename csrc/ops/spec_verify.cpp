// SPDX-License-Identifier: MIT
// spec_verify(target [rows, vocab], draft_tokens [B, K], cu_rows [B+1], …)
//   -> tokens [B, K+1], count [B], logprobs [B, K+1], status [B], nodes [B, K] of a tree, else [B, 0]
#include "../cpu/cpu.h"
#include "launch_scope.h"
#include "sampling_checks.h"

namespace quantgemm {

void run_verify(const char* op, VerifyArgs& args, const Tensor& rows) {
  check_value(args.num_sequences <= 0x0fffffff && args.max_drafts < 0x7fff, op,
              ": expected fewer than 2^28 sequences and 32767 drafts, got ", args.num_sequences, " and ",
              args.max_drafts);
  if (!rows.is_cuda()) {
    torch::stable::parallel_for(0, args.num_sequences, 1,
                                [&](int64_t begin, int64_t end) { spec_verify_cpu(args, begin, end); });
    return;
  }
#ifdef QG_WITH_CUDA
  const Tensor scratch = new_output(op, rows, {verify_scratch_bytes(args)}, ScalarType::Byte);
  args.row_laws = scratch.mutable_data_ptr();
#endif
  QG_RUN_ON_GPU(spec_verify, rows, args);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spec_verify(
    Tensor target, Tensor draft_tokens, Tensor cu_rows, OptTensor draft, bool target_probs, bool draft_probs,
    OptTensor draft_lse, OptTensor draft_cutoff, OptTensor target_to_draft, OptTensor temperature,
    OptTensor top_k, OptTensor top_p, OptTensor min_p, OptTensor seed, OptTensor position, OptTensor uniforms,
    OptTensor parents, bool block) {
  // check
  VerifyArgs args{};
  args.value_type = check_rows("target", target, 2, "[rows, vocab]");
  SamplingChecks checks(target);
  check_value(draft_tokens.dim() == 2, "draft_tokens: expected shape [num_sequences, max_drafts], got ",
              shape_of(draft_tokens));
  const int64_t sequences = args.num_sequences = draft_tokens.size(0);
  const int64_t drafts = args.max_drafts = draft_tokens.size(1);
  const char* per_draft = "[num_sequences, max_drafts]";
  const Tensor ids =
      checks.tensor("draft_tokens", draft_tokens, ScalarType::Long, {sequences, drafts}, per_draft);
  const Tensor starts =
      checks.tensor("cu_rows", cu_rows, ScalarType::Long, {sequences + 1}, "[num_sequences + 1]");
  args.drafts = ids.const_data_ptr<int64_t>();
  args.cu_rows = starts.const_data_ptr<int64_t>();
  args.target = target.const_data_ptr();
  args.num_rows = target.size(0), args.vocab = args.draft_vocab = target.size(1);
  args.target_stride = target.stride(0);
  args.target_is_logits = !target_probs;
  if (draft.has_value()) {
    check_rows("draft", *draft, 3, "[num_sequences, max_drafts, draft_vocab]");
    checks.device("draft", *draft);
    check_type(draft->scalar_type() == target.scalar_type(), "draft: expected the dtype of target, ",
               dtype_name(target.scalar_type()), ", got ", dtype_name(draft->scalar_type()));
    check_value(draft->size(0) == sequences && draft->size(1) == drafts, "draft: expected shape [", sequences,
                ", ", drafts, ", draft_vocab], got ", shape_of(*draft));
    args.draft = draft->const_data_ptr();
    args.draft_vocab = draft->size(2);
    args.draft_strides[0] = draft->stride(0), args.draft_strides[1] = draft->stride(1);
    args.draft_is_logits = !draft_probs;
  }
  check_value(!draft_lse.has_value() || args.draft_is_logits,
              "draft_lse: expected with logits in draft only");
  check_value(!draft_cutoff.has_value() || draft_lse.has_value(),
              "draft_cutoff: expected with draft_lse only");
  check_value(!target_to_draft.has_value() || draft.has_value(), "target_to_draft: expected with draft only");
  for (const auto& [name, t] : {std::pair{"top_k", &top_k}, {"top_p", &top_p}, {"min_p", &min_p}})
    check_value(!t->has_value() || !target_probs, name,
                ": expected with logits in target only; probabilities are taken as they are");
  args.draft_lse =
      checks.pointer<float>("draft_lse", draft_lse, ScalarType::Float, {sequences, drafts}, per_draft);
  args.draft_cutoff =
      checks.pointer<float>("draft_cutoff", draft_cutoff, ScalarType::Float, {sequences, drafts}, per_draft);
  args.target_to_draft =
      checks.pointer<int64_t>("target_to_draft", target_to_draft, ScalarType::Long, {args.vocab}, "[vocab]");
  check_value(!block || !parents.has_value(), "block: expected without parents");
  args.mode = block ? VerifyMode::kBlock : parents.has_value() ? VerifyMode::kTree : VerifyMode::kChain;
  check_value(args.mode == VerifyMode::kChain || drafts <= kMaxJointDrafts, "draft_tokens: expected at most ",
              kMaxJointDrafts, " drafts of a tree or a block, got ", drafts);
  args.parents =
      checks.pointer<int64_t>("parents", parents, ScalarType::Long, {sequences, drafts}, per_draft);
  checks.parameters(args, temperature, top_k, top_p, min_p);
  checks.noise(args, seed, position, uniforms);

  // outputs
  const auto output = [&](const std::vector<int64_t>& sizes, ScalarType type) {
    return new_output("spec_verify", target, sizes, type);
  };
  Tensor tokens = output({sequences, drafts + 1}, ScalarType::Long);
  Tensor count = output({sequences}, ScalarType::Long);
  Tensor logprobs = output({sequences, drafts + 1}, ScalarType::Float);
  Tensor status = output({sequences}, ScalarType::Int);
  args.tokens = tokens.mutable_data_ptr<int64_t>();
  args.counts = count.mutable_data_ptr<int64_t>();
  args.logprobs = logprobs.mutable_data_ptr<float>();
  args.status = status.mutable_data_ptr<int32_t>();
  Tensor nodes = output({sequences, parents.has_value() ? drafts : 0}, ScalarType::Long);
  args.nodes = parents.has_value() ? nodes.mutable_data_ptr<int64_t>() : nullptr;
  args.token_domain = kTokenDomain;

  run_verify("spec_verify", args, target);
  return {tokens, count, logprobs, status, nodes};
}

}  // namespace quantgemm
