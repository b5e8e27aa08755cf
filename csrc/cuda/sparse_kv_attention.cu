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
extern template cudaError_t launch_attention_of<64, DenseCodes>(const KvAttentionArgs&, int, bool,
                                                                cudaStream_t);
extern template cudaError_t launch_attention_of<128, DenseCodes>(const KvAttentionArgs&, int, bool,
                                                                 cudaStream_t);
extern template cudaError_t launch_attention_of<256, DenseCodes>(const KvAttentionArgs&, int, bool,
                                                                 cudaStream_t);
extern template cudaError_t launch_attention_of<64, BitmapCodes>(const KvAttentionArgs&, int, bool,
                                                                 cudaStream_t);
extern template cudaError_t launch_attention_of<128, BitmapCodes>(const KvAttentionArgs&, int, bool,
                                                                  cudaStream_t);
extern template cudaError_t launch_attention_of<256, BitmapCodes>(const KvAttentionArgs&, int, bool,
                                                                  cudaStream_t);
extern template cudaError_t launch_attention_of<64, FourOfEightCodes>(const KvAttentionArgs&, int, bool,
                                                                      cudaStream_t);
extern template cudaError_t launch_attention_of<128, FourOfEightCodes>(const KvAttentionArgs&, int, bool,
                                                                       cudaStream_t);
extern template cudaError_t launch_attention_of<256, FourOfEightCodes>(const KvAttentionArgs&, int, bool,
                                                                       cudaStream_t);

