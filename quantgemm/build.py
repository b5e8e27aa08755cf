# SPDX-License-Identifier: MIT
"""What was compiled into this installation."""

from __future__ import annotations

from dataclasses import dataclass

from quantgemm import _C


@dataclass(frozen=True)
class BuildInfo:
    """`cuda` is None in a CPU-only build; architectures are spelt as TORCH_CUDA_ARCH_LIST does."""

    compiler: str
    cuda: str | None
    cuda_architectures: tuple[str, ...]
    torch_abi: str  # the oldest torch this binary runs with


def build_info() -> BuildInfo:
    """Compiler, CUDA version and GPU architectures of the compiled module."""
    raw = _C.build_info()
    archs = tuple(raw["cuda_architectures"].replace(";", " ").split())
    return BuildInfo(raw["compiler"], raw["cuda"] or None, archs, raw["torch_abi"])
