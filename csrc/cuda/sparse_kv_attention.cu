// SPDX-License-Identifier: MIT
// Attention over the native key-value cache: how the context is cut, and the sum over the cuts.
#include "../kv_page.h"
#include "launch.h"
#include "memory.cuh"

namespace quantgemm {

// In sparse_kv_attention_*.cu
template <int Channels>
cudaError_t launch_attention_of(const KvAttentionArgs& args, cudaStream_t stream);

namespace {

// One block per query head: out = Σ parts of the context, each with its own maximum (in powers of 2).
template <class Real16>
__global__ void __launch_bounds__(128) merge_kernel(KvAttentionArgs args) {
  const KvCacheArgs& c = args.cache;
  const int64_t head = blockIdx.x, stride = c.channels + 2, heads = gridDim.x;
  const float* parts = args.partial + head * stride;
  float top = -INFINITY, mass = 0.0f;
  for (int64_t s = 0; s < args.split; ++s) top = fmaxf(top, parts[s * heads * stride + c.channels]);
  const auto factor = [&](int64_t s) {
    const float own = parts[s * heads * stride + c.channels];
    return own == -INFINITY ? 0.0f : exp2f(own - top);
  };
  for (int64_t s = 0; s < args.split; ++s) mass += factor(s) * parts[s * heads * stride + c.channels + 1];
  for (int d = static_cast<int>(threadIdx.x); d < c.channels; d += 128) {
    float sum = 0.0f;
    for (int64_t s = 0; s < args.split; ++s) sum += factor(s) * parts[s * heads * stride + d];
    store1(static_cast<Real16*>(args.out) + head * c.channels + d, mass == 0.0f ? 0.0f : sum / mass);
  }
  if (threadIdx.x == 0)
    args.lse[head] = top == -INFINITY && mass == mass ? -INFINITY : (top + log2f(mass)) / 1.4426950408889634f;
}

int num_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

}  // namespace

int64_t sparse_kv_attention_split(const KvAttentionArgs& args) {
  const KvCacheArgs& c = args.cache;
  // No more than one wave of blocks of four warps, a unit or more for each warp.
  const int64_t rows = c.batch * c.heads * ((args.groups + 7) / 8);
  const int64_t each = c.channels == 256 ? 2 : 4, wave = each * num_multiprocessors() / (rows > 0 ? rows : 1);
  const int64_t most = (c.max_pages + c.recent / kPageTokens + 4) / 4;
  const int64_t split = wave < most ? wave : most;
  return split < 1 ? 1 : split;
}

cudaError_t launch_sparse_kv_attention(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  cudaError_t status = cudaErrorInvalidValue;
  if (c.channels == 64) status = launch_attention_of<64>(args, stream);
  if (c.channels == 128) status = launch_attention_of<128>(args, stream);
  if (c.channels == 256) status = launch_attention_of<256>(args, stream);
  if (status != cudaSuccess) return status;
  const auto heads = static_cast<unsigned>(c.batch * c.heads * args.groups);
  if (c.type == Real::kFloat16)
    merge_kernel<Half><<<heads, 128, 0, stream>>>(args);
  else
    merge_kernel<BFloat16><<<heads, 128, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace quantgemm
