// SPDX-License-Identifier: MIT
// A format's look-up tables in shared memory. Rows of 256 bytes come first, so that two bytes side by side
// are an address: word i of a row, copy c, at 64 i + 4 c. Then single words in 32 copies, or 16 where they
// are many: word i of copy c is word copies · i + c, so with 32 of them each lane reads its own bank,
// whatever it looks up.
#pragma once
#include "gemm_3_dp4a.cuh"

namespace quantgemm::dp4a {

template <BlockFormat F>
inline constexpr bool kHasTable = TableFormat<F> || RowTableFormat<F>;

// The words of a format's tables, rows first, as memory has them: a word is one load and no arithmetic.
template <BlockFormat F>
struct TableWords {
  static constexpr int kRows = [] {
    if constexpr (RowTableFormat<F>) return 256 * F::kRowWords;
    return 0;
  }();
  static constexpr int kSingles = [] {
    if constexpr (TableFormat<F>) return int{F::kTableWords};
    return 0;
  }();
  uint32_t words[kRows + kSingles];
  constexpr TableWords() : words{} {
    if constexpr (RowTableFormat<F>)
      for (int i = 0; i < kRows; ++i) words[i] = F::row_word(i / F::kRowWords, i % F::kRowWords);
    if constexpr (TableFormat<F>)
      for (int i = 0; i < kSingles; ++i) words[kRows + i] = F::table_word(i);
  }
};
template <BlockFormat F>
__device__ constexpr TableWords<F> kTableWords;

template <BlockFormat F, bool Used>
struct LaneTable {
  static constexpr int kBytes = 0, kWords = 0;
  __device__ LaneTable(const void*, int) {}
  __device__ static uint32_t word(int) { return 0; }
  __device__ static void put(void*, int, uint32_t) {}
};

template <BlockFormat F>
  requires kHasTable<F>
struct LaneTable<F, true> {
  static constexpr int kRowCopies = 16;
  static constexpr int kRowWords = TableWords<F>::kRows, kSingleWords = TableWords<F>::kSingles;
  static constexpr int kRowBytes = 4 * kRowCopies * kRowWords;
  // 32 copies where rings of two items for each of 16 warps fit beside them.
  static constexpr int kRings = 2 * 16 * 32 * (F::kBytes * 256 / F::kElems);
  static constexpr int kCopies = kRowBytes + 128 * kSingleWords + kRings <= 190 * 1024 ? 32 : 16;
  static constexpr int kBytes = kRowBytes + 4 * kCopies * kSingleWords, kWords = kRowWords + kSingleWords;
  const uint8_t *rows, *singles;
  uint32_t row_copy, single_copy;

  __device__ LaneTable(const void* table, int lane)
      : rows(static_cast<const uint8_t*>(table)),
        singles(rows + kRowBytes),
        row_copy(lane % kRowCopies * 0x00040004u),
        single_copy(4 * (lane % kCopies)) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t i) const {  // as a multiply-add
    return *reinterpret_cast<const uint32_t*>(singles + (i * (4 * kCopies) + single_copy));
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t i, uint32_t more) const {
    return *reinterpret_cast<const uint32_t*>(singles +
                                              (i * (4 * kCopies) | more * (4 * kCopies) | single_copy));
  }
  __device__ __forceinline__ uint32_t copy() const { return row_copy; }
  __device__ __forceinline__ uint32_t address(uint32_t names, int j, uint32_t places, int k) const {
    return pick_bytes(places, names, static_cast<uint32_t>(k | (4 + j) << 4 | (k ^ 1) * 0x1100));
  }
  __device__ __forceinline__ uint32_t entry(uint32_t names, int j, uint32_t places, int k) const {
    return *reinterpret_cast<const uint16_t*>(rows + address(names, j, places, k));
  }
  __device__ __forceinline__ uint32_t whole(uint32_t names, int j, uint32_t places, int k) const {
    return *reinterpret_cast<const uint32_t*>(rows + address(names, j, places, k));
  }

  // Word i of all, and into all its copies. Neighbouring lanes begin at different banks.
  __device__ __forceinline__ static uint32_t word(int i) { return kTableWords<F>.words[i]; }
  __device__ __forceinline__ static void put(void* table, uint32_t i, uint32_t word) {
    const uint4 four = make_uint4(word, word, word, word);
    uint4* const all = static_cast<uint4*>(table);
    if (kSingleWords == 0 || static_cast<int>(i) < kRowWords) {
#pragma unroll
      for (int v = 0; v < kRowCopies / 4; ++v)
        all[i * (kRowCopies / 4) + (v + i / 2) % (kRowCopies / 4)] = four;
    } else {
      constexpr int kVectors = kCopies / 4;
      i -= kRowWords;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) all[kRowBytes / 16 + i * kVectors + (v + i) % kVectors] = four;
    }
  }
};

template <BlockFormat F, bool Tabled>
__device__ __forceinline__ void fill_table(void* table) {  // by all threads of the block
  using Table = LaneTable<F, Tabled>;
#pragma unroll 4
  for (int i = threadIdx.x; i < Table::kWords; i += blockDim.x) Table::put(table, i, Table::word(i));
}

template <BlockFormat F, bool Strided, bool Tabled>
__device__ __forceinline__ uint32_t few_codes(bytes_ptr block, int i, const LaneTable<F, Tabled>& table) {
  if constexpr (Tabled && PlanarTable<F>)
    return F::planar_codes(block, i, table);
  else if constexpr (Tabled)
    return F::quad(block, i, table);
  else if constexpr (Strided)
    return F::strided_codes(block, i);
  else
    return codes_of<F>(block, i);
}

}  // namespace quantgemm::dp4a
