// SPDX-License-Identifier: MIT
// What crosses from ops/ to the kernels: plain structs of pointers and sizes that own nothing.
// Everything in them has been checked by the op layer.
#pragma once
#include <cstdint>

namespace quantgemm {

enum class Real { kFloat32, kFloat16, kBFloat16 };

// Calls f with a value of the storage type: float, or the bit pattern wrapped in a tag.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class Fn>
void visit_real(Real type, Fn&& f) {
  switch (type) {
    case Real::kFloat32: return f(float{});
    case Real::kFloat16: return f(Half{});
    case Real::kBFloat16: return f(BFloat16{});
  }
}

struct DequantizeArgs {
  const uint8_t* blocks;  // [num_blocks, block bytes of qtype]
  void* out;              // [num_blocks, block elems of qtype] of out_type
  int64_t num_blocks;
  int64_t qtype;
  Real out_type;
};

struct QuantizeArgs {
  const void* x;            // [num_blocks, block elems of qtype] of x_type
  const float* importance;  // [blocks_per_row, block elems] or null
  uint8_t* blocks;          // [num_blocks, block bytes of qtype]
  int64_t num_blocks;
  int64_t blocks_per_row;
  int64_t qtype;
  Real x_type;
};

struct ActivationArgs {
  const void* x;  // [num_rows, num_cols] of x_type, num_cols a multiple of 32
  uint8_t* rows;  // [num_rows, ActivationRow::bytes(num_cols)]
  int64_t num_rows;
  int64_t num_cols;
  Real x_type;
};

// ---- products: y[m, n] = x[m, k] · dequantize(w)[n, k]ᵀ, m tokens, n outputs, k inputs ----
enum class GemmAlgo { kNaive, kTiled, kDp4a, kMma, kMmaQ8 };

// Up to so many tokens a GPU's dp4a rung rounds x itself, in every thread block: cheaper than a launch.
inline constexpr int64_t kRoundedInside = 1;

struct GemmArgs {
  const void* x;               // [m, k] of type
  const uint8_t* activations;  // [m, ActivationRow::bytes(k)], x as int8, where wants_rounded_rows()
  const uint8_t* w;            // [n, k / block elems · block bytes of qtype]
  void* y;                     // [m, n] of type
  void* scratch;               // as many bytes as the algorithm asks for, uninitialised
  int64_t m, n, k;
  int64_t qtype;
  Real type;
};

// Blocks to the packed layout (formats/packed.h) and back.
struct PackArgs {
  const uint8_t* from;  // pack: blocks [n, k / block elems · block bytes of qtype]; unpack: strips
  uint8_t* to;          // pack: strips [num_strips(n), strip_bytes(k)]; unpack: blocks
  int64_t n, k;
  int64_t qtype;
};

// Which rows of x meet which expert's weights. A slot is a row of y: one expert of one token. Groups are
// slots of the same expert, at most `tile` of them; who makes them on the device says cuda/expert_routes.cuh.
struct ExpertGroup {
  int32_t expert, first, count, unused;  // slots[first … first + count − 1]
};
inline constexpr int kMaxExperts = 4096;
inline constexpr int kOwnSlots = 128;  // at most so many does each thread block group for itself
struct ExpertRoutes {
  const void* ids = nullptr;       // [num_slots] int32, or int64 if wide; others than 0 … experts − 1: y is 0
  const float* weights = nullptr;  // [num_slots] that y is multiplied by, or null
  int32_t* num_groups = nullptr;   // [1]
  ExpertGroup* groups = nullptr;   // [most_groups]
  int32_t* slots = nullptr;        // [num_slots], by expert
  int32_t* ranks = nullptr;        // [num_slots], for the making
  void* sorted = nullptr;          // [num_slots, k] of type (16 bits): rows of x by slots, for wgmma
  int64_t num_slots = 0, experts = 0, expert_bytes = 0, most_groups = 0;
  int32_t slots_per_row = 1;  // that share a row of x
  int32_t tile = 0;
  bool wide = false;
};

// y[m, n] = x[m, k] · wᵀ + bias + residual, or silu(x · wᵀ) · (x · upᵀ), w and up as strips; with routes m is
// num_slots, rows of y. With norm_weight rms_norm(x) takes the place of x: only where folds_norm().
struct GemmPackedArgs {
  const void* x;          // [m, k] of type
  const uint8_t* packed;  // [num_strips(n), strip_bytes(k)] of qtype; of all experts
  const void* bias;       // [n] of type, or null; with routes [experts, n]
  void* y;                // [m, n] of type
  int64_t m, n, k;
  int64_t qtype;
  Real type;
  const void* residual = nullptr;  // [m, n] of type
  int64_t up_at = 0;               // bytes from w to up; 0: there is none
  void* gate = nullptr;            // [m, n] of type where wgmma leaves x · wᵀ, if there is up
  ExpertRoutes routes = {};
  const void* norm_weight = nullptr;  // [k] of type
  float norm_eps = 0;
  const uint8_t* ahead = nullptr;  // weights of a later launch, to bring nearer when these are read
  int64_t ahead_bytes = 0;
};

struct EmbeddingArgs {
  const int64_t* ids;  // [num_ids], each a row of w; any other id gives a row of NaN
  const uint8_t* w;    // [num_rows, row_blocks · block bytes of qtype]
  void* out;           // [num_ids, row_blocks · block elems] of out_type
  int64_t num_ids, num_rows, row_blocks;
  int64_t qtype;
  Real out_type;
};

// ---- the small steps of a layer between its products, rounded where torch's formulas round ----
struct RmsNormArgs {
  const void* x;       // [rows, cols] of type
  const void* weight;  // [cols] of type
  void* out;           // [rows, cols] of type
  int64_t rows, cols;
  float eps;
  Real type;
};

// Queries or keys: [batch, heads, tokens, channels] of type, channels side by side.
struct RotatedHeads {
  const void* x;
  void* out;  // contiguous
  int64_t heads;
  int64_t strides[3];  // of batch, head and token in x
};

struct RotaryArgs {
  RotatedHeads sides[2];
  const void *cos, *sin;  // [batch or 1, tokens, channels] of type
  int64_t batch, tokens, channels;
  int64_t angle_stride;  // of batch; 0: all have the same angles
  Real type;
};

// ---- sampling and speculative verification; any pointer of parameters may be null: off ----
struct SamplingParameters {
  const float* temperature;  // [num_sequences], 0 = greedy
  const int64_t* top_k;      // [num_sequences], 0 = off
  const float* top_p;        // [num_sequences], 1 = off
  const float* min_p;        // [num_sequences], 0 = off
};

// Bits of a sequence's status.
enum VerifyStatus : uint32_t {
  kBadToken = 1,        // a drafted id outside the vocabulary (other than -1): drafts end there
  kBadValue = 2,        // NaN, +inf or a negative probability among the values that decided
  kNoMass = 4,          // the row has no mass: its argmax was taken
  kBadParameter = 8,    // temperature (then greedy), top_k, top_p or min_p (then off) out of range
  kEmptyResidual = 16,  // rejected although p <= q everywhere: drawn from p
  kBadRows = 32,        // cu_rows does not fit: no token
  kBadUniform = 64,     // a uniform outside [0, 1) was moved inside
  kBadParent = 128,     // the parent of a node is no node and not -1: the node was not tried
};

enum NoiseDomain : uint32_t { kDraftDomain = 0, kAcceptDomain = 1, kTokenDomain = 2, kBlockDomain = 3 };

// How drafts are judged: one after the other, as a tree of alternatives, or as a whole.
enum class VerifyMode { kChain, kTree, kBlock };
inline constexpr int64_t kMaxJointDrafts = 256;  // of a tree or a block: they are kept on the chip

struct VerifyArgs {
  const void* target;              // rows of vocab values of value_type, target_stride apart
  const void* draft;               // [num_sequences, max_drafts, draft_vocab] of value_type; null: one-hot
  const int64_t* cu_rows;          // [num_sequences + 1]; null: row b is sequence b's only one
  const int64_t* drafts;           // [num_sequences, max_drafts], ids of the target's vocabulary
  const int64_t* parents;          // tree: [num_sequences, max_drafts], -1 = the root; else null
  const float* draft_lse;          // [num_sequences, max_drafts] or null: computed from the row
  const float* draft_cutoff;       // [num_sequences, max_drafts] or null: none; only with draft_lse
  const int64_t* target_to_draft;  // [vocab], -1 = not in the draft's vocabulary; null: the same ids
  SamplingParameters parameters;
  const int64_t* seeds;      // [num_sequences]
  const int64_t* positions;  // [num_sequences]
  const double* uniforms;    // [num_sequences, max_drafts + 1] or null; the last one draws the token
  int64_t* tokens;           // [num_sequences, max_drafts + 1], -1 after the last
  int64_t* counts;           // [num_sequences] or null
  float* logprobs;           // [num_sequences, max_drafts + 1] or null, 0 after the last
  int32_t* status;           // [num_sequences]
  int64_t* nodes;            // tree: [num_sequences, max_drafts], the accepted ones, then -1; else null
  float* lse;                // [num_sequences] or null: of the row the token was drawn from
  float* cutoff;             // [num_sequences] or null
  float* probs;              // [num_sequences, vocab] or null: the row the token was drawn from
  void* row_laws;            // CUDA: room for the laws of the rows (cuda/row_laws.cuh)
  int64_t num_sequences, max_drafts, num_rows, vocab, draft_vocab;
  int64_t target_stride, draft_strides[2];
  uint32_t token_domain, turn;  // of the noise that draws the token
  VerifyMode mode;
  bool target_is_logits, draft_is_logits;
  Real value_type;
};

// ---- the sparse key-value container (kv.h) ----
struct KvCompressArgs {
  const void* x;                          // [heads, tokens, channels] of type (16 bits)
  uint64_t* bitmaps;                      // [heads, blocks, channels], blocks = ceil(tokens / 64)
  int32_t* offsets;                       // like bitmaps: a tile's first word
  uint32_t* packed;                       // room for the words of all tiles
  void* scales;                           // like bitmaps, of type; with zeros null if bits is 16
  void* zeros;                            // like bitmaps, of type
  int64_t* num_words;                     // [1]: words used
  void* scratch;                          // CUDA: of as many bytes as its launcher wants
  int64_t heads, tokens, channels, room;  // room: words in packed
  int64_t keep;   // values kept of each token and head, the largest ones; ties: the first ones
  int bits;       // 2, 4 or 16
  bool is_value;  // how tiles lie
  Real type;
};

// y[heads, columns, m] = x[heads, columns, k] · aᵀ, a[m, k] sparse; a key's m are tokens, a value's channels
struct KvProductArgs {
  const void* x;            // of type
  const uint64_t* bitmaps;  // [heads, blocks · channels]
  const int32_t* offsets;   // like bitmaps
  const uint32_t* packed;   // [num_words]
  const void* scales;       // like bitmaps, of type; with zeros null if bits is 16
  const void* zeros;        // like bitmaps, of type
  void* y;                  // of type
  float* partial;           // CUDA: [split, heads, columns, m] if split > 1
  int64_t heads, columns, m, k;
  int64_t num_words, channels, blocks;
  int64_t split;  // CUDA: parts of k summed by different thread blocks
  int bits;       // 2, 4 or 16
  bool is_value;
  Real type;
};

// ---- the native key-value cache of one layer (kv_page.h) ----
// Which elements a page holds: all, `keep` of a token's channels, or 4 of each 8.
enum class PageKind { kDense, kBitmap, kFourOfEight };
struct PageFormat {
  PageKind kind;
  int bits;  // 2 or 4
  int keep;  // elements of a token: any of its channels in a bitmap page, else all or half of them
};

struct KvCacheArgs {
  uint8_t* key_pages;         // [num_pages, heads, key_page_bytes]
  uint8_t* value_pages;       // [num_pages, heads, value_page_bytes]
  const int32_t* page_table;  // [batch, max_pages]
  void* recent_keys;          // [batch, heads, recent, channels] of type: sinks, then the ring
  void* recent_values;
  const int64_t* lens;  // [batch]: tokens
  const void* means;    // [2, batch, heads, channels] of type, what keys and values are less by, or null
  int64_t batch, heads, channels, num_pages, max_pages;
  int64_t recent, sinks, window;
  PageFormat key_format, value_format;
  Real type;
};

struct KvAppendArgs {
  KvCacheArgs cache;      // with the lengths before
  const void* keys;       // [batch, heads, count, channels]
  const void* values;     // like keys
  const int64_t* counts;  // [batch]: how many of count are there, or null: all
  int64_t count;
};

// New tokens whose queries and keys have not had their rotary embedding.
struct KvAppendRotatedArgs {
  KvAppendArgs append;  // keys and values: null
  RotaryArgs rotary;    // of the keys without out
  RotatedHeads values;  // which are stored as they are
};

struct KvAttentionArgs {
  KvCacheArgs cache;
  const void* query;  // [batch, heads · groups, channels]
  void* out;          // like query
  float* lse;         // [batch, heads · groups], natural logarithm
  float* partial;     // CUDA: [split, batch, heads · groups, channels + 2]: sums, their maximum and mass
  int64_t groups;     // query heads of a key-value head, times tokens
  int64_t tokens;     // the last ones of each sequence ask, group g for token g % tokens
  int64_t split;
  float scale;
};

}  // namespace quantgemm
