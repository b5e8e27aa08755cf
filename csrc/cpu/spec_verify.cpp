// SPDX-License-Identifier: MIT
// Verification on the CPU, one sequence at a time, in the order a reader would do it: judge position
// after position, draw from the row that stops. The arithmetic is csrc/sampling.h.
#include <algorithm>
#include <vector>

#include "../sampling.h"
#include "cpu.h"
#include "vectorized.h"

namespace quantgemm {
namespace {

template <class T>
struct Row {
  const T* data;
  int64_t length;
  float at(int64_t i) const { return load_real(data + i); }
};

// The lowest value that top-k, top-p and min-p keep, and through `kept` the mass that stays.
// x [vocab] clean logits, weights [vocab] in fixed point
float find_cutoff(const std::vector<float>& x, float max, double total, const Parameters& s, double& kept) {
  const auto weight = [&](float v) { return to_fixed(relative_weight(v, max, s.slope)); };
  std::vector<float> order;
  for (const float v : x)
    if (v != minus_infinity()) order.push_back(v);
  float cutoff = minus_infinity();
  if (s.top_k > 0 && s.top_k <= static_cast<int64_t>(order.size())) {
    std::nth_element(order.begin(), order.begin() + (s.top_k - 1), order.end(), std::greater<float>());
    cutoff = order[static_cast<size_t>(s.top_k - 1)];
    std::erase_if(order, [&](float v) { return v < cutoff; });
  }
  if (s.top_p < 1.0f) {
    uint64_t mass = static_cast<uint64_t>(total * 0x1p44);
    if (cutoff != minus_infinity()) {
      mass = 0;
      for (const float v : order) mass += weight(v);
    }
    std::sort(order.begin(), order.end(), std::greater<float>());
    const uint64_t goal = mass_to_keep(s.top_p, mass);
    uint64_t sum = 0;
    for (size_t i = 0; i < order.size() && sum < goal; ++i) sum += weight(cutoff = order[i]);
  }
  if (s.min_p > 0.0f) cutoff = std::max(cutoff, std::min(max, min_p_cutoff(max, s)));
  if (cutoff == minus_infinity()) return cutoff;
  uint64_t sum = 0;
  for (const float v : order)
    if (v >= cutoff) sum += weight(v);
  kept = static_cast<double>(sum) * 0x1p-44;
  return cutoff;
}

template <class T>
RowLaw law_of(const Row<T>& row, const Parameters& s) {
  std::vector<float> x(static_cast<size_t>(row.length));
  float max = minus_infinity();
  for (int64_t i = 0; i < row.length; ++i) {
    x[static_cast<size_t>(i)] = clean_logit(row.at(i));
    max = std::max(max, x[static_cast<size_t>(i)]);
  }
  if (max == minus_infinity()) return {0.0f, s.slope, 0.0f, max};
  double total = 0;
  for (const float v : x) total += relative_weight(v, max, s.slope);
  float cutoff = minus_infinity();
  if (s.truncates()) cutoff = find_cutoff(x, max, total, s, total);
  return {max, s.slope, static_cast<float>(1.0 / total), cutoff};
}

template <class T>
class Sequence {
 public:
  Sequence(const VerifyArgs& args, int64_t index) : a(args), b(index) {
    s = parameters_of(a.parameters, b, a.vocab, status);
    draft_s = parameters_of(a.parameters, b, a.draft_vocab, status);
    rows = rows_of(a, b, status);
  }

  void run() {
    const int64_t columns = a.max_drafts + 1;
    std::fill_n(a.tokens + b * columns, columns, -1);
    if (a.logprobs) std::fill_n(a.logprobs + b * columns, columns, 0.0f);
    int64_t count = 0;
    while (rows.drafts >= 0) {
      float logprob = 0;
      const int64_t token = s.greedy ? judge_greedy(count) : judge_sampled(count, logprob);
      a.tokens[b * columns + count] = token;
      if (a.logprobs) a.logprobs[b * columns + count] = logprob;
      ++count;
      if (ended) break;
    }
    if (a.counts) a.counts[b] = count;
    a.status[b] = static_cast<int32_t>(status);
    if (rows.drafts < 0) return;
    const Row<T> row = target(count - 1);
    const int64_t last = a.tokens[b * columns + count - 1];
    if (a.probs)
      for (int64_t i = 0; i < a.vocab; ++i)
        a.probs[b * a.vocab + i] = s.greedy ? static_cast<float>(i == last) : probability(row.at(i), law);
    if (a.cutoff) a.cutoff[b] = law.cutoff;
    if (a.lse) {
      const float lse = law.scale > 0 ? law.max / s.temperature - std::log(law.scale) : minus_infinity();
      a.lse[b] = s.greedy ? law.max : lse;
    }
  }

 private:
  Row<T> target(int64_t k) const {
    return {static_cast<const T*>(a.target) + (rows.first + k) * a.target_stride, a.vocab};
  }
  Row<T> draft(int64_t k) const {
    return {static_cast<const T*>(a.draft) + b * a.draft_strides[0] + k * a.draft_strides[1], a.draft_vocab};
  }
  int64_t draft_token(int64_t k) const { return k < rows.drafts ? a.drafts[b * a.max_drafts + k] : -1; }

