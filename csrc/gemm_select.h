// SPDX-License-Identifier: MIT
// Which algorithm multiplies: pure functions of the problem, without a CUDA call, so that they are
// tested where there is no GPU. `auto` never rounds activations; `auto_q8` may (to int8 per 32).
#pragma once
#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "args.h"
#include "formats/activation.h"

namespace quantgemm {

struct GemmProblem {
  int64_t m, n, k;
  bool plain;           // w is unquantised
  int64_t block_elems;  // of w's format
  Real type;            // of x and y
  int arch;             // 10 · compute capability, e.g. 90; 0 = the CPU
};

struct GemmChoice {
  GemmAlgo algo;
  const char* reason;
};

inline constexpr GemmAlgo kGemmAlgos[] = {GemmAlgo::kNaive, GemmAlgo::kTiled, GemmAlgo::kDp4a, GemmAlgo::kMma,
                                          GemmAlgo::kMmaQ8};

inline const char* name_of(GemmAlgo algo) {
  switch (algo) {
    case GemmAlgo::kNaive: return "naive";
    case GemmAlgo::kTiled: return "tiled";
    case GemmAlgo::kDp4a: return "dp4a";
    case GemmAlgo::kMma: return "mma";
    case GemmAlgo::kMmaQ8: return "mma_q8";
  }
  return "";
}

inline bool rounds_activations(GemmAlgo algo) { return algo == GemmAlgo::kDp4a || algo == GemmAlgo::kMmaQ8; }

// Whether the activations are to be rounded by a launch of their own (GemmArgs::activations).
inline bool wants_rounded_rows(GemmAlgo algo, int64_t m, bool on_gpu) {
  return rounds_activations(algo) && !(on_gpu && algo == GemmAlgo::kDp4a && m <= kRoundedInside);
}

// Why an algorithm cannot serve a problem; null if it can.
inline const char* gemm_obstacle(GemmAlgo algo, const GemmProblem& p) {
  if (rounds_activations(algo) && p.plain) return "integer products need quantised weights";
  if (rounds_activations(algo) && p.block_elems % ActivationRow::kGroup != 0)
    return "activations have a scale per 32 values, which is no multiple of this type's block";
  if (algo == GemmAlgo::kMma || algo == GemmAlgo::kMmaQ8) {
    if (p.arch == 0) return "the CPU has no tensor cores";
    if (p.arch < 80) return "mma.sync with cp.async needs compute capability 8.0";
  }
  if (algo == GemmAlgo::kMma) {
    if (p.type == Real::kFloat32) return "tensor cores would round float32 activations";
    if (p.plain) return "weights are not quantised";
    if (p.block_elems % 32 != 0) return "blocks are shorter than a step of 32 along k";
    if (p.k >= int64_t{1} << 23) return "tiles of tokens this long have no 32-bit offsets";
  }
  return nullptr;
}

inline GemmChoice select_gemm(const GemmProblem& p, bool may_round) {
  const auto can = [&](GemmAlgo algo) { return gemm_obstacle(algo, p) == nullptr; };
  if (p.arch == 0) {
    if (may_round && can(GemmAlgo::kDp4a))
      return {GemmAlgo::kDp4a, "int8 dot products read a quarter of float32"};
    return {GemmAlgo::kTiled, "vector float32 arithmetic on decoded weights"};
  }
  // Thresholds of m as measured on an H200 (docs/ladder.md); k, n and the type moved them little.
  if (may_round && can(GemmAlgo::kDp4a)) {
    const bool exact_tensor_cores = can(GemmAlgo::kMma);
    if (p.m <= (exact_tensor_cores ? 4 : 8))
      return {GemmAlgo::kDp4a,
              "few tokens: reading the weights is the limit, int8 dot products keep up with it"};
    if (can(GemmAlgo::kMmaQ8) && (!exact_tensor_cores || (p.m > 8 && p.m <= 16)))
      return {GemmAlgo::kMmaQ8, "int8 tensor cores are the fastest here"};
    if (!exact_tensor_cores) return {GemmAlgo::kDp4a, "int8 dot products: no tensor cores serve here"};
  }
  if (can(GemmAlgo::kMma)) return {GemmAlgo::kMma, "tensor cores, activations kept as they are"};
  return {GemmAlgo::kTiled, "float32 arithmetic: tensor cores cannot keep this precision or type"};
}

// ---- packed weights (formats/packed.h) on a GPU ----
enum class PackedAlgo { kGemv, kFew, kMma, kWgmma, kInt8 };
inline constexpr PackedAlgo kPackedAlgos[] = {PackedAlgo::kGemv, PackedAlgo::kFew, PackedAlgo::kMma,
                                              PackedAlgo::kWgmma, PackedAlgo::kInt8};
inline const char* name_of(PackedAlgo algo) {
  switch (algo) {
    case PackedAlgo::kGemv: return "gemv";
    case PackedAlgo::kFew: return "few";
    case PackedAlgo::kMma: return "mma";
    case PackedAlgo::kWgmma: return "wgmma";
    case PackedAlgo::kInt8: return "int8";
  }
  return "";
}

inline const char* reason_for(PackedAlgo algo) {
  switch (algo) {
    case PackedAlgo::kGemv: return "few tokens: weights are read once, as fast as memory gives them";
    case PackedAlgo::kFew: return "few tokens: exact codes on tensor cores, scales for their sums";
    case PackedAlgo::kMma: return "tensor cores, activations kept as they are";
    case PackedAlgo::kWgmma: return "Hopper's tensor cores, activations kept as they are";
    case PackedAlgo::kInt8: return "many tokens: int8 tensor cores pay for rounding x and w";
  }
  return "";
}

// setup.py defines QG_SM90A where 9.0a is among the architectures.
#ifdef QG_SM90A
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif

struct PackedProblem {
  int64_t m, n, k;
  Real type;  // of x and y
  int arch;   // 10 · compute capability; 0 = the CPU
  bool experts = false;
};

constexpr int64_t kMostInt8Columns = 65535 * 1024;

// Why an algorithm cannot serve a problem; null if it can.
inline const char* packed_obstacle(PackedAlgo algo, const PackedProblem& p) {
  if (algo == PackedAlgo::kInt8) {  // the CPU has one to compare with
    if (p.experts) return "experts have no int8 product";
    if (p.arch != 0 && p.arch != 90) return "wgmma needs compute capability 9.0";
    if (p.arch != 0 && !kHasWgmma) return "this build has no machine code for 9.0a";
    if (p.k == 0) return "there are no columns to round";
    if (std::max(p.m, p.n) >= int64_t{1} << 30) return "the copy engine counts bytes in 32 bits";
    if (p.k > kMostInt8Columns) return "a grid has no more than 65535 blocks along k";
    return nullptr;
  }
  if (p.arch == 0) return "the CPU has no tensor cores";
  if (algo == PackedAlgo::kWgmma || algo == PackedAlgo::kFew) {
    const bool few = algo == PackedAlgo::kFew;
    if (few && p.experts) return "experts have tiles of other sizes";
    if (p.arch != 90) return few ? "made for compute capability 9.0" : "wgmma needs compute capability 9.0";
    if (!kHasWgmma) return "this build has no machine code for 9.0a";
    if (p.type == Real::kFloat32) return "tensor cores would round float32 activations";
    if (p.k == 0) return "there are no columns to copy";
    if (std::max({p.m, p.n, 2 * p.k}) >= int64_t{1} << 30) return "the copy engine counts bytes in 32 bits";
  }
  return nullptr;
}
// Whether int8 products are faster: weights are rounded anew by each, which fewer tokens do not pay for.
inline bool many_for_int8(const PackedProblem& p) { return p.m >= 2048 && p.n >= 1024; }
// Thresholds as measured on an H200 (docs/performance.md). With gemv every block has x of all tokens on its
// way through shared memory, which gets slow where x is long; with few a part of it.
inline bool few_tokens(const PackedProblem& p) {
  const bool long_x = p.m > 1 && (p.k > 8192 || p.m * p.k > 32768);
  return p.m <= 16 && (p.m > 8 || long_x);
}
inline PackedAlgo select_packed_gemm(const PackedProblem& p, bool may_round = false) {
  if (may_round && many_for_int8(p) && packed_obstacle(PackedAlgo::kInt8, p) == nullptr)
    return PackedAlgo::kInt8;
  if (few_tokens(p) && packed_obstacle(PackedAlgo::kFew, p) == nullptr) return PackedAlgo::kFew;
  if (p.m <= 8) return PackedAlgo::kGemv;
  if (packed_obstacle(PackedAlgo::kWgmma, p) == nullptr) return PackedAlgo::kWgmma;
  return PackedAlgo::kMma;
}

// Whether the algorithm has an RMS norm inside: x times its weight, rounded, and its factor for the sums,
// which float16 has no range for. Else it is launched in front.
inline bool folds_norm(PackedAlgo algo, const PackedProblem& p) {
  return algo == PackedAlgo::kGemv && p.type == Real::kBFloat16 && p.arch != 0 && p.k > 0;
}

// Experts: each slot is a token of one of them. `tile` is how many tokens of an expert are multiplied at a
// time.
struct MoeChoice {
  PackedAlgo algo;
  int tile;
};
inline MoeChoice moe_choice_of(PackedAlgo algo, const PackedProblem& p, int64_t experts) {
  const int64_t slots = p.m, busy = std::max<int64_t>(1, std::min(slots, experts));
  const bool wide = p.type == Real::kFloat32;  // three columns to a token
  if (algo == PackedAlgo::kGemv) return {algo, wide ? 2 : 8};
  if (algo == PackedAlgo::kMma) return {algo, wide ? 10 : slots <= 12 * busy ? 16 : 32};
  // Clocks of 64 columns of a tile; on average half a tile to an expert is empty, and a busy expert has one
  // (docs/performance.md).
  const auto clocks = [&](int tile, double step) {
    return std::max(static_cast<double>(slots) / busy / tile + 0.5, 1.0) * step;
  };
  int best = 32;
  double least = clocks(32, 590);
  for (const auto& [tile, step] : {std::pair{64, 670.0}, std::pair{128, 830.0}, std::pair{256, 1170.0}})
    if (clocks(tile, step) < least) best = tile, least = clocks(tile, step);
  return {algo, best};
}
inline MoeChoice select_moe(const PackedProblem& p, int64_t experts) {
  PackedProblem each = p;
  each.m = p.m / std::max<int64_t>(1, std::min(p.m, experts));  // slots of an expert that has any, on average
  return moe_choice_of(select_packed_gemm(each), p, experts);
}

inline std::string able_packed_gemms(const PackedProblem& p) {
  std::string names = "auto";
  for (const PackedAlgo algo : kPackedAlgos)  // that do not round
    if (algo != PackedAlgo::kInt8 && packed_obstacle(algo, p) == nullptr)
      names += std::string(", ") + name_of(algo);
  return names;
}

// Algorithms that can serve a problem, e.g. "naive, tiled".
inline std::string able_gemms(const GemmProblem& p) {
  std::string names;
  for (const GemmAlgo algo : kGemmAlgos)
    if (gemm_obstacle(algo, p) == nullptr) names += (names.empty() ? "" : ", ") + std::string(name_of(algo));
  return names;
}

}  // namespace quantgemm
