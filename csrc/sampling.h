// SPDX-License-Identifier: MIT
// The arithmetic of sampling and verification that the CPU and CUDA kernels share: noise, the law of
// a row (how a logit or a stored probability becomes p), fixed-point weights, the accept test.
// Weights are integers, so sums do not depend on their order and a token not on the grid.
#pragma once
#include <cmath>

#include "args.h"
#include "formats/portable.h"

namespace quantgemm {

// ---- noise: Philox4x32-10, key = seed, counter = (position, domain, turn) ----
struct Noise {
  uint32_t low, high;
};
QG_HD Noise philox(uint64_t seed, uint64_t position, uint32_t domain, uint32_t turn) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t c2 = domain, c3 = turn;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b), c3 = static_cast<uint32_t>(a), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

// A number of [0, 1) as a 64-bit fraction; accept tests use its top 24 bits.
QG_HD uint64_t fraction_of(Noise n) { return uint64_t{n.high} << 32 | n.low; }
QG_HD uint64_t fraction_of(double uniform, uint32_t& status) {
  if (!(uniform >= 0.0 && uniform < 1.0)) status |= kBadUniform;
  const double inside = uniform >= 0.0 ? uniform : 0.0;  // NaN becomes 0
  return inside < 1.0 ? static_cast<uint64_t>(inside * 0x1p53) << 11 : ~uint64_t{0};
}

// u·q < p, exactly: 24 bits times 24 bits fit a double, so p == q always accepts and p == 0 never.
QG_HD bool accepts(uint64_t fraction, float p, float q) {
  const double u = static_cast<double>(fraction >> 40) * 0x1p-24;
  return q > 0.0f && u * static_cast<double>(q) < static_cast<double>(p);
}

// ---- the law of a row: p(x) = clean(x) for stored probabilities, and for logits
//      x >= cutoff ? exp2((x - max) * slope) * scale : 0; a row without mass has max = scale = 0 ----
struct RowLaw {
  float max, slope, scale, cutoff;  // slope = log2(e) / temperature; 0 marks stored probabilities
};

QG_HD float minus_infinity() { return bit_cast<float>(0xff800000u); }
QG_HD RowLaw stored_law() { return {0.0f, 0.0f, 1.0f, minus_infinity()}; }

// NaN is no logit, and +inf the largest one.
QG_HD float clean_logit(float x) {
#ifdef __CUDA_ARCH__
  return fminf(fmaxf(x, minus_infinity()), 3.4028235e38f);
#else
  const float finite = x < 3.4028235e38f ? x : 3.4028235e38f;
  return x == x ? finite : minus_infinity();
#endif
}
QG_HD float clean_probability(float x) {
#ifdef __CUDA_ARCH__
  return __saturatef(x);  // NaN becomes 0
#else
  return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
#endif
}

QG_HD float multiply(float a, float b) {  // never fused with an addition: every pass gives the same bits
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

QG_HD float relative_weight(float clean, float max, float slope) {
  const float exponent = multiply(clean - max, slope);
#ifdef __CUDA_ARCH__
  float weight;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(weight) : "f"(exponent));
  return weight;
#else
  return exp2f(exponent);
#endif
}

QG_HD float softmax_probability(float x, const RowLaw& law) {
  const float clean = clean_logit(x);
  const float p = multiply(relative_weight(clean, law.max, law.slope), law.scale);
  return clean >= law.cutoff ? (p < 1.0f ? p : 1.0f) : 0.0f;
}
QG_HD float probability(float x, const RowLaw& law) {
  return law.slope == 0.0f ? clean_probability(x) : softmax_probability(x, law);
}

QG_HD bool is_bad_value(float x, bool is_logit) {
  return is_logit ? !(x <= 3.4028235e38f) : !(x >= 0.0f && x <= 3.4028235e38f);
}

// ---- fixed point: 1.0 is 2^44, so 2^19 weights of at most 1 stay below 2^63 ----
inline constexpr int64_t kMaxVocab = (1 << 19) - 1;

QG_HD uint64_t to_fixed(float x) {  // x in [0, 1]
  const float scaled = x * 0x1p44f;
#ifdef __CUDA_ARCH__
  return __float2ull_rn(scaled);
#else
  return static_cast<uint64_t>(std::nearbyintf(scaled));
#endif
}

QG_HD float residual(float p, float q) {  // of two numbers in [0, 1]
#ifdef __CUDA_ARCH__
  return __saturatef(p - q);
#else
  return p > q ? p - q : 0.0f;
#endif
}

// Σ of weights as a number. A refused sibling takes mass·q from weights of this mass.
QG_HD float mass_of(uint64_t total) { return static_cast<float>(static_cast<double>(total) * 0x1p-44); }

// Blocks: the share of the target's law that the drafts so far leave to what follows, min(share·p/q, 1).
QG_HD float next_share(float share, float p, float q) {
  if (!(q > 0.0f)) return 0.0f;
  const float next = static_cast<float>(static_cast<double>(share) * static_cast<double>(p) / q);
  return next < 1.0f ? next : 1.0f;
}

// Blocks: u < R / (R + 1 - share), R the residual's mass.
QG_HD bool accepts_block(uint64_t fraction, float share, uint64_t total) {
  const double u = static_cast<double>(fraction >> 40) * 0x1p-24;
  const double mass = static_cast<double>(total) * 0x1p-44;
  return u * (mass + (1.0 - static_cast<double>(share))) < mass;
}

// The draw: the token is the first whose inclusive prefix sum exceeds this, given total > 0.
QG_HD uint64_t draw(uint64_t fraction, uint64_t total) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(fraction) * total >> 64);
}

