// SPDX-License-Identifier: MIT
// Verification on the CPU, one sequence at a time, in the order a reader would do it: try draft after
// draft, draw from the row that stops. A chain is a tree of one branch. The arithmetic is sampling.h.
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
    std::fill_n(a.tokens + b * columns(), columns(), -1);
    if (a.logprobs) std::fill_n(a.logprobs + b * columns(), columns(), 0.0f);
    if (a.nodes) std::fill_n(a.nodes + b * a.max_drafts, a.max_drafts, -1);
    if (rows.drafts >= 0) {
      if (a.mode == VerifyMode::kBlock && !s.greedy) {
        verify_block();
      } else {
        walk_tree();
      }
    }
    if (a.counts) a.counts[b] = count;
    a.status[b] = static_cast<int32_t>(status);
    if (rows.drafts < 0) return;
    const Row<T> row = target(count - 1);  // of a chain; trees have no outputs below
    const int64_t last = a.tokens[b * columns() + count - 1];
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
  int64_t columns() const { return a.max_drafts + 1; }
  Row<T> target(int64_t k) const {
    return {static_cast<const T*>(a.target) + (rows.first + k) * a.target_stride, a.vocab};
  }
  Row<T> draft(int64_t k) const {
    return {static_cast<const T*>(a.draft) + b * a.draft_strides[0] + k * a.draft_strides[1], a.draft_vocab};
  }
  RowLaw target_law(const Row<T>& row) const { return a.target_is_logits ? law_of(row, s) : stored_law(); }

  int64_t draft_token(int64_t k) const { return a.drafts[b * a.max_drafts + k]; }
  bool is_valid(int64_t token) {
    if (token < -1 || token >= a.vocab) status |= kBadToken;
    return token >= 0 && token < a.vocab;
  }

  void emit(int64_t token, float logprob, int64_t node) {
    a.tokens[b * columns() + count] = token;
    if (a.logprobs) a.logprobs[b * columns() + count] = logprob;
    if (a.nodes && node >= 0) a.nodes[b * a.max_drafts + count] = node;
    ++count;
  }

  // Calls f(child, turn) for the children of a node until it is true; the child, or -1.
  template <class Fn>
  int64_t find_child(int64_t node, Fn f) const {
    uint32_t turn = 0;
    const int64_t end = a.parents ? rows.drafts : std::min(node + 2, rows.drafts);
    for (int64_t i = a.parents ? 0 : node + 1; i < end; ++i)
      if ((!a.parents || a.parents[b * a.max_drafts + i] == node) && f(i, turn++)) return i;
    return -1;
  }

  void walk_tree() {
    if (a.parents)
      for (int64_t i = 0; i < rows.drafts; ++i) {
        const int64_t parent = a.parents[b * a.max_drafts + i];
        if (parent < -1 || parent >= rows.drafts) status |= kBadParent;
      }
    for (int64_t node = -1;;) {
      float logprob = 0;
      const Row<T> row = target(node + 1);
      const int64_t child = s.greedy ? find_greedy(row, node) : find_accepted(row, node, logprob);
      if (child < 0) return s.greedy ? finish_greedy(row) : finish(row);
      emit(draft_token(child), logprob, child);
      node = child;
    }
  }

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

  int64_t find_greedy(const Row<T>& row, int64_t node) {
    best = argmax(row);
    return find_child(node, [&](int64_t child, uint32_t) {
      return is_valid(draft_token(child)) && draft_token(child) == best;
    });
  }

  void finish_greedy(const Row<T>& row) {
    const float top = clean(row.at(best));
    if (top == (a.target_is_logits ? minus_infinity() : 0.0f)) status |= kNoMass;
    law = {top, 0.0f, 1.0f, top};
    emit(best, 0.0f, -1);
  }

  // The child that is accepted; or -1 and what the refused ones left in `weights`.
  int64_t find_accepted(const Row<T>& p, int64_t node, float& logprob) {
    law = target_law(p);
    bool weighed = false;
    float mass = 1.0f;
    const int64_t accepted = find_child(node, [&](int64_t child, uint32_t turn) {
      const int64_t token = draft_token(child);
      if (!is_valid(token)) return false;
      open_draft(child, token);
      const float p_token = read(p, token, law, a.target_is_logits);
      check_draft(token);
      const float left = weighed ? weights[static_cast<size_t>(token)] : p_token;
      logprob = std::log(p_token);
      const uint64_t fraction = node_noise(a, b, child, count, turn, status);
      if (accepts(fraction, left, multiply(q_at(token), mass))) return true;
      if (!weighed) weigh(p, 1.0f);
      weighed = true;
      if (subtract(mass)) mass = mass_of(total);
      return false;
    });
    if (accepted < 0 && !weighed) weigh(p, 1.0f);
    return accepted;
  }

  // The last token, from `weights`.
  void finish(const Row<T>& p) {
    if (!summed) total = sum(weights);
    if (total == 0) {
      status |= kNoMass;
      return emit(argmax(p), 0.0f, -1);
    }
    uint64_t rest = draw(token_noise(a, b, count, status), total);
    size_t i = 0;
    for (uint64_t w; (w = to_fixed(weights[i])) <= rest; ++i) rest -= w;
    const auto token = static_cast<int64_t>(i);
    emit(token, std::log(probability(p.at(token), law)), -1);
  }

  // The longest part of the drafts that passes, from the last on; shares[k] belongs to k drafts.
  void verify_block() {
    std::vector<float> shares{1.0f};
    std::vector<RowLaw> laws;
    std::vector<float> logprobs;
    int64_t length = 0;
    for (; length < rows.drafts && is_valid(draft_token(length)); ++length) {
      const int64_t token = draft_token(length);
      laws.push_back(law = target_law(target(length)));
      open_draft(length, token);
      const float p = read(target(length), token, law, a.target_is_logits);
      check_draft(token);
      logprobs.push_back(std::log(p));
      shares.push_back(next_share(shares.back(), p, q_at(token)));
    }
    int64_t k = length;
    for (bool stops = false; !stops; k -= !stops) {
      const float share = shares[static_cast<size_t>(k)];
      const uint64_t fraction = k > 0 ? block_noise(a, b, k - 1, status) : 0;
      if (k == length) {
        stops = k == 0 || accepts(fraction, share, 1.0f);
        if (!stops) continue;
        law = target_law(target(k));
        weigh(target(k), 1.0f);
      } else {
        law = laws[static_cast<size_t>(k)];
        weigh(target(k), share);
        open_draft(k, draft_token(k));
        if (k > 0) {
          subtract(1.0f, true);
          stops = accepts_block(fraction, share, total);
        } else {
          subtract(1.0f);
          stops = true;
        }
      }
    }
    for (int64_t i = 0; i < k; ++i) emit(draft_token(i), logprobs[static_cast<size_t>(i)], -1);
    finish(target(k));
  }

  void open_draft(int64_t k, int64_t token) {
    one_hot = a.draft == nullptr ? token : -1;
    draft_law = stored_law();
    if (a.draft != nullptr) draft_row = draft(k);
    if (!a.draft_is_logits) return;
    const int64_t at = b * a.max_drafts + k;
    const float cutoff = a.draft_cutoff ? a.draft_cutoff[at] : minus_infinity();
    draft_law = a.draft_lse ? law_from_lse(a.draft_lse[at], cutoff, draft_s) : law_of(draft_row, draft_s);
  }

  int64_t draft_index(int64_t i) const {
    const int64_t j = a.target_to_draft ? a.target_to_draft[i] : i;
    return j >= 0 && j < draft_row.length ? j : -1;
  }

  void check_draft(int64_t token) {
    const int64_t j = a.draft != nullptr ? draft_index(token) : -1;
    if (j >= 0) read(draft_row, j, draft_law, a.draft_is_logits);
  }

  // q of a target's token in the draft that is open.
  float q_at(int64_t i) const {
    if (a.draft == nullptr) return static_cast<float>(i == one_hot);
    const int64_t j = draft_index(i);
    return j < 0 ? 0.0f : probability(draft_row.at(j), draft_law);
  }

  void weigh(const Row<T>& p, float share) {
    weights.resize(static_cast<size_t>(p.length));
    for (int64_t i = 0; i < p.length; ++i) {
      const float x = p.at(i);
      if (is_bad_value(x, a.target_is_logits)) status |= kBadValue;
      weights[static_cast<size_t>(i)] = multiply(probability(x, law), share);
    }
    summed = false;
  }

  static uint64_t sum(const std::vector<float>& x) {
    uint64_t total = 0;
    for (const float w : x) total += to_fixed(w);
    return total;
  }

  // Takes mass·q from the weights, unless that leaves nothing: then they stay as they are.
  bool subtract(float mass, bool may_be_empty = false) {
    if (a.draft != nullptr && !a.target_to_draft && !a.draft_lse)
      for (int64_t j = 0; j < std::min(draft_row.length, a.vocab); ++j)
        if (is_bad_value(draft_row.at(j), a.draft_is_logits)) status |= kBadValue;
    left.resize(weights.size());
    uint64_t rest = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const auto id = static_cast<int64_t>(i);
      left[i] = id == one_hot ? 0.0f : residual(weights[i], multiply(q_at(id), mass));
      rest += to_fixed(left[i]);
    }
    if (rest == 0 && !may_be_empty) {
      status |= kEmptyResidual;
      return false;
    }
    std::swap(weights, left);
    total = rest, summed = true;
    return true;
  }

  const VerifyArgs& a;
  const int64_t b;
  Parameters s, draft_s;
  Rows rows;
  RowLaw law = stored_law();
  Row<T> draft_row{nullptr, 0};
  RowLaw draft_law = stored_law();
  int64_t one_hot = -1;
  std::vector<float> weights, left;  // of the draw: p, or what is left of it
  uint64_t total = 0;                // Σ weights in fixed point, once it was asked for
  bool summed = false;
  int64_t best = 0, count = 0;
  uint32_t status = 0;
};

}  // namespace

void spec_verify_cpu(const VerifyArgs& args, int64_t first_sequence, int64_t last_sequence) {
  visit_real(args.value_type, [&]<class T>(T) {
    for (int64_t b = first_sequence; b < last_sequence; ++b) Sequence<T>(args, b).run();
  });
}

}  // namespace quantgemm
