// SPDX-License-Identifier: MIT
// Where a cluster that reads a row of logits (sample_rows.cu) sends what it keeps of it: the shared memory of
// its first block.
#pragma once
#include "launch.h"
#include "row_strips.cuh"

namespace quantgemm {

// What a cluster's first block gets: [strips][keys of lanes][keys of groups], as many as the row has.
struct Inbox {
  int num_strips, num_chunks, num_groups;  // without truncation the last two are 0
  int bytes_sent;

  template <class T>
  static Inbox of(const VerifyArgs& args, T) {
    const int length = static_cast<int>(args.vocab), strip = strip_length(length);
    const bool truncates = args.parameters.top_k || args.parameters.top_p || args.parameters.min_p;
    Inbox out{(length + strip - 1) / strip, 0, 0, 0};
    if (truncates) out.num_chunks = lanes_of<T>(length) / 32, out.num_groups = (length + kGroup - 1) / kGroup;
    out.bytes_sent = 8 * out.num_strips + 64 * out.num_chunks + 4 * out.num_groups;
    return out;
  }
  static constexpr int kLaneKeys = kMaxStrips * sizeof(float2);  // where they begin
  static constexpr int kMostBytes =                              // of any row
      kLaneKeys + 2 * lanes_of<float>(kMaxVocab) + 4 * ((kMaxVocab + kGroup - 1) / kGroup);
  __host__ __device__ int group_keys() const { return kLaneKeys + 64 * num_chunks; }
  int bytes() const { return group_keys() + 4 * num_groups; }
};

#if __CUDA_ARCH__ >= 900
extern __shared__ __align__(16) uint8_t inbox_bytes[];

// The way to it, by stores that count themselves where they arrive.
struct ToInbox {
  uint32_t strips, lanes, groups, arrivals;  // addresses there; lanes 0: no keys are wanted

  __device__ __forceinline__ ToInbox(const Inbox& inbox, const uint64_t* own_arrivals)
      : strips(there(inbox_bytes)), arrivals(there(own_arrivals)) {
    lanes = inbox.num_chunks > 0 ? strips + Inbox::kLaneKeys : 0;
    groups = strips + static_cast<uint32_t>(inbox.group_keys());
  }
  static __device__ __forceinline__ uint32_t there(const void* own) {
    uint32_t address = shared_address(own);
    asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
    return address;
  }
  __device__ __forceinline__ void send(uint32_t to, uint32_t word) const {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(word), "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ bool wanted() const { return lanes != 0; }
  __device__ __forceinline__ void put_group(int i, uint32_t key) const { send(groups + 4 * i, key); }
  __device__ __forceinline__ void put_lanes(int chunk, int lane, uint32_t key) const {
    const uint32_t next = __shfl_down_sync(~0u, key, 1);
    if (lane % 2 == 0) send(lanes + 64 * chunk + 2 * lane, key >> 16 | (next & 0xffff0000u));
  }
};
__device__ __forceinline__ void put_strip(const ToInbox& inbox, int i, float2 sum) {
  inbox.send(inbox.strips + 8 * i, __float_as_uint(sum.x));
  inbox.send(inbox.strips + 8 * i + 4, __float_as_uint(sum.y));
}

// By the first block, before the cluster meets.
__device__ __forceinline__ void open_inbox(uint64_t& arrivals, int bytes) {
  if (threadIdx.x == 0) {
    const uint32_t barrier = shared_address(&arrivals);
    mbarrier_init(barrier, 1);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
}
// All of it has come.
__device__ __forceinline__ void wait_for_inbox(const uint64_t& arrivals) {
  for (uint32_t done = 0; !done;)
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0;"
        " selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(shared_address(&arrivals))
        : "memory");
}
#endif

}  // namespace quantgemm
