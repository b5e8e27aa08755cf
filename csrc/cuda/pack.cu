// SPDX-License-Identifier: MIT
// Blocks [n, row_bytes] -> strips of the packed layout (formats/packed.h), and back. A thread block owns
// 16 rows by kChunk columns; the blocks of its rows lie in shared memory, so that both sides move whole
// lines: rows as runs of 16 bytes there, lanes' words and pieces of heads here.
// Limit: DRAM, the bytes of the matrix twice, and for few bits issue slots. unpack rebuilds a block by one
// thread and is slower.
#include "../formats/gguf_formats.h"
#include "../formats/packed.h"
#include "dependent_launch.cuh"
#include "launch.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace quantgemm {
namespace {

constexpr int kChunk = 2048, kPackThreads = 256;  // a multiple of every block and of a tile

template <class F>
struct Stage {  // a chunk of 16 rows in shared memory
  static constexpr int kRowBytes = kChunk / F::kElems * F::kBytes;
  static constexpr int kPitch = ((kRowBytes + 15) / 16 + 1 | 1) * 16;  // odd: rows in different banks
  static constexpr int kBytes = kStripRows * kPitch;
};

template <int Bits>
__device__ __forceinline__ void store_words(const uint32_t (&words)[Bits], uint8_t* tile, int lane) {
  if constexpr (Bits >= 4) {
#pragma unroll
    for (int w = 0; w < Bits; w += 4)
      *reinterpret_cast<uint4*>(tile + PackedField<Bits>::at(lane, w)) =
          make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
  } else {
    uint8_t* const own = tile + PackedField<Bits>::at(lane, 0);
    if constexpr (Bits == 2)
      *reinterpret_cast<uint2*>(own) = make_uint2(words[0], words[1]);
    else
      *reinterpret_cast<uint32_t*>(own) = words[0];
  }
}
// A step's codes into a lane's words of one plane, as pack_words does it for pairs: rows r and r + 8, of each
// the codes of columns 0, 1, 8 and 9 as bytes, whose bits from Shift on belong there.
template <int Bits, int Shift>
__device__ __forceinline__ void pack_step(const uint32_t (&rows)[2], int s, uint32_t (&words)[Bits]) {
  constexpr uint32_t kMask = 0x01010101u * ((1u << Bits) - 1), kInOrder = 0x3120u;  // columns 0, 8, 1, 9
  const uint32_t x = (rows[0] >> Shift) & kMask, y = (rows[1] >> Shift) & kMask;
  if constexpr (Bits == 8) {
    words[2 * s] = pick_bytes(x, 0, kInOrder), words[2 * s + 1] = pick_bytes(y, 0, kInOrder);
  } else {
    uint32_t pairs = pick_bytes(x | y << Bits, 0, kInOrder);  // a byte is j = 0, 1 or 2, 3 of a half
    if constexpr (Bits < 4) pairs = (pairs | pairs >> (8 - 2 * Bits)) & PackedField<4 * Bits>::kMask;
    words[s * Bits / 4] |= pairs << PackedField<Bits>::bit(s, 0);
  }
}

template <int Bits>
__device__ __forceinline__ void load_words(bytes_ptr tile, int lane, uint32_t (&words)[Bits]) {
#pragma unroll
  for (int w = 0; w < Bits; ++w)
    words[w] = *reinterpret_cast<const uint32_t*>(tile + PackedField<Bits>::at(lane, w));
}

// The part of a strip that a thread block owns: columns first … first + cols − 1 of `rows` rows.
struct Part {
  int64_t strip, first;
  int rows, cols;
};
__device__ __forceinline__ Part part_of(const PackArgs& args, int64_t chunks) {
  const int64_t strip = blockIdx.x / chunks, first = blockIdx.x % chunks * kChunk;
  return {strip, first,
          static_cast<int>(max(int64_t{0}, min(args.n - strip * kStripRows, int64_t{kStripRows}))),
          static_cast<int>(min(args.k - first, int64_t{kChunk}))};
}

// A row begins anywhere in global memory; in the stage it keeps its place between multiples of 16.
struct Skews {
  int first, step;
  __device__ __forceinline__ Skews(bytes_ptr rows, int64_t row_bytes)
      : first(static_cast<int>(reinterpret_cast<uintptr_t>(rows) % 16)),
        step(static_cast<int>(row_bytes % 16)) {}
  __device__ __forceinline__ int of(int row) const { return (first + row * step) % 16; }
};

// Heads on their way from the stage to their planes: a thread moves a row's piece of a record at a time.
template <PackableFormat F>
struct HeadPlanes {
  using L = PackedLayout<F>;
  const uint8_t* stage;
  const Skews& skews;
  const Part& part;

