// SPDX-License-Identifier: MIT
// Launcher of the int8 tensor-core product: the tile by the number of tokens, the grid by the number
// of tiles.
#include <cstdlib>
#include "gemm_5_mma_q8.cuh"

namespace quantgemm {
namespace mma_q8 {
namespace {

struct Device {
  int multiprocessors = 0, shared_per_block = 0, shared_per_sm = 0;
};

Device current_device() {
  Device d;
  int id = 0;
  cudaGetDevice(&id);
  cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id);
  cudaDeviceGetAttribute(&d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  cudaDeviceGetAttribute(&d.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  return d;
}

struct Plan {
  Work work;
  int64_t grid, tiles, partial_bytes;
  bool shared;  // tiles are shared by blocks
  int64_t scratch_bytes() const { return shared ? partial_bytes + tiles * 4 : 0; }
};

template <BlockFormat F, int kPairs>
Plan plan_for(const GemmArgs& args, const Device& device) {
  using L = Layout<F, kPairs>;
  constexpr int kReserved = 1024, kLeastUnits = 512 / L::kStep;
  int per_sm = device.shared_per_sm / (L::kBytes + kReserved);
  if (per_sm > L::kBlocksPerSm) per_sm = L::kBlocksPerSm;
  const int64_t slots = static_cast<int64_t>(device.multiprocessors) * (per_sm > 0 ? per_sm : 1);
  Plan p{};
  p.work.token_tiles = (args.m + L::kTokens - 1) / L::kTokens;
  p.work.tile_units = (args.k + L::kStep - 1) / L::kStep;
  p.tiles = p.work.token_tiles * ((args.n + kRows - 1) / kRows);
  p.work.row_bytes = args.k / F::kElems * F::kBytes;
  p.work.act_bytes = ActivationRow::bytes(args.k);
  p.work.k = static_cast<int>(args.k);
  p.work.num_units = p.tiles * p.work.tile_units;
  // Whole tiles keep at least 9 of 10 slots busy, or equal shares do not pay for their sums.
  const int64_t waves = (p.tiles + slots - 1) / slots;
  p.grid = p.tiles;
  if (10 * p.tiles < 9 * waves * slots) {
    const int64_t most = p.work.num_units / kLeastUnits;
    const int64_t shares = most < slots ? most : slots;
    if (shares > p.tiles || waves > 1) p.grid = shares;
  }
  p.shared = p.grid != p.tiles;
  p.partial_bytes = p.grid * 2 * L::kTokens * kRows * 4;
  return p;
}

template <BlockFormat F, int kPairs>
cudaError_t launch(const GemmArgs& args, const Device& device, cudaStream_t stream) {
  using L = Layout<F, kPairs>;
  Plan plan = plan_for<F, kPairs>(args, device);
  if (plan.shared) {
    uint8_t* scratch = static_cast<uint8_t*>(args.scratch);
    plan.work.partials = reinterpret_cast<float4*>(scratch);
    plan.work.arrivals = reinterpret_cast<int*>(scratch + plan.partial_bytes);
    const cudaError_t status = cudaMemsetAsync(plan.work.arrivals, 0, plan.tiles * 4, stream);
    if (status != cudaSuccess) return status;
  }
  const auto kernel = gemm_mma_q8_kernel<F, kPairs>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kBytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(plan.grid), kThreads, L::kBytes, stream>>>(args, plan.work);
  return cudaGetLastError();
}

// Calls f(F, tile) with the token tile for m: 16, 32, 64 or 128, as an integral constant of pairs.
template <class Fn>
void with_tile(const GemmArgs& args, const Device& device, Fn&& f) {
  BlockFormats::visit(args.qtype, [&]<class F>(F format) {
    if constexpr (F::kElems % 32 == 0) {
      const auto with = [&]<int kPairs>() { f(format, std::integral_constant<int, kPairs>{}); };
      const bool large_fits = 2 * (Layout<F, 8>::kBytes + 1024) <= device.shared_per_sm &&
                              Layout<F, 8>::kBytes <= device.shared_per_block;
      const int64_t rest = args.m % 128;
      if (const char* force = getenv("QG_PAIRS")) {
        switch (atoi(force)) {
          case 1: with.template operator()<1>(); return;
          case 2: with.template operator()<2>(); return;
          case 4: with.template operator()<4>(); return;
          case 6: with.template operator()<6>(); return;
          case 8: with.template operator()<8>(); return;
        }
      }
      if (args.m <= 16) {
        with.template operator()<1>();
      } else if (args.m <= 32) {
        with.template operator()<2>();
      } else if (args.m <= 64 || !large_fits || (args.m < 512 && rest > 0 && rest <= 64)) {
        with.template operator()<4>();
      } else {
        with.template operator()<8>();
      }
    }
  });
}

}  // namespace
}  // namespace mma_q8

int64_t gemm_mma_q8_scratch_bytes(const GemmArgs& args) {
  int64_t bytes = 0;
  const mma_q8::Device device = mma_q8::current_device();
  mma_q8::with_tile(args, device, [&]<class F, int kPairs>(F, std::integral_constant<int, kPairs>) {
    bytes = mma_q8::plan_for<F, kPairs>(args, device).scratch_bytes();
  });
  return bytes;
}

cudaError_t launch_gemm_mma_q8(const GemmArgs& args, cudaStream_t stream) {
  if (args.m == 0 || args.n == 0) return cudaSuccess;
  cudaError_t status = cudaErrorNotSupported;
  const mma_q8::Device device = mma_q8::current_device();
  mma_q8::with_tile(args, device, [&]<class F, int kPairs>(F, std::integral_constant<int, kPairs>) {
    status = mma_q8::launch<F, kPairs>(args, device, stream);
  });
  return status;
}

}  // namespace quantgemm
