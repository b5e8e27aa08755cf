// SPDX-License-Identifier: MIT
// THE CONTRACT between a GGUF block type and every kernel. One sentence covers them all:
//     weight = scale · q + offset,
// q a small signed integer, scale and offset shared by a group of neighbouring weights.
// A format is a struct of constants and two functions (affine, quad); what kernels need beyond
// that is derived here, once. No kernel knows a format's name.
#pragma once
#include <concepts>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "portable.h"

namespace quantgemm {

struct Affine {
  float scale, offset;
};

// kType    ggml's id                      kElems  weights per block (a multiple of 8)
// kName    the name users know            kBytes  bytes per block
// kGroup   weights sharing one affine     kOffset false if the offset is always 0
// affine(block, g)  scale and offset of weights g·kGroup … (g+1)·kGroup − 1
// quad(block, i)    q of weights 4i … 4i+3, one signed byte each, weight 4i in the lowest byte
// Optional, for types that store q + kZero: codes(block, i), those bytes (0…127) without the
// subtraction, which integer products do once per group of activations (codes_of, kZeroOf).
template <class F>
concept BlockFormat = requires(bytes_ptr block, int i) {
  { F::kType } -> std::convertible_to<int>;
  { F::kName } -> std::convertible_to<const char*>;
  { F::kElems } -> std::convertible_to<int>;
  { F::kBytes } -> std::convertible_to<int>;
  { F::kGroup } -> std::convertible_to<int>;
  { F::kOffset } -> std::convertible_to<bool>;
  { F::affine(block, i) } -> std::same_as<Affine>;
  { F::quad(block, i) } -> std::same_as<uint32_t>;
};

template <class F>
concept HasZero = BlockFormat<F> && requires(bytes_ptr block, int i) {
  { F::kZero } -> std::convertible_to<int>;
  { F::codes(block, i) } -> std::same_as<uint32_t>;
};

// Where a code is one of 16 levels picked by a nibble, a format may say so, with quad(block, i) =
// levels(nibbles(block, i)): a loop over many nibbles becomes vector code, a loop over look-ups does not.
template <class F>
concept LevelFormat = BlockFormat<F> && requires(bytes_ptr block, int i, uint32_t four) {
  { F::nibbles(block, i) } -> std::same_as<uint32_t>;
  { F::levels(four) } -> std::same_as<uint32_t>;
};

// A table of levels within ± 63 may say so, by kLargest: then seven bits hold a level.
template <class F>
concept SmallLevels = LevelFormat<F> && requires { requires F::kLargest <= 63; };

// Where codes are points of a codebook, a format may have them looked up in a table that a kernel keeps
// in fast memory: word i of kTableWords is table_word(i), and quad(block, i, table) = quad(block, i) reads
// word j | k, of disjoint bits, as table(j, k), or as table(j). (Or planar_codes, see below.)
template <class F>
concept TableFormat =
    BlockFormat<F> && requires(bytes_ptr block, int i, uint32_t (&table)(uint32_t, uint32_t)) {
      { F::kTableWords } -> std::convertible_to<int>;
      { F::table_word(i) } -> std::same_as<uint32_t>;
    };

// A table whose index has more than eight bits may come in 256 rows of kRowWords words, row_word(row, i).
// table.whole(names, j, places, k) is the word in the row that byte j of `names` says, at the place in byte k
// of `places`: bits 6 and 7 say which word, and table.copy() is added to bytes 0 and 2, or eight bits higher
// to 1 and 3; byte k ^ 1 is zero. table.entry(…) is one half of the word, by bit 1.
template <class F>
concept RowTableFormat = BlockFormat<F> && requires(int i) {
  { F::kRowWords } -> std::convertible_to<int>;
  { F::row_word(i, i) } -> std::same_as<uint32_t>;
};

// Where neighbouring codes lie in neighbouring bits, every eighth is easier to get at:
// strided_codes(block, 8g + j) are the codes of weights 32g + j, + 8, + 16 and + 24.
template <class F>
concept StridedFormat = BlockFormat<F> && requires(bytes_ptr block, int i) {
  { F::strided_codes(block, i) } -> std::same_as<uint32_t>;
};

// Integer products may want codes that are not shifted to the lowest bits of their bytes. Those of quad i
// belong to plane i % count: a product sums each plane by itself, then the planes, each 2^bits of the next,
// and has `unit` times what it wants. Eight fields of a word cost eight masks, but two or four shifts less.
// Codes in planes are unsigned bytes.
struct Planes {
  int count, bits, unit;
};
// strided_codes in planes.
template <class F>
concept PlanarStrides = StridedFormat<F> && requires { Planes{F::kPlanes}; };
// Look-ups in planes, planar_codes(block, i, table), of codes q + kLeast, or q + kLeast + kMore: there byte 2
// of more(block, g) is −1, of the first half of group g, byte 3 of the second, else 0. Groups are of 16
// or 32.
template <class F>
concept PlanarTable = (TableFormat<F> || RowTableFormat<F>) && requires(bytes_ptr block, int i) {
  { Planes{F::kPlanes} };
  { F::kLeast + F::kMore } -> std::convertible_to<int>;
  { F::more(block, i) } -> std::same_as<uint32_t>;
};

// Small integer scales, affine(block, g).scale = factor(block) · (1 + steps(block, g)): a product takes the
// groups of 32 weights together as integers. With int8 activations their sum, in units of Planes, must stay
// below 2^24.
template <class F>
concept SmallScales = BlockFormat<F> && requires(bytes_ptr block, int i) {
  { F::factor(block) } -> std::same_as<float>;
  { F::steps(block, i) } -> std::same_as<int>;
};

// Where groups have integer scales, a format may give eight of them at once, a signed byte each (one of
// 0…127 if there are offsets):
//     affine(block, g) = {factors(block).scale · scale code g, factors(block).offset · offset code g}
// scale_codes(block, i) are those of groups 8i … 8i + 7, offset_codes likewise if there is an offset.
template <class F>
concept TwoLevelFormat = BlockFormat<F> && requires(bytes_ptr block, int i) {
  { F::factors(block) } -> std::same_as<Affine>;
  { F::scale_codes(block, i) } -> std::same_as<uint64_t>;
};

// The same where only a lane that wants one or two of the eight gains by it.
template <class F>
concept ByteScales = BlockFormat<F> && !F::kOffset && requires(bytes_ptr block, int i) {
  { F::factors(block) } -> std::same_as<Affine>;
  { F::scale_bytes(block, i) } -> std::same_as<uint64_t>;
};

// Levels that are twice a float of four bits, sign, two of exponent and one more, may say so.
template <class F>
concept MiniFloats = LevelFormat<F> && requires { requires F::kMiniFloat; };

// Where a code is exactly kCodeBits bits and all other bits are whole bytes, the head (scales, offsets),
// a format may say so and gets a packed form (packed.h). Base class of such a format: its head is
// the bytes from HeadAt on. place(block, i, four) is the way back from stored_codes: it ORs the codes
// of weights 4i … 4i+3 into a block whose code bits are still zero.
template <int Bits, int HeadAt = 0>
struct Packs {
  static constexpr int kCodeBits = Bits;
  QG_HD static constexpr int head_at(int i) { return HeadAt + i; }  // where head byte i is in a block
};
template <class F>
concept PackableFormat = BlockFormat<F> && requires(uint8_t* block, int i, uint32_t four) {
  { F::kCodeBits } -> std::convertible_to<int>;
  { F::head_at(i) } -> std::same_as<int>;
  { F::place(block, i, four) } -> std::same_as<void>;
};

// Unquantised tensors are rows of one-element "blocks" with a value instead of a code.
template <class F>
concept PlainFormat = requires(bytes_ptr element) {
  { F::kType } -> std::convertible_to<int>;
  { F::kName } -> std::convertible_to<const char*>;
  { F::kBytes } -> std::convertible_to<int>;
  { F::value(element) } -> std::same_as<float>;
};

// Blocks lie back to back from an address that is a multiple of 16, so this divides every block's
// address. Formats pass it, or what a field's own offset leaves of it, to load<>().
template <int Bytes, int Offset = 0>
inline constexpr int kAlignOf = [] {
  int align = 16;
  while (Bytes % align != 0 || Offset % align != 0) align /= 2;
  return align;
}();

// One weight from its code, in float32. In every format scale · q is exact wherever an offset is
// added, so fused or separate multiply-add gives the same bits: ggml's.
template <BlockFormat F>
QG_HD float weight(Affine a, float q) {
  if constexpr (F::kOffset) return a.scale * q + a.offset;
  return a.scale * q;
}

// Weights 4i … 4i+3 of a block.
template <BlockFormat F>
QG_HD void decode_quad(bytes_ptr block, int i, Affine a, float* w) {
  const uint32_t q = F::quad(block, i);
  for (int j = 0; j < 4; ++j) w[j] = weight<F>(a, byte_to_float(q, j));
}

// q = code − zero, where the subtraction costs less later.
template <BlockFormat F>
inline constexpr int kZeroOf = [] {
  if constexpr (HasZero<F>) return static_cast<int>(F::kZero);
  return 0;
}();
template <BlockFormat F>
QG_HD uint32_t codes_of(bytes_ptr block, int i) {
  if constexpr (HasZero<F>) return F::codes(block, i);
  return F::quad(block, i);
}

// The bits of a code as they are stored, one byte each, and q of them.
template <PackableFormat F>
QG_HD uint32_t stored_codes(bytes_ptr block, int i) {
  if constexpr (LevelFormat<F>) return F::nibbles(block, i);
  return codes_of<F>(block, i);
}
template <PackableFormat F>
QG_HD uint32_t quad_of_stored(uint32_t four) {
  if constexpr (LevelFormat<F>) return F::levels(four);
  if constexpr (HasZero<F>) return sub_bytes(four, broadcast_byte(F::kZero));
  return four;
}

// ---- the registry: visit the format of a ggml id ----
template <class... Fs>
struct FormatList {
  static constexpr int kCount = sizeof...(Fs);

  // Calls f(F{}) for the format F with this id; false if there is none in the list.
  template <class Fn>
  static bool visit(int64_t type, Fn&& f) {
    return ((type == Fs::kType && (f(Fs{}), true)) || ...);
  }
  template <class Fn>
  static void for_each(Fn&& f) {
    (f(Fs{}), ...);
  }
};

}  // namespace quantgemm