// ---- truncation ----
// Order-preserving integers: a < b as floats iff the keys are. NaN is below everything.
QG_HD uint32_t key_of(float clean) {
  const uint32_t bits = bit_cast<uint32_t>(clean == 0.0f ? 0.0f : clean);  // -0 ties with 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
QG_HD float value_of_key(uint32_t key) {
  return bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Mass that top-p must keep out of `total`.
QG_HD uint64_t mass_to_keep(float top_p, uint64_t total) {
  const double wanted = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  const uint64_t mass = wanted < 9.2e18 ? static_cast<uint64_t>(wanted) : total;
  return mass < 1 ? 1 : (mass < total ? mass : total);
}

// Parameters of one sequence after checking; a bad one is off and sets a status bit.
struct Parameters {
  bool greedy;
  float slope;        // log2(e) / temperature
  float temperature;  // 1 if none was given
  int64_t top_k;      // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  QG_HD bool truncates() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }
};

QG_HD float slope_of(float temperature) {
  const float slope = 1.4426950408889634f / temperature;
  const float finite = slope < 3.4028235e38f ? slope : 3.4028235e38f;
  return finite >= 1.1754944e-38f ? finite : 1.1754944e-38f;
}

QG_HD Parameters parameters_of(const SamplingParameters& s, int64_t sequence, int64_t vocab,
                               uint32_t& status) {
  Parameters out{false, 1.0f, 1.0f, 0, 1.0f, 0.0f};
  // All loads before the first use: on a GPU one round trip to memory instead of four.
  const float t = s.temperature ? s.temperature[sequence] : 1.0f;
  const int64_t k = s.top_k ? s.top_k[sequence] : 0;
  const float top_p = s.top_p ? s.top_p[sequence] : 1.0f;
  const float min_p = s.min_p ? s.min_p[sequence] : 0.0f;
  const bool good = t >= 0.0f && t <= 3.4028235e38f;
  out.greedy = !good || t == 0.0f;
  out.temperature = out.greedy ? 1.0f : t;
  out.slope = slope_of(out.temperature);
  if (!good || k < 0 || !(top_p >= 0.0f && top_p <= 1.0f) || !(min_p >= 0.0f && min_p <= 1.0f))
    status |= kBadParameter;
  out.top_k = k > 0 && k < vocab ? k : 0;
  out.top_p = top_p >= 0.0f && top_p < 1.0f ? top_p : 1.0f;
  out.min_p = min_p > 0.0f && min_p <= 1.0f ? min_p : 0.0f;
  return out;
}

// The smallest logit that min-p keeps.
QG_HD float min_p_cutoff(float max, const Parameters& s) {
  return static_cast<float>(static_cast<double>(max) +
                            log(static_cast<double>(s.min_p)) * static_cast<double>(s.temperature));
}

// `low` or the least key that min-p keeps; always below `top`.
QG_HD uint32_t raise_to_min_p(uint32_t low, uint32_t top, float max, const Parameters& s) {
  if (!(s.min_p > 0.0f)) return low;
  const uint32_t key = key_of(fmaxf(min_p_cutoff(max, s), -3.4028235e38f));
  low = key > low ? key : low;
  return low < top ? low : top - 1;
}

// The law of a draft row whose log-sum-exp (and cutoff) the drafter handed over.
QG_HD RowLaw law_from_lse(float lse, float cutoff, const Parameters& s) {
  if (lse == minus_infinity()) return {0.0f, s.slope, 0.0f, cutoff};
  const float max = static_cast<float>(static_cast<double>(lse) * static_cast<double>(s.temperature));
  return {max, s.slope, 1.0f, cutoff};
}

// ---- where things lie ----
// Rows of a sequence: first row and number of drafts, or a status bit where cu_rows makes no sense.
struct Rows {
  int64_t first, drafts;
};
QG_HD Rows rows_of(const VerifyArgs& a, int64_t sequence, uint32_t& status) {
  if (a.cu_rows == nullptr) return {sequence, 0};
  const int64_t first = a.cu_rows[sequence], last = a.cu_rows[sequence + 1];
  const bool good = first >= 0 && last <= a.num_rows && last > first && last - first <= a.max_drafts + 1;
  if (!good) status |= kBadRows;
  return good ? Rows{first, last - first - 1} : Rows{0, -1};
}

// Noise of the drafts' judgement and of the token: column of the uniforms, or counter.
QG_HD uint64_t noise_at(const VerifyArgs& a, int64_t sequence, int64_t column, int64_t offset,
                        uint32_t domain, uint32_t turn, uint32_t& status) {
  if (a.uniforms != nullptr) return fraction_of(a.uniforms[sequence * (a.max_drafts + 1) + column], status);
  const uint64_t position = static_cast<uint64_t>(a.positions[sequence]) + static_cast<uint64_t>(offset);
  return fraction_of(philox(static_cast<uint64_t>(a.seeds[sequence]), position, domain, turn));
}

// A step uses positions up to that of its last token, and the next step begins behind it. A node at
// `depth` is the `turn`-th child of its parent. A block looks at all its noise wherever it ends, so
// its counters stay at the position of the step.
QG_HD uint64_t node_noise(const VerifyArgs& a, int64_t sequence, int64_t node, int64_t depth, uint32_t turn,
                          uint32_t& status) {
  return noise_at(a, sequence, node, depth, kAcceptDomain, turn, status);
}
QG_HD uint64_t block_noise(const VerifyArgs& a, int64_t sequence, int64_t k, uint32_t& status) {
  return noise_at(a, sequence, k, 0, kBlockDomain, static_cast<uint32_t>(k), status);
}
QG_HD uint64_t token_noise(const VerifyArgs& a, int64_t sequence, int64_t accepted, uint32_t& status) {
  return noise_at(a, sequence, a.max_drafts, accepted, a.token_domain, a.turn, status);
}

}  // namespace quantgemm
