// SPDX-License-Identifier: MIT
// Launcher of the int8 tensor-core product: the tile by the number of tokens, the grid by the number of
// tiles. Few tiles are cut along k, in equal shares for all the blocks the device runs at once.
#include "device.h"
#include "gemm_5_mma_q8.cuh"
#include "gemm_5_mma_q8_many.h"

namespace quantgemm {
namespace mma_q8 {

extern template cudaError_t launch_tiles<1>(const GemmArgs&, const Work&, int64_t, cudaStream_t);
extern template cudaError_t launch_tiles<2>(const GemmArgs&, const Work&, int64_t, cudaStream_t);
extern template cudaError_t launch_tiles<4>(const GemmArgs&, const Work&, int64_t, cudaStream_t);
extern template cudaError_t launch_tiles<8>(const GemmArgs&, const Work&, int64_t, cudaStream_t);

namespace {

struct Plan {
  int pairs = 0;  // of 8 tokens; 0: no such format
  Work work{};
  int64_t grid = 0, tiles = 0, partial_bytes = 0;
  int64_t scratch_bytes() const { return grid == tiles ? 0 : partial_bytes + tiles * 4; }
};

template <BlockFormat F, int kPairs>
Plan plan_for(const GemmArgs& args, const Device& device) {
  using L = Layout<F, kPairs>;
  const int fit = device.shared_per_multiprocessor / (L::kBytes + kReservedShared);
  const int per_sm = fit < 1 ? 1 : fit < L::kBlocksPerSm ? fit : L::kBlocksPerSm;
  const int64_t slots = static_cast<int64_t>(device.multiprocessors) * per_sm;
  Plan p;
  p.pairs = kPairs;
  p.work.row_bytes = args.k / F::kElems * F::kBytes;
  p.work.act_bytes = ActivationRow::bytes(args.k);
  p.work.k = static_cast<int>(args.k);
  p.work.token_tiles = (args.m + L::kTokens - 1) / L::kTokens;
  p.work.tile_units = (args.k + L::kStep - 1) / L::kStep;
  p.tiles = p.work.token_tiles * ((args.n + kRows - 1) / kRows);
  p.work.num_units = p.tiles * p.work.tile_units;
  p.grid = p.tiles;
  // Unless whole tiles keep 9 of 10 slots busy. A share is at least 512 of k, to pay for its sums.
  const int64_t waves = (p.tiles + slots - 1) / slots;
  if (10 * p.tiles < 9 * waves * slots) {
    const int64_t most = p.work.num_units / (512 / L::kStep), shares = most < slots ? most : slots;
    if (shares > p.tiles || waves > 1) p.grid = shares;
  }
  p.partial_bytes = p.grid * 2 * L::kTokens * kRows * static_cast<int64_t>(sizeof(float));
  return p;
}

Plan plan_for(const GemmArgs& args) {
  const Device device = current_device();
  Plan plan;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (F::kElems % ActivationRow::kGroup == 0) {
      constexpr int kLargest = Layout<F, 8>::kBytes;
      const bool large_fits = kLargest <= device.shared_per_block &&
                              2 * (kLargest + kReservedShared) <= device.shared_per_multiprocessor;
      const int64_t rest = args.m % 128;  // 64 tokens waste less of the last tile
      const bool prefer_64 = args.m <= 64 || (args.m < 512 && rest > 0 && rest <= 64);
      plan = args.m <= 16               ? plan_for<F, 1>(args, device)
             : args.m <= 32             ? plan_for<F, 2>(args, device)
             : prefer_64 || !large_fits ? plan_for<F, 4>(args, device)
                                        : plan_for<F, 8>(args, device);
    }
  });
  return plan;
}

}  // namespace
}  // namespace mma_q8

int64_t gemm_mma_q8_scratch_bytes(const GemmArgs& args) {
  if (mma_q8::serves_most(args)) return mma_q8::most_scratch_bytes(args);
  if (mma_q8::serves_many(args)) return mma_q8::many_scratch_bytes(args);
  return mma_q8::plan_for(args).scratch_bytes();
}

cudaError_t launch_gemm_mma_q8(const GemmArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  if (mma_q8::serves_most(args)) return mma_q8::launch_most(args, stream);
  if (mma_q8::serves_many(args)) return mma_q8::launch_many(args, stream);
  mma_q8::Plan plan = mma_q8::plan_for(args);
  if (plan.scratch_bytes() > 0) {
    uint8_t* scratch = static_cast<uint8_t*>(args.scratch);
    plan.work.partials = reinterpret_cast<float4*>(scratch);
    plan.work.arrivals = reinterpret_cast<int*>(scratch + plan.partial_bytes);
    const cudaError_t status = cudaMemsetAsync(plan.work.arrivals, 0, plan.tiles * 4, stream);
    if (status != cudaSuccess) return status;
  }
  switch (plan.pairs) {
    case 1: return mma_q8::launch_tiles<1>(args, plan.work, plan.grid, stream);
    case 2: return mma_q8::launch_tiles<2>(args, plan.work, plan.grid, stream);
    case 4: return mma_q8::launch_tiles<4>(args, plan.work, plan.grid, stream);
    case 8: return mma_q8::launch_tiles<8>(args, plan.work, plan.grid, stream);
    default: return cudaErrorNotSupported;
  }
}

}  // namespace quantgemm