  float read(const Row<T>& row, int64_t i, const RowLaw& how, bool is_logits) {
    const float x = row.at(i);
    if (is_bad_value(x, is_logits)) status |= kBadValue;
    return probability(x, how);
  }

  int64_t argmax(const Row<T>& row) {
    int64_t best = 0;
    for (int64_t i = 0; i < row.length; ++i) {
      if (is_bad_value(row.at(i), a.target_is_logits)) status |= kBadValue;
      if (clean(row.at(i)) > clean(row.at(best))) best = i;
    }
    return best;
  }
  float clean(float x) const { return a.target_is_logits ? clean_logit(x) : clean_probability(x); }

  int64_t judge_greedy(int64_t k) {
    const Row<T> row = target(k);
    const int64_t best = argmax(row), token = draft_token(k);
    ended = k == rows.drafts || token != best;
    if (!ended) return best;
    if (token < -1 || token >= a.vocab) status |= kBadToken;
    const float top = clean(row.at(best));
    if (top == (a.target_is_logits ? minus_infinity() : 0.0f)) status |= kNoMass;
    law = {top, 0.0f, 1.0f, top};
    return best;
  }

  int64_t judge_sampled(int64_t k, float& logprob) {
    const Row<T> p = target(k);
    const int64_t token = draft_token(k);
    const bool has_draft = token >= 0 && token < a.vocab;
    if (!has_draft && token != -1) status |= kBadToken;
    law = a.target_is_logits ? law_of(p, s) : stored_law();
    if (has_draft) {
      one_hot = a.draft == nullptr ? token : -1;
      if (a.draft != nullptr) open_draft(k);
      const float p_token = read(p, token, law, a.target_is_logits);
      const int64_t j = draft_index(token);
      if (a.draft != nullptr && j >= 0) read(draft_row, j, draft_law, a.draft_is_logits);
      logprob = std::log(p_token);
      if (accepts(noise_at(a, b, k, kAcceptDomain, status), p_token, q_at(token))) return token;
    }
    ended = true;
    logprob = 0;
    const uint64_t fraction = noise_at(a, b, k, a.token_domain, status);
    int64_t drawn = draw_from(p, has_draft, fraction);
    if (drawn < 0 && has_draft) {
      status |= kEmptyResidual;
      drawn = draw_from(p, false, fraction);
    }
    if (drawn < 0) {
      status |= kNoMass;
      return argmax(p);
    }
    logprob = std::log(probability(p.at(drawn), law));
    return drawn;
  }

  void open_draft(int64_t k) {
    draft_row = draft(k);
    draft_law = stored_law();
    if (!a.draft_is_logits) return;
    const int64_t at = b * a.max_drafts + k;
    const float cutoff = a.draft_cutoff ? a.draft_cutoff[at] : minus_infinity();
    draft_law = a.draft_lse ? law_from_lse(a.draft_lse[at], cutoff, draft_s) : law_of(draft_row, draft_s);
  }

  int64_t draft_index(int64_t i) const {
    const int64_t j = a.target_to_draft ? a.target_to_draft[i] : i;
    return j >= 0 && j < draft_row.length ? j : -1;
  }

  // q of a target's token at the position that is open.
  float q_at(int64_t i) const {
    if (a.draft == nullptr) return static_cast<float>(i == one_hot);
    const int64_t j = draft_index(i);
    return j < 0 ? 0.0f : probability(draft_row.at(j), draft_law);
  }

  int64_t draw_from(const Row<T>& p, bool subtract, uint64_t fraction) {
    std::vector<uint64_t> weights(static_cast<size_t>(p.length));
    uint64_t total = 0;
    for (int64_t i = 0; i < p.length; ++i) {
      const float x = p.at(i);
      if (is_bad_value(x, a.target_is_logits)) status |= kBadValue;
      const float r = residual(probability(x, law), subtract ? q_at(i) : 0.0f);
      total += weights[static_cast<size_t>(i)] = to_fixed(r);
    }
    if (subtract && a.draft != nullptr && !a.target_to_draft && !a.draft_lse)
      for (int64_t j = 0; j < std::min(draft_row.length, p.length); ++j)
        if (is_bad_value(draft_row.at(j), a.draft_is_logits)) status |= kBadValue;
    if (total == 0) return -1;
    uint64_t rest = draw(fraction, total);
    size_t i = 0;
    for (; weights[i] <= rest; ++i) rest -= weights[i];
    return static_cast<int64_t>(i);
  }

  const VerifyArgs& a;
  const int64_t b;
  Parameters s, draft_s;
  Rows rows;
  RowLaw law = stored_law();
  Row<T> draft_row{nullptr, 0};
  RowLaw draft_law = stored_law();
  int64_t one_hot = -1;
  uint32_t status = 0;
  bool ended = false;
};

}  // namespace

void spec_verify_cpu(const VerifyArgs& args, int64_t first_sequence, int64_t last_sequence) {
  visit_real(args.value_type, [&]<class T>(T) {
    for (int64_t b = first_sequence; b < last_sequence; ++b) Sequence<T>(args, b).run();
  });
}

}  // namespace quantgemm
