// SPDX-License-Identifier: MIT
// Attention over the native key-value cache: how the context is cut, and the sum over the cuts.
#include "../kv_page.h"
#include "dependent_launch.cuh"
#include "launch.h"
#include "memory.cuh"
#include "ptx.cuh"
#include "sparse_kv_attention.cuh"
#include "sparse_kv_bitmap.cuh"
#include "sparse_kv_four_of_eight.cuh"

namespace quantgemm {

// In sparse_kv_attention_*.cu
extern template cudaError_t launch_attention_of<64, DenseCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<128, DenseCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<256, DenseCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<64, BitmapCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<128, BitmapCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<256, BitmapCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<64, FourOfEightCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<128, FourOfEightCodes>(const KvAttentionArgs&, cudaStream_t);
extern template cudaError_t launch_attention_of<256, FourOfEightCodes>(const KvAttentionArgs&, cudaStream_t);

namespace {

constexpr int kMergeThreads = 256;

// One block per query head: out = Σ parts of the context, each with its own maximum (in powers of 2).
// Shared memory: a factor per part.
template <class Real16>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(KvAttentionArgs args) {
  extern __shared__ float factors[];
  __shared__ float sums[kMergeThreads];
  const KvCacheArgs& c = args.cache;
  const int channels = static_cast<int>(c.channels), split = static_cast<int>(args.split);
  const int64_t head = blockIdx.x, stride = channels + 2, part = gridDim.x * stride;
  const float* parts = args.partial + head * stride;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const auto mean_of = [&](bool value, int i) {
    const int64_t row = (value ? c.batch * c.heads : 0) + head / args.groups;
    return to_float(static_cast<const Real16*>(c.means)[row * channels + i]);
  };
  wait_for_previous_kernel();
  let_next_kernel_start();
  // This thread's first parts are on their way while every warp finds the maximum and the mass for itself.
  constexpr int kFirst = 8;
  const int d = thread % channels, each = kMergeThreads / channels;
  float first[kFirst];
#pragma unroll
  for (int i = 0; i < kFirst; ++i) {
    const int s = thread / channels + i * each;
    first[i] = s < split ? parts[s * part + d] : 0.0f;
  }
  float top = -INFINITY, mass = 0.0f;
  for (int s = lane; s < split; s += 32) top = fmaxf(top, parts[s * part + channels]);
  for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  for (int s = lane; s < split; s += 32) {
    const float own = parts[s * part + channels], factor = own == -INFINITY ? 0.0f : fast_exp2(own - top);
    mass += factor * parts[s * part + channels + 1];
    if (thread < 32) factors[s] = factor;
  }
  for (int step = 1; step < 32; step *= 2) mass += __shfl_xor_sync(~0u, mass, step);
  __syncthreads();  // factors

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kFirst; ++i) {
    const int s = thread / channels + i * each;
    if (s < split) sum += factors[s] * first[i];
  }
#pragma unroll 8
  for (int s = thread / channels + kFirst * each; s < split; s += each)
    sum += factors[s] * parts[s * part + d];
  sums[thread] = sum;
  __syncthreads();  // sums
  if (thread < channels) {
    for (int i = thread + channels; i < kMergeThreads; i += channels) sum += sums[i];
    const float mean = c.means == nullptr ? 0.0f : mean_of(true, d);
    store1(static_cast<Real16*>(args.out) + head * channels + d, mass == 0.0f ? 0.0f : sum / mass + mean);
  }
  if (thread >= 32) return;
  // What the keys are less by is the same for all tokens, so the weights do not know of it.
  float logit = 0.0f;
  if (c.means != nullptr) {
    for (int i = lane; i < channels; i += 32)
      logit += to_float(static_cast<const Real16*>(args.query)[head * channels + i]) * mean_of(false, i);
    for (int step = 1; step < 32; step *= 2) logit += __shfl_xor_sync(~0u, logit, step);
  }
  if (lane == 0)
    args.lse[head] = top == -INFINITY && mass == mass
                         ? -INFINITY
                         : (top + log2f(mass)) / 1.4426950408889634f + logit * args.scale;
}

int64_t table_bytes(PageFormat format) {
  if (format.kind != PageKind::kBitmap) return 0;
  return format.bits == 2 ? BitmapCodes<2>::kTableBytes : BitmapCodes<4>::kTableBytes;
}
// How far counts of set bits may lead behind a page.
int64_t overreach(PageFormat format, int64_t channels) {
  return format.kind == PageKind::kBitmap ? kPageTokens * (channels - format.keep) * format.bits / 8 + 16 : 0;
}

template <template <int> class Codes>
cudaError_t launch_kind(const KvAttentionArgs& args, cudaStream_t stream) {
  const int64_t channels = args.cache.channels;
  if (channels == 64) return launch_attention_of<64, Codes>(args, stream);
  if (channels == 128) return launch_attention_of<128, Codes>(args, stream);
  if (channels == 256) return launch_attention_of<256, Codes>(args, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t attention_shared(const KvCacheArgs& c) {
  const PageFormat &k = c.key_format, &v = c.value_format;
  const bool is_same = k.kind == v.kind && k.bits == v.bits;
  const int64_t slack[2] = {overreach(k, c.channels), overreach(v, c.channels)};
  const int64_t pages = key_page_bytes(c.channels, k) + value_page_bytes(c.channels, v);
  const int64_t bytes = table_bytes(k) + (is_same ? 0 : table_bytes(v)) + query_bytes(c.channels) +
                        kAttentionWarps * pages + (slack[0] > slack[1] ? slack[0] : slack[1]);
  const int64_t sums = 4 * kAttentionWarps * 8 * c.channels;
  return bytes > sums ? bytes : sums;
}

int64_t sparse_kv_attention_split(const KvAttentionArgs& args) {
  const KvCacheArgs& c = args.cache;
  // No more than one wave of blocks, and a page or more for each warp.
  const Device device = current_device();
  const int64_t shared = attention_shared(c);
  int64_t blocks = device.shared_per_multiprocessor / (shared + 256 + kReservedShared);
  const int64_t most_blocks = attention_blocks(c.channels);
  blocks = blocks < 1 ? 1 : (blocks < most_blocks ? blocks : most_blocks);
  // As for one token: the sums of several are the same bit for bit.
  const int64_t rows = c.batch * c.heads * ((args.groups / args.tokens + 7) / 8);
  const int64_t wave = blocks * device.multiprocessors / (rows > 0 ? rows : 1);
  const int64_t most = (c.max_pages + c.recent / kPageTokens + 4) / 4;
  const int64_t split = wave < most ? wave : most;
  return split < 1 ? 1 : split;
}

cudaError_t launch_sparse_kv_attention(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  cudaError_t status = cudaErrorNotSupported;
  if (c.key_format.kind == c.value_format.kind) {
    switch (c.key_format.kind) {
      case PageKind::kDense: status = launch_kind<DenseCodes>(args, stream); break;
      case PageKind::kBitmap: status = launch_kind<BitmapCodes>(args, stream); break;
      case PageKind::kFourOfEight: status = launch_kind<FourOfEightCodes>(args, stream); break;
    }
  }
  if (status != cudaSuccess) return status;
  Device device;
  if ((status = device.read()) != cudaSuccess) return status;
  const DependentLaunch launch(static_cast<unsigned>(c.batch * c.heads * args.groups), kMergeThreads, device,
                               stream, static_cast<int>(4 * args.split));
  const auto kernel = c.type == Real::kFloat16 ? merge_kernel<Half> : merge_kernel<BFloat16>;
  return cudaLaunchKernelEx(&launch.config, kernel, args);
}

}  // namespace quantgemm
