// SPDX-License-Identifier: MIT
// The laws of truncated rows, a block each, from the strips and group maxima that row_strips.cu has
// found; and the launches of both kernels, wave after wave.
#include <algorithm>

#include "launch.h"
#include "row_truncated.cuh"
#include "row_waves.cuh"

namespace quantgemm {
namespace {

// grid (sequences; layers of the wave)
template <class T>
__global__ void __launch_bounds__(kLawThreads, 2)
    row_laws_kernel(const __grid_constant__ VerifyArgs args, Wave wave) {
  const SlotRow info = wave.row(args, blockIdx.x, static_cast<int>(blockIdx.y));
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (!info.exists) return;
  const RowScratch scratch = scratch_of(args);
  if (wave.first != 0 && !is_reached<T>(args, scratch, wave, info, state_of(scratch, info.sequence))) return;
  const bool keeps = scratch.has_kept && !info.is_draft;
  Kept* const kept = keeps ? scratch.kept + info.slot * kMaxKept : nullptr;
  const LawAndToken found = law_of_row<kLawThreads, false, false>(
      keys_of_slot(scratch, info.slot), view_of<T>(args, info), info.parameters, nullptr, kept);
  if (threadIdx.x != 0) return;
  scratch.laws[info.slot] = found.law;
  if (keeps) scratch.num_kept[info.slot] = found.num_kept;
}

// The shared memory of a multiprocessor that has room for one block that finds laws.
constexpr unsigned kLawSharedPercent = 14;  // 32 kB on sm_90
static_assert(sizeof(LawShared) > (15 << 10) && sizeof(LawShared) <= (31 << 10));

// Little is read in one wave: a launch takes as long as some 16 MB. More in waves of a third of the positions
// that overlap: the second is read without asking, while the first is judged. Where laws are found in
// between, and of few positions, the first third in one wave and the rest in another. Of much the first has
// enough to read to be worth a launch, and each next one twice as many.
constexpr int64_t kWaveBytes = 32 << 20, kOneWaveBytes = 64 << 20, kTwoWavesBytes = 128 << 20,
                  kOverlapBytes = 144 << 20;

cudaError_t launch_overlapping_waves(const VerifyArgs& args, const Device& device, cudaStream_t stream) {
  const int positions = static_cast<int>(args.max_drafts) + 1, size = (positions + 1) / 3;
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < 3 && error == cudaSuccess; ++i) {
    Wave wave{i * size, i < 2 ? (i + 1) * size : positions, i != 0, true, true};
    wave.judges = i == 1;
    wave.known = i == 2 ? size : 0;
    error = launch_row_strips(args, wave, device, stream);
  }
  return error;
}

cudaError_t launch_waves(const VerifyArgs& args, const Device& device, cudaStream_t stream) {
  const int positions = static_cast<int>(args.max_drafts) + 1;
  const int64_t bytes = args.num_sequences * args.vocab * Wave{0, 1}.layers(args) *
                        static_cast<int64_t>(args.value_type == Real::kFloat32 ? 4 : 2);
  const bool overlap = launches_overlap(device) && args.mode == VerifyMode::kChain &&
                       !laws_are_stored(args) && positions > 4 && positions * bytes > kOneWaveBytes &&
                       positions * bytes <= kOverlapBytes;
  if (overlap) return launch_overlapping_waves(args, device, stream);
  const bool in_many = args.mode == VerifyMode::kChain && positions * bytes > kTwoWavesBytes;
  int64_t size = positions;
  const bool in_two =
      args.mode == VerifyMode::kChain && positions > 3 && !in_many && positions * bytes > kOneWaveBytes;
  if (in_two) size = (positions + 2) / 3;
  if (in_many) size = (kWaveBytes + bytes - 1) / bytes;
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < positions && error == cudaSuccess; first += size, size *= 2) {
    const Wave wave{static_cast<int>(first), static_cast<int>(std::min<int64_t>(first + size, positions)),
                    in_two && first != 0, in_two};
    error = launch_row_strips(args, wave, device, stream);
    if (error != cudaSuccess || !laws_are_stored(args)) continue;
    const dim3 grid(static_cast<unsigned>(args.num_sequences), static_cast<unsigned>(wave.layers(args)));
    DependentLaunch launch(grid, kLawThreads, device, stream);
    const bool few = grid.x * grid.y <= static_cast<unsigned>(device.multiprocessors) && device.major >= 9;
    if (few) {
      // Room for one on each: the first multiprocessor that is free must not get two.
      cudaLaunchAttribute& room = launch.attributes[launch.config.numAttrs++];
      room.id = cudaLaunchAttributePreferredSharedMemoryCarveout;
      room.val.sharedMemCarveout = kLawSharedPercent;
    }
    const auto launch_laws = [&] {
      visit_real(args.value_type, [&]<class T>(T) {
        error = cudaLaunchKernelEx(&launch.config, row_laws_kernel<T>, args, wave);
      });
    };
    launch_laws();
    if (error != cudaSuccess && few) {  // an older driver may not know that attribute
      cudaGetLastError();
      --launch.config.numAttrs;
      launch_laws();
    }
  }
  return error;
}

}  // namespace

int64_t verify_scratch_bytes(const VerifyArgs& args) {
  if (!needs_laws(args)) return 0;
  const RowScratch s = scratch_of(args);
  return 2 * s.slots *
             static_cast<int64_t>(kMaxStrips * sizeof(float2) + sizeof(RowLaw) +
                                  (s.has_keys ? 4 * s.num_groups + 2 * s.num_lanes : 0)) +
         (s.has_kept ? s.slots * static_cast<int64_t>(kMaxKept * sizeof(Kept) + 4) : 0) +
         4 * args.num_sequences;
}

cudaError_t launch_row_laws(const VerifyArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t error = device.read();
  if (error != cudaSuccess) return error;
  error = launch_waves(args, device, stream);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace quantgemm