namespace {

constexpr int kMergeThreads = 256;

// One block per query head: out = Σ parts of the context, each with its own maximum (in powers of 2), where
// no cluster does that. Few parts: a thread per channel knows all of its own.
template <class Real16>
__global__ void __launch_bounds__(256) merge_few_kernel(KvAttentionArgs args) {
  const int channels = static_cast<int>(args.cache.channels), thread = static_cast<int>(threadIdx.x);
  const int64_t head = blockIdx.x, stride = channels + 2;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const FewParts parts(static_cast<int>(args.split), [&](int s, float& sum, float& top, float& mass) {
    const float* part = args.partial + (s * int64_t{gridDim.x} + head) * stride;
    sum = part[thread], top = part[channels], mass = part[channels + 1];
  });
  float sum, top, mass;
  parts.merge(sum, top, mass);
  const AttentionResult<Real16> result{args, head};
  result.store(thread, sum, mass);
  if (thread < 32) result.store_logarithm(top, mass);
}

// More. Shared memory: a factor per part.
template <class Real16>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(KvAttentionArgs args) {
  extern __shared__ float factors[];
  __shared__ float sums[kMergeThreads];
  const int channels = static_cast<int>(args.cache.channels), split = static_cast<int>(args.split);
  const int64_t head = blockIdx.x, stride = channels + 2, part = gridDim.x * stride;
  const float* parts = args.partial + head * stride;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
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
  const AttentionResult<Real16> result{args, head};
  if (thread < channels) {
    for (int i = thread + channels; i < kMergeThreads; i += channels) sum += sums[i];
    result.store(d, sum, mass);
  }
  if (thread < 32) result.store_logarithm(top, mass);
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
cudaError_t launch_kind(const KvAttentionArgs& args, int warps, bool in_clusters, cudaStream_t stream) {
  const int64_t channels = args.cache.channels;
  if (channels == 64) return launch_attention_of<64, Codes>(args, warps, in_clusters, stream);
  if (channels == 128) return launch_attention_of<128, Codes>(args, warps, in_clusters, stream);
  if (channels == 256) return launch_attention_of<256, Codes>(args, warps, in_clusters, stream);
  return cudaErrorInvalidValue;
}

// How the context is cut into parts.
struct AttentionCut {
  int64_t split;
  int warps;       // of a block
  int64_t places;  // for blocks, on the whole device
  bool is_full;    // as many blocks as fit, not fewer for want of pages
};
// No more than one wave of blocks, and a page or more for each warp.
AttentionCut attention_cut(const KvAttentionArgs& args, const Device& device, int warps) {
  const KvCacheArgs& c = args.cache;
  int64_t blocks = device.shared_per_multiprocessor / (attention_shared(c, warps) + kStaticShared);
  const int64_t most_blocks = resident_warps(c.channels) / warps;
  blocks = blocks < most_blocks ? blocks : most_blocks;
  // As for one token: the sums of several are the same bit for bit.
  const int64_t rows = c.batch * c.heads * ((args.groups / args.tokens + 7) / 8);
  const int64_t wave = blocks * device.multiprocessors / (rows > 0 ? rows : 1);
  const int64_t most = (c.max_pages + c.recent / kPageTokens + warps) / warps;
  return {wave < most ? wave : most, warps, blocks * device.multiprocessors, wave <= most};
}
// Whether so many clusters, each of a block per part, are on the device at once: only then are they no later
// than blocks by themselves. Clusters leave places over, of an H200's 132 (one block a multiprocessor) 12 of
// three or four blocks and up to 30 of more; and with three blocks a multiprocessor a launch merges sooner.
bool clusters_fit(const Device& device, const AttentionCut& cut, int64_t clusters) {
  const int percent = cut.split > 4 ? 75 : (cut.split > 2 ? 90 : 100);
  const int64_t two_each = 2 * int64_t{device.multiprocessors};
  return launches_overlap(device) && cut.split > 1 && cut.split <= kFewParts &&
         clusters * cut.split <= (cut.places < two_each ? cut.places : two_each) * percent / 100;
}
// Large blocks have fewer parts to merge, with one part nothing. Small ones leave fewer warps over, and
// where pages are few no multiprocessor has two blocks' warps while others have one block's.
AttentionCut attention_cut(const KvAttentionArgs& args, const Device& device) {
  AttentionCut small = attention_cut(args, device, kMostWarps / 2);
  if (small.split < 1) small.split = 1;
  const AttentionCut large = attention_cut(args, device, kMostWarps);
  const bool is_large =
      args.cache.channels < 256 && large.is_full && large.split >= 1 && 2 * large.split >= small.split;
  if (is_large) return large;
  if (small.split <= kFewParts) return small;
  // 9 to 12 small blocks as 8, if a multiprocessor has one at most, and up to 17 as 8 large ones, of as many
  // warps but for four: a cluster of them saves the launch that merges.
  const KvCacheArgs& c = args.cache;
  const int64_t rows = c.batch * c.heads * ((args.groups / args.tokens + 7) / 8);
  AttentionCut fewer = small, larger = large;
  fewer.split = kFewParts;
  if (larger.split > kFewParts) larger.split = kFewParts;
  const bool is_fewer = 2 * small.split <= 3 * kFewParts && rows * kFewParts <= device.multiprocessors;
  if (is_fewer && clusters_fit(device, fewer, rows)) return fewer;
  const bool is_larger = 2 * larger.split + 1 >= small.split && clusters_fit(device, larger, rows);
  return is_larger ? larger : small;
}

}  // namespace

int64_t attention_shared(const KvCacheArgs& c, int warps) {
  const PageFormat &k = c.key_format, &v = c.value_format;
  const bool is_same = k.kind == v.kind && k.bits == v.bits;
  const int64_t slack[2] = {overreach(k, c.channels), overreach(v, c.channels)};
  const int64_t pages = whole_keys_bytes(c.channels, k) + value_page_bytes(c.channels, v);
  const int64_t bytes = table_bytes(k) + (is_same ? 0 : table_bytes(v)) + query_bytes(c.channels) +
                        warps * pages + (slack[0] > slack[1] ? slack[0] : slack[1]);
  const int64_t sums = 4 * warps * 8 * c.channels;
  return bytes > sums ? bytes : sums;
}

// Keys and values of one kind have kernels of their own.
static bool is_mixed(const KvCacheArgs& c) { return c.key_format.kind != c.value_format.kind; }

int64_t sparse_kv_attention_split(const KvAttentionArgs& args) {
  if (is_mixed(args.cache)) return sparse_kv_attention_mixed_split(args);
  return attention_cut(args, current_device()).split;
}

cudaError_t launch_sparse_kv_attention(const KvAttentionArgs& args, cudaStream_t stream) {
  const KvCacheArgs& c = args.cache;
  Device device;
  cudaError_t status = device.read();
  if (status != cudaSuccess) return status;
  bool is_merged = false;
  if (is_mixed(c)) {
    status = launch_sparse_kv_attention_mixed(args, stream);  // parts, even if there is only one
  } else {
    const AttentionCut cut = attention_cut(args, device);
    const bool in_clusters = clusters_fit(device, cut, c.batch * c.heads * ((args.groups + 7) / 8));
    is_merged = in_clusters || cut.split == 1;
    status = cudaErrorNotSupported;
    switch (c.key_format.kind) {
      case PageKind::kDense: status = launch_kind<DenseCodes>(args, cut.warps, in_clusters, stream); break;
      case PageKind::kBitmap: status = launch_kind<BitmapCodes>(args, cut.warps, in_clusters, stream); break;
      case PageKind::kFourOfEight:
        status = launch_kind<FourOfEightCodes>(args, cut.warps, in_clusters, stream);
        break;
    }
  }
  if (status != cudaSuccess || is_merged) return status;
  const bool is_few = args.split <= kFewParts;
  const DependentLaunch launch(static_cast<unsigned>(c.batch * c.heads * args.groups),
                               is_few ? static_cast<int>(c.channels) : kMergeThreads, device, stream,
                               is_few ? 0 : static_cast<int>(4 * args.split));
  const bool is_half = c.type == Real::kFloat16;
  const auto kernel = is_few ? (is_half ? merge_few_kernel<Half> : merge_few_kernel<BFloat16>)
                             : (is_half ? merge_kernel<Half> : merge_kernel<BFloat16>);
  return cudaLaunchKernelEx(&launch.config, kernel, args);
}

}  // namespace quantgemm
