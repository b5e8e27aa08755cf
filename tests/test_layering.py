# SPDX-License-Identifier: MIT
"""Folders are include rules: formats <- cpu, cuda <- ops <- quantgemm <- tests, examples."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# folder -> folders of csrc it may include from ("" is csrc itself: args.h)
MAY_INCLUDE = {
    "": {"", "formats"},
    "formats": {"formats"},
    "cpu": {"", "formats", "cpu"},
    "cuda": {"", "formats", "cuda"},
    "ops": {"", "formats", "cpu", "cuda", "ops"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)


def sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def folder_of(path: Path) -> str:
    parent = path.relative_to(CSRC).parent
    return "" if parent == Path() else parent.parts[0]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_point_down(path: Path) -> None:
    for kind, name in INCLUDE.findall(path.read_text()):
        if kind == '"':
            target = (path.parent / name).resolve()
            assert target.exists(), f"{name} does not exist"
            assert folder_of(target) in MAY_INCLUDE[folder_of(path)], f"{name} points up"
        elif name.startswith(("torch/", "ATen/", "c10/", "pybind11/")):
            assert folder_of(path) == "ops", f"<{name}> belongs in csrc/ops"
        elif name.startswith("cuda"):
            assert folder_of(path) in {"cuda", "ops"}, f"<{name}> belongs in csrc/cuda"


def test_ops_use_the_stable_abi_only() -> None:
    for path in (CSRC / "ops").iterdir():
        for _, name in INCLUDE.findall(path.read_text()):
            if name.startswith(("torch/", "ATen/", "c10/")):
                stable = ("torch/csrc/stable/", "torch/headeronly/")
                assert name.startswith(stable), f"{path.name}: <{name}> is not of the stable ABI"


def test_kernels_do_not_know_format_names() -> None:
    """Outside formats/ a format is a template parameter."""
    names = re.findall(
        r'kName = "(\w+)"', "".join(p.read_text() for p in (CSRC / "formats").iterdir())
    )
    assert len(names) > 30
    word = re.compile(r"\b(" + "|".join(names) + r")\b")
    for path in sources():
        if folder_of(path) != "formats":
            code = re.sub(r"//.*", "", path.read_text())
            assert not word.search(code), f"{path.name} names {word.search(code)}"


def test_only_one_header_has_device_branches() -> None:
    asking = {p.name for p in (CSRC / "formats").iterdir() if "__CUDA_ARCH__" in p.read_text()}
    assert asking == {"portable.h"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_python_imports_point_down() -> None:
    for path in (ROOT / "quantgemm").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"tests", "benchmarks", "examples"}, path
    for name in ("formats.py", "codebooks.py"):
        roots = {n.split(".")[0] for n in imports(ROOT / "quantgemm" / name)}
        assert "torch" not in roots and "quantgemm" not in roots, f"{name} is the numpy oracle"


def test_budgets() -> None:
    for path in sources():
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is too long to read"
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120