  // Byte B of a record and, if there are two, the one behind it; `record` is its first block.
  template <int B, bool Two>
  __device__ __forceinline__ uint32_t bytes_at(bytes_ptr record, int cols) const {
    constexpr int kBlock = B / L::kHeadBytes, kAt = kBlock * F::kBytes + F::head_at(B % L::kHeadBytes);
    if constexpr (Two) {
      constexpr int kNext = (B + 1) / L::kHeadBytes * F::kBytes + F::head_at((B + 1) % L::kHeadBytes);
      if constexpr (kNext == kAt + 1 && kAt % 2 == 0 && F::kBytes % 2 == 0)
        return kBlock * F::kElems < cols ? *reinterpret_cast<const uint16_t*>(record + kAt) : 0;
      else
        return bytes_at<B, false>(record, cols) | bytes_at<B + 1, false>(record, cols) << 8;
    } else {
      return kBlock * F::kElems < cols ? record[kAt] : 0;
    }
  }
  template <int B, int Size>
  __device__ __forceinline__ uint32_t word_at(bytes_ptr record, int cols) const {
    if constexpr (Size == 1) return bytes_at<B, false>(record, cols);
    uint32_t word = bytes_at<B, true>(record, cols);
    if constexpr (Size > 2) word |= bytes_at<B + 2, true>(record, cols) << 16;
    return word;
  }
  // The pieces of records from byte First on.
  template <int First>
  __device__ __forceinline__ void store(uint8_t* strip, int64_t k) const {
    if constexpr (First < L::kRecordBytes) {
      constexpr int kSize = L::piece_bytes(First);
      const int spans = (part.cols + L::kSpan - 1) / L::kSpan;
      uint8_t* const plane = strip + L::piece_at(k, First) + part.first / L::kSpan * kStripRows * kSize;
      for (int i = threadIdx.x; i < spans * kStripRows; i += kPackThreads) {
        const int span = i / kStripRows, row = i % kStripRows / 2 + i % 2 * 8;
        bytes_ptr record =
            stage + row * Stage<F>::kPitch + skews.of(row) + span * (L::kSpanBlocks * F::kBytes);
        const int cols = row < part.rows ? part.cols - span * L::kSpan : 0;
        uint8_t* const to = plane + i * kSize;
        if constexpr (kSize == 16)
          *reinterpret_cast<uint4*>(to) =
              make_uint4(word_at<First, 4>(record, cols), word_at<First + 4, 4>(record, cols),
                         word_at<First + 8, 4>(record, cols), word_at<First + 12, 4>(record, cols));
        else if constexpr (kSize == 8)
          *reinterpret_cast<uint2*>(to) =
              make_uint2(word_at<First, 4>(record, cols), word_at<First + 4, 4>(record, cols));
        else if constexpr (kSize == 4)
          *reinterpret_cast<uint32_t*>(to) = word_at<First, 4>(record, cols);
        else if constexpr (kSize == 2)
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word_at<First, 2>(record, cols));
        else
          *to = static_cast<uint8_t>(word_at<First, 1>(record, cols));
      }
      store<First + kSize>(strip, k);
    }
  }
};

