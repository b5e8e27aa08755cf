// SPDX-License-Identifier: MIT
// A format's look-up table in shared memory, in 32 copies, or 16 or 4 where it is large: word i of copy c
// is word copies · i + c, so with 32 of them each lane reads its own bank, whatever it looks up.
#pragma once
#include "gemm_3_dp4a.cuh"

namespace quantgemm::dp4a {

template <BlockFormat F, bool Used>
struct LaneTable {
  static constexpr int kBytes = 0;
  __device__ LaneTable(const void*, int) {}
  __device__ static void fill(void*) {}
};

template <TableFormat F>
struct LaneTable<F, true> {
  static constexpr int kCopies = 128 * F::kTableWords <= 81920 ? 32 : 64 * F::kTableWords <= 81920 ? 16 : 4;
  static constexpr int kBytes = 4 * kCopies * F::kTableWords;
  const uint8_t* words;
  uint32_t copy;

  __device__ LaneTable(const void* table, int lane)
      : words(static_cast<const uint8_t*>(table)), copy(4 * (lane % kCopies)) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t i) const {  // as a multiply-add
    return *reinterpret_cast<const uint32_t*>(words + (i * (4 * kCopies) + copy));
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t i, uint32_t more) const {
    return *reinterpret_cast<const uint32_t*>(words + (i * (4 * kCopies) | more * (4 * kCopies) | copy));
  }
  __device__ static void fill(void* table) {  // by all threads of the block
    constexpr int kVectors = kCopies / 4;
#pragma unroll 4
    for (int i = threadIdx.x; i < F::kTableWords; i += blockDim.x) {
      const uint32_t word = F::table_word(i);
#pragma unroll
      for (int v = 0; v < kVectors; ++v)  // neighbouring lanes begin at different banks
        static_cast<uint4*>(table)[i * kVectors + (v + i) % kVectors] = make_uint4(word, word, word, word);
    }
  }
};

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
