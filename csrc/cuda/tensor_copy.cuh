// SPDX-License-Identifier: MIT
// The copy engine of compute capability 9.0 (PTX ISA 9.7.9.25.5, cp.async.bulk): one thread asks for bytes
// or for a tile of a matrix, a barrier in shared memory counts them. Tiles arrive in the order that wgmma.cuh
// calls swizzled; what lies outside of the matrix as zeros. And the blocks of a cluster, how they talk.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "ptx.cuh"

namespace quantgemm {

struct ByteMatrix {
  const void* data;  // at a multiple of 16 bytes, as are its rows
  int64_t rows, cols, row_bytes;
};

// The driver is asked for its function by name, so that nothing has to be linked for it.
struct TileEncoder {
  decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  cudaError_t status;

  TileEncoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                              &found);
    if (status == cudaSuccess && found != cudaDriverEntryPointSuccess) status = cudaErrorNotSupported;
    encode = reinterpret_cast<decltype(encode)>(function);
  }
};

// Describes tiles of `rows` rows × 128 bytes.
inline cudaError_t describe_tiles(CUtensorMap& map, const ByteMatrix& matrix, int rows) {
  static const TileEncoder encoder;
  if (encoder.status != cudaSuccess) return encoder.status;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.cols), static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.row_bytes)};
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(rows)}, steps[2] = {1, 1};
  const CUresult result =
      encoder.encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix.data), sizes, strides,
                     box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// An arrival that announces bytes to the barrier's phase.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// `bytes` as they are; both sides and the number at multiples of 16.
__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, uint32_t bytes,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}
// `bytes`, as above, into the L2. PTX ISA 9.7.9.25.5.3 (cp.async.bulk.prefetch).
__device__ __forceinline__ void prefetch_bulk(const void* source, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
#endif
}
// The tile that begins with byte `col` of row `row`.
__device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap& map, int col, int row,
                                          uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(target),
      "l"(&map), "r"(col), "r"(row), "r"(barrier)
      : "memory");
#endif
}
// Likewise to the same place in all blocks of the cluster whose bit
// is set in `blocks`, counted by the same barrier of each.
__device__ __forceinline__ void copy_tile(uint32_t target, const CUtensorMap& map, int col, int row,
                                          uint32_t barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(&map), "r"(col), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// The way back: a tile to where the matrix has room for it. Others' stores to shared memory come before it if
// they made them visible to the copy engine and then met this thread at a barrier.
__device__ __forceinline__ void publish_to_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void store_tile(const CUtensorMap& map, int col, int row, uint32_t source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
               "r"(col), "r"(row), "r"(source)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Shared memory is read.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Behind the initialisation of barriers that count such copies or arrivals of other blocks.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// All threads of all blocks of the cluster meet.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}
// The place in the shared memory of another block of the cluster that has this address in one's own.
__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void mbarrier_arrive_there(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ float4 load_there(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace quantgemm
