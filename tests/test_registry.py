# SPDX-License-Identifier: MIT
"""The C++ and the Python registry say the same, and a new format really costs two edits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantgemm import _C
from quantgemm.formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_equal() -> None:
    cpp = {row["type_id"]: row for row in _C.format_table()}
    assert sorted(cpp) == sorted(FORMATS)
    for type_id, fmt in FORMATS.items():
        row = cpp[type_id]
        for field in ("name", "block_elems", "block_bytes", "group", "has_offset", "is_plain"):
            assert row[field] == getattr(fmt, field), f"{fmt.name}.{field}"


TOY_CPP = """
// | d i8 | 4 bytes of 2-bit codes, 4 neighbours in a byte | unused |
struct TOY2 {
  static constexpr int kType = 77, kElems = 16, kBytes = 6, kGroup = 16;
  static constexpr const char* kName = "TOY2";
  static constexpr bool kOffset = false;
  QG_HD static Affine affine(bytes_ptr b, int) {
    return {static_cast<float>(static_cast<int8_t>(b[0])), 0};
  }
  QG_HD static uint32_t quad(bytes_ptr b, int i) { return spread_pairs(b[1 + i]); }
};

using PlainFormats"""

TOY_PYTHON = '''

class TOY2(Format, type_id=77, elems=16, nbytes=6, group=16):
    """[d i8 1][codes 4][unused 1]"""

    def codes(self, b):
        return ((b[:, 1:5, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3).reshape(-1, 16)

    def scales(self, b):
        return b[:, :1].view(np.int8).astype(np.float32)
'''

TOY_CHECK = """
import numpy as np, torch, quantgemm
from quantgemm.formats import format_by_name
assert quantgemm.__file__.startswith({root!r}), quantgemm.__file__
toy = format_by_name("TOY2")
blocks = np.random.default_rng(0).integers(0, 256, (5, toy.row_bytes(48)), dtype=np.uint8)
want = torch.from_numpy(toy.decode(blocks))
got = torch.ops.quantgemm.dequantize(torch.from_numpy(blocks), 77)
assert got.shape == (5, 48) and torch.equal(got, want) and want.unique().numel() > 20
decode = lambda b: torch.ops.quantgemm.dequantize(b, 77)
traced = torch.compile(decode, fullgraph=True, backend="eager")
assert torch.equal(traced(torch.from_numpy(blocks)), want)
x = torch.randn(3, 48)
for algo in ("naive", "tiled"):
    for rows in (x[:1], x):
        y = torch.ops.quantgemm.gemm(rows, torch.from_numpy(blocks), 77, algo)
        assert torch.allclose(y, rows @ want.T, rtol=1e-4, atol=1e-2), algo
print("TOY2 decodes")
"""


@pytest.mark.slow
def test_a_new_format_is_two_edits(tmp_path: Path) -> None:
    """One struct with its name in the list, one Python class; ops and shape rules follow."""
    for name in ("csrc", "quantgemm", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, tmp_path / name, ignore=ignore)
        else:
            shutil.copy(source, tmp_path / name)

    header = tmp_path / "csrc/formats/gguf_formats.h"
    text = header.read_text()
    with_struct = text.replace("\nusing PlainFormats", TOY_CPP, 1)
    with_name = with_struct.replace("FormatList<Q4_0,", "FormatList<TOY2, Q4_0,", 1)
    assert text != with_struct != with_name
    header.write_text(with_name)

    module = tmp_path / "quantgemm/formats.py"
    text = module.read_text()
    marker = "\nclass Q4_0("
    assert marker in text
    module.write_text(text.replace(marker, TOY_PYTHON + marker, 1))

    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "QUANTGEMM_CUDA": "0", "PYTHONPATH": path}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    check = [sys.executable, "-X", "faulthandler", "-c", TOY_CHECK.format(root=str(tmp_path))]
    for command in (build, check):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "TOY2 decodes" in done.stdout
