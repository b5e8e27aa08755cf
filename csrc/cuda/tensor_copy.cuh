// SPDX-License-Identifier: MIT
// Tiles of a matrix of bytes by the copy engine of compute capability 9.0 (PTX ISA 9.7.9.27,
// cp.async.bulk.tensor): one thread asks for a whole tile, a barrier counts its bytes. A tile is rows of 128
// bytes, from a multiple of 1024 on; 16-byte piece p of row r arrives at place p ^ (r % 8), so that eight
// rows' pieces lie in different banks. Outside of the matrix are zeros.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "ptx.cuh"

namespace quantgemm {

struct ByteMatrix {
  const void* data;  // at a multiple of 16 bytes, as are its rows
  int64_t rows, cols, row_bytes;
};

// Describes tiles of at most 256 rows. The driver is asked for its function by name, so that nothing has to
// be linked for it.
inline cudaError_t describe_tiles(CUtensorMap& map, const ByteMatrix& matrix, int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess) return status;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.cols), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.row_bytes)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Starts the copy of the tile whose first byte is (row, col), and announces its bytes to the barrier as
// one arrival.
__device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap& map, int col, int row,
                                          uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(target),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// Behind the initialisation of barriers that count such copies.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

}  // namespace quantgemm