template <PackableFormat F>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackArgs args, int64_t chunks) {
  using L = PackedLayout<F>;
  using S = Stage<F>;
  extern __shared__ uint4 shared[];
  uint8_t* const stage = reinterpret_cast<uint8_t*>(shared);
  const Part part = part_of(args, chunks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kPackThreads / 32;
  let_next_kernel_start();  // settle_kernel, which then waits
  const int64_t row_bytes = args.k / F::kElems * F::kBytes;
  bytes_ptr source = args.from + part.strip * kStripRows * row_bytes + part.first / F::kElems * F::kBytes;
  const int run = part.cols / F::kElems * F::kBytes;
  const Skews skews(source, row_bytes);
  for (int row = warp; row < part.rows; row += warps) {
    const int skew = skews.of(row), bytes = skew + run;
    bytes_ptr from = source + row * row_bytes - skew;
    uint8_t* to = stage + row * S::kPitch;
#pragma unroll 1
    for (int i = 16 * lane; i + 16 <= bytes; i += 512) cp_async16(shared_address(to + i), from + i);
#pragma unroll 1
    for (int i = bytes / 16 * 16 + lane; i < bytes; i += 32) to[i] = from[i];
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  // Each lane reads quads of one row, and lanes 4r + c and c ^ 1 exchange the pairs that the other one keeps:
  // even lanes read row r and keep first pairs, odd ones row r + 8 and second pairs. While one reads columns
  // + 0 the other reads + 8, from other banks.
  uint8_t* const strip = args.to + part.strip * L::strip_bytes(args.k);
  const int r = lane / 4, c = lane % 4, odd = lane % 2, own_row = r + 8 * odd;
  bytes_ptr row = stage + own_row * S::kPitch + skews.of(own_row);
  const uint32_t keeps = odd ? 0x3276u : 0x5410u, sends = odd ? 0x1054u : 0x7632u;
  const uint32_t valid[2] = {r < part.rows ? ~0u : 0u, r + 8 < part.rows ? ~0u : 0u};
  const int64_t first_tile = part.first / kTileCols;
  for (int tile = warp; tile * kTileCols < part.cols; tile += warps) {
    const uint32_t late = tile * kTileCols + 32 < part.cols ? ~0u : 0u;  // blocks of 32 may end in a tile
    uint32_t low[L::kLowBits] = {}, high[L::kHighBits > 0 ? L::kHighBits : 1] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int col = tile * kTileCols + 16 * s;
      uint32_t quads[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        quads[i] =
            stored_codes<F>(row + col / F::kElems * F::kBytes, col % F::kElems / 4 | (i ^ odd) << 1 | c / 2);
      const uint32_t own = pick_bytes(quads[0], quads[1], keeps),
                     other = __shfl_xor_sync(~0u, pick_bytes(quads[0], quads[1], sends), 1),
                     mask = s < 2 ? ~0u : late;
      const uint32_t rows[2] = {(odd ? other : own) & (valid[0] & mask),
                                (odd ? own : other) & (valid[1] & mask)};
      pack_step<L::kLowBits, 0>(rows, s, low);
      if constexpr (L::kHighBits > 0) pack_step<L::kHighBits, L::kLowBits>(rows, s, high);
    }
    store_words(low, strip + (first_tile + tile) * L::kLowTile, lane);
    if constexpr (L::kHighBits > 0)
      store_words(high, strip + L::high_at(args.k) + (first_tile + tile) * L::kHighTile, lane);
  }

  const HeadPlanes<F> planes{stage, skews, part};
  planes.template store<0>(strip, args.k);
}

template <PackableFormat F>
__global__ void __launch_bounds__(kPackThreads) unpack_kernel(const PackArgs args, int64_t chunks) {
  using L = PackedLayout<F>;
  using S = Stage<F>;
  extern __shared__ uint4 shared[];
  uint8_t* const stage = reinterpret_cast<uint8_t*>(shared);
  uint8_t* const codes = stage + S::kBytes;  // [16][kChunk], padded against bank conflicts
  constexpr int kCodePitch = kChunk + 16;
  const Part part = part_of(args, chunks);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kPackThreads / 32;
  let_next_kernel_start();
  const int64_t row_bytes = args.k / F::kElems * F::kBytes, first_tile = part.first / kTileCols;
  bytes_ptr strip = args.from + part.strip * L::strip_bytes(args.k);

  for (int tile = warp; tile * kTileCols < part.cols; tile += warps) {
    uint32_t pairs[16] = {}, low[L::kLowBits];
    load_words(strip + (first_tile + tile) * L::kLowTile, lane, low);
    unpack_words<L::kLowBits, 0>(low, pairs);
    if constexpr (L::kHighBits > 0) {
      uint32_t high[L::kHighBits];
      load_words(strip + L::high_at(args.k) + (first_tile + tile) * L::kHighTile, lane, high);
      unpack_words<L::kHighBits, L::kLowBits>(high, pairs);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = lane / 4 + 8 * (i % 2),
                col = tile * kTileCols + 16 * (i / 4) + 8 * (i % 4 / 2) + 2 * (lane % 4);
      *reinterpret_cast<uint16_t*>(codes + row * kCodePitch + col) =
          static_cast<uint16_t>(pairs[i] | pairs[i] >> 8);
    }
  }
  for (int i = threadIdx.x; i < S::kBytes / 16; i += kPackThreads) shared[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  uint8_t* const target = args.to + part.strip * kStripRows * row_bytes + part.first / F::kElems * F::kBytes;
  const Skews skews(target, row_bytes);
  const int row_blocks = part.cols / F::kElems;
  for (int i = threadIdx.x; i < part.rows * row_blocks; i += kPackThreads) {
    const int row = i / row_blocks, block_idx = i % row_blocks;
    uint8_t* const block = stage + row * S::kPitch + skews.of(row) + block_idx * F::kBytes;
    bytes_ptr four = codes + row * kCodePitch + block_idx * F::kElems;
#pragma unroll 4  // whole blocks of 256 would need more registers than there are
    for (int q = 0; q < F::kElems / 4; ++q) F::place(block, q, reinterpret_cast<const uint32_t*>(four)[q]);
    load_head<F>(strip, args.k, row, part.first / F::kElems + block_idx, block);
  }
  __syncthreads();

  const int run = row_blocks * F::kBytes;
  for (int row = warp; row < part.rows; row += warps) {
    const int skew = skews.of(row);
    bytes_ptr from = stage + row * S::kPitch + skew;
    uint8_t* const to = target + row * row_bytes;
    const int lead = min((16 - skew) % 16, run), whole = (run - lead) / 16 * 16;
    if (lane < lead) to[lane] = from[lane];
    for (int i = 16 * lane; i < whole; i += 512)
      *reinterpret_cast<uint4*>(to + lead + i) = *reinterpret_cast<const uint4*>(from + lead + i);
    for (int i = lead + whole + lane; i < run; i += 32) to[i] = from[i];
  }
}

// A product reads its first weights before the launch ahead of it is over (gemm_packed.cuh). That launch may
// not be the one that writes them, so it is this one.
__global__ void settle_kernel() { wait_for_previous_kernel(); }

template <class Kernel>
cudaError_t run(Kernel kernel, int shared_bytes, int64_t strips, const PackArgs& args, cudaStream_t stream) {
  Device device;
  cudaError_t status = device.read();
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  const int64_t chunks = (args.k + kChunk - 1) / kChunk;
  kernel<<<static_cast<unsigned>(strips * chunks), kPackThreads, shared_bytes, stream>>>(args, chunks);
  if (const cudaError_t launched = cudaGetLastError(); launched != cudaSuccess) return launched;
  const DependentLaunch settle(1, 1, device, stream);
  return cudaLaunchKernelEx(&settle.config, settle_kernel);
}

}  // namespace

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>)
      status = run(pack_kernel<F>, Stage<F>::kBytes, num_strips(args.n), args, stream);
  });
  return status;
}

cudaError_t launch_unpack(const PackArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaErrorNotSupported;
  BlockFormats::visit(args.qtype, [&]<class F>(F) {
    if constexpr (PackableFormat<F>)
      status = run(unpack_kernel<F>, Stage<F>::kBytes + kStripRows * (kChunk + 16),
                   (args.n + kStripRows - 1) / kStripRows, args, stream);
  });
  return status;
}

}  // namespace quantgemm
