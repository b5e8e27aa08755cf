# SPDX-License-Identifier: MIT
"""What formats offer for speed says the same as their two functions, for random bytes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"

PROGRAM = """
#include <cstdio>
#include <random>
#include "formats/gguf_formats.h"
using namespace quantgemm;

template <class F>
struct Table {
  uint32_t operator()(uint32_t j, uint32_t k = 0) const {
    const bool fits = (j & k) == 0 && (j | k) < uint32_t{F::kTableWords};
    return fits ? F::table_word(static_cast<int>(j | k)) : ~0u;
  }
  uint32_t copy() const { return 0; }
  uint32_t whole(uint32_t names, int j, uint32_t places, int k) const {
    const uint32_t row = byte_of(names, j), place = byte_of(places, k);
    const bool fits = (place & ~0xc2u) == 0 && byte_of(places, k ^ 1) == 0;
    return fits ? F::row_word(static_cast<int>(row), static_cast<int>(place >> 6)) : ~0u;
  }
  uint32_t entry(uint32_t names, int j, uint32_t places, int k) const {
    return (whole(names, j, places, k) >> (8 * (byte_of(places, k) & 2))) & 0xffff;
  }
};

template <class F>
concept Planar = PlanarTable<F> || PlanarStrides<F>;
template <class F>
int unit() {
  if constexpr (Planar<F>) return F::kPlanes.unit;
  return 1;
}
template <class F>
int above(int i) {  // what the planes above quad i's multiply it by
  if constexpr (Planar<F>)
    return 1 << F::kPlanes.bits * (F::kPlanes.count - 1 - i % F::kPlanes.count);
  return 1;
}

int main() {
  std::mt19937 random(1);
  BlockFormats::for_each([&]<class F>(F) {
    int checked = 0, wrong = 0;
    for (int trial = 0; trial < 500; ++trial) {
      alignas(16) uint8_t block[512];
      for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
      for (int i = 0; i < F::kElems / 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          if constexpr (PlanarTable<F>) {
            const int weight = 4 * i + j, part = F::kGroup < 32 ? F::kGroup : 32;
            const int half = weight % part / (part / 2);
            const int more = -byte_at(F::more(block, weight / part), 2 + half);
            const uint32_t code = byte_of(F::planar_codes(block, i, Table<F>{}), j);
            const int zero = F::kPlanes.unit * (F::kLeast + F::kMore * more);
            const int got = static_cast<int>(code) * above<F>(i) - zero;
            ++checked, wrong += got != F::kPlanes.unit * byte_at(F::quad(block, i), j);
          } else if constexpr (TableFormat<F>) {
            const uint32_t quad = F::quad(block, i, Table<F>{});
            ++checked, wrong += byte_at(quad, j) != byte_at(F::quad(block, i), j);
          }
          if constexpr (StridedFormat<F>) {
            const int weight = i / 8 * 32 + i % 8 + 8 * j;
            const int code = byte_at(codes_of<F>(block, weight / 4), weight % 4);
            const int got = static_cast<int8_t>(byte_at(F::strided_codes(block, i), j));
            ++checked, wrong += got * above<F>(i) != unit<F>() * code;
          }
        }
      }
    }
    if constexpr (ByteScales<F>)
      for (int trial = 0; trial < 500; ++trial) {
        alignas(16) uint8_t block[512];
        for (uint8_t& byte : block) byte = static_cast<uint8_t>(random());
        block[F::kBytes - 1] = block[1] = 0x35;  // where d's exponent lies: no NaN
        for (int g = 0; g < F::kElems / F::kGroup; ++g) {
          const uint64_t eight = F::scale_bytes(block, g / 8) >> (8 * (g % 8));
          const float scale = F::factors(block).scale * static_cast<int8_t>(eight & 0xff);
          ++checked, wrong += scale != F::affine(block, g).scale;
        }
      }
    if constexpr (MiniFloats<F>)
      for (int code = 0; code < 16; ++code) {  // sign, two bits of exponent, one more
        const int e = code >> 1 & 3, one = code & 1, twice = e == 0 ? one : (2 + one) << (e - 1);
        const int level = byte_at(F::levels(static_cast<uint32_t>(code)), 0);
        ++checked, wrong += level != (code & 8 ? -twice : twice);
      }
    if (checked > 0) std::printf("%s %d\\n", F::kName, wrong);
  });
}
"""


def test_tables_and_strided_codes(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source, program = tmp_path / "members.cpp", tmp_path / "members"
    source.write_text(PROGRAM)
    command = [compiler, "-std=c++20", "-O1", f"-I{CSRC}", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    wrong = dict(line.split() for line in lines if line)
    known = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S Q1_0 Q2_0 Q3_K IQ4_XS MXFP4 NVFP4"
    assert set(known.split()) <= set(wrong)
    assert set(wrong.values()) == {"0"}, wrong
